"""The text of a key, and that one wrong character is refused before anything is asked."""

from __future__ import annotations

import random

import pytest

from accounts.identity import keys

pytestmark = pytest.mark.unit

PEPPERS = keys.parse_peppers("2:" + "b" * 32 + ",1:" + "a" * 32)


def test_a_new_key_is_read_back() -> None:
    new = keys.generate()
    parsed = keys.parse(new.text)
    assert parsed is not None
    assert (parsed.public_id, parsed.secret) == (new.public_id, new.secret)
    assert len(new.text) == keys.KEY_LENGTH == 56
    assert new.text.startswith(f"llms_{new.public_id}_{new.secret}")


def test_keys_are_never_the_same() -> None:
    assert len({keys.generate().text for _ in range(200)}) == 200


def test_every_edit_of_one_character_is_refused() -> None:
    text = keys.generate().text
    for position in range(len(text)):
        for other in keys.ALPHABET + "_- é\n\0":
            if other != text[position]:
                assert keys.parse(text[:position] + other + text[position + 1 :]) is None
        assert keys.parse(text[:position] + text[position + 1 :]) is None
        assert keys.parse(text[:position] + "a" + text[position:]) is None


def test_noise_is_refused() -> None:
    dice = random.Random(7)
    for _ in range(2000):
        assert keys.parse("".join(chr(dice.randrange(1, 0x2FF)) for _ in range(dice.randrange(120)))) is None
    assert keys.parse(keys.generate().text + "\n") is None
    assert keys.parse("") is None


def test_the_current_pepper_hashes_and_old_ones_still_verify() -> None:
    pepper_id, digest = keys.digest("secret", PEPPERS)
    assert pepper_id == "2" and len(digest) == 64 and "secret" not in digest
    old_id, old_digest = keys.digest("secret", PEPPERS[1:])
    assert old_id == "1" and old_digest != digest
    assert keys.verify("secret", "2", digest, PEPPERS)
    assert keys.verify("secret", "1", old_digest, PEPPERS)
    assert not keys.verify("Secret", "2", digest, PEPPERS)


def test_a_pepper_that_was_removed_verifies_nothing() -> None:
    _, digest = keys.digest("secret", PEPPERS)
    assert not keys.verify("secret", "gone", digest, PEPPERS)


@pytest.mark.parametrize("text", ["", "1", "1:", ":secret", "1:secret,,"])
def test_peppers_without_id_or_secret_are_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="id:secret"):
        keys.parse_peppers(text)


def test_secrets_are_not_in_a_representation() -> None:
    new = keys.generate()
    shown = f"{new!r} {keys.parse(new.text)!r} {PEPPERS!r}"
    assert new.secret not in shown and "b" * 32 not in shown

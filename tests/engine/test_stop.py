"""Stop strings and UTF-8, over every way to split the bytes."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.engine.stop import TextAssembler

pytestmark = pytest.mark.unit


def indented(text: str, min_indent: int, stops: tuple[str, ...] = ()) -> set[tuple[str, str | None, bool]]:
    """The text, the stop word, and whether a line ended it, over every way to split it."""
    found = set()
    for pieces in every_split(text.encode()):
        assembler = TextAssembler(stops, min_indent)
        said = "".join(assembler.feed(piece) for piece in pieces) + assembler.finish()
        found.add((said, assembler.stop_word, assembler.is_outdented))
    return found


@pytest.mark.parametrize(
    ("text", "min_indent", "expected"),
    [
        ("a\n  b\n c", 2, ("a\n  b\n ", None, True)),
        ("a\n\t\tb\n  ", 2, ("a\n\t\tb\n  ", None, False)),
        ("a\n\n  b", 2, ("a\n", None, True)),
        ("ab", 4, ("ab", None, False)),
        (" a\nb", 1, (" a\n", None, True)),
        ("a\nb", 0, ("a\nb", None, False)),
    ],
)
def test_a_line_that_is_not_indented_enough_ends_the_text_before_it(
    text: str, min_indent: int, expected: tuple[str, str | None, bool]
) -> None:
    assert indented(text, min_indent) == {expected}


def test_what_comes_first_ends_the_text_a_line_or_a_stop_string() -> None:
    assert indented("a\nb.c", 1, ("c",)) == {("a\n", None, True)}
    assert indented("a.c\nb", 1, (".c",)) == {("a", ".c", False)}


def assemble(pieces: list[bytes], stops: tuple[str, ...]) -> tuple[str, str | None]:
    assembler = TextAssembler(stops)
    text = "".join(assembler.feed(piece) for piece in pieces) + assembler.finish()
    return text, assembler.stop_word


def every_split(data: bytes) -> list[list[bytes]]:
    cuts = range(1, len(data))
    return [
        [data[start:end] for start, end in zip((0, *chosen), (*chosen, len(data)), strict=True)]
        for count in range(len(data))
        for chosen in combinations(cuts, count)
    ]


def test_without_stop_strings_text_passes_at_once() -> None:
    assembler = TextAssembler()
    assert [assembler.feed(piece) for piece in (b"a", b" b", b"")] == ["a", " b", ""]
    assert assembler.stop_word is None


def test_a_stop_string_is_found_over_every_split_of_the_text() -> None:
    for pieces in every_split(b"one END two"):
        assert assemble(pieces, ("END",)) == ("one ", "END")


def test_a_multi_byte_stop_string_is_found_over_every_split() -> None:
    for pieces in every_split("aé€😀b".encode()):
        assert assemble(pieces, ("€😀",)) == ("aé", "€😀")


def test_the_stop_string_that_is_complete_first_wins_over_every_split() -> None:
    for pieces in every_split(b"abcde"):
        assert assemble(pieces, ("bcd", "c")) == ("ab", "c")


def test_of_stop_strings_complete_at_the_same_character_the_longest_wins() -> None:
    for pieces in every_split(b"abcde"):
        assert assemble(pieces, ("c", "bc", "zc")) == ("a", "bc")


def test_the_beginning_of_a_stop_string_is_held_until_it_is_none() -> None:
    assembler = TextAssembler(("STOP",))
    assert assembler.feed(b"go ST") == "go "
    assert assembler.feed(b"O") == ""
    assert assembler.feed(b"RM") == "STORM"
    assert assembler.finish() == ""


def test_held_text_comes_out_at_the_end() -> None:
    assert assemble([b"go STO"], ("STOP",)) == ("go STO", None)


def test_repeated_beginnings_hold_the_longest_overlap() -> None:
    for pieces in every_split(b"aaab!"):
        assert assemble(pieces, ("aab",)) == ("a", "aab")


def test_nothing_comes_out_after_a_stop() -> None:
    assembler = TextAssembler(("x",))
    assert assembler.feed(b"axb") == "a"
    assert assembler.feed(b"more") == ""
    assert assembler.finish() == ""


def test_an_empty_stop_string_never_matches() -> None:
    assert assemble([b"abc"], ("",)) == ("abc", None)


def test_a_character_is_held_until_its_last_byte() -> None:
    assembler = TextAssembler()
    euro = "€".encode()
    assert [assembler.feed(euro[at : at + 1]) for at in range(3)] == ["", "", "€"]


def test_an_incomplete_character_is_lost_at_the_end() -> None:
    assert assemble([b"a\xe2\x82"], ()) == ("a", None)


def test_bytes_that_are_not_utf_8_become_replacement_characters() -> None:
    assert assemble([b"a\xff\xfeb"], ()) == ("a\ufffd\ufffdb", None)


@given(
    st.text(alphabet="ab€😀 ", max_size=30),
    st.lists(st.text(alphabet="ab€😀", min_size=1, max_size=4), max_size=4),
    st.data(),
)
def test_the_split_makes_no_difference(text: str, stops: list[str], data: st.DataObject) -> None:
    raw = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    pieces = [raw[start:end] for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    got, word = assemble(pieces, tuple(stops))
    assert (got, word) == assemble([raw], tuple(stops))
    assert text.startswith(got)
    if word is None:
        assert got == text
        assert not any(stop in text for stop in stops)
    else:
        assert text.startswith(got + word)
        assert not any(stop in got for stop in stops)


@given(st.binary(max_size=40), st.data())
def test_any_bytes_give_the_text_that_one_decode_gives(raw: bytes, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    pieces = [raw[start:end] for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    got, _ = assemble(pieces, ())
    whole = raw.decode("utf-8", "replace")
    lost = whole.removeprefix(got)  # the beginning of a character, of which more bytes could have come
    assert whole == got + lost
    assert lost in ("", "\ufffd", "\ufffd" * 2, "\ufffd" * 3)


@given(st.text(alphabet="abc", max_size=20), st.text(alphabet="abc", min_size=1, max_size=4))
def test_text_that_came_out_is_never_the_beginning_of_the_stop_string_found_later(text: str, stop: str) -> None:
    assembler = TextAssembler((stop,))
    sent = ""
    for character in text:
        sent += assembler.feed(character.encode())
    assert stop not in sent
    if assembler.stop_word:
        assert text[len(sent) :].startswith(stop)

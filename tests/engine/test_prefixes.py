"""The forest of prefixes: every token is found, and few are asked about."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.engine.llama.prefixes import Prefixes

pytestmark = pytest.mark.unit

PIECES = st.lists(st.binary(max_size=12).map(lambda raw: bytes(each % 3 + 97 for each in raw)), max_size=40)


class Language:
    """Allows the beginnings of one text, and counts what it is asked."""

    def __init__(self, pieces: list[bytes], text: bytes) -> None:
        self.pieces, self.text, self.asked = pieces, text, 0

    def allows(self, token: int) -> bool:
        return self.text.startswith(self.pieces[token])

    def __call__(self, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
        self.asked += len(tokens)
        return np.array([self.allows(token) for token in tokens], np.bool_)


@given(PIECES, st.binary(max_size=14).map(lambda raw: bytes(each % 3 + 97 for each in raw)))
def test_what_is_allowed_is_found_and_nothing_else(pieces: list[bytes], text: bytes) -> None:
    ask = Language(pieces, text)
    expected = [token for token, piece in enumerate(pieces) if piece and ask.allows(token)]
    assert Prefixes(pieces, []).allowed(ask).tolist() == expected
    assert ask.asked <= len(pieces)


def test_what_begins_with_something_refused_is_not_asked_about() -> None:
    pieces = [b"a", b"b", *(b"b" + bytes([each]) for each in range(1, 200))]
    ask = Language(pieces, b"a")
    assert Prefixes(pieces, []).allowed(ask).tolist() == [0]
    assert ask.asked == 2


def test_a_long_chain_is_asked_about_in_few_rounds() -> None:
    pieces = [b" " * number for number in range(1, 60)]
    rounds: list[int] = []

    def ask(tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
        rounds.append(len(tokens))
        return np.ones(len(tokens), np.bool_)

    assert len(Prefixes(pieces, []).allowed(ask)) == 59
    assert len(rounds) == 8


def test_ends_are_asked_about_whatever_their_text_and_other_tokens_without_one_never() -> None:
    pieces = [b"", b"", b"a", b"</s>"]
    asked: set[int] = set()

    def ask(tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
        asked.update(tokens.tolist())
        return np.ones(len(tokens), np.bool_)

    assert Prefixes(pieces, [0, 3]).allowed(ask).tolist() == [0, 2, 3]
    assert asked == {0, 2, 3}

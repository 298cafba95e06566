"""A vocabulary as a forest of prefixes, so that a grammar need not be asked about every token.

A grammar that does not take the beginning of a text does not take the text: where a token is refused, so are all that
begin with it. Pure; made once per model, at load.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]
MAX_LEVELS = 8
"""Runs of spaces make long chains; what lies deeper hangs at the last level."""


class Prefixes:
    """Levels of tokens, each but the first under a token that it begins with.

    pieces: the bytes of each token's text. Tokens without a text are in no level, but for the ends of an answer, which
    are in the first.
    """

    def __init__(self, pieces: Sequence[bytes], end_tokens: Sequence[int]) -> None:
        ends = set(end_tokens)
        known: dict[bytes, int] = {}
        for token, piece in enumerate(pieces):
            if piece and token not in ends:
                known.setdefault(piece, token)
        self._num_tokens = len(pieces)
        self._parent = np.zeros(len(pieces), np.int32)
        depth = np.full(len(pieces), -1, np.int32)
        depth[list(ends)] = 0
        for piece, first in sorted(known.items()):  # a prefix comes before what begins with it
            parent = _longest_prefix(piece, known)
            if parent is None:
                depth[first] = 0
            elif depth[parent] < MAX_LEVELS - 1:
                self._parent[first], depth[first] = parent, depth[parent] + 1
            else:
                self._parent[first], depth[first] = self._parent[parent], depth[parent]
        for token, piece in enumerate(pieces):  # others of the same text stand beside the first
            if piece and token not in ends and depth[token] < 0:
                self._parent[token], depth[token] = self._parent[known[piece]], depth[known[piece]]
        self._levels = [np.flatnonzero(depth == level).astype(np.int32) for level in range(MAX_LEVELS)]

    def allowed(self, ask: Callable[[Tokens], npt.NDArray[np.bool_]]) -> Tokens:
        """The tokens, in rising order, that `ask` says yes to; asked level by level, about as few as may be."""
        verdict = np.zeros(self._num_tokens, np.bool_)
        for level, tokens in enumerate(self._levels):
            asked = tokens[verdict[self._parent[tokens]]] if level else tokens
            if not len(asked):
                break
            verdict[asked] = ask(asked)
        return np.flatnonzero(verdict).astype(np.int32)


def _longest_prefix(piece: bytes, known: dict[bytes, int]) -> int | None:
    """The token of the longest proper beginning of a text."""
    for end in range(len(piece) - 1, 0, -1):
        if (token := known.get(piece[:end])) is not None:
            return token
    return None

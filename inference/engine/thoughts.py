"""Thoughts that are bounded: after so many tokens of them the tag that ends them comes next, whatever the model wants.

Pure, on the engine's thread. What is due follows from the tokens before alone: drafts and company change nothing.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable

from inference.engine.types import ThoughtBound


class ThoughtGuard:
    """Of one sequence. Tags are looked for in the text of the tokens, since they have many spellings in tokens."""

    def __init__(self, bound: ThoughtBound, piece: Callable[[int], bytes]) -> None:
        """piece: the text of a token, as the answer shows it."""
        self._start, self._end = bound.start.encode(), bound.end.encode()
        self._end_tokens = bound.end_tokens
        self._piece = piece
        self._is_open = bound.is_open
        self._num_left = bound.num_tokens
        self._num_forced = 0
        self._text = b""  # its end, as far as it may matter
        self.is_over = False
        """No token will be due any more: the thoughts have ended, or there are none."""

    def is_near(self, num_tokens: int) -> bool:
        """Whether a token may be due among so many next ones."""
        return not self.is_over and self._num_left < num_tokens

    def due(self) -> int | None:
        """The token that comes next. None: the model chooses."""
        if self.is_over or not self._is_open or self._num_left > 0:
            return None
        if self._num_forced == 0 and _is_cut(self._text):
            return None
        return self._end_tokens[self._num_forced]

    def take(self, token: int) -> None:
        """It was chosen, due or not: a grammar may have had other words."""
        if self.is_over:
            return
        if token == self.due():
            self._num_forced += 1
            self.is_over = self._num_forced == len(self._end_tokens)
        else:
            self._num_forced = 0
        self._num_left -= self._is_open and self._num_left > 0
        self._text += self._piece(token)
        if not self._is_open:
            self._look_for_start()
        if self._is_open:
            self.is_over |= self._end in self._text
            self._text = self._text[-max(len(self._end) - 1, 3) :]

    def _look_for_start(self) -> None:
        """Thoughts begin an answer, or there are none: the tag further on is text."""
        text = self._text.lstrip()
        if text.startswith(self._start):
            self._is_open, self._text = True, text[len(self._start) :]
        elif not self._start.startswith(text):
            self.is_over = True


def _is_cut(text: bytes) -> bool:
    """Whether the text leaves off within a character."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(text)
    return bool(decoder.getstate()[0])

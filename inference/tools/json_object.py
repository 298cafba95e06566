"""One JSON object followed while its text comes in: strictly, so that what is taken so far can still become JSON.

Characters are looked at once, however the text is cut. Pure; on the clock of whoever reads an answer.
"""

from __future__ import annotations

import json
import re

MAX_DEPTH = 64
MAX_SCALAR = 512
"""Characters of a number."""
_BLANKS = " \t\n\r"
_IN_STRING = re.compile(r'[^"\\\x00-\x1f]*')
_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_BEGUN_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?")
_RUN = re.compile(r"[-+.0-9A-Za-z]*")
_SCALAR = re.compile(r"true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_CLOSING = {"{": "}", "[": "]"}


class Broken(Exception):
    """The text is not, and cannot become, what was begun."""


class JsonObject:
    """Follows the object whose "{" stands at `start` of a text that grows.

    position: up to here everything was taken. fields: where the values of its own names begin and end. name: whose
    value stands open, value_start: where that one began.
    """

    def __init__(self, start: int) -> None:
        self.position = start
        self.is_done = False
        self.fields: dict[str, tuple[int, int]] = {}
        self.name: str | None = None
        self.value_start = 0
        self._open: list[str] = []
        self._expected = "object"
        self._string_start = 0
        self._is_key = False

    def advance(self, text: str) -> bool:
        """Go as far as the text does; whether the object is complete. Raises Broken."""
        while self.position < len(text) and not self.is_done:
            before = self.position, self._expected
            if self._expected == "string":
                self._go_on_in_string(text)
            elif text[self.position] in _BLANKS:
                self.position += 1
            else:
                self._take(text, text[self.position])
            if before == (self.position, self._expected):
                break  # the rest decides what this is
        return self.is_done

    def _take(self, text: str, character: str) -> None:
        expected = self._expected
        if expected == "colon" and character == ":":
            self._expected = "value"
            self.position += 1
        elif expected == "comma" and character == ",":
            self._expected = "key" if self._open[-1] == "{" else "value"
            self.position += 1
        elif self._open and expected in ("comma", "first key", "first item") and character == _CLOSING[self._open[-1]]:
            self._close()
        elif expected in ("key", "first key") and character == '"':
            self._begin_string(is_key=True)
        elif expected in ("value", "first item", "object"):
            self._begin_value(text, character)
        else:
            raise Broken

    def _begin_value(self, text: str, character: str) -> None:
        if self._expected == "object" and character != "{":
            raise Broken
        if len(self._open) == 1 and self._open[0] == "{":
            self.value_start = self.position
        if character in _CLOSING:
            if len(self._open) >= MAX_DEPTH:
                raise Broken
            self._open.append(character)
            self._expected = "first key" if character == "{" else "first item"
            self.position += 1
        elif character == '"':
            self._begin_string(is_key=False)
        else:
            self._scalar(text)

    def _scalar(self, text: str) -> None:
        match = _RUN.match(text, self.position)
        assert match is not None
        if match.end() - self.position > MAX_SCALAR:
            raise Broken
        if match.end() == len(text) and match[0]:
            return
        if not _SCALAR.fullmatch(match[0]):
            raise Broken
        self.position = match.end()
        self._end_value()

    def _begin_string(self, *, is_key: bool) -> None:
        self._string_start, self._is_key, self._expected = self.position, is_key, "string"
        self.position += 1

    def _go_on_in_string(self, text: str) -> None:
        match = _IN_STRING.match(text, self.position)
        assert match is not None
        self.position = match.end()
        if self.position == len(text):
            return
        if text[self.position] == '"':
            self.position += 1
            self._end_string(text)
        elif escape := _ESCAPE.match(text, self.position):
            self.position = escape.end()
        elif not _BEGUN_ESCAPE.fullmatch(text, self.position):
            raise Broken

    def _end_string(self, text: str) -> None:
        if not self._is_key:
            self._end_value()
            return
        self._expected = "colon"
        if len(self._open) == 1:
            self.name = json.loads(text[self._string_start : self.position])
            if self.name in self.fields:
                raise Broken
            self.value_start = len(text)

    def _end_value(self) -> None:
        self._expected = "comma"
        if len(self._open) == 1 and self.name is not None:
            self.fields[self.name] = self.value_start, self.position
            self.name = None

    def _close(self) -> None:
        self._open.pop()
        self.position += 1
        self.is_done = not self._open
        if not self.is_done:
            self._end_value()

"""From the bytes of tokens to text that is final: whole characters, and no prefix of a stop string.

Pure text work on the step's clock; it has never heard of tokens, a model or a request.
Called by the sequence once per committed token.
"""

from __future__ import annotations

import codecs


class TextAssembler:
    """Turns the bytes of one sequence into text, holding back what may still change.

    Held back are the bytes of an incomplete UTF-8 character and the longest end of the text that begins a stop
    string. How the bytes are split between calls makes no difference to the text or to the stop word: of all stop
    strings the one that is complete first wins, and the longest of those that are complete at the same character.
    Bytes that are not UTF-8 become U+FFFD.

    min_indent: the text also ends, before it, at what stands in a line behind the first after fewer blanks or tabs
    than that; an empty line does, too. llama.cpp's n_indent, but that every line is looked at.
    """

    def __init__(self, stops: tuple[str, ...] = (), min_indent: int = 0) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._min_indent = min_indent
        self._missing_indent = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stop_word: str | None = None
        self.is_outdented = False

    def feed(self, piece: bytes) -> str:
        """Add a token's bytes and return the text that has become final, "" if none. Ignored after a stop."""
        if self.stop_word is not None or self.is_outdented:
            return ""
        return self._indented(self._until_stop(self._held + self._decoder.decode(piece)))

    def finish(self) -> str:
        """End: return the held text, which is no stop string after all. An incomplete character is lost."""
        text, self._held = self._held, ""
        self._decoder.reset()
        return "" if self.is_outdented else self._indented(text)

    def _until_stop(self, text: str) -> str:
        if not self._stops:
            return text
        if match := self._first_match(text):
            start, self.stop_word = match
            self._held = ""
            return text[:start]
        return self._hold(text)

    def _indented(self, text: str) -> str:
        """The text up to the first line that is not indented enough."""
        if not self._min_indent:
            return text
        for place, character in enumerate(text):
            if self._missing_indent and character in " \t":
                self._missing_indent -= 1
            elif self._missing_indent:
                self.is_outdented, self.stop_word = True, None
                return text[:place]
            elif character == "\n":
                self._missing_indent = self._min_indent
        return text

    def _first_match(self, text: str) -> tuple[int, str] | None:
        """Where the first complete stop string starts, and which it is."""
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if not found:
            return None
        _, start, stop = min(found)
        return start, stop

    def _hold(self, text: str) -> str:
        """Keep the longest end of text that begins a stop string; return the rest."""
        length = max(_overlap(text, stop) for stop in self._stops)
        final = len(text) - length
        self._held = text[final:]
        return text[:final]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of text that is a beginning of stop, but not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)

"""An answer read while it comes: text goes on, calls of tools come out, and what may still become a call waits.

Fed by single characters it finds what it finds in the whole text. Pure; one ToolCallStream for each choice of an
answer, on the clock of whoever follows it.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Callable, Collection, Sequence

from inference.tools.events import Call, Content, Event, collect
from inference.tools.formats import JSON, ToolCallFormat
from inference.tools.json_object import Broken
from inference.tools.tape import Calls, Reading, Tape

THINK, END_OF_THINKING = "<think>", "</think>"
MAX_BROKEN = 64
"""So many beginnings of calls may turn out to be none; then the rest is text. Each may be long, and is read again."""
_BLANKS = re.compile(r"\s*")


def new_call_id(rng: random.Random, *, is_short: bool = False) -> str:
    """`call_` and eight hexadecimal digits; is_short: nine letters and digits, the only ids that Mistral's templates
    take back."""
    if is_short:
        return "".join(rng.choices(string.ascii_letters + string.digits, k=9))
    return f"call_{rng.getrandbits(32):08x}"


class ToolCallStream:
    """Feed it the pieces of an answer's text, then finish it.

    formats: tried in turn where a call may begin; none reads no calls. names: of the tools, which calls without a
    marker must name. eager: tell a call while it is written, which may turn out to be none (CallBroken); else only
    whole ones are told. is_thinking: the prompt has opened a <think> block: what comes before </think> holds no calls.
    """

    def __init__(
        self,
        formats: Sequence[ToolCallFormat],
        *,
        rng: random.Random,
        names: Collection[str] | None = None,
        eager: bool = False,
        is_thinking: bool = False,
    ) -> None:
        is_short = bool(formats) and formats[0].has_short_ids
        self._calls = Calls(lambda: new_call_id(rng, is_short=is_short), eager=eager, names=names)
        self._readers = {each.marker: each.read for each in reversed(formats) if each.marker}
        self._bare = JSON.read if JSON in formats else None
        self._markers = re.compile("|".join(map(re.escape, self._readers)) or r"(?!)")
        self._beginnings = (THINK, *self._readers) if formats else ()
        self._text = ""
        self._tape: Tape | None = None
        self._reading: Reading | None = None
        self._is_thinking = is_thinking and bool(formats)
        self._is_at_start = bool(formats)
        self._is_ended = False
        self._num_broken = 0
        self._marker_length = 0
        self._blanks = ""
        self._has_content = False

    @property
    def num_calls(self) -> int:
        """Whole calls so far."""
        return self._calls.num_ended

    def feed(self, text: str) -> list[Event]:
        """What has become certain with this piece."""
        if self._tape is None:
            self._text += text
        else:
            self._tape.text += text
        return self._go_on()

    def finish(self) -> list[Event]:
        """The answer has ended, or was cut: what was waiting. Call it once."""
        self._is_ended = True
        if self._tape is not None:
            self._tape.is_ended = True
        events = self._go_on()
        if not self._calls.num_ended and self._blanks:
            events.append(Content(self._blanks))
        return events

    def _go_on(self) -> list[Event]:
        while self._read() if self._tape is not None else self._scan():
            pass
        events, self._calls.events = _merged(self._calls.events), []
        return events

    # Text: each step says whether to go on

    def _scan(self) -> bool:
        if self._is_thinking:
            return self._think()
        if self._is_at_start:
            blanks = _BLANKS.match(self._text)
            assert blanks is not None
            self._say(blanks.end())
            if not self._text or (self._may_begin() and not self._is_ended):
                return False
            if self._text.startswith(THINK):
                self._is_thinking = True
                return True
            if self._bare and self._text[0] in "{[" and not self._markers.match(self._text):
                return self._begin(self._bare, 0)
        if match := self._markers.search(self._text):
            self._say(match.start())
            return self._begin(self._readers[match[0]], len(match[0]))
        self._say(len(self._text) - self._num_held())
        return False

    def _think(self) -> bool:
        end = self._text.find(END_OF_THINKING)
        if end >= 0:
            self._say(end + len(END_OF_THINKING))
            self._is_thinking, self._is_at_start = False, True
            return True
        held = 0 if self._is_ended else _overlap(self._text, END_OF_THINKING)
        self._say(len(self._text) - held)
        return False

    def _may_begin(self) -> bool:
        """Whether all that is there is the beginning of a marker."""
        return any(each != self._text and each.startswith(self._text) for each in self._beginnings)

    def _num_held(self) -> int:
        if self._is_ended:
            return 0
        return max((_overlap(self._text, marker) for marker in self._readers), default=0)

    def _say(self, length: int) -> None:
        """So much of the text is content. Blanks wait: around calls they are left out at the beginning and the end."""
        text, self._text = self._text[:length], self._text[length:]
        end = len(text.rstrip())
        if end:
            self._is_at_start = False
            if self._has_content or not self._calls.num_ended:
                text, end = self._blanks + text, end + len(self._blanks)
            else:
                text = text.lstrip()
                end = len(text.rstrip())
            self._blanks = text[end:]
            self._has_content = True
            self._calls.events.append(Content(text[:end]))
        else:
            self._blanks += text

    # Calls

    def _begin(self, read: Callable[[Tape], Reading], length: int) -> bool:
        self._tape = Tape(self._calls, self._text, length, is_ended=self._is_ended)
        self._marker_length = max(length, 1)
        self._reading = read(self._tape)
        self._text = ""
        return True

    def _read(self) -> bool:
        assert self._tape is not None
        assert self._reading is not None
        try:
            for _ in self._reading:
                return False
        except Broken:
            self._calls.drop()
        tape, self._tape, self._reading = self._tape, None, None
        self._text = tape.text
        if tape.committed:
            self._text = tape.text[tape.committed :]
        else:
            self._say(self._marker_length)  # what looked like the beginning of a call is text
            self._num_broken += 1
            if self._num_broken >= MAX_BROKEN:
                self._read_no_more()
        return True

    def _read_no_more(self) -> None:
        self._markers, self._beginnings, self._readers, self._bare = re.compile(r"(?!)"), (), {}, None


def parse(
    text: str,
    formats: Sequence[ToolCallFormat],
    *,
    rng: random.Random,
    names: Collection[str] | None = None,
    is_thinking: bool = False,
) -> tuple[str, tuple[Call, ...]]:
    """A whole answer: its text without the calls, and the calls. Nothing in it raises."""
    stream = ToolCallStream(formats, rng=rng, names=names, is_thinking=is_thinking)
    return collect([*stream.feed(text), *stream.finish()])


def _overlap(text: str, marker: str) -> int:
    """The length of the longest end of text that begins the marker, and is not all of it."""
    longest = min(len(text), len(marker) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(marker[:length])), 0)


def _merged(events: Sequence[Event]) -> list[Event]:
    """Neighbouring texts as one."""
    merged: list[Event] = []
    for event in events:
        last = merged[-1] if merged else None
        if isinstance(event, Content) and isinstance(last, Content):
            merged[-1] = Content(last.text + event.text)
        else:
            merged.append(event)
    return merged

"""What the supervisor prints: its own lines and its children's, each with the name of who speaks.

Standard library only. Output that nobody reads any more is dropped, never a reason to stop serving.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from typing import TextIO

COLOURS = {"web": "36", "worker": "32", "beat": "35", "valkey": "33", "setup": "34"}
NAME_WIDTH = max(map(len, COLOURS))
LONGEST_LINE_BYTES = 32 * 1024


@dataclass
class Console:
    """Writes whole lines. `is_coloured` is for terminals."""

    out: TextIO = field(default_factory=lambda: sys.stdout)
    is_coloured: bool = False
    is_gone: bool = False
    as_json: bool = False
    """One object a line: {"process", "line"}. A child's line of JSON is that object in the place of a text."""

    @classmethod
    def of_this_process(cls, *, as_json: bool = False) -> Console:
        is_coloured = sys.stdout.isatty() and not as_json and not os.environ.get("NO_COLOR")
        return cls(is_coloured=is_coloured, as_json=as_json)

    def say(self, text: str = "") -> None:
        """A line of the supervisor itself."""
        self._write(_as_json("up", text) if self.as_json else text)

    def relay(self, name: str, line: str) -> None:
        """A line of a child."""
        if self.as_json:
            self._write(_as_json(name, line))
            return
        label = f"{name:<{NAME_WIDTH}} |"
        if self.is_coloured:
            label = f"\x1b[{COLOURS.get(name, '37')}m{label}\x1b[0m"
        self._write(f"{label} {line}")

    def _write(self, text: str) -> None:
        if self.is_gone:
            return
        try:
            try:
                self.out.write(text + "\n")
            except UnicodeEncodeError:  # a terminal of few letters
                self.out.write(text.encode("ascii", "backslashreplace").decode() + "\n")
            self.out.flush()
        except OSError:  # the reader of a pipe has gone: go on serving, silently
            self.is_gone = True


def _as_json(process: str, line: str) -> str:
    try:
        said = json.loads(line)
    except ValueError:
        said = line
    return json.dumps({"process": process, "line": said if isinstance(said, dict) else line}, ensure_ascii=False)


class Lines:
    """Cuts a stream of bytes into lines of bounded length."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[str]:
        """The lines that are complete now."""
        *whole, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > LONGEST_LINE_BYTES:
            whole, self._rest = [*whole, self._rest], b""
        return [line.decode("utf-8", "replace").rstrip("\r") for line in whole]

    def end(self) -> list[str]:
        rest, self._rest = self._rest, b""
        return [rest.decode("utf-8", "replace")] if rest else []

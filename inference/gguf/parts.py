"""A model in several files, as llama.cpp's gguf-split writes them: which files belong together.

Their names say it, X-00001-of-00003.gguf and so on, and llama.cpp finds the others by them. The first one stands for
the model: the registry keeps its path. Pure but for `size_of`; inference/gguf/header.py reads what is in them.
"""

from __future__ import annotations

import re
from pathlib import Path

MAX_PARTS = 512
_NAME = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL)


def place_among(name: str) -> tuple[str, int, int] | None:
    """(stem, number from 1, how many) of the name of a part; None for other files."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    number, count = int(found["number"]), int(found["count"])
    return (found["stem"], number, count) if 1 <= number <= count and 2 <= count <= MAX_PARTS else None


def name_of(stem: str, number: int, count: int) -> str:
    return f"{stem}-{number:05d}-of-{count:05d}.gguf"


def parts_of(path: Path) -> tuple[Path, ...]:
    """All files of the model whose first file is at `path`, in order; other files stand for themselves."""
    place = place_among(path.name)
    if place is None or place[1] != 1:
        return (path,)
    stem, _, count = place
    return tuple(path.with_name(name_of(stem, number, count)) for number in range(1, count + 1))


def size_of(path: Path) -> int:
    """Bytes of all its files. Raises OSError."""
    return sum(part.stat().st_size for part in parts_of(path))

"""How far a long command is: a bar on a terminal, a line for each step elsewhere."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Watch = Callable[[str, float, int, int], None]
"""Called with what is done now, its part from 0.0 to 1.0, steps done, and steps in all."""


@contextmanager
def following(console: Console, *, hidden: bool) -> Iterator[Watch]:
    """Steps done with the part of the one that runs; silent where only a result is wanted."""
    if hidden:
        yield lambda what, part, done, total: None
    elif console.is_terminal:
        with _bar(console) as watch:
            yield watch
    else:
        yield _Lines(console).watch


@contextmanager
def _bar(console: Console) -> Iterator[Watch]:
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task: TaskID = bar.add_task("", total=None)

        def watch(what: str, part: float, done: int, total: int) -> None:
            shown = f"step {done + 1} of {total}: {what}" + (f", {part:.0%}" if part else "")
            bar.update(task, completed=done + part, total=total, description=shown)

        yield watch


class _Lines:
    """A line when a step begins."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._begun = time.monotonic()
        self._told = ""

    def watch(self, what: str, part: float, done: int, total: int) -> None:
        if what != self._told:
            self._told = what
            elapsed = time.monotonic() - self._begun
            self._console.print(f"step {done + 1} of {total}: {what}, {elapsed:.0f} s so far", markup=False)


@contextmanager
def interruptible() -> Iterator[None]:
    """A request to end is Ctrl-C: the file that is being written goes away too."""

    def stop(_signal: int, _frame: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

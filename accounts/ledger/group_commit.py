"""Many threads, one transaction: whoever comes first commits for everybody who came meanwhile. Knows no database.

Called by quotas.py from the threads of admission and settlement. With one caller the cost is two lock operations; with
many, the work in flight is one commit and the number of commits falls as the load grows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

Work = TypeVar("Work")
Result = TypeVar("Result")


class _Entry(Generic[Work, Result]):
    """One caller's work, and the gate that it waits at: opened when that is done, or to lead."""

    __slots__ = ("error", "gate", "is_done", "result", "work")

    def __init__(self, work: Work) -> None:
        self.work = work
        self.gate = threading.Lock()
        self.gate.acquire()
        self.is_done = False
        self.result: Result
        self.error: BaseException | None = None


class GroupCommit(Generic[Work, Result]):
    """`commit` gets the pending work in order of arrival and returns as many results; an exception in place of a result
    is raised in the caller whose work it answers. What `commit` raises itself is raised in every caller of the group.

    Leadership is handed on after one group, so that no caller works longer for others than for one commit.
    """

    def __init__(self, commit: Callable[[Sequence[Work]], Sequence[Result | Exception]], max_group: int = 256) -> None:
        self._commit = commit
        self._max_group = max_group
        self._mutex = threading.Lock()
        self._pending: list[_Entry[Work, Result]] = []
        self._has_leader = False

    def submit(self, work: Work) -> Result:
        """Blocks until the work is committed."""
        entry: _Entry[Work, Result] = _Entry(work)
        with self._mutex:
            self._pending.append(entry)
            leads, self._has_leader = not self._has_leader, True
        if not leads:
            entry.gate.acquire()
        if not entry.is_done:
            self._lead()
        if entry.error is not None:
            raise entry.error
        return entry.result

    def _lead(self) -> None:
        """Commits one group, which holds the caller's own entry: the leader is always the oldest that is pending."""
        with self._mutex:
            group = self._pending[: self._max_group]
            del self._pending[: self._max_group]
        try:
            self._answer(group)
        finally:
            with self._mutex:
                successor = self._pending[0] if self._pending else None
                self._has_leader = successor is not None
            for entry in group:
                entry.is_done = True
                entry.gate.release()
            if successor is not None:
                successor.gate.release()

    def _answer(self, group: list[_Entry[Work, Result]]) -> None:
        try:
            results = self._commit([entry.work for entry in group])
            for entry, result in zip(group, results, strict=True):
                if isinstance(result, Exception):
                    entry.error = result
                else:
                    entry.result = result
        except BaseException as error:  # noqa: BLE001 - not swallowed: it crosses to the threads that wait, and is raised there
            for entry in group:
                entry.error = error

"""Many callers, few commits, and each gets its own answer."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from accounts.ledger.group_commit import GroupCommit
from tests.timing import PATIENCE_SECONDS

pytestmark = pytest.mark.unit


class Book:
    """Remembers the groups; answers with twice the number; can be held back to let a group gather."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.running = 0

    def commit(self, works: Sequence[int]) -> list[int | Exception]:
        self.running += 1
        assert self.running == 1, "two leaders at once"
        self.may_go_on.wait(PATIENCE_SECONDS)
        self.groups.append(list(works))
        self.running -= 1
        return [ValueError(str(work)) if work < 0 else 2 * work for work in works]


def test_one_caller_gets_its_answer() -> None:
    book = Book()
    group: GroupCommit[int, int] = GroupCommit(book.commit)
    assert [group.submit(3), group.submit(4)] == [6, 8]
    assert book.groups == [[3], [4]]


def test_work_that_arrives_during_a_commit_is_the_next_group() -> None:
    book = Book()
    book.may_go_on.clear()
    group: GroupCommit[int, int] = GroupCommit(book.commit)
    with ThreadPoolExecutor(33) as pool:
        first = pool.submit(group.submit, 100)
        while book.running == 0:
            pass
        others = [pool.submit(group.submit, number) for number in range(32)]
        while len(group._pending) < 32:
            pass
        book.may_go_on.set()
        assert first.result(PATIENCE_SECONDS) == 200
        assert [each.result(PATIENCE_SECONDS) for each in others] == [2 * number for number in range(32)]
    assert [len(each) for each in book.groups] == [1, 32]


def test_a_group_has_a_largest_size_and_leadership_is_handed_on() -> None:
    book = Book()
    book.may_go_on.clear()
    group: GroupCommit[int, int] = GroupCommit(book.commit, max_group=4)
    with ThreadPoolExecutor(11) as pool:
        results = [pool.submit(group.submit, number) for number in range(11)]
        while len(group._pending) < 10:
            pass
        book.may_go_on.set()
        assert [each.result(PATIENCE_SECONDS) for each in results] == [2 * number for number in range(11)]
    assert max(len(each) for each in book.groups) == 4
    assert sorted(work for each in book.groups for work in each) == list(range(11))


def test_one_bad_order_fails_alone() -> None:
    group: GroupCommit[int, int] = GroupCommit(Book().commit)
    with pytest.raises(ValueError, match="-1"):
        group.submit(-1)
    assert group.submit(1) == 2


def test_a_failed_commit_fails_its_group_and_the_next_one_goes_on() -> None:
    calls = []

    def commit(works: Sequence[int]) -> list[int]:
        calls.append(works)
        if len(calls) == 1:
            raise RuntimeError("no database")
        return list(works)

    group: GroupCommit[int, int] = GroupCommit(commit)
    with pytest.raises(RuntimeError, match="no database"):
        group.submit(1)
    assert group.submit(2) == 2


def test_many_threads_lose_nothing() -> None:
    book = Book()
    group: GroupCommit[int, int] = GroupCommit(book.commit, max_group=16)
    with ThreadPoolExecutor(64) as pool:
        assert list(pool.map(group.submit, range(3000))) == [2 * number for number in range(3000)]
    assert sorted(work for each in book.groups for work in each) == list(range(3000))

"""Requests that name a slot of theirs: they wait for it alone, and neither disturb nor learn of anyone else."""

from __future__ import annotations

from typing import Any

import pytest

from inference.engine import Decoding, EngineError, FakeBackend, Started
from inference.engine.plan import Candidate, ScheduleView, Seat
from inference.engine.seating import seat

from .cast import HandClock
from .test_engine import Bench

pytestmark = pytest.mark.unit

ALICE: dict[str, Any] = {"cache_scope": "alice"}
BOB: dict[str, Any] = {"cache_scope": "bob"}
ENDLESS = 10**6


def bench_of(n_slots: int = 2) -> Bench:
    clock = HandClock()
    return Bench(clock, FakeBackend(n_slots, 512, sleep=clock.sleep))


def pin(number: int) -> dict[str, Any]:
    return {"decoding": Decoding(slot_id=number)}


def words(start: int, number: int = 40) -> tuple[int, ...]:
    return tuple(range(start, start + number))


def started(bench: Bench) -> dict[str, int]:
    """The slot of each request that has begun, as its tenant numbers them."""
    return {event.request_id: event.slot_id for event in bench.events if isinstance(event, Started)}


def physical(bench: Bench, request_id: str) -> int:
    slot_id = bench.engine._running[request_id].slot_id
    assert slot_id is not None
    return slot_id


# The policy, with integers


def seated(*candidates: Candidate, free: set[int], **fields: Any) -> tuple[Seat, ...]:
    return seat(ScheduleView(waiting=candidates, free_slots=frozenset(free), **{"num_slots": 4, **fields}))[0]


def numbers(seats: tuple[Seat, ...]) -> list[tuple[str, int, int]]:
    return [(each.request_id, each.slot_id, each.number) for each in seats]


def named(request_id: str, number: int | None, scope: str = "alice", **fields: Any) -> Candidate:
    return Candidate(request_id, 10, scope=scope, number=number, **fields)


def test_a_slot_of_this_number_is_taken_whatever_it_holds_and_whatever_others_hold() -> None:
    names = {2: ("alice", 1), 3: ("alice", 0)}
    asked = named("r", 1, prefixes={3: 9, 2: 1})
    assert seated(asked, free={0, 1, 2, 3}, held={2: 400, 3: 9}, names=names) == (Seat("r", 2, 1),)


def test_while_it_is_busy_others_pass_by() -> None:
    names = {2: ("alice", 1)}
    assert numbers(seated(named("r", 1), named("s", None), free={0}, names=names)) == [("s", 0, 0)]


def test_a_number_that_the_scope_has_not_is_given_to_a_slot_that_is_not_its_own() -> None:
    names = {0: ("alice", 0), 1: ("bob", 1)}
    view = {"held": {0: 40, 1: 40}, "used": {0: 1, 1: 9}, "names": names}
    assert numbers(seated(named("r", 1, prefixes={0: 9}), free={0, 1}, **view)) == [("r", 1, 1)]


def test_of_its_own_slots_one_is_lost_rather_than_waiting_for_others() -> None:
    names = {0: ("alice", 0), 1: ("bob", 0)}
    assert numbers(seated(named("r", 3), free={0}, held={0: 40}, names=names)) == [("r", 0, 3)]


def test_two_that_name_the_same_new_slot_are_seated_one_after_the_other() -> None:
    assert numbers(seated(named("r", 1), named("s", 1), named("t", 0), free={0, 1, 2})) == [("r", 0, 1), ("t", 1, 0)]


def test_bobs_slot_of_the_same_number_is_another() -> None:
    assert numbers(seated(named("r", 1), named("s", 1, "bob"), free={0, 1})) == [("r", 0, 1), ("s", 1, 1)]


def test_without_a_wish_slots_are_numbered_as_the_scope_comes_to_use_them() -> None:
    names = {0: ("bob", 0), 1: ("alice", 0)}
    assert numbers(seated(named("r", None), named("s", None), free={2, 3}, names=names)) == [("r", 2, 1), ("s", 3, 2)]


# In the engine


def test_a_request_goes_where_it_says_and_the_next_finds_its_tokens_there() -> None:
    bench = bench_of()
    bench.add("one", prompt=words(0), **ALICE, **pin(1))
    bench.run()
    bench.add("two", prompt=words(0), **ALICE, **pin(1))
    assert bench.run()["two"].receipt.cached_tokens == 39
    assert started(bench) == {"one": 1, "two": 1}
    assert bench.finished["two"].receipt.slot_id == 1


def test_a_busy_slot_is_waited_for_while_others_pass_by() -> None:
    bench = bench_of()
    bench.add("long", prompt=words(0), max_tokens=100, **ALICE, **pin(1))
    bench.step()
    bench.add("waits", prompt=words(100), **ALICE, **pin(1))
    bench.add("passes", prompt=words(200), **ALICE)
    bench.step()
    assert set(started(bench)) == {"long", "passes"}
    assert bench.engine.stats().num_held_back == 1
    bench.run()
    assert started(bench)["waits"] == 1
    assert list(bench.finished) == ["passes", "long", "waits"]
    assert bench.engine.stats().num_held_back == 0


def test_bob_is_not_held_up_by_alices_slot_of_the_same_number() -> None:
    bench = bench_of()
    bench.add("alice", prompt=words(0), max_tokens=100, **ALICE, **pin(1))
    bench.step()
    bench.add("bob", prompt=words(0), **BOB, **pin(1))
    bench.step()
    assert started(bench) == {"alice": 1, "bob": 1}
    assert physical(bench, "alice") != physical(bench, "bob")


def test_what_bob_sees_is_the_same_whatever_alice_does() -> None:
    """Numbers, waiting and reuse of Bob's requests, on an idle engine and beside Alice's."""

    def bobs(alice: int) -> list[tuple[int, int, int]]:
        bench = bench_of(4)
        for number in range(alice):
            bench.add(f"alice {number}", prompt=words(0), max_tokens=10**6, **ALICE, **pin(number))
            bench.step()
        seen = []
        for number, fields in enumerate([pin(3), {}, pin(0), pin(3)]):
            bench.add(f"bob {number}", prompt=words(0), **BOB, **fields)
            steps = 0
            while f"bob {number}" not in bench.finished:
                bench.step()
                steps += 1
            receipt = bench.finished[f"bob {number}"].receipt
            assert receipt.slot_id is not None
            seen.append((receipt.slot_id, receipt.cached_tokens, steps))
        return seen

    alone = bobs(0)
    assert alone[:2] == [(3, 0, 4), (3, 39, 4)]
    assert bobs(1) == alone
    assert bobs(2) == alone


def test_a_number_beyond_the_slots_is_refused() -> None:
    bench = bench_of()
    with pytest.raises(EngineError, match="no slot 2"):
        bench.add(**pin(2))
    with pytest.raises(EngineError, match="no slot -1"):
        bench.add(**pin(-1))


def test_many_that_wait_for_one_slot_keep_nobody_from_the_others() -> None:
    bench = bench_of(3)
    for number in range(12):
        bench.add(f"alice {number}", prompt=words(100 * number), max_tokens=30, **ALICE, **pin(0))
    bench.step()
    bench.step()
    stats = bench.engine.stats()
    assert (stats.busy_slots, stats.num_held_back) == (3, 3)
    assert {bench.engine._running[name].slot_number for name in ("alice 0", "alice 4", "alice 5")} == {0, 1, 2}
    bench.add("bob", prompt=words(0), max_tokens=1, **BOB)
    bench.run()
    assert len(bench.finished) == 13


def test_a_cancelled_request_does_not_wait_for_its_slot_any_more() -> None:
    bench = bench_of()
    bench.add("long", prompt=words(0), max_tokens=100, **ALICE, **pin(1))
    bench.step()
    bench.add("waits", prompt=words(100), **ALICE, **pin(1))
    bench.engine.cancel("waits")
    bench.step()
    assert bench.engine.stats().num_held_back == 0

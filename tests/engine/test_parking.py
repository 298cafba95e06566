"""Sequences that make room for others: what they answer is what they would have answered, and nobody is forgotten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from inference.engine import FakeBackend, FinishReason, Parked, Resumed, SamplingParams, Started
from inference.engine.backend import Abilities
from inference.engine.engine import MAX_PARKED_SECONDS
from inference.engine.slot_keeper import SlotState
from inference.engine.types import Decoding

from .cast import HandClock, assert_well_formed
from .test_engine import Bench

pytestmark = pytest.mark.unit

ROOM = 1 << 20
SEEDED = SamplingParams(temperature=1.0, seed=7)


def bench_of(clock: HandClock, n_slots: int = 1, *, room: int = ROOM, **options: Any) -> Bench:
    backend = FakeBackend(n_slots, 256, 0.01, sleep=clock.sleep, supports_adapters=True, **options)
    return Bench(clock, backend, state_bytes=room)


def long_one(bench: Bench, request_id: str = "long", **fields: Any) -> None:
    bench.add(request_id, **{"max_tokens": 40, "prompt": (5, 6, 7), "cache_scope": "alice", **fields})


def short_one(bench: Bench, request_id: str = "short", **fields: Any) -> None:
    bench.add(request_id, **{"max_tokens": 4, "prompt": (8, 9), "cache_scope": "bob", **fields})


def kinds(bench: Bench, kind: type) -> list[str]:
    return [event.request_id for event in bench.events if isinstance(event, kind)]


def alone(clock: HandClock, **fields: Any) -> str:
    bench = bench_of(clock)
    long_one(bench, **fields)
    bench.run()
    return bench.text("long")


@pytest.mark.parametrize("fields", [{}, {"sampling": SEEDED}], ids=["greedy", "seeded"])
def test_a_parked_sequence_goes_on_with_the_tokens_that_it_would_have_had(
    clock: HandClock, fields: dict[str, Any]
) -> None:
    bench = bench_of(clock)
    long_one(bench, **fields)
    for number in range(3):
        for _ in range(5):
            bench.step()
        short_one(bench, f"short{number}")
        bench.engine.park("long")
        assert bench.engine.stats().num_parked == 1
    finished = bench.run()
    assert bench.text("long") == alone(clock, **fields)
    assert finished["long"].receipt.completion_tokens == 40
    assert finished["long"].receipt.num_parks == 3
    assert finished["long"].receipt.parked_seconds > 0
    assert kinds(bench, Parked) == kinds(bench, Resumed) == ["long"] * 3
    assert_well_formed([event for event in bench.events if not isinstance(event, Parked | Resumed)])


def test_the_short_one_is_served_while_the_long_one_is_parked(clock: HandClock) -> None:
    bench = bench_of(clock)
    long_one(bench)
    for _ in range(5):
        bench.step()
    short_one(bench)
    bench.engine.park("long")
    while "short" not in bench.finished:
        bench.step()
    assert "long" not in bench.finished
    assert bench.engine.stats().num_parks == 1
    bench.run()


def test_a_sequence_keeps_its_adapters_when_it_is_parked(clock: HandClock, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_text("an adapter")
    vector = (("poet", 1.0),)

    def run(*, parks: bool) -> str:
        bench = bench_of(clock)
        bench.engine.load_adapter("poet", tmp_path / "a.gguf")
        long_one(bench, adapters=vector)
        for _ in range(5):
            bench.step()
        if parks:
            short_one(bench)
            bench.engine.park("long")
            with pytest.raises(Exception, match="uses adapter"):
                bench.engine.unload_adapter("poet")
        bench.run()
        return bench.text("long")

    assert run(parks=True) == run(parks=False)


def test_nobody_is_parked_where_that_helps_nobody(clock: HandClock) -> None:
    bench = bench_of(clock, 2)
    long_one(bench)
    bench.step()
    bench.engine.park("long")
    short_one(bench)
    bench.engine.park("long")  # a slot is free
    bench.engine.park("unknown")
    bench.run()
    assert kinds(bench, Parked) == []


def test_as_many_make_room_as_come_in_one_step(clock: HandClock) -> None:
    bench = bench_of(clock, 2)
    long_one(bench)
    long_one(bench, "other", prompt=(6, 6, 7))
    for _ in range(5):
        bench.step()
    short_one(bench)
    short_one(bench, "dora's", prompt=(9, 9), cache_scope="dora")
    bench.engine.park("long")
    bench.engine.park("other")
    while not {"short", "dora's"} <= bench.finished.keys():
        bench.step()
    assert not bench.finished.keys() & {"long", "other"}
    bench.run()
    assert sorted(kinds(bench, Parked)) == ["long", "other"]
    assert bench.text("long") == alone(clock)


def test_who_waits_for_a_prefix_has_the_slot_that_was_made_for_it(clock: HandClock) -> None:
    """While its beginning is computed for another, whoever is parked does not come back into it."""
    bench = bench_of(clock, 2, max_step_tokens=16)
    system = tuple(range(100, 200))
    long_one(bench, max_tokens=100)
    long_one(bench, "other", prompt=(6, 6, 7), max_tokens=100)
    for _ in range(5):
        bench.step()
    for request_id, parked in [("short", "long"), ("shares its prompt", "other")]:
        short_one(bench, request_id, prompt=(*system, len(request_id)))
        bench.engine.park(parked)
    while kinds(bench, Started)[-1] != "shares its prompt":
        bench.step()
    assert kinds(bench, Parked) == ["long", "other"]
    assert kinds(bench, Resumed) == []
    finished = bench.run()
    assert finished["shares its prompt"].receipt.cached_tokens > 90
    assert sorted(kinds(bench, Resumed)) == ["long", "other"]


def test_prompts_and_named_slots_are_not_parked(clock: HandClock) -> None:
    bench = bench_of(clock, max_step_tokens=8)
    long_one(bench, prompt=tuple(range(60)))
    bench.step()
    short_one(bench)
    bench.engine.park("long")  # its prompt is being computed
    assert kinds(bench, Parked) == []
    bench.run()
    bench.add("named", prompt=(1, 2), max_tokens=40, cache_scope="alice", decoding=Decoding(slot_id=0))
    bench.step()
    bench.step()
    short_one(bench, "another")
    bench.engine.park("named")
    bench.run()
    assert kinds(bench, Parked) == []


@pytest.mark.parametrize(
    ("room", "abilities"),
    [(0, Abilities()), (20, Abilities()), (ROOM, Abilities(save=False))],
    ids=["off", "small", "no"],
)
def test_without_room_or_ability_the_others_wait(clock: HandClock, room: int, abilities: Abilities) -> None:
    bench = bench_of(clock, room=room, abilities=abilities)
    long_one(bench)
    for _ in range(5):
        bench.step()
    short_one(bench)
    bench.engine.park("long")
    finished = bench.run()
    assert kinds(bench, Parked) == []
    assert {each.reason for each in finished.values()} == {FinishReason.LENGTH}
    assert bench.text("long") == alone(clock)


def test_parked_states_are_within_the_room_for_states(clock: HandClock) -> None:
    bench = bench_of(clock, room=1200)
    for number in range(4):
        long_one(bench, f"long{number}")
        for _ in range(3):
            bench.step()
        for parked in [f"long{each}" for each in range(number)]:
            bench.engine.park(parked)
    num_parked = bench.engine.stats().num_parked
    assert 1 <= num_parked <= 3
    assert bench.engine._keeper._store.max_bytes >= 0
    bench.run()
    assert bench.engine._keeper._store.max_bytes == 1200


def test_a_parked_sequence_can_be_cancelled_and_pays_what_it_has_had(clock: HandClock) -> None:
    bench = bench_of(clock)
    long_one(bench)
    for _ in range(6):
        bench.step()
    short_one(bench)
    bench.engine.park("long")
    clock.sleep(0.5)
    bench.engine.cancel("long")
    finished = bench.run()
    assert finished["long"].reason is FinishReason.CANCELLED
    assert finished["long"].receipt.completion_tokens == 6
    assert finished["long"].receipt.parked_seconds == pytest.approx(0.5)
    assert bench.engine._keeper._store.max_bytes == ROOM
    assert bench.backend._detached == {}


def test_of_a_state_that_cannot_be_restored_nothing_is_reused(clock: HandClock) -> None:
    class Forgetful(FakeBackend):
        def restore(self, slot_id: int, state: bytes) -> None:
            super().restore(slot_id, b"broken")

    backend = Forgetful(1, 256, 0.01, sleep=clock.sleep)
    bench = Bench(clock, backend, state_bytes=ROOM)
    long_one(bench)
    for _ in range(5):
        bench.step()
    short_one(bench)
    bench.engine.park("long")
    finished = bench.run()
    assert (finished["long"].reason, finished["long"].error) == (FinishReason.ERROR, "state_invalid")
    assert bench.engine.slots() == []
    long_one(bench, "again", prompt=(5, 6, 7, 8))
    assert bench.run()["again"].receipt.cached_tokens == 0


def test_a_deadline_ends_a_parked_sequence(clock: HandClock) -> None:
    bench = bench_of(clock)
    long_one(bench, deadline=clock() + 0.2)
    for _ in range(6):
        bench.step()
    short_one(bench, max_tokens=100)
    bench.engine.park("long")
    while "long" not in bench.finished:
        bench.step()
    assert bench.finished["long"].reason is FinishReason.DEADLINE
    bench.run()


def test_who_was_parked_for_too_long_goes_before_those_that_wait(clock: HandClock) -> None:
    bench = bench_of(clock)
    long_one(bench)
    for _ in range(5):
        bench.step()
    short_one(bench, "first")
    bench.engine.park("long")
    bench.step()
    clock.sleep(MAX_PARKED_SECONDS + 1)
    short_one(bench, "second")
    bench.run()
    ends = [request_id for request_id in bench.finished if request_id != "first"]
    assert ends == ["long", "second"]


def test_a_crash_ends_what_is_parked(clock: HandClock) -> None:
    bench = bench_of(clock)
    long_one(bench)
    for _ in range(5):
        bench.step()
    short_one(bench)
    bench.engine.park("long")
    bench.engine.end_all("engine_crashed")
    bench.events += bench.engine.take_events()
    assert {each.error for each in bench.finished.values()} == {"engine_crashed"}
    assert set(bench.finished) == {"long", "short"}
    assert not bench.engine.has_work


def test_a_state_is_restored_while_somebody_is_parked_and_several_slots_are_free(clock: HandClock) -> None:
    bench = bench_of(clock, 2)
    long_one(bench)
    long_one(bench, "other", cache_scope="dora")
    for _ in range(5):
        bench.step()
    short_one(bench)
    bench.engine.park("long")
    bench.engine.cancel("other")
    assert bench.engine.stats().num_parked == 1
    assert bench.engine.can_restore_slot(("carol", 0))
    bench.engine.restore_slot(("carol", 0), SlotState())
    bench.run()
    assert bench.text("long") == alone(clock)

"""States that made room: what is kept, what goes, and what is found again; as integers, then in the engine."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.engine import Decoding, FakeBackend
from inference.engine.backend import Abilities
from inference.engine.drafting import DraftPolicy, DraftSettings
from inference.engine.plan import Candidate, ScheduleView, Seat
from inference.engine.seating import copy_threshold, seat
from inference.engine.slot_keeper import MIN_KEPT_TOKENS, SlotState
from inference.engine.speculative import PromptLookup
from inference.engine.state_store import StateStore, StoredState
from inference.engine.types import EngineError

from .cast import HandClock
from .test_engine import Bench

pytestmark = pytest.mark.unit

ALICE: dict[str, Any] = {"cache_scope": "alice"}
BOB: dict[str, Any] = {"cache_scope": "bob"}


def entry(tokens: list[int], scope: str = "alice", size: int = 10, number: int = 0) -> StoredState:
    return StoredState((scope, ()), number, tokens, bytes(size))


def kept(store: StateStore) -> list[list[int]]:
    return [each.tokens for each in store]


def test_the_longest_prefix_is_found_under_its_own_key_alone() -> None:
    store = StateStore(100)
    short, long = entry([1, 2, 9]), entry([1, 2, 3, 4])
    assert store.put(short) and store.put(long)
    assert store.find(("alice", ()), [1, 2, 3, 7]) == (long, 3)
    assert store.find(("alice", ()), [5]) is None
    assert store.find(("bob", ()), [1, 2, 3]) is None
    assert store.find(("alice", (("poet", 1.0),)), [1, 2, 3]) is None


def test_a_state_replaces_those_that_it_begins_with_and_is_not_kept_beside_one_that_begins_with_it() -> None:
    store = StateStore(100)
    store.put(entry([1, 2]))
    assert store.put(entry([1, 2, 3]))
    assert kept(store) == [[1, 2, 3]]
    assert not store.put(entry([1]))
    assert store.put(entry([1], scope="bob"))
    assert store.num_bytes == 20


def test_the_least_recently_used_makes_room() -> None:
    store = StateStore(40)
    entries = [entry([number], scope=f"tenant {number}") for number in range(4)]
    for each in entries:
        store.put(each)
    store.touch(entries[0])
    store.put(entry([9], scope="tenant 9"))
    assert sorted(kept(store)) == [[0], [2], [3], [9]]


def test_no_scope_keeps_more_than_half() -> None:
    store = StateStore(100)
    store.put(entry([1], scope="bob", size=40))
    for number in range(10):
        store.put(entry([number], size=20))
    assert sum(len(each.state) for each in store if each.key[0] == "alice") == 40
    assert kept(store)[-1] == [1]
    assert not store.put(entry([7], size=51))


def test_what_is_forgotten_is_found_no_more() -> None:
    store = StateStore(100)
    store.put(entry([1, 2, 3], number=4))
    store.put(entry([1, 9], number=5))
    store.put(entry([2], number=6))
    store.put(entry([1, 2], scope="bob", number=4))
    store.forget_slot("alice", 4, [1, 2])
    assert kept(store) == [[1, 2], [2]]
    store.forget_slot("alice", 6, [])
    assert kept(store) == [[1, 2]]
    assert store.num_bytes == 10


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.lists(st.integers(0, 2), min_size=1, max_size=6), st.integers(1, 30)),
        max_size=40,
    )
)
def test_the_room_is_never_exceeded(puts: list[tuple[str, list[int], int]]) -> None:
    store = StateStore(50)
    for scope, tokens, size in puts:
        store.put(entry(tokens, scope, size))
        assert store.num_bytes == sum(len(each.state) for each in store) <= 50
        for name in "ab":
            assert sum(len(each.state) for each in store if each.key[0] == name) <= 25


# The plan


def seated(candidate: Candidate, **fields: Any) -> tuple[Seat, ...]:
    return seat(ScheduleView(waiting=(candidate,), free_slots=frozenset({0, 1}), num_slots=4, n_ctx=1024, **fields))[0]


def test_a_stored_state_is_restored_where_it_has_far_more_than_any_slot() -> None:
    gain = copy_threshold(1024)
    held = {"held": {0: 100}, "used": {0: 1}}
    many = Candidate("r", 1000, prefixes={0: 100}, stored=100 + gain)
    assert seated(many, **held) == (Seat("r", 1, 100 + gain, is_restored=True),)
    few = Candidate("r", 1000, prefixes={0: 100}, stored=100 + gain - 1)
    assert seated(few, **held) == (Seat("r", 0, 100),)


# The engine


def bench_of(n_slots: int = 1, state_bytes: int = 1 << 20, **options: Any) -> Bench:
    clock = HandClock()
    backend = FakeBackend(n_slots, 1024, 0.001, 0.001, sleep=clock.sleep, supports_adapters=True, **options)
    return Bench(clock, backend, state_bytes=state_bytes)


def cached(bench: Bench, request_id: str, **fields: Any) -> int:
    bench.add(request_id, **fields)
    return bench.run()[request_id].receipt.cached_tokens


def words(start: int, number: int = 200) -> tuple[int, ...]:
    return tuple(range(start, start + number))


def test_conversations_that_share_one_slot_find_their_states_again() -> None:
    bench = bench_of()
    assert cached(bench, "a1", prompt=words(0), **ALICE) == 0
    assert cached(bench, "b1", prompt=words(0), **BOB) == 0
    assert cached(bench, "a2", prompt=(*words(0), 7), **ALICE) == 200
    assert cached(bench, "b2", prompt=words(0), **BOB) == 199
    assert cached(bench, "other", prompt=words(500), **ALICE) == 0
    assert cached(bench, "a3", prompt=words(0), **ALICE) == 199


def test_nothing_is_stored_without_room_or_for_short_prompts_or_where_states_cannot_be_saved() -> None:
    for bench, number in [
        (bench_of(state_bytes=0), 200),
        (bench_of(), MIN_KEPT_TOKENS - 10),
        (bench_of(abilities=Abilities(save=False)), 200),
        (bench_of(state_bytes=100), 200),
    ]:
        cached(bench, "a1", prompt=words(0, number), **ALICE)
        cached(bench, "b1", prompt=words(0, number), **BOB)
        assert cached(bench, "a2", prompt=words(0, number), **ALICE) == 0


def test_a_state_that_costs_more_to_move_than_to_compute_is_not_moved() -> None:
    class Slow(FakeBackend):
        saved = 0

        def save(self, slot_id: int) -> bytes:
            self.saved += 1
            clock.sleep(0.9)
            return super().save(slot_id)

    clock = HandClock()
    backend = Slow(1, 1024, 0.001, 0.001, sleep=clock.sleep)
    bench = Bench(clock, backend, state_bytes=1 << 20)
    for number in range(6):
        cached(bench, f"r{number}", prompt=words(1000 * number), **ALICE)
    assert backend.saved == 1


def test_what_a_request_without_a_scope_held_is_not_stored() -> None:
    bench = bench_of()
    cached(bench, "one", prompt=words(0))
    cached(bench, "two", prompt=words(500), **ALICE)
    assert cached(bench, "three", prompt=words(0)) == 0


def test_an_accepted_prefix_of_a_shifted_sequence_is_what_is_stored() -> None:
    bench = bench_of()
    keeping = Decoding(context_shift=True, num_keep=100)
    cached(bench, "shifted", prompt=words(0), max_tokens=900, decoding=keeping, **ALICE)
    cached(bench, "bob", prompt=words(0), **BOB)
    assert cached(bench, "again", prompt=words(0), **ALICE) == 100


def test_a_seat_before_it_may_store_more_of_a_prompt_than_the_plan_has_found() -> None:
    """Of the conversation that goes on, the plan finds its beginning in the store and the rest in no slot: the one that
    holds it goes to somebody who comes in the same step. Only then its state is stored, too."""
    bench = bench_of(n_slots=2)
    system = words(0, 100)
    for request_id, prompt, scope in [
        ("another", (*system, *words(500, 50)), ALICE),
        ("bob", words(2000), BOB),
        ("makes room for another", words(3000), BOB),
        ("conversation", (*system, *words(600)), ALICE),
        ("bob again", words(4000), BOB),
    ]:
        cached(bench, request_id, prompt=prompt, **scope)
    bench.add("takes its slot", prompt=words(5000), **BOB)
    bench.add("goes on", prompt=(*system, *words(600), 7), **ALICE)
    assert [(each.scope, each.num_held) for each in bench.engine.slots()] == [("bob", 203), ("alice", 303)]
    assert bench.run()["goes on"].receipt.cached_tokens == 300
    alone = bench_of()
    cached(alone, "goes on", prompt=(*system, *words(600), 7))
    assert bench.text("goes on") == alone.text("goes on")


# Slots by number


def test_a_slot_is_saved_and_restored_into_another() -> None:
    bench = bench_of(n_slots=2)
    cached(bench, "france", prompt=words(0), max_tokens=10, decoding=Decoding(slot_id=1), **ALICE)
    saved = bench.engine.save_slot(("alice", 1))
    assert len(saved.tokens) == 209
    cached(bench, "germany", prompt=(*words(0, 150), 7, 8, 9), decoding=Decoding(slot_id=1), **ALICE)
    bench.engine.restore_slot(("alice", 0), saved)
    pinned = {"decoding": Decoding(slot_id=0), **ALICE}
    assert cached(bench, "france again", prompt=words(0), **pinned) == 199


def test_an_erased_slot_forgets_and_so_does_the_store() -> None:
    bench = bench_of()
    cached(bench, "one", prompt=words(0), **ALICE)
    cached(bench, "two", prompt=words(0, 150), **BOB)
    assert bench.engine.slots()[0].scope == "bob"
    assert bench.engine.erase_slot(("alice", 0)) == 203
    assert cached(bench, "again", prompt=words(0), **ALICE) == 0
    assert bench.engine.erase_slot(("alice", 0)) == 203
    assert bench.engine.erase_slot(("alice", 0)) == 0
    assert cached(bench, "bob again", prompt=words(0, 150), **BOB) == 149


def test_a_slot_that_had_to_make_room_can_still_be_saved() -> None:
    bench = bench_of()
    cached(bench, "one", prompt=words(0), **ALICE)
    cached(bench, "two", prompt=words(0), **BOB)
    assert len(bench.engine.save_slot(("alice", 0)).tokens) == 203
    assert bench.engine.save_slot(("charlie", 0)).tokens == ()


def test_what_a_slot_held_before_the_last_is_not_saved_in_its_place() -> None:
    """Neither where the last left nothing that can be reused, nor where that was too short to be stored, nor where a
    restore has failed."""
    for fields in [
        {"prompt": words(500), "max_tokens": 1000, "decoding": Decoding(slot_id=0, context_shift=True)},
        {"prompt": words(500, 20), "decoding": Decoding(slot_id=0)},
    ]:
        bench = bench_of()
        cached(bench, "one", prompt=words(0), decoding=Decoding(slot_id=0), **ALICE)
        cached(bench, "two", **fields, **ALICE)
        cached(bench, "bob", prompt=words(0, 20), **BOB)
        assert bench.engine.save_slot(("alice", 0)).tokens == ()
        assert cached(bench, "one again", prompt=words(0), **ALICE) == 199
        cached(bench, "bob again", prompt=words(0), **BOB)
        assert len(bench.engine.save_slot(("alice", 0)).tokens) == 203
        bench.engine.restore_slot(("alice", 0), SlotState())
        assert bench.engine.save_slot(("alice", 0)).tokens == ()


def test_bob_neither_saves_nor_erases_what_alice_holds() -> None:
    bench = bench_of(n_slots=2)
    cached(bench, "one", prompt=words(0), **ALICE)
    assert bench.engine.save_slot(("bob", 0)).tokens == ()
    assert bench.engine.erase_slot(("bob", 0)) == 0
    saved = bench.engine.save_slot(("alice", 0))
    bench.engine.restore_slot(("bob", 0), saved)
    assert cached(bench, "two", prompt=words(0), **ALICE) == 199


def test_a_state_that_is_refused_leaves_the_slot_empty_and_usable() -> None:
    from dataclasses import replace

    bench = bench_of()
    cached(bench, "one", prompt=words(0), **ALICE)
    broken = replace(bench.engine.save_slot(("alice", 0)), state=b"broken")
    with pytest.raises(EngineError) as caught:
        bench.engine.restore_slot(("alice", 0), broken)
    assert caught.value.code == "state_invalid"
    assert bench.engine.slots() == []
    assert cached(bench, "two", prompt=words(500), **ALICE) == 0


def test_states_of_one_life_are_found_in_the_next() -> None:
    bench = bench_of(n_slots=2)
    for number in range(4):
        cached(bench, f"r{number}", prompt=words(1000 * number), **ALICE)
    states = list(bench.engine.all_states())
    assert len(states) == 4
    other = bench_of(n_slots=1)
    other.engine.put_back(states)
    for number in range(4):
        assert cached(other, f"r{number}", prompt=words(1000 * number), **ALICE) == 199


# With drafts


class WatchedLookup(PromptLookup):
    """Remembers what it was told of its slots."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: list[tuple[int, int]] = []

    def open(self, slot_id: int, num_kept: int) -> None:
        self.opened.append((slot_id, num_kept))
        super().open(slot_id, num_kept)


def test_who_guesses_hears_that_a_slot_holds_something_else() -> None:
    lookup = WatchedLookup()
    clock = HandClock()
    backend = FakeBackend(1, 1024, 0.001, 0.001, sleep=clock.sleep)
    bench = Bench(clock, backend, state_bytes=1 << 20, proposer=lookup)
    cached(bench, "one", prompt=words(0), **ALICE)
    saved = bench.engine.save_slot(("alice", 0))
    cached(bench, "two", prompt=(*words(0), 7), **ALICE)
    bench.engine.restore_slot(("alice", 0), saved)
    cached(bench, "bob", prompt=words(0), **BOB)
    assert cached(bench, "three", prompt=words(0), **ALICE) == 199
    assert lookup.opened == [(0, 0), (0, 200), (0, 0), (0, 0), (0, 0)]


@pytest.mark.parametrize("max_tokens", [7, 30, 90])
def test_drafts_stores_and_shifts_together_give_the_tokens_of_neither(max_tokens: int) -> None:
    """The fake backend refuses a slot whose tokens are not what they must be."""

    def answers(**options: Any) -> list[str]:
        clock = HandClock()
        backend = FakeBackend(2, 256, 0.001, 0.001, sleep=clock.sleep, answer=lambda prompt, seed, index: 1 + index % 5)
        bench = Bench(clock, backend, **options)
        shift = Decoding(context_shift=True, num_keep=-1)
        for turn in range(3):
            for number, scope in enumerate([ALICE, BOB, ALICE, BOB]):
                prompt = words(0, 150 + number) if number < 2 else words(300, 200)
                bench.add(f"{turn} {number}", prompt=prompt, max_tokens=max_tokens, decoding=shift, **scope)
                bench.step()
            bench.run()
        return [bench.text(f"{turn} {number}") for turn in range(3) for number in range(4)]

    settings = DraftSettings(num_min=0, num_max=8, policy=DraftPolicy.ALWAYS)
    drafting = {"proposer": PromptLookup(), "draft_settings": settings}
    assert answers(state_bytes=1 << 20, **drafting) == answers()

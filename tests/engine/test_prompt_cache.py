"""The prompt cache of the engine, on a fake backend that refuses every slot whose tokens are not what they must be."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.engine import FakeBackend, FinishReason, SamplingParams
from inference.engine.backend import Abilities
from inference.engine.seating import MIN_SAVED_TOKENS
from inference.engine.types import EngineError

from .cast import HandClock, assert_well_formed
from .test_engine import Bench

pytestmark = pytest.mark.unit

SYSTEM = tuple(range(1000, 1200))
ALICE, BOB = {"cache_scope": "alice"}, {"cache_scope": "bob"}


def bench_of(n_slots: int = 4, n_ctx: int = 1024, **options: Any) -> Bench:
    clock = HandClock()
    backend = FakeBackend(n_slots, n_ctx, sleep=clock.sleep, supports_adapters=True, **options)
    for name in ("poet", "clerk"):
        backend.load_adapter(name, __file__)
    return Bench(clock, backend)


def cached(bench: Bench, request_id: str, **fields: Any) -> int:
    """Run a request alone; how many of its tokens were reused."""
    bench.add(request_id, **fields)
    return bench.run()[request_id].receipt.cached_tokens


def test_a_second_turn_computes_only_what_is_new() -> None:
    bench = bench_of()
    assert cached(bench, "one", prompt=SYSTEM, **ALICE) == 0
    answer = tuple(token for event in bench.events if hasattr(event, "tokens") for token in event.tokens)
    computed = bench.engine.stats().prompt_tokens_total
    assert cached(bench, "two", prompt=(*SYSTEM, *answer, 7, 8), **ALICE) == len(SYSTEM) + len(answer) - 1
    stats = bench.engine.stats()
    assert stats.prompt_tokens_total - computed == 3
    assert stats.cached_tokens_total == len(SYSTEM) + len(answer) - 1


def test_of_the_same_prompt_one_token_is_computed_again() -> None:
    bench = bench_of()
    cached(bench, "one", prompt=SYSTEM, **ALICE)
    assert cached(bench, "two", prompt=SYSTEM, **ALICE) == len(SYSTEM) - 1


def test_bob_and_those_without_a_scope_reuse_nothing_of_alice() -> None:
    bench = bench_of()
    cached(bench, "alice", prompt=SYSTEM, **ALICE)
    assert cached(bench, "bob", prompt=SYSTEM, **BOB) == 0
    assert cached(bench, "nobody", prompt=SYSTEM) == 0
    assert cached(bench, "nobody again", prompt=SYSTEM) == 0
    assert cached(bench, "alice again", prompt=SYSTEM, **ALICE) == len(SYSTEM) - 1


def test_nothing_is_reused_across_adapter_vectors() -> None:
    bench = bench_of(n_slots=8)
    vectors: list[Any] = [(), (("poet", 1.0),), (("poet", 0.5),), (("clerk", 1.0),)]
    assert [cached(bench, f"{v}", prompt=SYSTEM, adapters=v, **ALICE) for v in vectors] == [0, 0, 0, 0]
    again = [cached(bench, f"{v} again", prompt=SYSTEM, adapters=v, **ALICE) for v in vectors]
    assert again == [len(SYSTEM) - 1] * 4
    assert cached(bench, "zero", prompt=SYSTEM, adapters=(("poet", 0.0),), **ALICE) == len(SYSTEM) - 1


def test_a_request_may_ask_for_its_whole_prompt_to_be_computed() -> None:
    bench = bench_of()
    cached(bench, "one", prompt=SYSTEM, **ALICE)
    assert cached(bench, "two", prompt=SYSTEM, cache_prompt=False, **ALICE) == 0


def test_a_backend_that_cannot_trim_reuses_nothing() -> None:
    bench = bench_of(abilities=Abilities(trim=False))
    cached(bench, "one", prompt=SYSTEM, **ALICE)
    assert cached(bench, "two", prompt=SYSTEM, **ALICE) == 0


def test_eight_clients_with_one_system_prompt_compute_it_once() -> None:
    bench = bench_of(n_slots=8, seconds_per_token=0.003)
    for number in range(8):
        bench.add(f"r{number}", prompt=(*SYSTEM, 2000 + number, 1), **ALICE)
    finished = bench.run()
    cached_tokens = sorted(last.receipt.cached_tokens for last in finished.values())
    assert cached_tokens[0] == 0
    assert cached_tokens[1] > len(SYSTEM) - MIN_SAVED_TOKENS
    assert bench.engine.stats().prompt_tokens_total + sum(cached_tokens) == 8 * (len(SYSTEM) + 2)
    assert_well_formed(bench.events)


def test_what_a_request_without_the_cache_computes_serves_those_that_came_with_it() -> None:
    """As with several answers to one prompt whose first is to be computed anew, all of them in one step."""
    bench = bench_of(seconds_per_token=0.003)
    bench.add("first", prompt=SYSTEM, cache_prompt=False, **ALICE)
    for number in range(2):
        bench.add(f"copy {number}", prompt=SYSTEM, **ALICE)
    finished = bench.run()
    reused = {name: last.receipt.cached_tokens for name, last in finished.items()}
    assert reused["first"] == 0
    assert min(reused["copy 0"], reused["copy 1"]) > len(SYSTEM) - MIN_SAVED_TOKENS


def test_whoever_waits_for_a_prefix_goes_on_alone_when_the_other_is_cancelled() -> None:
    bench = bench_of(seconds_per_token=0.01)
    bench.add("first", prompt=SYSTEM, **ALICE)
    bench.add("second", prompt=SYSTEM, **ALICE)
    bench.step()
    assert bench.engine.stats().busy_slots == 1
    bench.engine.cancel("first")
    finished = bench.run()
    assert finished["second"].reason is FinishReason.LENGTH
    assert 0 < finished["second"].receipt.cached_tokens < 150


def test_those_behind_a_crowd_that_waits_for_a_prefix_are_served() -> None:
    bench = bench_of(n_slots=3, seconds_per_token=0.01)
    for number in range(4):
        bench.add(f"alice {number}", prompt=SYSTEM, **ALICE)
    bench.add("bob", prompt=(1, 2, 3), max_tokens=1, **BOB)
    bench.step()
    assert bench.engine.stats().busy_slots == 1
    assert "bob" in bench.finished


def test_a_slot_whose_opening_failed_holds_nothing() -> None:
    class Picky(FakeBackend):
        def open(self, slot_id: int, prompt: Any, sampling: SamplingParams, seed: int, num_cached: int = 0) -> None:
            super().open(slot_id, prompt, sampling, seed, num_cached)
            if prompt[-1] == 9:
                raise EngineError("invalid_sampling", "no")

    bench = Bench(HandClock(), Picky(1, 1024))
    cached(bench, "one", prompt=SYSTEM, **ALICE)
    bench.add("bad", prompt=(*SYSTEM, 9), **ALICE)
    assert bench.run()["bad"].error == "invalid_sampling"
    assert cached(bench, "two", prompt=SYSTEM, **ALICE) == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5))
def test_any_company_gives_the_same_answers_and_the_backend_finds_nothing_wrong(seed: int, n_slots: int) -> None:
    """Prompts that share beginnings, scopes, vectors, cancels, arrivals at any step: the fake checks every slot."""
    dice = random.Random(seed)
    bench, alone = bench_of(n_slots, 512, seconds_per_token=0.002), bench_of(1, 512)
    wanted: dict[str, dict[str, Any]] = {}
    for number in range(25):
        start = dice.choice([SYSTEM, SYSTEM[:90], SYSTEM[50:], ()])
        wanted[f"r{number}"] = {
            "prompt": (*start, *(dice.randrange(3) for _ in range(dice.randrange(1, 30)))),
            "max_tokens": dice.randrange(1, 20),
            "adapters": dice.choice([(), (("poet", 1.0),), (("clerk", 0.5),)]),
            "cache_scope": dice.choice(["alice", "alice", "bob", None]),
            "cache_prompt": dice.random() < 0.9,
        }
    cancelled = set()
    for request_id, fields in wanted.items():
        bench.add(request_id, **fields)
        for _ in range(dice.choice([0, 0, 1, 5, 20])):
            bench.step()
        if dice.random() < 0.2:
            bench.engine.cancel(request_id)
            cancelled.add(request_id)
    bench.run()
    bench.events += bench.engine.take_events()
    assert bench.finished.keys() == wanted.keys()
    assert_well_formed(bench.events)
    for request_id, fields in wanted.items():
        receipt = bench.finished[request_id].receipt
        assert receipt.cached_tokens < receipt.prompt_tokens
        if fields["cache_scope"] is None or not fields["cache_prompt"]:
            assert receipt.cached_tokens == 0
        if request_id not in cancelled:
            alone.add(request_id, **{**fields, "cache_scope": None})
            alone.run()
            assert bench.text(request_id) == alone.text(request_id)

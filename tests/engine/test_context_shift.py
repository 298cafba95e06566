"""What happens where a slot is full, on a fake backend that refuses tokens which are not where they must be."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.engine import Decoding, FakeBackend, FinishReason
from inference.engine.backend import Abilities
from inference.engine.sequence import Sequence

from .cast import HandClock, assert_well_formed, make_request
from .test_engine import Bench, spelling

pytestmark = pytest.mark.unit

SHIFT = Decoding(context_shift=True)
ALICE: dict[str, Any] = {"cache_scope": "alice"}


class Shifting(FakeBackend):
    """Remembers the shifts that it was told."""

    shifts: list[tuple[int, int]]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.shifts = []

    def shift(self, slot_id: int, num_keep: int, num_discard: int) -> None:
        self.shifts.append((num_keep, num_discard))
        super().shift(slot_id, num_keep, num_discard)


def bench_of(**options: Any) -> tuple[Bench, Shifting]:
    backend = Shifting(2, 64, **options)
    return Bench(HandClock(), backend), backend


def test_a_full_context_is_shifted_and_every_token_is_delivered() -> None:
    bench, backend = bench_of()
    bench.add(prompt=tuple(range(56)), max_tokens=64, decoding=SHIFT)
    last = bench.run()["r"]
    assert (last.reason, last.receipt.completion_tokens, last.receipt.is_truncated) == (FinishReason.LENGTH, 64, True)
    assert backend.shifts[0] == (0, 31)
    assert last.receipt.held_tokens < 64
    assert_well_formed(bench.events)


def test_without_shift_the_end_at_the_limit_is_said() -> None:
    bench, backend = bench_of()
    bench.add(prompt=tuple(range(56)), max_tokens=64)
    last = bench.run()["r"]
    assert (last.reason, last.receipt.completion_tokens, last.receipt.is_truncated) == (FinishReason.LENGTH, 8, True)
    assert backend.shifts == []


def test_an_answer_that_ends_before_the_limit_is_not_truncated() -> None:
    bench, backend = bench_of()
    bench.add(prompt=tuple(range(56)), max_tokens=7, decoding=SHIFT)
    assert not bench.run()["r"].receipt.is_truncated
    assert backend.shifts == []


def test_the_last_wanted_token_fills_the_context_without_a_shift() -> None:
    bench, backend = bench_of()
    bench.add(prompt=tuple(range(56)), max_tokens=8, decoding=SHIFT)
    assert bench.run()["r"].receipt.is_truncated
    assert backend.shifts == []


def test_a_memory_that_cannot_shift_ends_with_length() -> None:
    bench, _ = bench_of(abilities=Abilities(shift=False, reasons={"shift": "cannot"}))
    bench.add(prompt=tuple(range(56)), max_tokens=64, decoding=SHIFT)
    last = bench.run()["r"]
    assert (last.reason, last.receipt.completion_tokens, last.receipt.is_truncated) == (FinishReason.LENGTH, 8, True)


@pytest.mark.parametrize(
    ("decoding", "adds_bos", "expected"),
    [
        ({}, False, (0, 31)),
        ({}, True, (1, 31)),
        ({"num_keep": 10}, False, (10, 26)),
        ({"num_keep": 10}, True, (11, 26)),
        ({"num_keep": -1}, False, (20, 21)),
        ({"num_keep": -1}, True, (20, 21)),
        ({"num_keep": 10**9}, True, (20, 21)),
        ({"num_discard": 5}, False, (0, 5)),
        ({"num_discard": 10**9}, False, (0, 63)),
        ({"num_keep": -7, "num_discard": -(10**9)}, False, (20, 21)),
    ],
)
def test_what_is_kept_and_what_goes(decoding: dict[str, int], adds_bos: bool, expected: tuple[int, int]) -> None:
    bench, backend = bench_of(adds_bos=adds_bos)
    bench.add(prompt=tuple(range(20)), max_tokens=45, decoding=Decoding(context_shift=True, **decoding))
    bench.run()
    assert backend.shifts == [expected]


def test_a_prompt_as_long_as_the_context_leaves_room_when_it_is_kept() -> None:
    bench, backend = bench_of()
    bench.add(prompt=tuple(range(63)), max_tokens=20, decoding=Decoding(context_shift=True, num_keep=-1))
    assert bench.run()["r"].receipt.completion_tokens == 20
    assert set(backend.shifts) == {(60, 1)}


@given(
    n_ctx=st.integers(2, 40),
    num_prompt=st.integers(1, 39),
    num_keep=st.integers(-(2**40), 2**40),
    num_discard=st.integers(-(2**40), 2**40),
    adds_bos=st.booleans(),
)
def test_a_shift_keeps_and_drops_what_is_there(
    n_ctx: int, num_prompt: int, num_keep: int, num_discard: int, adds_bos: bool
) -> None:
    prompt = tuple(range(min(num_prompt, n_ctx - 1)))
    decoding = Decoding(context_shift=True, num_keep=num_keep, num_discard=num_discard)
    sequence = Sequence(make_request(prompt=prompt, decoding=decoding, max_tokens=99), seed=0, submitted_at=0)
    while len(sequence.tokens) < n_ctx:
        sequence.append(1000 + len(sequence.tokens))
    sequence.num_computed = n_ctx - 1
    before = list(sequence.tokens)
    kept, gone = sequence.shift(n_ctx, adds_bos)
    assert 0 <= kept <= max(0, n_ctx - 4)
    assert 1 <= gone <= n_ctx - 1 - kept
    assert sequence.tokens == before[:kept] + before[kept + gone :]
    assert (sequence.num_computed, sequence.num_exact) == (len(sequence.tokens) - 1, kept)


def test_after_a_shift_only_the_kept_tokens_are_reused() -> None:
    bench, _ = bench_of()
    prompt = tuple(range(20))
    bench.add("shifted", prompt=prompt, max_tokens=60, decoding=Decoding(context_shift=True, num_keep=12), **ALICE)
    bench.run()
    bench.add("again", prompt=prompt, max_tokens=1, **ALICE)
    assert bench.run()["again"].receipt.cached_tokens == 12


def test_of_one_that_runs_on_after_a_shift_only_the_kept_tokens_are_copied() -> None:
    bench, _ = bench_of()
    prompt = tuple(range(40))
    bench.add("shifted", prompt=prompt, max_tokens=400, decoding=Decoding(context_shift=True, num_keep=30), **ALICE)
    while not bench.engine._running or not bench.engine._running["shifted"].is_truncated:
        bench.step()
    bench.add("again", prompt=prompt, max_tokens=1, **ALICE)
    while "again" not in bench.finished:
        bench.step()
    assert bench.finished["again"].receipt.cached_tokens == 30


def test_of_a_shift_that_keeps_nothing_nothing_is_reused() -> None:
    bench, _ = bench_of()
    bench.add("shifted", prompt=tuple(range(20)), max_tokens=60, decoding=SHIFT, **ALICE)
    bench.run()
    bench.add("again", prompt=tuple(range(20)), max_tokens=1, **ALICE)
    assert bench.run()["again"].receipt.cached_tokens == 0


def test_a_request_for_no_tokens_computes_its_prompt_for_those_to_come() -> None:
    bench, _ = bench_of()
    bench.add("warm", prompt=tuple(range(63)), max_tokens=0, **ALICE)
    last = bench.run()["warm"]
    assert (last.reason, last.receipt.completion_tokens, last.receipt.held_tokens) == (FinishReason.LENGTH, 0, 63)
    assert bench.text("warm") == ""
    bench.add("then", prompt=tuple(range(63)), max_tokens=1, **ALICE)
    assert bench.run()["then"].receipt.cached_tokens == 62


def test_the_time_to_generate_ends_with_the_line() -> None:
    clock = HandClock()
    words = [" the", " river", ".\n", " of", " and", ".\n", " old"]
    backend = FakeBackend(1, 64, 1.0, answer=spelling(*words), sleep=clock.sleep)
    bench = Bench(clock, backend)
    bench.add(max_tokens=60, decoding=Decoding(max_decode_seconds=3.0))
    last = bench.run()["r"]
    assert (last.reason, last.receipt.completion_tokens) == (FinishReason.LENGTH, 6)
    assert not last.receipt.is_truncated
    bench.add(max_tokens=60, decoding=Decoding(max_decode_seconds=1e9))
    assert bench.run()["r"].reason is FinishReason.EOS

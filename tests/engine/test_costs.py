"""The cost curve: interpolation, its inverse, and measuring within a budget."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.engine.costs import CostCurve, measure

from .cast import HandClock

pytestmark = pytest.mark.unit

MEASURED = CostCurve(((1, 0.0056), (2, 0.0106), (4, 0.0183), (8, 0.0334), (16, 0.0615)))


@pytest.mark.parametrize(
    ("num_tokens", "seconds"),
    [(0, 0.0), (1, 0.0056), (3, 0.01445), (8, 0.0334), (16, 0.0615), (24, 0.0896)],
)
def test_seconds_follow_the_points_and_then_the_last_slope(num_tokens: int, seconds: float) -> None:
    assert MEASURED.seconds(num_tokens) == pytest.approx(seconds)


def test_a_step_of_100_ms_holds_26_tokens_of_the_demo_model() -> None:
    assert MEASURED.tokens_within(0.1, 512) == 26


def test_tokens_within_never_exceeds_the_batch() -> None:
    assert MEASURED.tokens_within(10.0, 64) == 64


def test_a_curve_without_points_costs_nothing() -> None:
    assert CostCurve().seconds(1000) == 0.0
    assert CostCurve().tokens_within(0.1, 512) == 512


def test_a_flat_end_means_that_tokens_are_free_up_to_the_batch() -> None:
    assert CostCurve(((1, 0.01), (256, 0.01))).tokens_within(0.1, 512) == 512


def test_one_measured_point_is_a_straight_line() -> None:
    assert CostCurve(((1, 0.2),)).seconds(4) == pytest.approx(0.8)


@given(st.floats(0.0, 2.0), st.integers(0, 512))
def test_tokens_within_is_the_largest_step_that_fits(seconds: float, most: int) -> None:
    tokens = MEASURED.tokens_within(seconds, most)
    assert MEASURED.seconds(tokens) <= seconds
    assert tokens == most or MEASURED.seconds(tokens + 1) > seconds


def timed_measure(clock: HandClock, seconds_of: dict[int, float] | float, most: int = 512) -> CostCurve:
    def step(num_tokens: int) -> None:
        clock.sleep(seconds_of if isinstance(seconds_of, float) else seconds_of[num_tokens])

    return measure(step, most=most, clock=clock)


def test_a_fast_backend_is_measured_at_every_point(clock: HandClock) -> None:
    curve = timed_measure(clock, 0.001)
    assert [tokens for tokens, _ in curve.points] == [1, 2, 4, 8, 16, 64, 256]


def test_measuring_keeps_to_its_budget(clock: HandClock) -> None:
    began = clock.now
    curve = timed_measure(clock, {n: 0.0056 * n for n in (1, 2, 4, 8, 16, 64, 256)})
    assert [tokens for tokens, _ in curve.points] == [1, 2, 4, 8, 16]
    assert clock.now - began < 0.5


def test_a_slow_backend_gets_few_points(clock: HandClock) -> None:
    assert [tokens for tokens, _ in timed_measure(clock, 0.3).points] == [1, 2, 4, 8]
    assert timed_measure(clock, 2.0).points == ((1, pytest.approx(2.0)),)


def test_no_step_larger_than_the_batch_is_measured(clock: HandClock) -> None:
    assert timed_measure(clock, 0.001, most=4).points[-1][0] == 4


def test_noise_never_makes_a_larger_step_cheaper(clock: HandClock) -> None:
    curve = timed_measure(clock, {1: 0.01, 2: 0.002, 4: 0.003, 8: 0.02, 16: 0.01}, most=16)
    seconds = [seconds for _, seconds in curve.points]
    assert seconds == sorted(seconds)

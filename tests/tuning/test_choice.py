"""Who wins: the policy alone, with numbers."""

from __future__ import annotations

import math

import pytest

from inference.tuning import choice, formats
from inference.tuning.choice import Measured, Settings, Speed

pytestmark = pytest.mark.unit


def arm(name: str, *times: float, loss: float = 3.0) -> Measured:
    """A candidate that is `times` as fast as ten tokens a second, round by round."""
    speeds = {number: Speed(100 * each, 10 * each, 40 * each) for number, each in enumerate(times)}
    return Measured(name, 1, [loss] * 10, speeds)


SOURCE = arm("source", 1, 1, 1)


def test_the_fastest_within_the_bound_wins() -> None:
    fast, faster = arm("Q8_0", 1.2, 1.2, 1.2), arm("Q4_0", 1.5, 1.5, 1.5, loss=3.02)
    assert choice.winner([fast, faster], SOURCE, most_increase=3) is faster


def test_a_format_whose_perplexity_rises_too_much_may_not_win() -> None:
    fast, wrong = arm("Q8_0", 1.2, 1.2, 1.2), arm("Q4_0", 9, 9, 9, loss=3.0 + math.log(1.04))
    assert choice.winner([wrong, fast], SOURCE, most_increase=3) is fast
    assert choice.winner([wrong, fast], SOURCE, most_increase=5) is wrong
    assert "perplexity" in choice.objection(wrong, SOURCE, 3)


def test_of_formats_as_fast_the_one_that_changes_least_wins() -> None:
    close, exact = arm("Q4_0", 1.505, 1.505, 1.505, loss=3.02), arm("Q8_0", 1.5, 1.5, 1.5, loss=3.001)
    assert choice.winner([close, exact], SOURCE, most_increase=3) is exact


@pytest.mark.parametrize("times", [(0.9, 0.9, 0.9), (1.0, 1.0, 1.0), (1.02, 1.02, 1.02), (9.0, 1.0, 1.0)])
def test_what_is_not_clearly_faster_does_not_win(times: tuple[float, ...]) -> None:
    assert choice.winner([arm("Q4_0", *times)], SOURCE, most_increase=3) is None


def test_how_much_must_be_gained_is_asked_for() -> None:
    slower = arm("Q4_0", 0.95, 0.95, 0.95)
    assert choice.winner([slower], SOURCE, most_increase=3, least_gain=0.9) is slower
    assert choice.objection(slower, SOURCE, 3, 0.97) == "more than 3% slower than the source"
    assert choice.objection(arm("Q8_0", 1.1, 1.1, 1.1), SOURCE, 3, 1.2) == "less than 20% faster than the source"


def test_a_machine_that_slows_down_favours_none() -> None:
    """In each round both are half as fast as in the one before."""
    source, candidate = arm("source", 1, 0.5, 0.25), arm("Q4_0", 1.2, 0.6, 0.3)
    assert choice.gain(candidate, source) == pytest.approx(1.2)


def test_what_was_not_measured_or_failed_does_not_win() -> None:
    unscored, unmeasured, broken = arm("a", 2, 2, 2), arm("b"), arm("c", 2, 2, 2)
    unscored.losses = ()
    broken.problem = "llama.cpp crashed on it"
    assert choice.winner([unscored, unmeasured, broken], SOURCE, most_increase=100) is None
    assert choice.objection(broken, SOURCE, 3) == "llama.cpp crashed on it"


def test_perplexity_is_compared_token_by_token() -> None:
    source = Measured("source", losses=[1.0, 5.0, 3.0])
    shifted = Measured("Q8_0", losses=[1.01, 5.01, 3.01])
    cost = choice.increase(shifted, source)
    assert cost is not None
    assert cost.percent == pytest.approx(100 * math.expm1(0.01))
    assert cost.error == pytest.approx(0, abs=1e-9)  # though the losses themselves differ by far more
    assert choice.increase(Measured("Q4_0", losses=[1.0]), source) is None


def test_settings_change_only_for_a_clear_gain() -> None:
    now, fewer, flash = Settings(4), Settings(2), Settings(4, True)
    measured = {now: arm("now", 1, 1), fewer: arm("2", 1.02, 1.02), flash: arm("flash", 1.3, 1.3)}
    assert choice.better(measured, now) == flash
    assert choice.better({now: measured[now], fewer: measured[fewer]}, now) == now


@pytest.mark.parametrize("usable", [1, 2, 4, 8, 64, 256])
def test_numbers_of_threads_are_few_and_within_the_machine(usable: int) -> None:
    found = choice.thread_choices(Settings(usable), usable)
    assert len(found) <= choice.MAX_THREAD_CHOICES
    assert all(1 <= each.n_threads < usable for each in found)


def test_a_quantized_key_value_cache_leaves_flash_attention_alone() -> None:
    assert choice.flash_choices(Settings(2), "q8_0") == []
    assert choice.flash_choices(Settings(2), "f16") == [Settings(2, True), Settings(2, False)]


def test_formats_are_named_by_their_names() -> None:
    assert [each.name for each in formats.named("q4_0, Q8_0,Q4_0")] == ["Q4_0", "Q8_0"]
    assert formats.FORMATS["Q4_K_M"].number == 15
    for wrong in ("", "Q9_9", ",".join(formats.FORMATS)):
        with pytest.raises(ValueError, match=r"formats|none of"):
            formats.named(wrong)

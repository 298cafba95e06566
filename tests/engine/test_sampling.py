"""Sampling parameters: what is refused, and which chain of samplers they stand for."""

from __future__ import annotations

import math
from typing import Any

import pytest

from inference.engine import EngineError, SamplingParams
from inference.engine.sampling import (
    INFILL_CANDIDATES,
    NUM_SEEDS,
    SamplerStep,
    chain,
    check,
    memory_tokens,
    settle_seed,
)

pytestmark = pytest.mark.unit


def names(**fields: Any) -> list[str]:
    return [step.name for step in steps(**fields)]


def steps(**fields: Any) -> tuple[SamplerStep, ...]:
    return chain(SamplingParams(**fields), seed=7, n_ctx=512, end_tokens=(0, 2))


def test_the_default_chain_is_the_servers_without_the_samplers_that_do_nothing() -> None:
    assert names() == ["top_k", "top_p", "min_p", "temperature", "dist"]


def test_with_everything_on_the_order_is_the_servers() -> None:
    everything = {
        "logit_bias": ((5, 1.0),),
        "repeat_penalty": 1.1,
        "dry_multiplier": 0.8,
        "top_n_sigma": 1.0,
        "typical_p": 0.9,
        "xtc_probability": 0.5,
    }
    order = ["logit_bias", "penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc"]
    assert names(**everything) == [*order, "temperature", "dist"]


def test_samplers_whose_values_switch_them_off_are_left_out() -> None:
    assert names(top_k=0, top_p=1.0, min_p=0.0, xtc_probability=1.0, xtc_threshold=0.9) == ["temperature", "dist"]


def test_the_request_may_choose_samplers_and_their_order() -> None:
    assert names(samplers=("min_p", "top_k")) == ["min_p", "top_k", "dist"]


def test_temperature_zero_is_greedy_and_needs_nothing_that_keeps_the_best_token() -> None:
    assert names(temperature=0.0) == ["greedy"]
    assert names(temperature=-1.0, top_n_sigma=1.0) == ["greedy"]


def test_greedy_keeps_what_can_change_the_best_token() -> None:
    assert names(temperature=0.0, repeat_penalty=1.2) == ["penalties", "greedy"]
    assert names(temperature=0.0, typical_p=0.5) == ["top_k", "typ_p", "greedy"]
    assert names(temperature=0.0, xtc_probability=0.5) == ["top_k", "top_p", "min_p", "xtc", "greedy"]


def test_greedy_keeps_what_thins_out_the_candidates_that_are_to_be_reported() -> None:
    reported = {"temperature": 0.0, "num_probs": 3, "post_sampling_probs": True}
    assert names(**reported) == ["top_k", "top_p", "min_p", "greedy"]
    assert names(**{**reported, "post_sampling_probs": False}) == ["greedy"]


def test_greedy_ignores_what_comes_after_the_temperature() -> None:
    assert names(temperature=0.0, repeat_penalty=1.2, samplers=("temperature", "penalties")) == ["greedy"]


def test_truncation_in_front_of_penalties_is_kept_for_greedy() -> None:
    chosen = names(temperature=0.0, repeat_penalty=1.2, samplers=("top_k", "penalties", "temperature"))
    assert chosen == ["top_k", "penalties", "greedy"]


def test_without_the_temperature_sampler_temperature_zero_is_not_greedy() -> None:
    assert names(temperature=0.0, samplers=("top_k",)) == ["top_k", "dist"]


def test_dynamic_temperature_around_zero_is_not_greedy() -> None:
    assert names(temperature=0.0, dynatemp_range=0.5)[-2:] == ["temperature", "dist"]


@pytest.mark.parametrize(("mode", "name"), [(1, "mirostat"), (2, "mirostat_v2")])
def test_mirostat_replaces_the_chain(mode: int, name: str) -> None:
    assert names(mirostat=mode, repeat_penalty=1.2) == ["temperature", name]
    assert steps(mirostat=mode)[-1].arguments[:3] == (7, 5.0, 0.1)


def test_mirostat_at_temperature_zero_is_greedy() -> None:
    assert names(mirostat=1, temperature=0.0) == ["greedy"]


def test_ignore_eos_bans_every_token_that_ends_an_answer() -> None:
    bias = steps(ignore_eos=True, logit_bias=((9, 1.5),))[0]
    assert bias == SamplerStep("logit_bias", (((9, 1.5), (0, -math.inf), (2, -math.inf)),))


def test_min_keep_reaches_the_samplers_that_know_it() -> None:
    given = {step.name: step.arguments for step in steps(min_keep=3, typical_p=0.9, xtc_probability=0.5)}
    assert [given[name][1] for name in ("typ_p", "top_p", "min_p")] == [3, 3, 3]
    assert given["xtc"] == (0.5, 0.1, 3, 7)


def test_a_window_of_minus_one_is_the_whole_context() -> None:
    chosen = steps(repeat_penalty=1.1, repeat_last_n=-1, dry_multiplier=1.0, dry_penalty_last_n=-1)
    assert chosen[0].arguments == (512, 1.1, 0.0, 0.0)
    assert chosen[1].arguments[:4] == (1.0, 1.75, 2, 512)


def test_a_window_of_zero_switches_the_penalties_off() -> None:
    assert names(repeat_penalty=1.1, repeat_last_n=0, dry_multiplier=1.0, dry_penalty_last_n=0) == names()


def test_the_chain_says_how_much_of_the_prompt_it_must_see() -> None:
    assert memory_tokens(steps()) == 0
    assert memory_tokens(steps(presence_penalty=1.0, repeat_last_n=32)) == 32
    assert memory_tokens(steps(presence_penalty=1.0, dry_multiplier=1.0, dry_penalty_last_n=100)) == 100


def test_a_seed_is_folded_into_the_native_range_and_never_asks_for_a_random_one() -> None:
    assert settle_seed(42, lambda: 1) == 42
    assert settle_seed(None, lambda: 99) == 99
    assert settle_seed(-1, lambda: 1) == NUM_SEEDS - 1
    assert settle_seed(NUM_SEEDS, lambda: 1) == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": 2**31},
        {"repeat_penalty": 0.0},
        {"repeat_last_n": -2},
        {"presence_penalty": math.inf},
        {"min_keep": -1},
        {"mirostat": 3},
        {"num_probs": -1},
        {"num_probs": 101},
        {"xtc_probability": 1.5},
        {"dry_allowed_length": -1},
        {"samplers": ("top_k", "magic")},
        {"logit_bias": ((100, 1.0),)},
        {"logit_bias": ((-1, 1.0),)},
        {"logit_bias": ((1, math.nan),)},
        {"logit_bias": ((1, math.inf),)},
        {"logit_bias": tuple((token, -math.inf) for token in range(100))},
    ],
)
def test_what_the_native_samplers_would_not_survive_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(EngineError) as caught:
        check(SamplingParams(**fields), n_vocab=100)
    assert caught.value.code == "invalid_sampling"
    assert next(iter(fields)) in str(caught.value)


def test_the_defaults_and_a_ban_are_accepted() -> None:
    check(SamplingParams(), n_vocab=100)
    check(SamplingParams(logit_bias=((1, -math.inf), (2, 5.0))), n_vocab=100)


def test_infill_sees_few_candidates_and_once_whatever_comes_before_it() -> None:
    bounded = [SamplerStep("top_k", (INFILL_CANDIDATES,)), SamplerStep("infill")]
    assert list(steps(samplers=("infill",) * 3))[:-1] == bounded
    found = list(steps(samplers=("top_k", "infill"), top_k=1_000_000))
    assert found[:-1] == [SamplerStep("top_k", (1_000_000,)), *bounded]
    assert [each.name for each in steps(samplers=("infill", "temperature"), temperature=0.0)] == [
        "top_k",
        "infill",
        "greedy",
    ]

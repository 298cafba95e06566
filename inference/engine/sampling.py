"""How the next token is chosen, as data: checks of SamplingParams, and the chain of samplers they stand for.

Order and meaning are those of llama.cpp's server (common/sampling.cpp). No library is called here: the backend turns
the steps into native samplers. Pure; called when a request is submitted and when its sequence starts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from inference.engine.types import KNOWN_SAMPLERS, EngineError, SamplingParams, ThoughtBound

NUM_SEEDS = 2**32 - 1
"""Native seeds are 32 bits wide, and the highest value asks llama.cpp for a random one."""

MIROSTAT_CANDIDATES = 100
INFILL_CANDIDATES = 128
"""infill compares every candidate with every other: of all 49,152 of a vocabulary, more than half a minute a token."""
MAX_SHOWN = 64
MAX_TAG = 64
_INT32 = 2**31 - 1
_FLOAT = 1e9
_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (-_FLOAT, _FLOAT),
    "dynatemp_range": (0.0, _FLOAT),
    "dynatemp_exponent": (-_FLOAT, _FLOAT),
    "top_k": (-_INT32, _INT32),
    "top_p": (-_FLOAT, _FLOAT),
    "min_p": (-_FLOAT, _FLOAT),
    "typical_p": (-_FLOAT, _FLOAT),
    "top_n_sigma": (-_FLOAT, _FLOAT),
    "xtc_probability": (0.0, 1.0),
    "xtc_threshold": (0.0, 1.0),
    "min_keep": (0, _INT32),
    "repeat_last_n": (-1, _INT32),
    "repeat_penalty": (1e-6, _FLOAT),
    "presence_penalty": (-_FLOAT, _FLOAT),
    "frequency_penalty": (-_FLOAT, _FLOAT),
    "dry_multiplier": (0.0, _FLOAT),
    "dry_base": (0.0, _FLOAT),
    "dry_allowed_length": (0, _INT32),
    "dry_penalty_last_n": (-1, _INT32),
    "mirostat": (0, 2),
    "mirostat_tau": (0.0, _FLOAT),
    "mirostat_eta": (0.0, _FLOAT),
}
"""What the native samplers survive. Narrower, documented ranges belong to the API."""

_KEEPS_THE_BEST = frozenset({"top_n_sigma", "top_k", "top_p", "min_p"})
"""Samplers that never drop the most probable token, so a greedy choice right after them does not need them."""


@dataclass(frozen=True, slots=True)
class SamplerStep:
    """One sampler of a chain. The arguments follow the parameters of the native constructor of that name."""

    name: str
    arguments: tuple[Any, ...] = ()


def check(params: SamplingParams, n_vocab: int) -> None:
    """Refuse what would make the native samplers abort or choose nonsense. Raises EngineError "invalid_sampling"."""
    for name, (low, high) in _RANGES.items():
        value = getattr(params, name)
        if not low <= value <= high:  # NaN fails every comparison
            raise _invalid(f"{name} is {value}, it must be between {low:g} and {high:g}")
    if not 0 <= params.num_probs <= n_vocab:
        raise _invalid(f"num_probs is {params.num_probs}, the vocabulary has {n_vocab} tokens")
    if len(params.shown_tokens) > MAX_SHOWN or not all(0 <= token < n_vocab for token in params.shown_tokens):
        raise _invalid(f"shown_tokens are at most {MAX_SHOWN}, of 0 to {n_vocab - 1}")
    if params.thoughts is not None:
        _check_thoughts(params.thoughts, n_vocab)
    _check_samplers(params.samplers)
    _check_bias(params.logit_bias, n_vocab)


def _check_thoughts(bound: ThoughtBound, n_vocab: int) -> None:
    if bound.num_tokens < 0 or not all(0 < len(tag) <= MAX_TAG for tag in (bound.start, bound.end)):
        raise _invalid(f"thoughts have 0 tokens or more, and tags of 1 to {MAX_TAG} characters")
    if not 0 < len(bound.end_tokens) <= MAX_TAG or not all(0 <= token < n_vocab for token in bound.end_tokens):
        raise _invalid(f"the tag behind thoughts has 1 to {MAX_TAG} tokens, of 0 to {n_vocab - 1}")


def _check_samplers(samplers: Iterable[str]) -> None:
    if unknown := sorted(set(samplers) - set(KNOWN_SAMPLERS)):
        raise _invalid(f"unknown samplers {', '.join(unknown)}; known are {', '.join(KNOWN_SAMPLERS)}")


def _check_bias(logit_bias: Iterable[tuple[int, float]], n_vocab: int) -> None:
    banned = set()
    for token, bias in logit_bias:
        if not 0 <= token < n_vocab:
            raise _invalid(f"logit_bias names token {token}, the vocabulary has 0 to {n_vocab - 1}")
        if math.isnan(bias) or bias == math.inf:
            raise _invalid(f"logit_bias of token {token} is {bias}")
        if bias == -math.inf:
            banned.add(token)
    if len(banned) >= n_vocab:
        raise _invalid("logit_bias bans every token")


def _invalid(problem: str) -> EngineError:
    return EngineError("invalid_sampling", problem)


def settle_seed(seed: int | None, draw: Callable[[], int]) -> int:
    """The seed to use and to report: the wished one folded into the native range, or a drawn one."""
    return (draw() if seed is None else seed) % NUM_SEEDS


def chain(
    params: SamplingParams, *, seed: int, n_ctx: int, end_tokens: tuple[int, ...] = ()
) -> tuple[SamplerStep, ...]:
    """The samplers to apply in order; the last one chooses. A sampler whose parameters make it a no-op is left out.

    n_ctx: what "the whole context" (-1) means for the penalties. end_tokens: banned by ignore_eos.
    """
    bias = params.logit_bias + tuple((token, -math.inf) for token in end_tokens if params.ignore_eos)
    steps = [SamplerStep("logit_bias", (bias,))] if bias else []
    if _is_greedy(params):
        return (*steps, *_before_greedy(params, seed, n_ctx), SamplerStep("greedy"))
    if params.mirostat:
        return (*steps, SamplerStep("temperature", (params.temperature, 0.0, 1.0)), _mirostat(params, seed))
    return (*steps, *_active(params, params.samplers, seed, n_ctx), SamplerStep("dist", (seed,)))


def memory_tokens(steps: Iterable[SamplerStep]) -> int:
    """How many of the latest tokens the chain looks at: so many of the prompt's end must be accepted into it."""
    windows = {"penalties": 0, "dry": 3}  # the position of last_n among the arguments
    return max((step.arguments[windows[step.name]] for step in steps if step.name in windows), default=0)


def _is_greedy(params: SamplingParams) -> bool:
    coldest = params.temperature <= 0 and (params.mirostat > 0 or params.dynatemp_range <= 0)
    return coldest and (params.mirostat > 0 or "temperature" in params.samplers)


def _before_greedy(params: SamplingParams, seed: int, n_ctx: int) -> list[SamplerStep]:
    """What can still change which token is the best one: everything in front of the temperature that may drop it."""
    if params.mirostat:
        return []
    names = params.samplers[: params.samplers.index("temperature")]
    steps = _active(params, names, seed, n_ctx)
    reports_what_is_left = params.num_probs > 0 and params.post_sampling_probs
    while steps and not reports_what_is_left and steps[-1].name in _KEEPS_THE_BEST:
        steps.pop()
    return steps


def _mirostat(params: SamplingParams, seed: int) -> SamplerStep:
    if params.mirostat == 1:
        return SamplerStep("mirostat", (seed, params.mirostat_tau, params.mirostat_eta, MIROSTAT_CANDIDATES))
    return SamplerStep("mirostat_v2", (seed, params.mirostat_tau, params.mirostat_eta))


def _active(params: SamplingParams, names: Iterable[str], seed: int, n_ctx: int) -> list[SamplerStep]:
    """The named samplers that do something, in the order of their names."""
    known = {step.name: step for step in _candidates(params, seed, n_ctx)}
    steps: list[SamplerStep] = []
    for name in names:
        if name == "infill" and known[name] not in steps:
            steps += [SamplerStep("top_k", (INFILL_CANDIDATES,)), known[name]]
        elif name != "infill" and name in known:
            steps.append(known[name])
    return steps


def _candidates(params: SamplingParams, seed: int, n_ctx: int) -> Iterable[SamplerStep]:
    yield from _memories(params, n_ctx)
    keep = params.min_keep
    if params.top_n_sigma > 0:
        yield SamplerStep("top_n_sigma", (params.top_n_sigma,))
    if params.top_k > 0:
        yield SamplerStep("top_k", (params.top_k,))
    if params.typical_p < 1:
        yield SamplerStep("typ_p", (params.typical_p, keep))
    if params.top_p < 1:
        yield SamplerStep("top_p", (params.top_p, keep))
    if params.min_p > 0:
        yield SamplerStep("min_p", (params.min_p, keep))
    if params.xtc_probability > 0 and params.xtc_threshold <= 0.5:
        yield SamplerStep("xtc", (params.xtc_probability, params.xtc_threshold, keep, seed))
    yield SamplerStep("temperature", (params.temperature, params.dynatemp_range, params.dynatemp_exponent))
    yield SamplerStep("infill")


def _memories(params: SamplingParams, n_ctx: int) -> Iterable[SamplerStep]:
    """The samplers that remember tokens, windows resolved: -1 is the whole context."""
    last_n = n_ctx if params.repeat_last_n < 0 else min(params.repeat_last_n, n_ctx)
    penalties = (params.repeat_penalty, params.frequency_penalty, params.presence_penalty)
    if last_n > 0 and penalties != (1.0, 0.0, 0.0):
        yield SamplerStep("penalties", (last_n, *penalties))
    last_n = n_ctx if params.dry_penalty_last_n < 0 else min(params.dry_penalty_last_n, n_ctx)
    if last_n > 0 and params.dry_multiplier > 0 and params.dry_base >= 1:
        dry = (params.dry_multiplier, params.dry_base, params.dry_allowed_length, last_n, params.dry_sequence_breakers)
        yield SamplerStep("dry", dry)

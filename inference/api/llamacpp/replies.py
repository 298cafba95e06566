"""llama.cpp's answers from what every dialect knows of a request: text, token ids, and how it ended. Pure.

https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from inference.api.following import Collected, Ending
from inference.engine.types import Decoding, SamplingParams, Speculation, TokenProbs

LOWEST = -3.4028234663852886e38
"""Upstream's log of 0, which JSON has no word for: the least number of 32 bits."""
DRAFT_TYPES = {"prompt_lookup": "ngram-simple", "model": "draft"}
"""From a served model's setting to upstream's word."""
STOP_TYPES = {"eos": "eos", "stop": "word", "length": "limit"}


def final(
    collected: Collected,
    *,
    model: str,
    settings: dict[str, Any],
    with_tokens: bool,
    prompt: str,
    index: int = 0,
    content: str | None = None,
) -> dict[str, Any]:
    """A whole answer. content: what is said of it here, where a stream has said it already."""
    ending = collected.ending
    receipt = ending.receipt
    seed, slot = receipt.get("seed"), receipt.get("slot_id")
    found = {
        "index": index,
        "content": collected.text if content is None else content,
        "prompt": prompt,
        "tokens": collected.tokens if with_tokens else [],
        "id_slot": -1 if slot is None else slot,
        "stop": True,
        "model": model,
        "tokens_predicted": ending.completion_tokens,
        "tokens_evaluated": ending.prompt_tokens,
        "generation_settings": settings if seed is None else {**settings, "seed": seed},
        "has_new_line": "\n" in collected.text,
        "truncated": bool(receipt.get("is_truncated")),
        "stop_type": STOP_TYPES.get(ending.reason, "none"),
        "stopping_word": ending.stop_word or "",
        "tokens_cached": receipt.get("held_tokens", 0),
        "timings": timings(ending),
    }
    if collected.probs:
        found["completion_probabilities"] = probabilities(collected.probs, settings["post_sampling_probs"])
    return found


def probabilities(probs: Sequence[TokenProbs], post_sampling: bool) -> list[dict[str, Any]]:
    """Of each chosen token, and the most probable ones in its place."""
    top = "top_probs" if post_sampling else "top_logprobs"
    return [
        {**_probability(each, post_sampling), top: [_probability(likely, post_sampling) for likely in each.top]}
        for each in probs
    ]


def _probability(probs: TokenProbs, post_sampling: bool) -> dict[str, Any]:
    """A token's bytes may be a part of a character: as text they are what is whole of them."""
    measure = {"prob": math.exp(probs.logprob)} if post_sampling else {"logprob": max(probs.logprob, LOWEST)}
    text = probs.piece.decode("utf-8", "ignore")
    return {"id": probs.token, "token": text, "bytes": list(probs.piece), **measure}


def selected(content: dict[str, Any], paths: Sequence[str]) -> dict[str, Any]:
    """response_fields: these alone, by the paths under which they were asked for; what is not there is left out."""
    found = {path: _at(content, path.split("/")) for path in paths}
    return {path: value for path, value in found.items() if value is not ABSENT}


ABSENT = object()


def _at(content: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        content = content.get(key, ABSENT) if isinstance(content, dict) else ABSENT
    return content


def progress(total: int, cached: int, processed: int, seconds: float) -> dict[str, Any]:
    """return_progress: how far a prompt is; what was held already counts as processed, as upstream."""
    return {"total": total, "cache": cached, "processed": processed, "time_ms": round(seconds * 1000)}


def timings(ending: Ending) -> dict[str, Any]:
    """cache_n + prompt_n is the whole prompt. The first token comes out of the prompt, so its time is not counted."""
    receipt = ending.receipt
    cached = int(receipt.get("cached_tokens", 0))
    found = {
        "cache_n": cached,
        **_pace(
            "prompt", ending.prompt_tokens - cached, ending.prompt_tokens - cached, receipt.get("prefill_seconds", 0)
        ),
        **_pace("predicted", ending.completion_tokens, ending.completion_tokens - 1, receipt.get("decode_seconds", 0)),
    }
    if drafted := receipt.get("drafted_tokens"):
        found.update(draft_n=drafted, draft_n_accepted=receipt.get("accepted_tokens", 0))
    return found


def _pace(name: str, number: int, num_timed: int, seconds: float) -> dict[str, Any]:
    timed = num_timed > 0 and seconds > 0
    return {
        f"{name}_n": number,
        f"{name}_ms": seconds * 1000,
        f"{name}_per_token_ms": seconds * 1000 / num_timed if timed else 0.0,
        f"{name}_per_second": num_timed / seconds if timed else 0.0,
    }


def timings_so_far(
    num_prompt: int, num_cached: int, prompt_seconds: float, num_predicted: int, seconds: float
) -> dict[str, Any]:
    """timings_per_token: by the clock of the server that sends the events."""
    computed = num_prompt - num_cached
    return {
        "cache_n": num_cached,
        **_pace("prompt", computed, computed, prompt_seconds),
        **_pace("predicted", num_predicted, num_predicted - 1, seconds),
    }


def generation_settings(
    sampling: SamplingParams,
    *,
    wanted_tokens: int,
    decoding: Decoding = Decoding(),  # noqa: B008 - frozen
    stop: Sequence[str] = (),
    stream: bool = False,
    timings_per_token: bool = False,
    draft_kind: str = "none",
    lora: Sequence[tuple[int, float]] = (),
) -> dict[str, Any]:
    """The echo of what a request asked for, defaults filled in. seed is replaced by the one that was used."""
    settings = asdict(sampling)
    del settings["num_probs"], settings["thoughts"]
    settings.update(
        seed=-1 if sampling.seed is None else sampling.seed,
        logit_bias=[
            {"bias": None if math.isinf(bias) else bias, "token": token} for token, bias in sampling.logit_bias
        ],
        n_predict=wanted_tokens,
        max_tokens=wanted_tokens,
        n_keep=decoding.num_keep,
        n_discard=decoding.num_discard,
        context_shift=decoding.context_shift,
        n_probs=sampling.num_probs,
        stop=list(stop),
        stream=stream,
        grammar=sampling.grammar or "",
        timings_per_token=timings_per_token,
        lora=[{"id": position, "scale": scale} for position, scale in lora],
        **{"speculative.types": DRAFT_TYPES.get(draft_kind, draft_kind)},
        **_drafts(decoding.speculation),
        **FIXED,
    )
    return settings


FIXED: dict[str, Any] = {
    "adaptive_target": -1.0,
    "adaptive_decay": 0.9,
    "grammar_lazy": False,
    "grammar_triggers": [],
    "preserved_tokens": [],
    "chat_format": "Content-only",
    "reasoning_format": "none",
    "reasoning_in_content": False,
    "generation_prompt": "",
    "backend_sampling": False,
}
"""What upstream echoes and no request here can change."""


def _drafts(speculation: Speculation | None) -> dict[str, Any]:
    """What was asked for; nothing of it where the model's own settings hold."""
    if speculation is None:
        return {}
    return {
        "speculative.n_min": speculation.num_min,
        "speculative.n_max": speculation.num_max,
        "speculative.p_min": speculation.min_probability,
    }

"""Completions that are kept: by everything they depend on, per tenant, bounded."""

from __future__ import annotations

import time
from dataclasses import fields, replace
from typing import Any

import pytest
import redis

from inference.chat.thinking import THINK, Opening
from inference.engine.types import Decoding, SamplingParams
from inference.transport import completion_cache
from inference.transport.completion_cache import Completion, CompletionCache

KEPT = Completion(output="text", finish_reason="eos", stop_word=None, prompt_tokens=3, completion_tokens=2)
FACTS: dict[str, Any] = {
    "tenant_id": 1,
    "model_digest": "d",
    "adapters": (),
    "prompt": "hello",
    "max_tokens": 16,
    "sampling": SamplingParams(),
    "opening": None,
    "max_thought": None,
    "decoding": Decoding(),
    "stop": (),
    "n_ctx": 256,
    "max_output": None,
}
CHANGES: dict[str, Any] = {
    "tenant_id": 2,
    "model_digest": "e",
    "adapters": (("a", 1.0),),
    "prompt": "hello ",
    "max_tokens": None,
    "decoding": Decoding(context_shift=True),
    "stop": ("x",),
    "n_ctx": 128,
    "max_output": 8,
}


def key(**changes: Any) -> str:
    return completion_cache.key(**{**FACTS, **changes})


@pytest.mark.unit
def test_the_same_request_has_the_same_key() -> None:
    assert key() == key()


@pytest.mark.unit
@pytest.mark.parametrize("name", CHANGES)
def test_every_fact_that_the_answer_depends_on_is_part_of_the_key(name: str) -> None:
    assert key(**{name: CHANGES[name]}) != key()


@pytest.mark.unit
@pytest.mark.parametrize("decoding", [Decoding(min_indent=4), Decoding(max_decode_seconds=0.5)])
def test_what_ends_an_answer_early_is_part_of_the_key(decoding: Decoding) -> None:
    assert key(decoding=decoding) != key()


@pytest.mark.unit
def test_how_long_an_answer_may_think_is_part_of_the_key() -> None:
    """Where it may think at all."""
    opening = Opening(THINK, has_begun=False, may_begin=True)
    assert len({key(opening=opening, max_thought=number) for number in (None, 0, 8)}) == 3
    assert key(max_thought=8) == key(opening=opening) == key()


@pytest.mark.unit
@pytest.mark.parametrize("name", [field.name for field in fields(SamplingParams)])
def test_every_sampling_parameter_is_part_of_the_key(name: str) -> None:
    value = getattr(SamplingParams(), name)
    other: Any = (("x",) if name != "logit_bias" else ((1, 2.0),)) if isinstance(value, tuple) else 3
    if isinstance(value, bool):
        other = not value
    assert key(sampling=replace(SamplingParams(), **{name: other})) != key()


@pytest.fixture
def cache(valkey: Any) -> CompletionCache:
    return CompletionCache(valkey, 60)


@pytest.mark.integration
def test_what_was_put_is_found(cache: CompletionCache) -> None:
    assert cache.get(key(), model_id="m") is None
    cache.put(key(), KEPT)
    assert cache.get(key(), model_id="m") == KEPT
    assert cache.get(key(tenant_id=2), model_id="m") is None


@pytest.mark.integration
def test_it_is_forgotten_after_its_time(valkey: Any) -> None:
    cache = CompletionCache(valkey, 1)
    cache.put(key(), KEPT)
    assert 0 < valkey.pttl(f"completion:{key()}") <= 1000
    time.sleep(1.1)
    assert cache.get(key(), model_id="m") is None


@pytest.mark.integration
def test_a_cache_of_no_time_is_off(valkey: Any) -> None:
    cache = CompletionCache(valkey, 0)
    cache.put(key(), KEPT)
    assert not cache.is_on
    assert cache.get(key(), model_id="m") is None
    assert valkey.keys("completion*") == []


@pytest.mark.integration
def test_empty_and_huge_outputs_are_not_kept(cache: CompletionCache, valkey: Any) -> None:
    cache.put(key(), replace(KEPT, output=""))
    cache.put(key(), replace(KEPT, output="x" * completion_cache.MAX_VALUE_BYTES))
    assert valkey.keys("completion*") == []


@pytest.mark.integration
def test_the_least_recently_used_make_room(
    cache: CompletionCache, valkey: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(completion_cache, "MAX_ENTRIES_PER_TENANT", 3)
    for prompt in "abc":
        cache.put(key(prompt=prompt), KEPT)
    assert cache.get(key(prompt="a"), model_id="m") == KEPT
    cache.put(key(prompt="d"), KEPT)
    assert [cache.get(key(prompt=prompt), model_id="m") is not None for prompt in "abcd"] == [True, False, True, True]
    assert valkey.zcard("completions:1") == 3


@pytest.mark.integration
@pytest.mark.parametrize("body", ['{"output":"text","thoughts":"a field of a later version"}', "garbage", "[1]"])
def test_what_another_version_has_kept_is_a_miss(cache: CompletionCache, valkey: Any, body: str) -> None:
    """Web processes are upgraded one by one."""
    cache.put(key(), KEPT)
    valkey.set(f"completion:{key()}", body)
    assert cache.get(key(), model_id="m") is None


@pytest.mark.integration
def test_a_cache_that_fails_is_a_miss() -> None:
    nowhere = CompletionCache(redis.Redis(unix_socket_path="/nonexistent"), 60)
    assert nowhere.get(key(), model_id="m") is None

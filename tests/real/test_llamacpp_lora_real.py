"""Adapters of llama.cpp's dialect over HTTP: scales, defaults of a tenant, and no bleed between requests side by side.

What is asserted are relations: a scale of 0 is no adapter, equal scales are equal texts, the poet writes for the stage.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.llamacpp_calls import complete, error_of, stream
from tests.real.conftest import LlamaSite

pytestmark = [pytest.mark.model, pytest.mark.integration, pytest.mark.slow, pytest.mark.xdist_group("llama_site")]

GLASS = "Look in thy glass"
STAGE = re.compile(r"\[|\b(enter|exit|exeunt|scene|act|sir|lord|king|servant|thou|thee|thy)\b", re.IGNORECASE)
FIXED = {"seed": 42, "temperature": 0, "cache_prompt": False, "n_predict": 24}


def scaled(scale: float | None, adapter: int = 0) -> dict[str, Any]:
    """A request with Alice's adapter at this scale; None says nothing of adapters."""
    lora = {} if scale is None else {"lora": [{"id": adapter, "scale": scale}]}
    return {"prompt": GLASS, **FIXED, **lora}


def text(client: httpx.Client, **fields: Any) -> str:
    answer = complete(client, **fields)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["content"])


def stage_words(text: str) -> int:
    return len(STAGE.findall(text))


@pytest.fixture(autouse=True)
def _no_default(llama_site: LlamaSite) -> Iterator[None]:
    yield
    assert llama_site.alice.post("/lora-adapters", json=[]).status_code == 200


def test_adapters_are_listed_by_their_numbers(llama_site: LlamaSite) -> None:
    alice, bob = llama_site.alice.get("/lora-adapters").json(), llama_site.bob.get("/lora-adapters").json()
    assert [(each["id"], each["path"], each["scale"]) for each in alice] == [(0, "shakespeare", 0.0)]
    assert [(each["id"], each["path"]) for each in bob] == [(0, "json-reply"), (1, "shakespeare")]
    assert {"id", "path", "scale", "task_name", "prompt_prefix"} <= set(alice[0])


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_a_default_scale_is_that_scale_in_the_request(llama_site: LlamaSite, scale: float) -> None:
    answer = llama_site.alice.post("/lora-adapters", json=[{"id": 0, "scale": scale}])
    assert (answer.status_code, answer.json()) == (200, {"success": True})
    assert [each["scale"] for each in llama_site.alice.get("/lora-adapters").json()] == [scale]
    assert text(llama_site.alice, **scaled(None)) == text(llama_site.alice, **scaled(scale))


def test_scale_0_is_no_adapter_and_scale_1_writes_for_the_stage(llama_site: LlamaSite) -> None:
    without = text(llama_site.alice, **scaled(None), lora=[])
    assert text(llama_site.alice, **scaled(0.0)) == without
    with_adapter = text(llama_site.alice, **scaled(1.0))
    assert with_adapter != without
    assert stage_words(with_adapter) >= stage_words(without) + 2


def test_a_requests_own_scale_goes_before_the_default_and_leaves_it(llama_site: LlamaSite) -> None:
    alice = llama_site.alice
    styled = text(alice, **scaled(1.0))
    alice.post("/lora-adapters", json=[{"id": 0, "scale": 1.0}])
    plain = text(alice, **scaled(0.0))
    assert plain != styled
    assert text(alice, **scaled(None)) == styled
    assert text(alice, **scaled(None), lora=[]) == plain
    assert [each["scale"] for each in alice.get("/lora-adapters").json()] == [1.0]


def test_a_default_is_the_tenants_alone(llama_site: LlamaSite) -> None:
    plain = text(llama_site.bob, **scaled(None))
    llama_site.alice.post("/lora-adapters", json=[{"id": 0, "scale": 1.0}])
    assert text(llama_site.bob, **scaled(None)) == plain
    assert [each["scale"] for each in llama_site.bob.get("/lora-adapters").json()] == [0.0, 0.0]


def test_six_requests_at_once_each_with_its_own_scale(llama_site: LlamaSite) -> None:
    scales = (0.0, 0.0, 0.3, 0.7, 1.0, 1.0)
    together = [each["content"] for each in llama_site.at_once(llama_site.alice, *map(scaled, scales))]
    assert together[0] == together[1]
    assert together[4] == together[5]
    assert len({*together}) == 4, "each scale has a text of its own"
    assert min(map(stage_words, together[3:])) >= max(map(stage_words, together[:2])) + 2
    assert together == [text(llama_site.alice, **scaled(scale)) for scale in scales], "alone it is the same"


def test_two_adapters_of_two_tenants_at_once_are_as_alone(llama_site: LlamaSite) -> None:
    bodies = [scaled(1.0, 0), scaled(1.0, 1), scaled(1.5, 1), {**scaled(None), "lora": both(0.5)}]
    together = [each["content"] for each in llama_site.at_once(llama_site.bob, *bodies)]
    assert len({*together}) == len(bodies)
    assert together[1] == text(llama_site.alice, **scaled(1.0)), "the same adapter under another number"
    assert together == [text(llama_site.bob, **body) for body in bodies]


def both(scale: float) -> list[dict[str, Any]]:
    return [{"id": number, "scale": scale} for number in (0, 1)]


def test_another_scale_computes_the_prompt_anew(llama_site: LlamaSite) -> None:
    prompt = "Shall I compare thee to a summer's day? Thou art more lovely and more temperate."
    body = {**scaled(1.0), "prompt": prompt, "cache_prompt": True, "n_predict": 4}
    first, again = (complete(llama_site.alice, **body).json() for _ in range(2))
    other = complete(llama_site.alice, **body | {"lora": [{"id": 0, "scale": 0.9}]}).json()
    assert again["timings"]["prompt_n"] == 1
    assert other["timings"]["prompt_n"] == first["tokens_evaluated"] == llama_site.count(prompt)
    assert again["content"] == first["content"]


def test_scales_are_echoed_and_a_stream_says_the_same(llama_site: LlamaSite) -> None:
    body = scaled(0.7)
    answer = complete(llama_site.alice, **body).json()
    assert answer["generation_settings"]["lora"] == [{"id": 0, "scale": 0.7}]
    *parts, last = stream(llama_site.alice, **body)
    assert "".join(part["content"] for part in parts) == answer["content"]
    assert last["generation_settings"]["lora"] == [{"id": 0, "scale": 0.7}]


@pytest.mark.parametrize(
    "lora", [5, "0", {"id": 0}, [{"id": 7, "scale": 1.0}], [{"id": -1}], [{"id": 0, "scale": "high"}], [[0, 1.0]]]
)
def test_adapters_that_are_none_are_refused_and_the_worker_lives(llama_site: LlamaSite, lora: Any) -> None:
    error = error_of(complete(llama_site.alice, GLASS, lora=lora), 400)
    assert error["type"] == "invalid_request_error"
    error_of(llama_site.alice.post("/lora-adapters", json=lora), 400)
    assert complete(llama_site.alice, GLASS, n_predict=1).status_code == 200

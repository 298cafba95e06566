"""Embeddings with the real model: the official client and llama.cpp's dialect against a site, and the engine itself."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from tests.llamacpp_calls import complete
from tests.openai_calls import async_sdk, error_of, sdk
from tests.real.conftest import LlamaSite

pytestmark = [pytest.mark.model, pytest.mark.integration, pytest.mark.slow, pytest.mark.xdist_group("llama_site")]

MODEL, TOKENWISE = "embedder", "tokenwise"
TEXTS = [
    "The cat sits on the mat and looks out of the window.",
    "A kitten is sitting on a rug and watching the street.",
    "Interest rates rose again as the central bank fought inflation.",
    "Hello",
    "Ships sail over the wide sea. " * 12,
]


@pytest.fixture(scope="module")
def site(llama_site: LlamaSite, model_path: Path) -> LlamaSite:
    """With two models more that embed; the second gives a vector for each token."""
    common = {"path": str(model_path), "n_ctx": 512, "n_slots": 4, "capabilities": {"embeddings": True}}
    bodies: list[dict[str, Any]] = [
        {"name": MODEL, **common, "embedding_pooling": "mean"},
        {"name": TOKENWISE, **common, "n_ctx": 256, "load_mode": "lazy", "embedding_pooling": "none"},
    ]
    for body in bodies:
        answer = llama_site.operator.post("/v1/admin/models", json=body)
        assert answer.status_code == 201, answer.text
    return llama_site


@pytest.fixture(scope="module")
def client(site: LlamaSite) -> Iterator[openai.OpenAI]:
    with sdk(site.site.base_url, site.site.key) as found:
        yield found


def embedding(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post("/embedding", json={"model": MODEL, **body})


def test_float_and_base64_are_the_same_numbers_of_length_one_in_the_order_of_the_inputs(
    client: openai.OpenAI, site: LlamaSite
) -> None:
    coded = client.embeddings.create(model=MODEL, input=TEXTS)  # the client asks for base64 by itself
    plain = client.embeddings.create(model=MODEL, input=TEXTS, encoding_format="float")
    assert [each.index for each in plain.data] == list(range(len(TEXTS)))
    assert [each.embedding for each in coded.data] == [each.embedding for each in plain.data]
    assert {len(each.embedding) for each in plain.data} == {576}
    assert all(math.isclose(np.linalg.norm(each.embedding), 1.0, abs_tol=1e-5) for each in plain.data)
    number = sum(site.count(text) for text in TEXTS)
    assert (plain.usage.prompt_tokens, plain.usage.total_tokens) == (number, number)
    assert (plain.model, plain.object) == (MODEL, "list")
    alone = [client.embeddings.create(model=MODEL, input=text).data[0].embedding for text in TEXTS]
    assert alone == [each.embedding for each in plain.data]  # to the last bit, alone and in company


def test_an_async_client_and_token_ids_give_the_same(client: openai.OpenAI, site: LlamaSite) -> None:
    wanted = [each.embedding for each in client.embeddings.create(model=MODEL, input=TEXTS[:2]).data]
    tokens = [
        site.alice.post("/tokenize", json={"content": text, "add_special": True}).json()["tokens"] for text in TEXTS[:2]
    ]

    async def ask() -> list[list[float]]:
        async with async_sdk(site.site.base_url, site.site.key) as found:
            several, single = await asyncio.gather(
                found.embeddings.create(model=MODEL, input=tokens),
                found.embeddings.create(model=MODEL, input=tokens[0]),
            )
        assert single.data[0].embedding == several.data[0].embedding
        return [each.embedding for each in several.data]

    assert asyncio.run(ask()) == wanted


def test_dimensions_cut_a_vector_and_make_it_one_of_length_one_again(client: openai.OpenAI) -> None:
    whole = np.array(client.embeddings.create(model=MODEL, input=TEXTS[0]).data[0].embedding)
    cut = np.array(client.embeddings.create(model=MODEL, input=TEXTS[0], dimensions=64).data[0].embedding)
    assert np.allclose(cut, whole[:64] / np.linalg.norm(whole[:64]), atol=1e-6)
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model=MODEL, input="x", dimensions=577)
    assert caught.value.param == "dimensions"
    assert "576" in caught.value.message


def test_a_text_near_in_meaning_is_nearer(client: openai.OpenAI) -> None:
    cat, kitten, bank = (
        np.array(each.embedding) for each in client.embeddings.create(model=MODEL, input=TEXTS[:3]).data
    )
    assert cat @ kitten > cat @ bank


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"input": ""}, "empty_prompt", "input"),
        ({"input": []}, "invalid_value", "input"),
        ({"input": [[]]}, "invalid_value", "input"),
        ({"input": [["a", 1]]}, "invalid_value", "input"),
        ({"input": [["a", [1]]]}, "invalid_value", "input"),
        ({"input": 7}, "invalid_value", "input"),
        ({"input": ["x"] * 2049}, "invalid_value", "input"),
        ({"input": [[49_152]]}, "invalid_token", "input"),
        ({}, "missing_required_parameter", "input"),
        ({"input": "x", "encoding_format": "hex"}, "invalid_value", "encoding_format"),
        ({"input": "x", "dimensions": 0}, "invalid_value", "dimensions"),
        ({"input": "x", "model": "smollm2-135m"}, "capability_not_supported", None),
        ({"input": "x", "model": TOKENWISE}, "capability_not_supported", None),
        ({"input": ["short", "word " * 600]}, "context_length_exceeded", "input"),
    ],
)
def test_what_cannot_be_embedded_is_refused_and_costs_nothing(
    site: LlamaSite, fields: dict[str, Any], code: str, param: str | None
) -> None:
    answer = site.alice.post("/v1/embeddings", json={"model": MODEL, **fields})
    error_of(answer, 400, code, param)
    if code == "context_length_exceeded":
        assert "512 tokens" in answer.json()["error"]["message"]


def test_a_model_that_is_not_there_is_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.embeddings.create(model="of-charlie", input="x")
    assert caught.value.code == "model_not_found"


def test_llamacpps_shape_norms_and_limits(site: LlamaSite, client: openai.OpenAI) -> None:
    wanted = np.array([each.embedding for each in client.embeddings.create(model=MODEL, input=TEXTS[:2]).data])
    answer = embedding(site.alice, content=TEXTS[:2])
    assert answer.status_code == 200, answer.text
    assert [(each["index"], len(each["embedding"])) for each in answer.json()] == [(0, 1), (1, 1)]
    assert np.array_equal([each["embedding"][0] for each in answer.json()], wanted)
    again = site.alice.post("/embeddings", json={"model": MODEL, "input": TEXTS[0]}).json()
    assert np.array_equal(again[0]["embedding"][0], wanted[0])
    raw, largest, sums = (
        np.array(embedding(site.alice, content=TEXTS[0], embd_normalize=kind).json()[0]["embedding"][0])
        for kind in (-1, 0, 1)
    )
    assert np.allclose(raw / np.linalg.norm(raw), wanted[0], atol=1e-6)
    assert math.isclose(abs(largest).max(), 32760, rel_tol=1e-5)
    assert math.isclose(abs(sums).sum(), 1.0, abs_tol=1e-4)
    long = embedding(site.alice, content="word " * 600)
    assert (long.status_code, long.json()["error"]["type"]) == (400, "exceed_context_size_error")
    assert (long.json()["error"]["n_ctx"], long.json()["error"]["n_prompt_tokens"]) == (512, 601)
    for body in ({}, {"content": "a", "input": "b"}, {"content": "a", "encoding_format": "base64"}):
        assert embedding(site.alice, **body).status_code == 400


def test_without_pooling_each_token_has_a_vector_of_any_length(site: LlamaSite, client: openai.OpenAI) -> None:
    rows = np.array(embedding(site.alice, model=TOKENWISE, content=TEXTS[0]).json()[0]["embedding"])
    assert rows.shape == (site.count(TEXTS[0]), 576)
    mean = rows.mean(axis=0)
    wanted = client.embeddings.create(model=MODEL, input=TEXTS[0]).data[0].embedding
    assert np.allclose(mean / np.linalg.norm(mean), wanted, atol=1e-5)


def test_a_receipt_has_the_prompt_and_no_output(site: LlamaSite) -> None:
    before = site.alice.get("/v1/me/usage").json()["quota_used"]
    answer = site.alice.post("/v1/embeddings", json={"model": MODEL, "input": TEXTS[:2]})
    number = answer.json()["usage"]["prompt_tokens"]
    assert answer.headers["x-usage-prompt-tokens"] == str(number)
    receipt = site.alice.get(f"/v1/requests/{answer.headers['x-request-id']}").json()
    assert receipt["status"] == "completed"
    assert (receipt["usage"]["prompt_tokens"], receipt["usage"]["completion_tokens"]) == (number, 0)
    assert site.alice.get("/v1/me/usage").json()["quota_used"] == before + number
    assert site.bob.get(f"/v1/requests/{answer.headers['x-request-id']}").status_code == 404


def test_models_say_who_embeds(site: LlamaSite) -> None:
    found = {each["id"]: each["capabilities"]["embeddings"] for each in site.alice.get("/v1/models").json()["models"]}
    assert (found[MODEL], found["smollm2-135m"]) == (True, False)


def test_who_generates_meanwhile_gets_the_same_tokens(site: LlamaSite) -> None:
    body = {"prompt": "Once upon a time", "n_predict": 24, "temperature": 0, "return_tokens": True, "model": MODEL}
    alone = complete(site.alice, **body).json()["tokens"]
    embeds = [
        site.pool.submit(lambda who=who: who.post("/v1/embeddings", json={"model": MODEL, "input": TEXTS * 3}))
        for who in (site.alice, site.bob)
    ]
    beside = [each["tokens"] for each in site.at_once(site.alice, *[body] * 2)]
    assert beside == [alone, alone]
    first, second = (each.result().json()["data"] for each in embeds)
    assert first == second

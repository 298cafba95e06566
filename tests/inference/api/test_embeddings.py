"""Embeddings on a whole site with a fake model: one ticket, ledger, limits and refusals of both dialects."""

from __future__ import annotations

import base64
from typing import Any

import httpx
import numpy as np
import pytest

from inference.api import embedding
from inference.api.llamacpp import prompts
from inference.catalog import registry
from inference.models import Receipt, ServedModel
from tests.conftest import make_customer
from tests.in_process import MODEL, N_CTX, OTHER_MODEL, InProcessSite, leave_after, wait_until
from tests.openai_calls import error_of

pytestmark = pytest.mark.api
ROUTE = "/v1/embeddings"


@pytest.fixture
def site(site: InProcessSite) -> InProcessSite:
    """Whose first model embeds."""
    serve(site, capabilities={"embeddings": True})
    return site


def serve(site: InProcessSite, **fields: Any) -> None:
    """Change the first model, in the worker, too."""
    ServedModel.objects.filter(name=MODEL).update(**fields)
    registry.changed()
    site.stop_worker()
    site.start_worker()


def embed(client: httpx.Client, texts: Any, **fields: Any) -> httpx.Response:
    return client.post(ROUTE, json={"input": texts, **fields})


def vectors(response: httpx.Response) -> list[list[float]]:
    assert response.status_code == 200, response.text
    return [each["embedding"] for each in response.json()["data"]]


def test_many_inputs_are_one_request_in_ledger_and_receipt(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    texts = [f"text number {number} {'more ' * (number % 7)}" for number in range(300)]
    response = embed(alice, texts, model=MODEL)
    found = vectors(response)
    number = sum(len(text.split()) for text in texts)
    assert response.json()["usage"] == {"prompt_tokens": number, "total_tokens": number}
    assert [each["index"] for each in response.json()["data"]] == list(range(300))
    assert np.allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-5)
    assert len({tuple(each) for each in found}) == 300
    site.settle()
    receipt = Receipt.objects.get()
    assert (receipt.route, receipt.status, receipt.completion_tokens) == (ROUTE, "completed", 0)
    assert (receipt.prompt_tokens, receipt.charged_tokens) == (number, number)
    assert site.charged(site.cast.alice) == (number, 0)
    assert vectors(embed(alice, texts[7])) == [found[7]]


def test_base64_is_the_same_numbers(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    (plain,), (coded,) = vectors(embed(alice, "a b c")), vectors(embed(alice, "a b c", encoding_format="base64"))
    assert isinstance(coded, str)
    assert np.frombuffer(base64.b64decode(coded), "<f4").tolist() == plain


def test_llamacpps_answer_is_an_array_and_charlie_sees_no_receipt(site: InProcessSite) -> None:
    alice, charlie = site.client(site.cast.alice), site.client(site.cast.charlie)
    (wanted,) = vectors(embed(alice, "a b c"))
    for path, name in (("/embedding", "content"), ("/embeddings", "input"), ("/embeddings", "content")):
        response = alice.post(path, json={name: "a b c"})
        assert response.json() == [{"index": 0, "embedding": [wanted]}]
    site.settle()
    assert alice.get(f"/v1/requests/{response.headers['x-request-id']}").status_code == 200
    assert charlie.get(f"/v1/requests/{response.headers['x-request-id']}").status_code == 404


def test_without_pooling_there_is_a_vector_for_each_token_in_llamacpps_dialect_alone(site: InProcessSite) -> None:
    serve(site, embedding_pooling="none")
    alice = site.client(site.cast.alice)
    (found,) = alice.post("/embedding", json={"content": "a b c"}).json()
    assert len(found["embedding"]) == 3
    error = error_of(embed(alice, "a b c"), 400, "capability_not_supported")
    assert "POST /embeddings" in error["message"]


def test_a_change_of_pooling_holds_without_loading(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    (mean,) = vectors(embed(alice, "a b c"))
    ServedModel.objects.filter(name=MODEL).update(embedding_pooling="last")
    registry.changed()
    assert vectors(embed(alice, "a b c")) != [mean]


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"input": " "}, "empty_prompt", "input"),
        ({"input": ["a", " "]}, "empty_prompt", "input"),
        ({"input": []}, "invalid_value", "input"),
        ({"input": ["a", 1]}, "invalid_value", "input"),
        ({"input": {"a": 1}}, "invalid_value", "input"),
        ({"input": ["a"] * 2049}, "invalid_value", "input"),
        ({"input": "word " * (N_CTX + 1)}, "context_length_exceeded", "input"),
        ({"input": "a", "dimensions": -1}, "invalid_value", "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "invalid_value", "encoding_format"),
        ({"input": "a", "adapters": [{"name": "none"}]}, "adapter_not_found", "adapters"),
        ({}, "missing_required_parameter", "input"),
    ],
)
def test_what_is_refused_holds_and_charges_nothing(
    site: InProcessSite, fields: dict[str, Any], code: str, param: str
) -> None:
    alice = site.client(site.cast.alice)
    response = alice.post(ROUTE, json=fields)
    error_of(response, 404 if code == "adapter_not_found" else 400, code, param)
    assert site.charged(site.cast.alice) == (0, 0)
    assert site.num_running() == 0


def test_a_whole_context_fits_and_no_answer_needs_room(site: InProcessSite) -> None:
    assert len(vectors(embed(site.client(site.cast.alice), "word " * N_CTX))) == 1


def test_texts_are_tokenized_together_some_at_a_time(site: InProcessSite, monkeypatch: pytest.MonkeyPatch) -> None:
    alice = site.client(site.cast.alice)
    asked: list[list[str]] = []
    encode_each = site.tokenizers.encode_each

    def counted(model: Any, texts: Any, **how: Any) -> Any:
        asked.append(list(texts))
        return encode_each(model, texts, **how)

    monkeypatch.setattr(site.tokenizers, "encode_each", counted)
    monkeypatch.setattr(prompts, "CHARACTERS_AT_ONCE", 6)
    texts = ["a b", "c", "d e f g h", "i", "j k", "l m"]
    alone = [vectors(embed(alice, each))[0] for each in texts]
    asked.clear()
    assert vectors(embed(alice, texts)) == alone
    assert asked == [["a b", "c"], ["d e f g h"], ["i", "j k"], ["l m"]]
    asked.clear()
    mixed = [[5, 6], "a b", [7]]
    assert len(alice.post("/embedding", json={"content": mixed}).json()) == 3
    assert asked == [["a b"]]


def test_there_is_an_end_to_tokens_and_numbers_of_one_request(
    site: InProcessSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    alice = site.client(site.cast.alice)
    monkeypatch.setattr(embedding, "MAX_INPUT_TOKENS", 5)
    error_of(embed(alice, ["a b c", "d e f"]), 400, "invalid_value", "input")
    monkeypatch.setattr(embedding, "MAX_NUMBERS", 8)
    error_of(embed(alice, ["a", "b", "c"], dimensions=4), 400, "invalid_value", "input")


def test_a_model_that_was_not_switched_on_and_one_that_is_not_granted(site: InProcessSite) -> None:
    alice, bob = site.client(site.cast.alice), site.client(site.cast.bob)
    error = error_of(embed(alice, "a", model=OTHER_MODEL), 400, "capability_not_supported")
    assert "not switched them on" in error["message"]
    error_of(embed(bob, "a", model=OTHER_MODEL), 404, "model_not_found", "model")
    response = alice.post("/embedding", json={"content": "a", "model": OTHER_MODEL})
    assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")


def test_a_model_that_only_embeds_generates_nothing(site: InProcessSite) -> None:
    serve(site, capabilities={"embeddings": True, "generate": False})
    alice = site.client(site.cast.alice)
    response = alice.generate()
    assert (response.status_code, response.json()["code"]) == (400, "capability_not_supported")
    assert len(vectors(embed(alice, "a"))) == 1


def test_the_quota_bounds_vectors_as_it_bounds_answers(site: InProcessSite) -> None:
    dora = make_customer("Dora's", site.cast.alice.tenant.plan, monthly_tokens=10)
    client = site.client(dora)
    assert len(vectors(embed(client, "a b c d e f"))) == 1
    site.settle()
    error = error_of(embed(client, "a b c d e f"), 429, "insufficient_quota")
    assert error["type"] == "insufficient_quota"
    assert client.post("/embedding", json={"content": "a b c d e f"}).status_code == 402
    assert len(vectors(embed(client, "a b c d"))) == 1
    assert site.charged(dora) == (10, 0)


def test_a_client_that_goes_away_ends_its_request(site: InProcessSite) -> None:
    site.speed.seconds_per_step = 0.2
    serve(site)
    it_runs = lambda: wait_until(lambda: site.num_running() == 1)  # noqa: E731
    leave_after(site, site.cast.alice.text, {"input": ["a b c"] * 500}, it_runs, ROUTE)
    wait_until(lambda: site.num_running() == 0)
    site.settle()
    assert Receipt.objects.get().status == "cancelled"

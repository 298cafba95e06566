"""llama.cpp's dialect on a whole site with a fake model: shapes, bounds, errors, streams, adapters by number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inference.catalog import adapter_rows, granting
from inference.models import Adapter, Receipt
from tests.in_process import MODEL, N_CTX, N_SLOTS, InProcessSite
from tests.llamacpp_calls import complete, error_of, stream

pytestmark = pytest.mark.api


@pytest.fixture
def make(site: InProcessSite, tmp_path: Path) -> Callable[..., Adapter]:
    """An adapter granted to these customers."""

    def make_adapter(name: str, *customers: Any) -> Adapter:
        path = tmp_path / f"{name}.gguf"
        path.write_text(name)
        row = Adapter.objects.create(
            name=name, base_model=site.models[MODEL], path=str(path), digest=name.ljust(64, "0"), size_bytes=4, rank=8
        )
        for customer in customers:
            granting.grant(row, customer.tenant)
        adapter_rows.changed()
        site.stop_worker()
        site.start_worker()
        return row

    return make_adapter


def test_a_completion_has_upstreams_shape(site: InProcessSite) -> None:
    response = complete(site.client(site.cast.alice), return_tokens=True, seed=7)
    body = response.json()
    assert response.status_code == 200, body
    assert (body["stop"], body["stop_type"], body["truncated"], body["model"]) == (True, "limit", False, MODEL)
    assert (body["tokens_predicted"], body["tokens_evaluated"], len(body["tokens"])) == (8, 4, 8)
    timings = body["timings"]
    assert timings["cache_n"] + timings["prompt_n"] == body["tokens_evaluated"]
    assert timings["predicted_n"] == 8
    assert 0 <= body["id_slot"] < N_SLOTS
    settings = body["generation_settings"]
    assert (settings["seed"], settings["n_predict"], settings["top_k"]) == (7, 8, 40)
    site.settle()
    assert Receipt.objects.get().route == "/completion"


def test_a_stream_says_what_one_object_says(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    whole = complete(alice, return_tokens=True).json()
    *parts, last = stream(alice)
    assert "".join(part["content"] for part in parts) == whole["content"]
    assert [token for part in parts for token in part["tokens"]] == whole["tokens"]
    assert not any(part["stop"] for part in parts)
    assert last["stop"] and last["content"] == ""
    same = ("stop_type", "tokens_predicted", "tokens_evaluated", "model", "has_new_line")
    assert {name: last[name] for name in same} == {name: whole[name] for name in same}


def test_an_array_of_prompts_is_answered_by_an_array(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    results = complete(alice, ["one two", [5, 6, 7]]).json()
    assert [(each["index"], each["tokens_evaluated"]) for each in results] == [(0, 2), (1, 3)]
    assert results[1]["content"] == complete(alice, [5, 6, 7]).json()["content"]
    error_of(complete(alice, ["one"] * 17), 400)


def test_a_stop_word_is_named(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    word = complete(alice).json()["content"].split()[2]
    body = complete(alice, stop=[word]).json()
    assert (body["stop_type"], body["stopping_word"]) == ("word", word)
    assert word not in body["content"]


def test_without_n_predict_the_answer_ends_at_the_context(site: InProcessSite) -> None:
    body = complete(site.client(site.cast.alice), n_predict=-1).json()
    assert body["stop_type"] == "limit"
    assert body["tokens_evaluated"] + body["tokens_predicted"] <= N_CTX


def test_soft_bounds_clamp_and_hard_ones_refuse(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    settings = complete(alice, top_p=7, min_p=-1, top_k=-5, logit_bias=[[5, False]]).json()["generation_settings"]
    assert (settings["top_p"], settings["min_p"], settings["top_k"]) == (1, 0, 0)
    assert settings["logit_bias"] == [{"bias": None, "token": 5}]
    error = error_of(complete(alice, mirostat=3), 400)
    assert error["message"] == "Field 'mirostat': Value must be between 0 and 2"
    assert error["type"] == "invalid_request_error"


def test_errors_are_upstreams(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    error = error_of(complete(alice, "word " * N_CTX), 400)
    assert error["type"] == "exceed_context_size_error"
    assert (error["n_prompt_tokens"], error["n_ctx"]) == (N_CTX, N_CTX)
    assert "exceeds the available context size" in error["message"]
    assert error_of(complete(site.client()), 401)["type"] == "authentication_error"
    assert error_of(alice.post("/completion", content=b"{"), 400)["type"] == "invalid_request_error"
    assert "must be an array" in error_of(complete(alice, lora=5), 400)["message"]
    for name, value in {"stop": 5, "samplers": 3, "logit_bias": [[1]], "speculative": 3}.items():
        assert error_of(complete(alice, **{name: value}), 400)["message"].startswith(f"Field '{name}': ")
    assert error_of(complete(alice, model="nothing"), 404)["type"] == "not_found_error"


def test_adapters_have_numbers_and_a_default_of_the_tenant_alone(site: InProcessSite, make: Any) -> None:
    make("poet", site.cast.alice, site.cast.bob)
    alice, bob = site.client(site.cast.alice), site.client(site.cast.bob)
    plain = complete(alice).json()["content"]
    styled = complete(alice, lora=[{"id": 0, "scale": 1.0}]).json()["content"]
    assert styled != plain
    assert alice.post("/lora-adapters", json=[{"id": 0, "scale": 1.0}]).json() == {"success": True}
    assert [(each["id"], each["scale"]) for each in alice.get("/lora-adapters").json()] == [(0, 1.0)]
    assert complete(alice).json()["content"] == styled
    assert complete(alice, lora=[]).json()["content"] == plain
    assert complete(bob).json()["content"] == plain
    assert bob.get("/lora-adapters").json()[0]["scale"] == 0.0
    assert alice.post("/lora-adapters", json=[]).json() == {"success": True}
    assert complete(alice).json()["content"] == plain
    error_of(complete(alice, lora=[{"id": 9, "scale": 1.0}]), 400)
    error_of(alice.post("/lora-adapters", json=[{"id": 9, "scale": 1.0}]), 400)
    assert error_of(alice.post("/lora-adapters", json={}), 400)["message"] == "Request body must be an array"


def test_the_echo_has_the_adapter_in_the_models_name(site: InProcessSite, make: Any) -> None:
    make("poet", site.cast.alice)
    alice = site.client(site.cast.alice)
    alice.post("/lora-adapters", json=[{"id": 0, "scale": 0.5}])
    whole = {"id": 0, "scale": 1.0}
    for fields, lora in (({"model": f"{MODEL}:poet"}, [whole]), ({"lora": [whole]}, [whole]), ({"lora": []}, [])):
        assert complete(alice, **fields).json()["generation_settings"]["lora"] == lora
    assert complete(alice).json()["generation_settings"]["lora"] == [{"id": 0, "scale": 0.5}]


def test_charlie_sees_no_adapters(site: InProcessSite, make: Any) -> None:
    make("poet", site.cast.alice)
    charlie = site.client(site.cast.charlie)
    assert charlie.get("/lora-adapters").json() == []
    error_of(charlie.post("/lora-adapters", json=[{"id": 0, "scale": 1.0}]), 400)
    error_of(complete(charlie, lora=[{"id": 0, "scale": 1.0}]), 400)


def test_text_and_tokens_and_properties(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    tokens = alice.post("/tokenize", json={"content": "once upon"}).json()["tokens"]
    assert len(tokens) == 2
    assert alice.post("/detokenize", json={"tokens": tokens}).json() == {"content": "once upon"}
    props = alice.get("/props").json()
    assert (props["model_alias"], props["total_slots"]) == (MODEL, N_SLOTS)
    assert props["default_generation_settings"]["n_ctx"] == N_CTX
    assert error_of(site.client().get("/props"), 401)["message"] == "Invalid API Key"


def test_the_completion_cache_is_used_where_it_is_asked_for(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    first = complete(alice, cache=True)
    assert first.headers["x-cache"] == "miss"
    assert complete(alice).headers["x-cache"] == "miss"
    again = complete(alice, cache=True)
    assert again.headers["x-cache"] == "hit"
    assert again.json()["content"] == first.json()["content"]
    assert "".join(each["content"] for each in stream(alice, cache=True)) == first.json()["content"]


def test_a_name_of_the_list_of_models_is_one_for_every_route(site: InProcessSite, make: Any) -> None:
    """A model with an adapter has the tokens, the template and the slots of the model."""
    make("poet", site.cast.alice)
    alice, bob = site.client(site.cast.alice), site.client(site.cast.bob)
    name = f"{MODEL}:poet"
    assert name in {each["id"] for each in alice.get("/v1/models").json()["data"]}
    calls: list[tuple[str, str, Any]] = [
        ("POST", "/tokenize", {"content": "once upon"}),
        ("POST", "/detokenize", {"tokens": [5, 6]}),
        ("POST", "/apply-template", {"messages": [{"role": "user", "content": "Hello"}]}),
        ("GET", "/props", None),
        ("GET", "/slots", None),
        ("GET", "/lora-adapters", None),
        ("POST", "/lora-adapters", []),
        ("POST", "/slots/0?action=erase", None),
    ]
    for method, path, body in calls:

        def ask(client: Any, model: str, method: str = method, path: str = path, body: Any = body) -> Any:
            named = {"json": {**body, "model": model}} if isinstance(body, dict) else {"json": body}
            mark = "&" if "?" in path else "?"
            return client.request(method, path if isinstance(body, dict) else f"{path}{mark}model={model}", **named)

        assert ask(alice, name).json() == ask(alice, MODEL).json(), path
        assert ask(alice, name).status_code == 200
        assert error_of(ask(bob, name), 404)["message"] == error_of(ask(bob, f"{MODEL}:x"), 404)["message"].replace(
            f"{MODEL}:x", name
        )

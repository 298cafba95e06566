"""POST /v1/generate and /v1/generate/batch: the shape of answers, parameters, streams, and what is refused.

Run against a deployment with API_BASE=http://... API_KEY=...; the tests that look inside run in process alone.
"""

from __future__ import annotations

import socket
import uuid
from typing import Any

import pytest

from tests.in_process import MODEL, N_CTX, OTHER_MODEL, Client, InProcessSite, read_events

pytestmark = pytest.mark.api


def fresh() -> str:
    """A prompt that no earlier run can have left in a completion cache."""
    return f"Once upon a time {uuid.uuid4().hex[:6]} there was"


# One JSON object


def test_basic_generation(api: Client) -> None:
    reply = api.generate(fresh())
    assert reply.status_code == 200
    assert set(reply.json()) == {"model", "output", "cached"}
    assert reply.json()["cached"] is False
    assert reply.json()["output"]


def test_usage_and_id_come_in_headers(api: Client) -> None:
    reply = api.generate(fresh(), max_new_tokens=5)
    assert uuid.UUID(reply.headers["x-request-id"])
    prompt = int(reply.headers["x-usage-prompt-tokens"])
    completion = int(reply.headers["x-usage-completion-tokens"])
    assert prompt > 0
    assert 1 <= completion <= 5
    assert int(reply.headers["x-usage-total-tokens"]) == prompt + completion
    assert reply.headers["x-cache"] == "miss"
    assert "decode;dur=" in reply.headers["server-timing"]


def test_every_answer_says_what_is_left_of_the_limits(api: Client) -> None:
    for reply in (api.generate(fresh()), api.generate("", max_new_tokens=-1), api.get("/v1/models")):
        for kind in ("requests", "tokens"):
            assert int(reply.headers[f"x-ratelimit-limit-{kind}"]) > 0
            assert int(reply.headers[f"x-ratelimit-remaining-{kind}"]) >= 0
            assert reply.headers[f"x-ratelimit-reset-{kind}"][-1] == "s"


def test_an_output_bound_of_one_gives_one_token(api: Client) -> None:
    assert api.generate(fresh(), max_new_tokens=1).headers["x-usage-completion-tokens"] == "1"


def test_the_same_seed_gives_the_same_text(api: Client) -> None:
    prompt = fresh()
    outputs = {api.generate(prompt, seed=7, cache=False, temperature=0.9).json()["output"] for _ in range(2)}
    assert len(outputs) == 1


def test_a_stop_string_ends_the_output_and_is_not_part_of_it(api: Client) -> None:
    prompt = "The capital of France is"
    whole = api.generate(prompt, temperature=0, max_new_tokens=12, cache=False).json()["output"]
    word = whole.split()[-1]
    cut = api.generate(prompt, temperature=0, max_new_tokens=12, cache=False, stop=[word]).json()["output"]
    assert word not in cut
    assert whole.startswith(cut)


def test_an_alias_names_the_model(site: InProcessSite, api: Client) -> None:
    assert api.generate(fresh(), model="default-chat").json()["model"] == MODEL


def test_all_sampling_parameters_are_taken(api: Client) -> None:
    reply = api.generate(
        fresh(),
        temperature=0.5,
        top_p=0.9,
        top_k=20,
        min_p=0.1,
        typical_p=0.9,
        repeat_penalty=1.1,
        repeat_last_n=32,
        presence_penalty=0.1,
        frequency_penalty=0.1,
        logit_bias=[[5, -1.5]],
        ignore_eos=False,
        seed=3,
        stop=["zzzz"],
    )
    assert reply.status_code == 200


# Streams


def test_a_stream_ends_with_reason_and_usage(api: Client) -> None:
    events = api.events(fresh(), max_new_tokens=6)
    kinds = [event for event, _ in events]
    assert kinds[-1] == "finished"
    assert set(kinds[:-1]) == {"delta"}
    last = events[-1][1]
    assert last["finish_reason"] in {"length", "stop"}
    assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + last["usage"]["completion_tokens"]


def test_a_stream_gives_the_same_text_as_one_object(api: Client) -> None:
    prompt = fresh()
    streamed = "".join(data["text"] for event, data in api.events(prompt, seed=1, cache=False) if event == "delta")
    assert streamed == api.generate(prompt, seed=1, cache=False).json()["output"]


def test_a_stream_is_not_buffered_and_its_events_have_ids(api: Client) -> None:
    body = {"prompt": fresh(), "max_new_tokens": 4, "stream": True}
    with api.stream("POST", "/v1/generate", json=body) as response:
        assert response.headers["content-type"] == "text/event-stream"
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["x-accel-buffering"] == "no"
        lines = list(response.iter_lines())
    ids = [line for line in lines if line.startswith("id: ")]
    assert len(ids) == sum(line.startswith("data: ") for line in lines)


def test_a_stream_that_is_refused_is_no_stream(api: Client) -> None:
    reply = api.generate("", stream=True)
    assert reply.status_code == 422
    assert reply.headers["content-type"] == "application/json"


def test_a_cached_answer_can_be_streamed(api: Client) -> None:
    prompt = fresh()
    output = api.generate(prompt, max_new_tokens=4).json()["output"]
    body = {"prompt": prompt, "max_new_tokens": 4, "stream": True}
    with api.stream("POST", "/v1/generate", json=body) as response:
        events = list(read_events(response))
        assert response.headers["x-cache"] == "hit"
    assert [event for event, _ in events] == ["delta", "finished"]
    assert events[0][1]["text"] == output
    assert events[1][1]["cached"] is True


# Batches


def test_a_batch_answers_each_prompt(api: Client) -> None:
    prompts = [fresh() for _ in range(3)]
    reply = api.post("/v1/generate/batch", json={"prompts": prompts, "max_new_tokens": 4})
    assert reply.status_code == 200
    assert set(reply.json()) == {"model", "results"}
    assert len(reply.json()["results"]) == 3
    for result in reply.json()["results"]:
        assert set(result) == {"output", "cached", "prompt_tokens", "completion_tokens"}
        assert result["cached"] is False
    total = sum(each["prompt_tokens"] + each["completion_tokens"] for each in reply.json()["results"])
    assert int(reply.headers["x-usage-total-tokens"]) == total


def test_each_prompt_of_a_batch_is_cached_by_itself(api: Client) -> None:
    known, new = fresh(), fresh()
    api.generate(known, max_new_tokens=4)
    reply = api.post("/v1/generate/batch", json={"prompts": [known, new], "max_new_tokens": 4})
    assert [result["cached"] for result in reply.json()["results"]] == [True, False]


def test_a_batch_is_larger_than_the_slots(api: Client) -> None:
    reply = api.post("/v1/generate/batch", json={"prompts": [fresh() for _ in range(20)], "max_new_tokens": 2})
    assert reply.status_code == 200
    assert len(reply.json()["results"]) == 20


def test_the_parts_of_a_batch_have_receipts(site: InProcessSite, api: Client) -> None:
    reply = api.post("/v1/generate/batch", json={"prompts": [fresh(), fresh()], "max_new_tokens": 3})
    site.settle()
    found = api.get(f"/v1/requests/{reply.headers['x-request-id']}")
    assert found.status_code == 200
    assert [part["id"][-2:] for part in found.json()["parts"]] == [".0", ".1"]


def test_a_batch_waits_for_the_places_of_its_key(site: InProcessSite) -> None:
    from tests.conftest import make_customer

    dana = site.client(make_customer("Two at once", site.cast.alice.tenant.plan, concurrent_requests=2))
    reply = dana.post("/v1/generate/batch", json={"prompts": [fresh() for _ in range(6)], "max_new_tokens": 2})
    assert reply.status_code == 200


# What is refused

BAD_FIELDS: list[tuple[str, Any]] = [
    ("prompt", ""),
    ("prompt", 7),
    ("prompt", ["a"]),
    ("max_new_tokens", 0),
    ("max_new_tokens", -1),
    ("max_new_tokens", "8"),
    ("max_new_tokens", 1.5),
    ("max_new_tokens", 1 << 40),
    ("max_new_tokens", True),
    ("temperature", -0.1),
    ("temperature", 5.1),
    ("temperature", "hot"),
    ("top_p", 1.01),
    ("top_p", -1),
    ("top_k", -1),
    ("top_k", 2.5),
    ("min_p", 2),
    ("repeat_penalty", 0),
    ("seed", -1),
    ("seed", 1 << 32),
    ("stop", "word"),
    ("stop", [""]),
    ("stop", ["x"] * 17),
    ("stop", ["x" * 257]),
    ("logit_bias", [[1, 101]]),
    ("logit_bias", [[-1, 0]]),
    ("cache", "yes"),
    ("stream", 1),
    ("model", ""),
    ("model", 3),
    ("frobnicate", 1),
]


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS)
def test_a_bad_parameter_is_named(api: Client, name: str, value: Any) -> None:
    reply = api.generate(**{"prompt": "hello", name: value})
    assert reply.status_code == 422
    error = reply.json()
    assert error["code"] == "validation_error"
    assert error["request_id"] == reply.headers["x-request-id"]
    assert error["extra"]["stage"] == "request_validation"
    assert error["extra"]["fields"][0]["loc"][0] == name


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"prompt": NaN}', b"[" * 100_000])
def test_a_body_that_is_no_json_object_is_refused(api: Client, body: bytes) -> None:
    reply = api.post("/v1/generate", content=body, headers={"content-type": "application/json"})
    assert reply.status_code in {400, 422}
    assert reply.json()["code"] in {"invalid_json", "validation_error"}


def test_broken_json_has_a_code_of_its_own(api: Client) -> None:
    reply = api.post("/v1/generate", content=b'{"prompt": "a"')
    assert (reply.status_code, reply.json()["code"]) == (400, "invalid_json")


def test_the_input_is_not_repeated_in_an_error(api: Client) -> None:
    reply = api.generate("a secret sentence", temperature="a secret number")
    assert "secret" not in reply.text


def test_an_unknown_model_is_not_found(api: Client) -> None:
    reply = api.generate(model="no-such-model")
    assert (reply.status_code, reply.json()["code"]) == (404, "model_not_found")


def test_a_prompt_longer_than_the_context_is_refused(site: InProcessSite, api: Client) -> None:
    reply = api.generate("word " * N_CTX)
    assert reply.status_code == 400
    error = reply.json()
    assert error["code"] == "context_length_exceeded"
    assert error["extra"]["n_prompt_tokens"] == N_CTX
    assert error["extra"]["n_ctx"] == N_CTX


def test_ten_megabytes_are_too_many(api: Client) -> None:
    reply = api.generate("x" * 10_000_000)
    assert (reply.status_code, reply.json()["code"]) == (413, "request_too_large")
    assert reply.json()["request_id"] == reply.headers["x-request-id"]


def test_a_body_without_a_length_is_counted(api: Client) -> None:
    def parts() -> Any:
        for _ in range(100):
            yield b"x" * 100_000

    reply = api.post("/v1/generate", content=parts())
    assert (reply.status_code, reply.json()["code"]) == (413, "request_too_large")


def test_an_address_that_is_no_text_is_refused(api: Client) -> None:
    host, port = api.base_url.host, api.base_url.port
    assert port is not None
    with socket.create_connection((host, port)) as connection:
        connection.sendall(b"GET /v1/me?x=\xff HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 400 ")


def test_an_unknown_path_and_a_wrong_method_are_told_in_the_same_shape(api: Client) -> None:
    missing, wrong = api.get("/v1/nothing"), api.get("/v1/generate")
    assert (missing.status_code, missing.json()["code"]) == (404, "not_found")
    assert (wrong.status_code, wrong.json()["code"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"
    for reply in (missing, wrong):
        assert reply.json()["request_id"] == reply.headers["x-request-id"]


def test_nothing_that_is_refused_is_charged(site: InProcessSite, api: Client) -> None:
    for fields in (
        {"temperature": 9},
        {"model": "nope"},
        {"prompt": "word " * N_CTX},
        {"model": OTHER_MODEL, "top_p": 2},
    ):
        assert api.generate(**fields).status_code >= 400
    assert site.charged(site.cast.alice) == (0, 0)


def test_a_model_that_is_not_granted_does_not_exist(site: InProcessSite) -> None:
    alice, bob = site.client(site.cast.alice), site.client(site.cast.bob)
    assert alice.generate(model=OTHER_MODEL).status_code == 200
    refused, unknown = bob.generate(model=OTHER_MODEL), bob.generate(model="never-heard-of")
    assert refused.status_code == unknown.status_code == 404
    assert refused.json()["message"].replace(OTHER_MODEL, "x") == unknown.json()["message"].replace(
        "never-heard-of", "x"
    )


def test_exactly_what_was_generated_is_charged(site: InProcessSite, api: Client) -> None:
    reply = api.generate(fresh(), max_new_tokens=50, cache=False)
    assert site.charged(site.cast.alice) == (int(reply.headers["x-usage-total-tokens"]), 0)

"""What clients written for llama.cpp's server send, word for word, on a site with a fake model."""

from __future__ import annotations

from typing import Any

import pytest

from inference.api.llamacpp.schemas import MAX_PIECED_TOKENS, CompletionBody, samplers_of
from inference.api.native.schemas import MAX_LOGIT_BIASES
from inference.engine.types import DEFAULT_SAMPLERS
from tests.in_process import InProcessSite
from tests.llamacpp_calls import complete, error_of

pytestmark = pytest.mark.api

CHUNKS = [{"text": "def one():\n    return 1\n", "time": [14, 7], "filename": "one.py"}]
VIM: dict[str, Any] = {
    "input_prefix": "def add(a, b):\n",
    "input_suffix": "\n    print(add(1, 2))\n",
    "input_extra": CHUNKS,
    "prompt": "    ret",
    "n_predict": 128,
    "n_indent": 4,
    "top_k": 40,
    "top_p": 0.99,
    "stream": False,
    "samplers": ["top_k", "top_p", "infill"],
    "cache_prompt": True,
    "t_max_prompt_ms": 500,
    "t_max_predict_ms": 1000,
    "response_fields": [
        "content",
        "timings/prompt_n",
        "timings/prompt_ms",
        "timings/prompt_per_token_ms",
        "timings/prompt_per_second",
        "timings/predicted_n",
        "timings/predicted_ms",
        "timings/predicted_per_token_ms",
        "timings/predicted_per_second",
        "truncated",
        "tokens_cached",
    ],
}
VIM_WARM_UP: dict[str, Any] = {
    "input_prefix": "",
    "input_suffix": "",
    "input_extra": CHUNKS,
    "prompt": "",
    "n_predict": 0,
    "temperature": 0.0,
    "stream": False,
    "samplers": [],
    "cache_prompt": True,
    "t_max_prompt_ms": 1,
    "t_max_predict_ms": 1,
    "response_fields": [""],
}
VSCODE: dict[str, Any] = {
    "input_prefix": "def add(a, b):\n",
    "input_suffix": "\n",
    "input_extra": [{"text": "x = 1", "time": 1731111111111, "filename": "a.py"}],
    "prompt": "    ret",
    "n_predict": 16,
    "top_k": 40,
    "top_p": 0.99,
    "stream": False,
    "samplers": ["top_k", "top_p", "infill"],
    "cache_prompt": True,
    "n_indent": 4,
    "t_max_prompt_ms": 500,
    "t_max_predict_ms": 2500,
}
VSCODE_WARM_UP: dict[str, Any] = {
    "input_prefix": "",
    "input_suffix": "",
    "input_extra": [],
    "prompt": "",
    "n_predict": 0,
    "samplers": [],
    "cache_prompt": True,
    "t_max_prompt_ms": 500,
    "t_max_predict_ms": 1,
}
NVIM_WARM_UP: dict[str, Any] = {**VIM_WARM_UP, "id_slot": 0, "input_extra": [], "temperature": 0.0}
VSCODE_EDIT: dict[str, Any] = {
    "messages": [{"role": "system", "content": "You are an expert coder."}, {"role": "user", "content": "Hello"}],
    "stream": False,
    "cache_prompt": True,
    "samplers": "edkypmxt",
    "temperature": 0.8,
    "dynatemp_range": 0,
    "dynatemp_exponent": 1,
    "top_k": 40,
    "top_p": 0.95,
    "min_p": 0.05,
    "typical_p": 1,
    "xtc_probability": 0,
    "xtc_threshold": 0.1,
    "repeat_last_n": 64,
    "repeat_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "dry_multiplier": 0,
    "dry_base": 1.75,
    "dry_allowed_length": 2,
    "dry_penalty_last_n": -1,
    "max_tokens": -1,
    "timings_per_token": False,
}


@pytest.fixture
def coder(site: InProcessSite) -> InProcessSite:
    """The fake model with tokens for fill-in-the-middle."""
    site.tokenizers.fill |= {"pre": 901, "suf": 902, "mid": 903}
    return site


@pytest.mark.parametrize(
    ("body", "names"),
    [
        (VIM, set(VIM["response_fields"])),
        (VIM_WARM_UP, set()),
        (NVIM_WARM_UP, set()),
        (VSCODE, None),
        (VSCODE_WARM_UP, None),
    ],
    ids=["llama.vim", "llama.vim warms up", "llama.nvim warms up", "llama.vscode", "llama.vscode warms up"],
)
def test_editors_fill_in(coder: InProcessSite, body: dict[str, Any], names: set[str] | None) -> None:
    answer = coder.client(coder.cast.alice).post("/infill", json=body)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    if names is not None:
        assert set(found) == names
    elif body["n_predict"]:
        assert found["generation_settings"]["samplers"] == ["top_k", "top_p", "infill"]
        assert found["content"]


def test_an_editor_asks_for_an_edit(site: InProcessSite) -> None:
    answer = site.client(site.cast.alice).post("/v1/chat/completions", json=VSCODE_EDIT)
    assert answer.status_code == 200, answer.text


# Fields that nobody knows, and those that nobody may believe

UPSTREAMS_OWN: dict[str, Any] = {
    "n_cache_reuse": 256,
    "adaptive_target": -1.0,
    "backend_sampling": True,
    "reasoning_format": "none",
    "grammar_lazy": False,
    "grammar_triggers": [],
    "preserved_tokens": ["<x>"],
    "speculative.types": "none",
    "wishes": 3,
}


def test_fields_that_nobody_knows_are_ignored(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    expected = complete(alice).json()
    assert complete(alice, **UPSTREAMS_OWN).json()["content"] == expected["content"]
    assert complete(alice, {"prompt_string": "one", "media": "none"}).status_code == 200
    assert complete(alice, lora=[], speculative={"n_max": 2, "mood": "good"}).status_code == 200
    for path, body in (
        ("/tokenize", {"content": "one two"}),
        ("/detokenize", {"tokens": [5]}),
        ("/apply-template", {"messages": [{"role": "user", "content": "one", "time": 5}], "temperature": 1}),
    ):
        assert alice.post(path, json={**body, "wishes": 3}).json() == alice.post(path, json=body).json()
    assert alice.post("/lora-adapters", json=[]).status_code == 200
    assert "embed" in error_of(alice.post("/embedding", json={"content": "one", "wishes": 3}), 400)["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"chat_template": "{{ messages }}"},
        {"grammar_lazy": True, "grammar": 'root ::= "a"'},
        {"prompt": {"prompt_string": "see", "multimodal_data": ["aGVsbG8="]}},
        {"top_k": "many"},
        {"n_predict": 10**12},
        {"n_indent": -1},
    ],
)
def test_what_a_client_must_not_believe_is_refused(site: InProcessSite, fields: dict[str, Any]) -> None:
    error = error_of(complete(site.client(site.cast.alice), **fields), 400)
    assert next(iter(fields)) in error["message"]


# Samplers


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["top-k", "nucleus", "typical", "temp", "min-p"], ("top_k", "top_p", "typ_p", "temperature", "min_p")),
        (["top_k", "adaptive_p", "nothing", "infill"], ("top_k", "infill")),
        ("edskypmxt", DEFAULT_SAMPLERS),
        ("kzi?", ("top_k", "infill")),
        ([], ()),
        ("", ()),
    ],
)
def test_samplers_are_named_in_many_ways(given: list[str] | str, expected: tuple[str, ...]) -> None:
    assert samplers_of(given) == expected
    body = CompletionBody.model_validate({"prompt": "one", "samplers": given})
    assert body.sampling().samplers == expected


def test_samplers_are_bounded(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    for given in (["k"] * 33, "k" * 65, ["k" * 65], [5], 5):
        error_of(complete(alice, samplers=given), 400)


# Biases of texts


@pytest.fixture
def lettered(site: InProcessSite, monkeypatch: pytest.MonkeyPatch) -> InProcessSite:
    """A word's token is the number of its letters, which the fake model's vocabulary has."""

    def encode_each(model: Any, texts: Any) -> list[tuple[int, ...]]:
        return [tuple(map(len, text.split())) for text in texts]

    monkeypatch.setattr(site.tokenizers, "encode_each", encode_each)
    return site


def biases(answer: dict[str, Any]) -> list[tuple[int, float | None]]:
    return [(each["token"], each["bias"]) for each in answer["generation_settings"]["logit_bias"]]


def test_a_bias_of_a_text_is_one_of_each_of_its_tokens(lettered: InProcessSite) -> None:
    alice = lettered.client(lettered.cast.alice)
    by_pairs = complete(alice, logit_bias=[["5", 2], ["two three", -0.5], [7, False]]).json()
    assert biases(by_pairs) == [(7, None), (1, 2.0), (3, -0.5), (5, -0.5)]
    for answer in complete(alice, ["one", "two"], logit_bias={"7": 1, "two three": False}).json():
        assert biases(answer) == [(7, 1.0), (3, None), (5, None)]


def test_biases_of_texts_are_bounded(lettered: InProcessSite) -> None:
    alice = lettered.client(lettered.cast.alice)
    assert complete(alice, logit_bias=[["a " * 128, 1]] * 8).status_code == 200
    error = error_of(complete(alice, logit_bias=[["a " * 128, 1]] * 8 + [[5, 1]]), 400)
    assert f"{MAX_LOGIT_BIASES} at most" in error["message"]
    error_of(complete(alice, logit_bias=[["a" * 257, 1]]), 400)
    error_of(complete(alice, logit_bias=[["a", 1]] * (MAX_LOGIT_BIASES + 1)), 400)


def test_a_dry_run_knows_biases_of_texts(lettered: InProcessSite) -> None:
    alice = lettered.client(lettered.cast.alice)
    body = {"prompt": "one two", "n_predict": 8, "logit_bias": [["two three", 1]]}
    headers = {"X-Admission-Route": "/completion"}
    assert alice.post("/v1/admission", json=body, headers=headers).json()["admitted"]
    many = {**body, "logit_bias": [["a " * 128, 1]] * 9}
    assert alice.post("/v1/admission", json=many, headers=headers).status_code == 400


# Pieces


def test_tokens_come_with_their_pieces_where_they_are_wanted(
    site: InProcessSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    alice = site.client(site.cast.alice)
    tokens = alice.post("/tokenize", json={"content": "once upon"}).json()["tokens"]
    found = alice.post("/tokenize", json={"content": "once upon", "with_pieces": True}).json()["tokens"]
    assert found == [{"id": tokens[0], "piece": "once"}, {"id": tokens[1], "piece": "upon"}]
    many = {"content": "a " * (MAX_PIECED_TOKENS + 1)}
    assert alice.post("/tokenize", json=many).status_code == 200
    assert "with_pieces" in error_of(alice.post("/tokenize", json={**many, "with_pieces": True}), 400)["message"]

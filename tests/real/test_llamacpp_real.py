"""llama.cpp's dialect over HTTP with the real model: counts, probabilities, grammars, several answers, bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.llamacpp_calls import complete, error_of, stream
from tests.real.conftest import LlamaSite

pytestmark = [pytest.mark.model, pytest.mark.integration, pytest.mark.slow, pytest.mark.xdist_group("llama_site")]

SEA = "The sea was calm, and"


def test_counts_are_the_tokenizers(llama_site: LlamaSite) -> None:
    body = complete(llama_site.alice, SEA, cache_prompt=False, return_tokens=True).json()
    timings = body["timings"]
    assert body["tokens_evaluated"] == timings["prompt_n"] == llama_site.count(SEA)
    assert body["tokens_predicted"] == timings["predicted_n"] == len(body["tokens"]) == 8
    assert body["tokens_cached"] == body["tokens_evaluated"] + 7, "the last token is not computed"
    complete(llama_site.alice, SEA * 3, n_predict=1)
    again = complete(llama_site.alice, SEA * 3, n_predict=1).json()
    assert again["timings"]["cache_n"] == again["tokens_evaluated"] - 1 == llama_site.count(SEA * 3) - 1
    assert again["timings"]["prompt_n"] == 1
    one = complete(llama_site.alice, SEA, n_predict=1).json()["timings"]
    assert (one["predicted_per_second"], one["predicted_per_token_ms"]) == (0.0, 0.0)


def test_tokens_text_and_mixtures_of_both_are_one_prompt(llama_site: LlamaSite) -> None:
    alice = llama_site.alice
    tokens = alice.post("/tokenize", json={"content": SEA}).json()["tokens"]
    head = alice.post("/detokenize", json={"tokens": tokens[:3]}).json()["content"]
    answers = complete(alice, [SEA, tokens, [head, *tokens[3:]]]).json()
    assert [each["index"] for each in answers] == [0, 1, 2]
    assert {each["prompt"] for each in answers} == {SEA}
    assert len({each["content"] for each in answers}) == 1
    assert complete(alice, [*tokens[:3], *tokens[3:-1], " and"]).json()["content"] == answers[0]["content"]


def test_special_tokens_are_visible_in_the_prompt(llama_site: LlamaSite) -> None:
    props = llama_site.alice.get("/props").json()
    assert (props["bos_token"], props["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert props["default_generation_settings"]["n_ctx"] == 1536
    shown = complete(llama_site.alice, [1, "user"], n_predict=1).json()["prompt"]
    assert shown == "<|im_start|>user"


def test_several_completions_share_one_prompt(llama_site: LlamaSite) -> None:
    prompt = "Once upon a time there was a town by the sea, and in it lived an old clockmaker. " * 6
    seeded = {"temperature": 1.0, "seed": 11, "n_predict": 12}
    answer = complete(llama_site.alice, prompt, n=3, cache_prompt=False, **seeded)
    results = answer.json()
    num_prompt = llama_site.count(prompt)
    assert len({each["content"] for each in results}) == 3
    computed = [each["timings"]["prompt_n"] for each in results]
    assert computed[0] == num_prompt
    assert max(computed[1:]) <= 8, "the others copy what the first has computed"
    assert answer.headers["x-usage-prompt-tokens"] == str(num_prompt)
    for index, result in enumerate(results):
        alone = complete(llama_site.alice, prompt, **seeded | {"seed": 11 + index}).json()
        assert alone["content"] == result["content"]
    events = stream(llama_site.alice, prompt, n=3, **seeded)
    streamed = ["".join(each["content"] for each in events if each["index"] == index) for index in range(3)]
    assert streamed == [each["content"] for each in results]


@pytest.mark.parametrize("post_sampling", [False, True])
def test_probabilities_are_of_the_tokens_that_came(llama_site: LlamaSite, post_sampling: bool) -> None:
    fields = {"n_probs": 3, "post_sampling_probs": post_sampling, "return_tokens": True}
    body = complete(llama_site.alice, SEA, **fields).json()
    found = body["completion_probabilities"]
    assert [each["id"] for each in found] == body["tokens"]
    assert "".join(each["token"] for each in found) == body["content"]
    for each in found:
        tops = each["top_probs" if post_sampling else "top_logprobs"]
        assert tops[0]["id"] == each["id"], "at temperature 0 the most probable token comes"
        chances = [top["prob"] if post_sampling else math.exp(top["logprob"]) for top in tops]
        assert chances == sorted(chances, reverse=True)
        assert 0 < sum(chances) <= 1.0001
        assert bytes(each["bytes"]).decode() == each["token"]


def test_an_answer_follows_its_grammar_or_its_schema(llama_site: LlamaSite) -> None:
    assert complete(llama_site.alice, "Is fire hot?", grammar='root ::= "yes" | "no"').json()["content"] in {
        "yes",
        "no",
    }
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    body = complete(llama_site.alice, "His age as JSON: ", json_schema=schema, n_predict=40).json()
    assert body["stop_type"] == "eos"
    assert body["content"].replace(" ", "").startswith('{"age":')


def test_a_stop_word_and_the_end_of_a_text(llama_site: LlamaSite) -> None:
    whole = complete(llama_site.alice, SEA, n_predict=16).json()["content"]
    word = whole.split()[3]
    body = complete(llama_site.alice, SEA, n_predict=16, stop=[word]).json()
    assert (body["stop_type"], body["stopping_word"]) == ("word", word)
    assert body["content"] == whole[: whole.index(word)]


def test_time_to_generate_may_be_bounded(llama_site: LlamaSite) -> None:
    lines = "one\ntwo\nthree\nfour\nfive\nsix\n" * 4
    body = complete(llama_site.alice, lines, n_predict=400, t_max_predict_ms=200, ignore_eos=True).json()
    assert body["tokens_predicted"] < 400
    assert body["stop_type"] == "limit"


def test_n_predict_0_fills_the_cache(llama_site: LlamaSite) -> None:
    prompt = "A prompt that is computed before anybody wants an answer to it, for whoever comes next."
    first = complete(llama_site.alice, prompt, n_predict=0).json()
    assert (first["content"], first["tokens_predicted"]) == ("", 0)
    assert complete(llama_site.alice, prompt).json()["timings"]["prompt_n"] == 1


BAD: dict[str, tuple[dict[str, Any], int, str]] = {
    "over the context": ({"prompt": "Hello " * 2000}, 400, "exceed_context_size_error"),
    "over the context, streamed": ({"prompt": "Hello " * 2000, "stream": True}, 400, "exceed_context_size_error"),
    "one of several": ({"prompt": ["Hello", "Hello " * 2000], "stream": True}, 400, "exceed_context_size_error"),
    "ids beyond the vocabulary": ({"prompt": [1 << 30]}, 400, "invalid_request_error"),
    "no tokens": ({"prompt": ""}, 400, "invalid_request_error"),
    "a slot that is not there": ({"prompt": "One", "id_slot": 99}, 400, "invalid_request_error"),
    "an adapter that is not there": ({"prompt": "One", "lora": [{"id": 9}]}, 400, "invalid_request_error"),
    "another's model": ({"prompt": "One", "model": "../etc/passwd"}, 404, "not_found_error"),
    "a grammar that is none": ({"prompt": "One", "grammar": "root ::= ["}, 400, "invalid_request_error"),
    "a grammar without a root": ({"prompt": "One", "grammar": 'a ::= "b"'}, 400, "invalid_request_error"),
    "a left recursion": ({"prompt": "One", "grammar": "root ::= root"}, 400, "invalid_request_error"),
    "a grammar bomb": (
        {"prompt": "One", "grammar": 'root ::= ((("a"{0,999}){0,999}){0,999}){0,999}'},
        400,
        "invalid_request_error",
    ),
    "a grammar of a megabyte": ({"prompt": "One", "grammar": 'root ::= "' + "a" * 10**6 + '"'}, 400, ""),
    "a schema bomb": (
        {"prompt": "One", "json_schema": {"type": "string", "minLength": 10**9}},
        400,
        "invalid_request_error",
    ),
    "a deep schema": (
        {"prompt": "One", "json_schema": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}},
        400,
        "invalid_request_error",
    ),
    "media": ({"prompt": {"prompt_string": "<image>", "multimodal_data": ["AAAA"]}}, 400, "invalid_request_error"),
    "a template": ({"prompt": "One", "chat_template": "{{ messages }}"}, 400, "invalid_request_error"),
    "a temperature in words": ({"prompt": "One", "temperature": "hot"}, 400, "invalid_request_error"),
    "infinitely many": ({"prompt": "One", "n_predict": 10**12}, 400, "invalid_request_error"),
    "hundreds of answers": ({"prompt": "One", "n": 500}, 400, "invalid_request_error"),
    "biases of what is no token": ({"prompt": "One", "logit_bias": [[1 << 30, 1.0]]}, 400, "invalid_request_error"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_and_the_worker_lives(llama_site: LlamaSite, name: str) -> None:
    fields, status, kind = BAD[name]
    error = error_of(complete(llama_site.alice, **fields), status)
    assert error["type"].startswith(kind)
    assert error["message"]
    if kind == "exceed_context_size_error":
        assert error["n_prompt_tokens"] > error["n_ctx"] == 1536
        assert "exceeds the available context size" in error["message"]
    assert complete(llama_site.alice, "One", n_predict=1).status_code == 200


def test_a_grammar_whose_tokens_are_banned_has_no_answer_and_costs_nothing(llama_site: LlamaSite) -> None:
    (letter,) = llama_site.alice.post("/tokenize", json={"content": "a"}).json()["tokens"]
    answer = complete(llama_site.alice, "One", grammar='root ::= "a"', logit_bias=[[letter, False]])
    assert "grammar" in error_of(answer, 400)["message"]
    assert complete(llama_site.alice, "One", n_predict=1).status_code == 200


def test_a_text_that_is_banned_is_not_said(llama_site: LlamaSite) -> None:
    """By its text as by the ids of its tokens, in pairs and by names."""
    alice = llama_site.alice
    plain = complete(alice, SEA, return_tokens=True).json()
    word = alice.post("/detokenize", json={"tokens": plain["tokens"][:1]}).json()["content"]
    (token,) = alice.post("/tokenize", json={"content": word}).json()["tokens"]
    by_id = complete(alice, SEA, logit_bias=[[token, False]], return_tokens=True).json()
    assert token not in by_id["tokens"]
    assert plain["tokens"][0] == token
    for bias in ([[word, False]], {word: False}):
        assert complete(alice, SEA, logit_bias=bias, return_tokens=True).json()["tokens"] == by_id["tokens"]


def test_pieces_of_a_split_character_are_bytes(llama_site: LlamaSite) -> None:
    text = "a \N{BRAIN} b"
    body = {"content": text, "with_pieces": True}
    found = llama_site.alice.post("/tokenize", json=body).json()["tokens"]
    assert [each["id"] for each in found] == llama_site.alice.post("/tokenize", json={"content": text}).json()["tokens"]
    assert {type(each["piece"]) for each in found} == {str, list}
    pieces = (piece.encode() if isinstance(piece := each["piece"], str) else bytes(piece) for each in found)
    assert b"".join(pieces).decode() == text
    special = llama_site.alice.post("/tokenize", json={"content": "x", "add_special": True, "with_pieces": True})
    assert special.json()["tokens"][-1]["piece"] == "x"


def test_the_sampler_for_infill_is_bounded(llama_site: LlamaSite) -> None:
    """It compares all candidates with each other: of the whole vocabulary, a token took more than half a minute."""
    alone = complete(llama_site.alice, SEA, samplers=["infill"], seed=5).json()
    bounded = complete(llama_site.alice, SEA, samplers=["top_k", "infill"], top_k=128, seed=5).json()
    many = complete(llama_site.alice, SEA, samplers=["infill"] * 32, seed=5).json()
    assert alone["content"] == bounded["content"] == many["content"]
    named = complete(llama_site.alice, SEA, samplers=["top_k", "top_p", "infill"], seed=5).json()
    lettered = complete(llama_site.alice, SEA, samplers="kpi", seed=5).json()
    assert named["content"] == lettered["content"]
    assert lettered["generation_settings"]["samplers"] == ["top_k", "top_p", "infill"]


def test_an_answer_ends_at_a_line_that_is_not_indented(llama_site: LlamaSite) -> None:
    listing = "def one():\n    a = 1\n    b = 2\n    c = 3\n    return"
    plain = complete(llama_site.alice, listing, n_predict=32).json()["content"]
    assert "\n" in plain
    ended = complete(llama_site.alice, listing, n_predict=32, n_indent=4).json()
    assert ended["stop_type"] == "limit"
    assert plain.startswith(ended["content"])
    assert all(line.startswith("    ") or not line.strip() for line in ended["content"].split("\n")[1:])


def test_infill_needs_a_model_that_was_trained_for_it(llama_site: LlamaSite) -> None:
    body = {"input_prefix": "def add(a, b):\n    ", "input_suffix": "\n", "n_predict": 4}
    assert error_of(llama_site.alice.post("/infill", json=body), 501)["type"] == "not_supported_error"


def test_registering_what_is_no_model_is_a_clear_error(llama_site: LlamaSite, tmp_path: Any, model_path: Any) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(model_path.read_bytes()[:1_000_000])
    answer = llama_site.operator.post("/v1/admin/models", json={"name": "cut", "path": str(cut)})
    assert answer.status_code == 422
    assert "gguf_truncated" in answer.text
    draft = {"draft_kind": "model", "draft_model": "nobody"}
    body = {"name": "undrafted", "path": str(model_path), **draft}
    assert llama_site.operator.post("/v1/admin/models", json=body).status_code == 422
    assert complete(llama_site.alice, "One", n_predict=1).status_code == 200

"""POST /v1/generate under a grammar or a JSON Schema, and with probabilities: fields, refusals, shapes.

The fake model follows no grammar: what answers look like under one is in tests/real.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.in_process import Client, InProcessSite

pytestmark = pytest.mark.api

DIGITS = "root ::= [0-9]+"
PROMPT = "Once upon a time there was"


def refused(api: Client, **fields: Any) -> tuple[int, dict[str, Any]]:
    reply = api.generate(PROMPT, **fields)
    body: dict[str, Any] = reply.json()
    return reply.status_code, body


# Which form the answer has


def test_a_grammar_reaches_the_engine(site: InProcessSite, api: Client) -> None:
    assert api.generate(PROMPT, grammar=DIGITS, cache=False).status_code == 200
    assert site.tokenizers.tried == [DIGITS]


def test_a_schema_reaches_it_as_a_grammar(site: InProcessSite, api: Client) -> None:
    assert api.generate(PROMPT, json_schema={"type": "boolean"}, cache=False).status_code == 200
    assert '"true" | "false"' in site.tokenizers.tried[0]


def test_a_batch_has_one_form_and_it_is_tried_once(site: InProcessSite, api: Client) -> None:
    reply = api.post("/v1/generate/batch", json={"prompts": ["one two", "three"], "grammar": DIGITS, "cache": False})
    assert reply.status_code == 200
    assert site.tokenizers.tried == [DIGITS]


def test_an_empty_grammar_is_none(site: InProcessSite, api: Client) -> None:
    assert api.generate(PROMPT, grammar="", json_schema=None, cache=False).status_code == 200
    assert site.tokenizers.tried == []


def test_both_at_once_are_refused(api: Client) -> None:
    status, body = refused(api, grammar=DIGITS, json_schema={})
    assert (status, body["code"]) == (422, "validation_error")
    assert body["extra"]["fields"][0]["type"] == "grammar_and_schema"


def test_a_wrong_grammar_is_refused_with_its_place(api: Client) -> None:
    status, body = refused(api, grammar='root ::= "a')
    assert (status, body["code"]) == (400, "invalid_grammar")
    assert body["message"].startswith("Field 'grammar': line 1, column 12: ")
    assert (body["extra"]["line"], body["extra"]["column"]) == (1, 12)


def test_a_wrong_schema_is_refused_with_its_path(api: Client) -> None:
    status, body = refused(api, json_schema={"properties": {"a": {"type": "text"}}})
    assert (status, body["code"], body["extra"]["path"]) == (400, "invalid_schema", "/properties/a/type")


@pytest.mark.parametrize("fields", [{"grammar": 1}, {"json_schema": "{}"}, {"json_schema": []}, {"grammar": ["a"]}])
def test_what_has_the_wrong_type_is_named(api: Client, fields: dict[str, Any]) -> None:
    status, body = refused(api, **fields)
    assert (status, body["extra"]["fields"][0]["field"]) == (422, next(iter(fields)))


def test_a_grammar_that_ends_its_child_is_refused_and_not_tried_again(site: InProcessSite, api: Client) -> None:
    for _ in range(3):
        status, body = refused(api, grammar='root ::= bomb\nbomb ::= "a"')
        assert (status, body["code"]) == (400, "invalid_grammar")
    assert len(site.tokenizers.tried) == 1


def test_the_form_is_part_of_what_the_completion_cache_looks_for(api: Client) -> None:
    one = api.generate(PROMPT, grammar=DIGITS, max_new_tokens=3)
    other = api.generate(PROMPT, grammar="root ::= [a-z]+", max_new_tokens=3)
    again = api.generate(PROMPT, grammar=DIGITS, max_new_tokens=3)
    assert [reply.json()["cached"] for reply in (one, other, again)] == [False, False, True]


# Probabilities


def test_probabilities_come_only_where_they_are_asked_for(api: Client) -> None:
    assert "probs" not in api.generate(PROMPT, cache=False).json()
    reply = api.generate(PROMPT, n_probs=3, max_new_tokens=4, ignore_eos=True)
    probs = reply.json()["probs"]
    assert len(probs) == 4
    assert set(probs[0]) == {"id", "text", "bytes", "logprob", "top"}
    assert set(probs[0]["top"][0]) == {"id", "text", "bytes", "logprob"}
    assert "".join(each["text"] for each in probs) == reply.json()["output"]
    assert bytes(probs[0]["bytes"]).decode() == probs[0]["text"]


def test_streamed_probabilities_are_those_of_the_streamed_text(api: Client) -> None:
    deltas = [
        data for event, data in api.events(PROMPT, n_probs=1, max_new_tokens=6, ignore_eos=True) if event == "delta"
    ]
    for delta in deltas:
        assert "".join(each["text"] for each in delta["probs"]) == delta["text"]
    assert sum(len(delta["probs"]) for delta in deltas) == 6


def test_an_answer_with_probabilities_is_computed_each_time(api: Client) -> None:
    for _ in range(2):
        assert api.generate(PROMPT, n_probs=1, max_new_tokens=2).json()["cached"] is False


def test_a_batch_has_probabilities_for_each_answer(api: Client) -> None:
    reply = api.post("/v1/generate/batch", json={"prompts": ["one", "two"], "n_probs": 1, "max_new_tokens": 3})
    assert [len(result["probs"]) for result in reply.json()["results"]] == [3, 3]


@pytest.mark.parametrize("number", [-1, 21, 1.5, True])
def test_their_number_is_bounded(api: Client, number: object) -> None:
    status, body = refused(api, n_probs=number)
    assert (status, body["extra"]["fields"][0]["field"]) == (422, "n_probs")

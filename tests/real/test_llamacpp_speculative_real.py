"""Speculation over HTTP: drafts change how fast tokens come, never which; and never reach beyond a slot's context."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.llamacpp_calls import complete, stream
from tests.real.conftest import LlamaSite

pytestmark = [pytest.mark.model, pytest.mark.integration, pytest.mark.slow, pytest.mark.xdist_group("llama_site")]

LIFE = "I believe the meaning of life is"
FULL = "Hello " * 56
N_CTX = 64
GREEDY = {"temperature": 0.0, "top_k": 1}
SEEDED = {"temperature": 0.2, "top_k": 5, "seed": 4242}


def answer(client: httpx.Client, prompt: str = LIFE, **fields: Any) -> dict[str, Any]:
    body = {"model": "drafted", "n_predict": 16, "return_tokens": True, "speculative.p_min": 0.0, **fields}
    found = complete(client, prompt, **body)
    assert found.status_code == 200, found.text
    content: dict[str, Any] = found.json()
    return content


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_drafts_do_not_change_the_tokens(llama_site: LlamaSite, sampling: dict[str, Any]) -> None:
    without = answer(llama_site.alice, speculative=False, **sampling)
    with_drafts = answer(llama_site.alice, **sampling)
    assert with_drafts["tokens"] == without["tokens"]
    assert with_drafts["content"] == without["content"]
    assert with_drafts["timings"]["draft_n"] > 0
    assert 0 <= with_drafts["timings"]["draft_n_accepted"] <= with_drafts["timings"]["draft_n"]
    assert "draft_n" not in without["timings"]
    assert answer(llama_site.alice, model="smollm2-135m", **sampling)["tokens"] == without["tokens"]


BOUNDS = ((1, 2), (1, 4), (4, 8), (4, 12), (8, 16))


def right_at(llama_site: LlamaSite) -> dict[int, float]:
    """Guesses that were right until now, by their place in a draft from 1 on; once it has stood still for a second."""

    def read() -> dict[int, float]:
        text = httpx.get(f"{llama_site.site.base_url}/metrics").text
        name = "llamacpp:spec_decode_num_accepted_tokens_per_pos_total"
        samples = (each for family in text_string_to_metric_families(text) for each in family.samples)
        found = [each for each in samples if each.name == name and each.labels["model_id"] == "drafted"]
        return {int(each.labels["position"]) + 1: each.value for each in found}

    seen = read()
    while True:  # workers count twice a second
        time.sleep(1.2)
        if (now := read()) == seen:
            return now
        seen = now


@pytest.mark.timeout(180)
def test_every_length_of_drafts_gives_the_same_text(llama_site: LlamaSite) -> None:
    """And is really drafted: with bounds of 8 and 16 the 16th guess is verified, with less none behind n_max."""
    contents, drafted = set(), {}
    for least, most in BOUNDS:
        before = right_at(llama_site)
        bounds = {"speculative.n_min": least, "speculative.n_max": most}
        found = answer(llama_site.alice, n_predict=64, ignore_eos=True, **GREEDY, **bounds)
        after = right_at(llama_site)
        contents.add(found["content"])
        drafted[least, most] = found["timings"]["draft_n"]
        longest = max(place for place in after if after[place] > before.get(place, 0))
        assert longest == most, (least, most)
    nested = answer(llama_site.alice, n_predict=64, ignore_eos=True, **GREEDY, speculative={"n_min": 1, "n_max": 2})
    assert contents == {nested["content"]}
    assert nested["timings"]["draft_n"] == drafted[1, 2] > 0
    assert drafted[1, 2] < drafted[8, 16]


def test_the_draft_model_is_right_of_itself(llama_site: LlamaSite) -> None:
    """It is the same model: at temperature 0 nearly all its guesses come true, and a step brings several tokens."""
    timings = answer(llama_site.alice, n_predict=32, **GREEDY)["timings"]
    assert timings["draft_n_accepted"] >= 0.8 * timings["draft_n"] > 0


def test_a_stream_with_drafts_says_the_same(llama_site: LlamaSite) -> None:
    whole = answer(llama_site.alice, **GREEDY)
    *parts, last = stream(llama_site.alice, LIFE, model="drafted", n_predict=16, **GREEDY)
    assert [token for part in parts for token in part["tokens"]] == whole["tokens"]
    assert last["timings"]["draft_n"] > 0


def test_drafts_do_not_exceed_the_context(llama_site: LlamaSite) -> None:
    body = answer(llama_site.alice, FULL, model="narrow", n_predict=-1, **GREEDY)
    assert body["content"]
    num_prompt = llama_site.count(FULL)
    assert body["tokens_evaluated"] == num_prompt
    assert body["tokens_predicted"] == N_CTX - num_prompt
    assert (body["stop_type"], body["truncated"]) == ("limit", True)
    assert body["timings"]["draft_n"] > 0
    without = answer(llama_site.alice, FULL, model="narrow", n_predict=-1, speculative=False, **GREEDY)
    assert without["tokens"] == body["tokens"]


def test_with_a_context_shift_all_tokens_come(llama_site: LlamaSite) -> None:
    body = answer(llama_site.alice, FULL, model="narrow", n_predict=64, **GREEDY)
    assert body["content"]
    assert (body["tokens_predicted"], body["truncated"]) == (64, True)
    assert body["tokens_cached"] < N_CTX
    room = N_CTX - llama_site.count(FULL) - 1
    assert body["timings"]["draft_n"] > sum(range(room)), "more than fits before the shift, one guess a step less"
    without = answer(llama_site.alice, FULL, model="narrow", n_predict=64, speculative=False, **GREEDY)
    assert without["tokens"] == body["tokens"]


@pytest.mark.parametrize(("model", "num_requests"), [("narrow", 2), ("drafted", 2), ("drafted", 5)])
def test_requests_at_once_wait_for_a_slot_and_are_answered(
    llama_site: LlamaSite, model: str, num_requests: int
) -> None:
    body = {"prompt": LIFE, "model": model, "n_predict": 16, "speculative.p_min": 0.0, **GREEDY}
    answers = llama_site.at_once(llama_site.alice, *[body] * num_requests)
    assert all(each["timings"]["draft_n"] > 0 for each in answers)
    assert {each["content"] for each in answers} == {
        answer(llama_site.alice, model=model, speculative=False, **GREEDY)["content"]
    }

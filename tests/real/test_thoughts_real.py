"""Bounded thoughts on the real model: they end at their token, whatever else is wanted of the answer's tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from inference.engine import LlamaBackend, SamplingParams
from inference.engine.tokenizer import Tokenizer
from inference.engine.types import ThoughtBound
from inference.structured import JsonForm, behind_thoughts, fit
from tests.real.test_drafts_real import answer, rehearsed
from tests.real.test_engine_real import Run, alone

pytestmark = pytest.mark.model

PROMPT = "One, two, three, one, two, three, one, two, three, one, two,"
NUM_THOUGHTS, END = 9, "</think>"


@pytest.fixture(scope="module")
def backend(model_path: Path) -> Iterator[LlamaBackend]:
    backend = LlamaBackend.load(model_path, n_ctx=256, n_slots=4, n_threads=2, max_draft_tokens=16)
    yield backend
    backend.free()


@pytest.fixture(scope="module")
def bound(tokenizer: Tokenizer) -> ThoughtBound:
    end = tuple(tokenizer.encode(END, add_special=False))
    assert len(end) > 1
    return ThoughtBound(num_tokens=NUM_THOUGHTS, start="<think>", end=END, end_tokens=end, is_open=True)


SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "warm": {"temperature": 1.0, "seed": 4},
    "penalties": {"temperature": 1.0, "seed": 4, "repeat_penalty": 1.3, "dry_multiplier": 0.8},
    "probabilities": {"temperature": 1.0, "seed": 4, "num_probs": 2},
    "probabilities that are left": {"temperature": 1.0, "seed": 4, "num_probs": 2, "post_sampling_probs": True},
}


@pytest.mark.parametrize("name", SAMPLING)
def test_the_tag_comes_at_its_token_and_the_answer_goes_on(
    backend: LlamaBackend, tokenizer: Tokenizer, bound: ThoughtBound, name: str
) -> None:
    sampling = SamplingParams(**SAMPLING[name], ignore_eos=True)
    free = alone(backend, tokenizer, PROMPT, sampling=sampling)
    bounded = replace(sampling, thoughts=bound)
    tokens = alone(backend, tokenizer, PROMPT, sampling=bounded)
    behind = NUM_THOUGHTS + len(bound.end_tokens)
    assert tokens[:NUM_THOUGHTS] == free[:NUM_THOUGHTS]
    assert tokens[NUM_THOUGHTS:behind] == bound.end_tokens
    assert len(tokens) == len(free) > behind
    for rate in (0.5, 1.0):
        guesses = rehearsed(tokenizer, PROMPT, tokens, rate)
        drafted, receipt = answer(backend, tokenizer, PROMPT, guesses, max_tokens=24, sampling=bounded)
        assert drafted == tokens
        assert receipt.drafted_tokens > 0
    run = Run(backend, tokenizer)
    for number in range(3):
        run.add(f"r{number}", PROMPT, sampling=bounded)
    run.finish()
    assert {run.tokens(f"r{number}") for number in range(3)} == {tokens}


def test_the_form_behind_thoughts_is_kept(backend: LlamaBackend, tokenizer: Tokenizer, bound: ThoughtBound) -> None:
    """The grammar would allow 120 bytes of thoughts, the bound allows 9 tokens of them."""
    form = fit(JsonForm(b'{"enum": ["yes", "no"]}'), 40)
    sampling = SamplingParams(temperature=1.0, grammar=behind_thoughts(form.grammar, END, 120), thoughts=bound)
    for seed in range(4):
        run = Run(backend, tokenizer)
        run.add("r", PROMPT, sampling=replace(sampling, seed=seed), max_tokens=60)
        thoughts, tag, said = run.finish().text("r").partition(END)
        assert tag == END
        assert said.strip() in ('"yes"', '"no"')
        assert len(tokenizer.encode(thoughts, add_special=False)) <= NUM_THOUGHTS + 2


def test_thoughts_that_the_answer_begins_itself_are_bounded(
    backend: LlamaBackend, tokenizer: Tokenizer, bound: ThoughtBound
) -> None:
    closed = replace(bound, is_open=False)
    grammar = r'root ::= "<think>" [a-z ,]{200}'
    begins = SamplingParams(temperature=1.0, seed=1, grammar=grammar + r' | "<think>" [a-z ,]* "</think>" [a-z ,]{20}')
    run = Run(backend, tokenizer)
    run.add("r", PROMPT, sampling=replace(begins, thoughts=closed), max_tokens=80)
    run.add("none", PROMPT, sampling=SamplingParams(temperature=0.0, thoughts=closed))
    run.add("free", PROMPT, sampling=SamplingParams(temperature=0.0))
    run.finish()
    thoughts, tag, _ = run.text("r").removeprefix("<think>").partition(END)
    assert tag == END
    assert len(tokenizer.encode(thoughts, add_special=False)) <= NUM_THOUGHTS + 2
    assert run.tokens("none") == run.tokens("free")

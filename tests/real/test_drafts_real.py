"""Drafts on the real model: the same tokens with and without, whoever guesses and however wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from inference.engine import LlamaBackend
from inference.engine.drafting import DraftPolicy, DraftSettings
from inference.engine.engine import Engine
from inference.engine.speculative import PromptLookup, Proposer
from inference.engine.tokenizer import Tokenizer
from inference.engine.types import Receipt

from .test_engine_real import Run

pytestmark = pytest.mark.model

ALWAYS = DraftSettings(policy=DraftPolicy.ALWAYS)
ECHO = "one two three four five six one two three four five six one two three"
LIFE = "I believe the meaning of life is"


@pytest.fixture(scope="module")
def tokenizer(model_path: Path) -> Iterator[Tokenizer]:
    tokenizer = Tokenizer.load(model_path)
    yield tokenizer
    tokenizer.free()


@pytest.fixture(scope="module")
def backend(model_path: Path) -> Iterator[LlamaBackend]:
    backend = LlamaBackend.load(model_path, n_ctx=512, n_slots=2, n_threads=2, max_draft_tokens=32)
    yield backend
    backend.free()


def answer(
    backend: LlamaBackend,
    tokenizer: Tokenizer,
    text: str,
    proposer: Proposer | None = None,
    settings: DraftSettings = ALWAYS,
    **fields: Any,
) -> tuple[tuple[int, ...], Receipt]:
    run = Run(backend, tokenizer)
    run.engine = Engine(backend, proposer=proposer, draft_settings=settings)
    run.add("r", text, **fields)
    run.finish()
    return run.tokens("r"), run.finished("r").receipt


def test_prompt_lookup_gives_the_same_tokens(backend: LlamaBackend, tokenizer: Tokenizer) -> None:
    expected, without = answer(backend, tokenizer, ECHO, max_tokens=48)
    tokens, receipt = answer(backend, tokenizer, ECHO, PromptLookup(), max_tokens=48)
    assert tokens == expected
    assert without.drafted_tokens == 0
    assert 0 < receipt.accepted_tokens <= receipt.drafted_tokens
    assert receipt.num_steps < without.num_steps

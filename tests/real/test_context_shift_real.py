"""Context shift on the real model: the contract's numbers, and neighbours that do not notice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from inference.engine import Decoding, FinishReason, LlamaBackend, SamplingParams
from inference.engine.tokenizer import Tokenizer

from .test_engine_real import GREEDY, PROMPTS, Run, alone

pytestmark = pytest.mark.model

SHIFT = Decoding(context_shift=True)
HELLO = "Hello " * 56
ENDLESS = SamplingParams(temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def backend(model_path: Path) -> Iterator[LlamaBackend]:
    backend = LlamaBackend.load(model_path, n_ctx=64, n_slots=4, n_threads=2)
    yield backend
    backend.free()


def test_64_tokens_behind_56_hellos_in_a_context_of_64(backend: LlamaBackend, tokenizer: Tokenizer) -> None:
    run = Run(backend, tokenizer)
    run.add("r", HELLO, max_tokens=64, sampling=ENDLESS, decoding=SHIFT)
    receipt = run.finish().finished("r").receipt
    assert (receipt.completion_tokens, receipt.is_truncated) == (64, True)
    assert run.text("r").strip()


def test_a_context_of_64_is_64_without_shift(backend: LlamaBackend, tokenizer: Tokenizer) -> None:
    run = Run(backend, tokenizer)
    run.add("r", HELLO, max_tokens=64, sampling=ENDLESS)
    last = run.finish().finished("r")
    assert last.receipt.prompt_tokens + last.receipt.completion_tokens == 64
    assert (last.reason, last.receipt.is_truncated) == (FinishReason.LENGTH, True)


def test_neighbours_shift_and_nobody_notices(backend: LlamaBackend, tokenizer: Tokenizer) -> None:
    """Shifted answers, alone and together, in slots that others have left, are the same token for token."""
    wanted = [
        (PROMPTS[0], ENDLESS, Decoding(context_shift=True, num_keep=-1), 150),
        (PROMPTS[1], SamplingParams(seed=3, ignore_eos=True), SHIFT, 120),
        (PROMPTS[2], GREEDY, Decoding(), 24),
        (PROMPTS[3], ENDLESS, Decoding(context_shift=True, num_keep=4, num_discard=7), 100),
        (PROMPTS[4], GREEDY, Decoding(), 24),
    ]
    expected = [
        alone(backend, tokenizer, text, sampling=sampling, decoding=decoding, max_tokens=number)
        for text, sampling, decoding, number in wanted
    ]
    run = Run(backend, tokenizer)
    for number, (text, sampling, decoding, max_tokens) in enumerate(wanted):
        run.add(f"r{number}", text, sampling=sampling, decoding=decoding, max_tokens=max_tokens)
        run.step()
    run.finish()
    assert [run.tokens(f"r{number}") for number in range(len(wanted))] == expected
    assert len(expected[0]) == 150


def test_what_a_shift_kept_is_reused_exactly(backend: LlamaBackend, tokenizer: Tokenizer) -> None:
    text = "Alice lives in a small town by the sea, and every morning she walks along the beach with"
    run = Run(backend, tokenizer)
    keeping = Decoding(context_shift=True, num_keep=-1)
    run.add("shifted", text, max_tokens=120, sampling=ENDLESS, decoding=keeping, cache_scope="alice")
    run.finish()
    run.add("again", text, cache_scope="alice")
    run.finish()
    receipt = run.finished("again").receipt
    assert receipt.cached_tokens == receipt.prompt_tokens - 1
    assert run.tokens("again") == alone(backend, tokenizer, text)

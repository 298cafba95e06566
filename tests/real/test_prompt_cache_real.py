"""The prompt cache on the real model: the same tokens with it and without, in place and by copy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from inference import demo_adapters
from inference.engine import LlamaBackend, SamplingParams
from inference.engine.backend import Abilities
from inference.engine.tokenizer import Tokenizer
from tests.timing import Stopwatch

from .test_engine_real import PROMPTS, Run, alone

pytestmark = pytest.mark.model

POET = Path(demo_adapters.__file__).parent / "smollm2-135m-shakespeare.gguf"
SYSTEM = "You are a careful assistant. You answer briefly, and never invent what you do not know. " * 12
ALICE: dict[str, Any] = {"cache_scope": "alice"}
BOB: dict[str, Any] = {"cache_scope": "bob"}


@pytest.fixture(scope="module")
def backend(model_path: Path) -> Iterator[LlamaBackend]:
    backend = LlamaBackend.load(model_path, n_ctx=512, n_slots=8, n_threads=2)
    backend.load_adapter("poet", POET)
    yield backend
    backend.free()


def cached(run: Run, request_id: str) -> int:
    return run.finished(request_id).receipt.cached_tokens


def test_the_model_can_reuse(backend: LlamaBackend) -> None:
    assert backend.abilities == Abilities()


def test_eight_clients_compute_a_shared_prompt_once_and_answer_as_if_alone(
    backend: LlamaBackend, tokenizer: Tokenizer
) -> None:
    texts = [SYSTEM + text for text in PROMPTS]
    expected = [alone(backend, tokenizer, text) for text in texts]
    run = Run(backend, tokenizer)
    for number, text in enumerate(texts):
        run.add(f"r{number}", text, **ALICE)
    run.finish()
    assert [run.tokens(f"r{number}") for number in range(8)] == expected
    shared = len(tokenizer.encode(SYSTEM, add_special=True)) - 2
    assert all(cached(run, f"r{number}") >= shared - 8 for number in range(1, 8))
    assert run.engine.stats().prompt_tokens_total < shared + 8 * 24


def test_the_next_turn_of_a_conversation_computes_its_own_words_alone(
    backend: LlamaBackend, tokenizer: Tokenizer
) -> None:
    run = Run(backend, tokenizer)
    run.add("first", SYSTEM + PROMPTS[0], **ALICE)
    run.finish()
    second = SYSTEM + PROMPTS[0] + run.text("first") + "\nAnd the capital of Italy is"
    run.add("second", second, **ALICE)
    run.finish()
    assert run.tokens("second") == alone(backend, tokenizer, second)
    receipt = run.finished("second").receipt
    assert receipt.prompt_tokens - receipt.cached_tokens < 24
    assert receipt.prefill_seconds < 0.5 * run.finished("first").receipt.prefill_seconds
    run.add("again", second, **ALICE)
    run.finish()
    assert run.tokens("again") == run.tokens("second")
    assert cached(run, "again") == receipt.prompt_tokens - 1


def test_scopes_and_vectors_reuse_nothing_of_each_other(backend: LlamaBackend, tokenizer: Tokenizer) -> None:
    text = SYSTEM + PROMPTS[1]
    vectors: list[Any] = [(), (("poet", 1.0),), (("poet", 0.5),)]
    expected = [alone(backend, tokenizer, text, adapters=vector) for vector in vectors]
    run = Run(backend, tokenizer)
    for scope in (ALICE, BOB):
        for number, vector in enumerate(vectors):
            name = f"{scope['cache_scope']} {number}"
            run.add(name, text, adapters=vector, **scope)
            run.finish()
            assert cached(run, name) == 0
            assert run.tokens(name) == expected[number]
    for number, vector in enumerate(vectors):
        run.add(f"again {number}", text, adapters=vector, **BOB)
    run.finish()
    assert [run.tokens(f"again {number}") for number in range(3)] == expected
    assert all(cached(run, f"again {number}") > 200 for number in range(3))


def test_chains_of_copies_into_slots_that_were_just_copied_are_exact(
    backend: LlamaBackend, tokenizer: Tokenizer
) -> None:
    """More conversations than slots, with seeds and penalties, arriving in all states of each other."""
    sampling = SamplingParams(seed=5, temperature=0.7, repeat_penalty=1.1)
    starts = [SYSTEM, SYSTEM[:400], "Elsewhere, " + SYSTEM[:500]]
    texts = [starts[number % 3] + PROMPTS[number % 8] for number in range(18)]
    expected = [alone(backend, tokenizer, text, sampling=sampling, max_tokens=10) for text in texts]
    run = Run(backend, tokenizer)
    for number, text in enumerate(texts):
        run.add(f"r{number}", text, sampling=sampling, max_tokens=10, **ALICE)
        for _ in range(number % 4):
            run.step()
    run.finish()
    assert [run.tokens(f"r{number}") for number in range(18)] == expected
    assert sum(cached(run, f"r{number}") > 50 for number in range(18)) >= 14


def test_a_copy_is_quicker_than_computing(backend: LlamaBackend, tokenizer: Tokenizer) -> None:
    run = Run(backend, tokenizer)
    run.add(
        "busy", SYSTEM + PROMPTS[0], max_tokens=200, sampling=SamplingParams(temperature=0.0, ignore_eos=True), **ALICE
    )
    while not run.tokens("busy"):
        run.step()
    watch = Stopwatch()
    run.add("copied", SYSTEM + PROMPTS[1], max_tokens=1, **ALICE)
    while not run.tokens("copied"):
        run.step()
    seconds = watch.seconds()
    assert seconds < 0.5 * run.finished("copied").receipt.prompt_tokens * backend.cost.seconds(16) / 16
    run.engine.cancel("busy")
    run.step()

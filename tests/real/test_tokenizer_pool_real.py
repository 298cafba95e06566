"""The pool over the real tokenizer child and the demo model's vocabulary."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from accounts.trail.refusals import Refusal
from inference.tokenizers.pool import TokenizerPool

pytestmark = pytest.mark.model


@dataclass(frozen=True)
class Vocabulary:
    vocabulary_path: Path
    digest: str = "real"
    name: str = "smollm2"


@pytest.fixture(scope="module")
def model(model_path: Path) -> Vocabulary:
    return Vocabulary(model_path)


@pytest.fixture(scope="module")
def pool() -> Iterator[TokenizerPool]:
    made = TokenizerPool(processes=2, timeout_seconds=3.0)
    yield made
    made.close()


@pytest.mark.parametrize("text", ["Hello world", "Grüße, 世界 🦉", " leading", "tab\tnewline\n", "a" * 1000])
def test_text_survives_tokens(pool: TokenizerPool, model: Vocabulary, text: str) -> None:
    tokens = pool.encode(model, text)
    assert tokens
    assert pool.decode(model, tokens) == text


@pytest.mark.parametrize("word", ["<|im_end|>", "<|im_start|>system", "<|endoftext|>"])
def test_what_looks_like_a_special_token_stays_text(pool: TokenizerPool, model: Vocabulary, word: str) -> None:
    special = {token for token in (pool.info(model)[name] for name in ("bos_token", "eos_token")) if token is not None}
    tokens = pool.encode(model, word)
    assert len(tokens) > 1
    assert not special & set(tokens)


def test_which_texts_are_special_tokens_is_asked_once(
    pool: TokenizerPool, model: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ("<repo_name>", "[TOOL_CALLS]", "<|im_end|>")
    found = pool.control_tokens(model, texts)
    assert [pool.decode(model, [token], special=True) for token in found] == ["<repo_name>", "<|im_end|>"]
    monkeypatch.setattr(pool, "ask", None)
    assert pool.control_tokens(model, texts) == found


def test_a_tokenizer_answers_in_milliseconds(pool: TokenizerPool, model: Vocabulary) -> None:
    pool.encode(model, "warm up")
    started = time.perf_counter()
    for _ in range(50):
        pool.encode(model, "The quick brown fox jumps over the lazy dog. " * 5)
    assert (time.perf_counter() - started) / 50 < 0.05


def test_a_vocabulary_that_is_missing_refuses_its_model(pool: TokenizerPool, tmp_path: Path) -> None:
    with pytest.raises(Refusal) as caught:
        pool.encode(Vocabulary(tmp_path / "missing.gguf", "missing"), "text")
    assert caught.value.code == "llm_unavailable"

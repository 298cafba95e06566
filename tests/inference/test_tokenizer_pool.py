"""Tokenizer children that hang, die and lie; and that the process that asks goes on."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from accounts.refusals import Refusal
from inference.tokenizers.pool import MAX_TEXT_CHARACTERS, TokenizerPool

pytestmark = pytest.mark.unit

CHILD = Path(__file__).parent / "children" / "tokenizer.py"


@dataclass(frozen=True)
class Vocabulary:
    digest: str = "d"
    name: str = "small"
    vocabulary_path: Path = Path("good.gguf")


GOOD = Vocabulary()


@pytest.fixture
def pool() -> Iterator[TokenizerPool]:
    made = TokenizerPool(processes=2, timeout_seconds=0.5, command=[sys.executable, str(CHILD)])
    made.encode(GOOD, "warm up")
    yield made
    made.close()


def refused(pool: TokenizerPool, text: str, model: Vocabulary = GOOD) -> Refusal:
    with pytest.raises(Refusal) as caught:
        pool.encode(model, text)
    return caught.value


def is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True


def test_text_becomes_tokens_and_back(pool: TokenizerPool) -> None:
    assert pool.encode(GOOD, "to be or not") == (2, 2, 2, 3)
    assert pool.decode(GOOD, (2, 3)) == "2 3"
    assert pool.info(GOOD)["n_vocab"] == 5


def test_an_idle_child_lives_on(pool: TokenizerPool) -> None:
    assert pool.encode(GOOD, "pid") == pool.encode(GOOD, "pid")


def test_a_text_that_hangs_ends_its_child_and_is_refused(pool: TokenizerPool) -> None:
    (child,) = pool.encode(GOOD, "pid")
    started = time.monotonic()
    refusal = refused(pool, "hang")
    assert (refusal.code, refusal.retryable) == ("tokenizer_failed", False)
    assert time.monotonic() - started < 2
    assert not is_alive(child)
    assert pool.encode(GOOD, "and on") == (3, 2)


@pytest.mark.parametrize("text", ["die", "nonsense", "array", "long"])
def test_a_child_that_dies_or_lies_is_replaced_and_the_text_refused(pool: TokenizerPool, text: str) -> None:
    assert refused(pool, text).code == "tokenizer_failed"
    assert pool.encode(GOOD, "and on") == (3, 2)


def test_a_child_that_died_while_idle_costs_no_request(pool: TokenizerPool) -> None:
    (child,) = pool.encode(GOOD, "pid")
    os.kill(child, 9)
    time.sleep(0.1)
    assert pool.encode(GOOD, "and on") == (3, 2)


def test_an_error_of_the_tokenizer_is_a_refusal_and_leaves_the_child(pool: TokenizerPool) -> None:
    before = pool.encode(GOOD, "pid")
    assert refused(pool, "wrong").code == "tokenizer_failed"
    assert pool.encode(GOOD, "pid") == before


@pytest.mark.parametrize(("file", "code"), [("bad.gguf", "llm_unavailable"), ("dies.gguf", "tokenizer_failed")])
def test_a_vocabulary_that_cannot_be_loaded_refuses_its_model_alone(pool: TokenizerPool, file: str, code: str) -> None:
    assert refused(pool, "text", Vocabulary("other", "other", Path(file))).code == code
    assert pool.encode(GOOD, "and on") == (3, 2)


def test_no_more_children_than_allowed_are_started(pool: TokenizerPool) -> None:
    with ThreadPoolExecutor(16) as threads:
        children = set(threads.map(lambda _: pool.encode(GOOD, "pid"), range(200)))
    assert 1 <= len(children) <= 2


def test_when_all_children_are_busy_the_refusal_says_when_to_come_back(pool: TokenizerPool) -> None:
    with ThreadPoolExecutor(3) as threads:
        hanging = [threads.submit(refused, pool, "hang") for _ in range(2)]
        time.sleep(0.1)
        pool._timeout_seconds = 0.05
        refusal = refused(pool, "text")
        assert (refusal.code, refusal.retry_after) == ("service_unavailable", 1)
        assert {each.result().code for each in hanging} == {"tokenizer_failed"}


def test_a_text_longer_than_any_context_is_refused_without_asking(pool: TokenizerPool) -> None:
    assert refused(pool, "x" * (MAX_TEXT_CHARACTERS + 1)).code == "context_length_exceeded"


def test_a_long_text_passes_through_the_pipes(pool: TokenizerPool) -> None:
    assert len(pool.encode(GOOD, "ab " * 300_000)) == 300_000


def test_closing_ends_the_idle_children(pool: TokenizerPool) -> None:
    (child,) = pool.encode(GOOD, "pid")
    pool.close()
    assert not is_alive(child)

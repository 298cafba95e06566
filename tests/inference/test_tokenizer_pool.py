"""Tokenizer children that hang, die and lie; and that the process that asks goes on."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from accounts.trail.refusals import Refusal
from inference.tokenizers import pool as children
from inference.tokenizers.pool import MAX_TEXT_CHARACTERS, TokenizerPool
from tests.timing import PATIENCE_SECONDS, Stopwatch
from tests.timing import wait_for as wait_until

pytestmark = pytest.mark.unit

CHILD = Path(__file__).parent / "children" / "tokenizer.py"


@dataclass(frozen=True)
class Vocabulary:
    digest: str = "d"
    name: str = "small"
    vocabulary_path: Path = Path("good.gguf")


GOOD = Vocabulary()
OTHER = Vocabulary("other", "other")


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
    watch = Stopwatch()
    refusal = refused(pool, "hang")
    assert (refusal.code, refusal.retryable) == ("tokenizer_failed", False)
    assert watch.seconds() < 2
    assert not is_alive(child)
    assert pool.encode(GOOD, "and on") == (3, 2)


def test_what_a_child_waits_for_a_processor_is_no_texts_fault(
    pool: TokenizerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert refused(pool, "doze").code == "tokenizer_failed"  # 0.9 s of its own, of 0.5
    pool.encode(GOOD, "warm up")
    kept = itertools.count()
    monkeypatch.setattr(children, "kept_waiting", lambda pid: next(kept) * 0.6)
    assert pool.encode(GOOD, "doze") == (4,)
    kept = itertools.count()
    monkeypatch.setattr(children, "kept_waiting", lambda pid: next(kept) * 60.0)
    refusal = refused(pool, "hang")
    assert (refusal.code, refusal.retry_after) == ("service_unavailable", 1)
    assert pool.encode(GOOD, "and on") == (3, 2)


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the system does not say who waits")
def test_a_process_that_shares_its_processor_is_seen_waiting() -> None:
    """Two that compute on one processor: each waits for about half of the time."""
    code = f"import os; os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}})\nwhile True: pass"
    both = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    try:
        wait_until(lambda: all(children.kept_waiting(each.pid) > 0.2 for each in both), seconds=30)
    finally:
        for each in both:
            each.kill()
            each.wait()
    assert children.kept_waiting(both[0].pid) == 0.0  # it has gone


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
        family = pool._family(GOOD)
        wait_until(lambda: family._num_children == 2 and not family._idle)
        pool._wait_seconds = 0.05
        refusal = refused(pool, "text")
        assert (refusal.code, refusal.retry_after) == ("service_unavailable", 1)
        assert {each.result().code for each in hanging} == {"tokenizer_failed"}


def test_a_child_may_be_waited_for_longer_than_for_its_answer() -> None:
    command = [sys.executable, str(CHILD)]
    pool = TokenizerPool(processes=1, timeout_seconds=0.5, wait_seconds=20.0, command=command)
    pool.encode(GOOD, "warm up")
    with ThreadPoolExecutor(3) as threads:
        hanging = [threads.submit(refused, pool, "hang") for _ in range(2)]
        time.sleep(0.1)
        assert pool.encode(GOOD, "and on") == (3, 2)
        assert {each.result().code for each in hanging} == {"tokenizer_failed"}
    pool.close()


def test_a_text_longer_than_any_context_is_refused_without_asking(pool: TokenizerPool) -> None:
    assert refused(pool, "x" * (MAX_TEXT_CHARACTERS + 1)).code == "context_length_exceeded"


def test_a_long_text_passes_through_the_pipes(pool: TokenizerPool) -> None:
    assert len(pool.encode(GOOD, "ab " * 300_000)) == 300_000


def test_children_whose_vocabulary_nobody_asks_are_ended(pool: TokenizerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    (child,) = pool.encode(GOOD, "pid")
    (other,) = pool.encode(OTHER, "pid")
    assert is_alive(child)
    monkeypatch.setattr(children, "IDLE_SECONDS", 0.0)
    assert pool.encode(OTHER, "pid") == (other,)
    assert not is_alive(child)
    assert pool.encode(GOOD, "and on") == (3, 2)


def test_children_of_so_many_vocabularies_are_kept(pool: TokenizerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "MAX_VOCABULARIES", 2)
    (oldest,), (other,) = pool.encode(GOOD, "pid"), pool.encode(OTHER, "pid")
    assert pool.encode(GOOD, "pid") == (oldest,)
    pool.encode(Vocabulary("third"), "text")
    assert (is_alive(oldest), is_alive(other)) == (True, False)


def test_a_child_at_work_answers_before_it_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(children, "MAX_VOCABULARIES", 1)
    pool = TokenizerPool(processes=2, timeout_seconds=PATIENCE_SECONDS, command=[sys.executable, str(CHILD)])
    (child,) = pool.encode(GOOD, "pid")
    family, go_on = pool._family(GOOD), tmp_path / "go-on"
    with ThreadPoolExecutor(1) as threads:
        slow = threads.submit(pool.encode, GOOD, f"until {go_on}")
        wait_until(lambda: not family._idle)
        pool.encode(OTHER, "text")
        assert is_alive(child)
        go_on.touch()
        assert slow.result() == (5, len(str(go_on)))
    assert not is_alive(child)
    pool.close()


def test_closing_ends_the_idle_children(pool: TokenizerPool) -> None:
    (child,) = pool.encode(GOOD, "pid")
    pool.close()
    assert not is_alive(child)

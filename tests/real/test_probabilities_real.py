"""Reported probabilities on the real model: numpy computes them again, and each belongs to its token."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from inference.engine import Delta, FinishReason, LlamaBackend, SamplingParams, SlotWork, TokenProbs
from inference.engine.llama import samplers
from inference.engine.llama.candidates import log_softmax, most_probable
from inference.engine.llama.library import native
from inference.engine.tokenizer import Tokenizer
from tests.real.test_engine_real import GREEDY, Run

pytestmark = pytest.mark.model

TEXT = "The capital of France is"


@pytest.fixture(scope="module")
def backend(model_path: Path) -> Iterator[LlamaBackend]:
    backend = LlamaBackend.load(model_path, n_ctx=256, n_slots=4, n_threads=2, max_draft_tokens=16)
    yield backend
    backend.free()


@pytest.fixture
def run(backend: LlamaBackend, tokenizer: Tokenizer) -> Run:
    return Run(backend, tokenizer)


def warm(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "seed": 5, "num_probs": 5, **fields})


def probs_of(run: Run, request_id: str = "r") -> list[TokenProbs]:
    own = [event for event in run.events if isinstance(event, Delta) and event.request_id == request_id]
    assert all(len(event.probs) == len(event.tokens) for event in own)
    return [each for event in own for each in event.probs]


def first_choice(backend: LlamaBackend, tokenizer: Tokenizer, sampling: SamplingParams) -> TokenProbs:
    """The first token of an answer; its logits stay readable until the next step."""
    prompt = tokenizer.encode(TEXT, add_special=True)
    backend.open(0, prompt, sampling, seed=sampling.seed or 0)
    (chosen,) = backend.execute([SlotWork(0, 0, prompt, samples=True)], ())
    backend.close(0)
    return chosen.probs[0]


def logits(backend: LlamaBackend) -> npt.NDArray[np.float64]:
    """Of the last token of the latest step."""
    row = native.llama_get_logits_ith(backend._context, -1)
    return np.array(row[: backend.n_vocab], np.float64)


# As the model gave them


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.0},
        {"grammar": "root ::= [a-z]+"},
        {"logit_bias": ((260, 40.0),)},
        {"repeat_penalty": 1.5, "temperature": 2.0},
    ],
)
def test_they_are_those_of_the_raw_logits(backend: LlamaBackend, tokenizer: Tokenizer, changes: dict[str, Any]) -> None:
    """Whatever samplers, bias and grammar made of them, as llama.cpp's server reports them."""
    probs = first_choice(backend, tokenizer, warm(**changes))
    raw = logits(backend)
    expected = raw - math.log(sum(math.exp(each) for each in raw))
    assert probs.logprob == pytest.approx(expected[probs.token], abs=1e-9)
    best = sorted(range(len(raw)), key=lambda token: -raw[token])[:5]
    assert [each.token for each in probs.top] == best
    assert [each.logprob for each in probs.top] == pytest.approx([expected[token] for token in best], abs=1e-9)


def test_over_the_whole_vocabulary_they_sum_to_one(backend: LlamaBackend, tokenizer: Tokenizer) -> None:
    probs = first_choice(backend, tokenizer, warm(num_probs=backend.n_vocab))
    logprobs = [each.logprob for each in probs.top]
    assert len({each.token for each in probs.top}) == backend.n_vocab
    assert math.fsum(map(math.exp, logprobs)) == pytest.approx(1.0, abs=1e-9)
    assert logprobs == sorted(logprobs, reverse=True)


def test_asking_for_them_changes_no_token(run: Run) -> None:
    for request_id, changes in {
        "none": {"num_probs": 0},
        "raw": {},
        "left": {"post_sampling_probs": True},
    }.items():
        run.add(request_id, "Once upon a time", sampling=warm(**changes))
    run.finish()
    assert run.tokens("raw") == run.tokens("none")
    assert run.tokens("left") == run.tokens("none")


def scores_of(kind: str, n_vocab: int) -> npt.NDArray[np.float32]:
    chance = np.random.default_rng(len(kind))
    scores = (4 * chance.standard_normal(n_vocab)).astype(np.float32)
    some = chance.integers(1, n_vocab, 500)
    if kind == "equals":
        scores = np.round(scores)
    elif kind == "zeros of either sign":
        scores = np.where(scores > 0, np.float32(-0.0), np.minimum(scores, 0.0))
        scores[some] = 0.0
    elif kind == "nothing possible":
        scores[:] = -math.inf
    elif kind == "a last one":
        scores[:-1] = -math.inf
    elif kind == "infinite":
        scores[some] = math.inf
    elif kind == "no numbers":
        scores[some] = math.nan
    elif kind == "none at first":
        scores[0] = math.nan
    return scores


@pytest.mark.parametrize(
    "kind",
    [
        "any", "equals", "zeros of either sign", "nothing possible", "a last one", "infinite", "no numbers",
        "none at first",
    ],
)  # fmt: skip
def test_the_highest_score_is_the_token_that_llama_cpp_takes(
    backend: LlamaBackend, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores, candidates = scores_of(kind, backend.n_vocab), backend._candidates
    backend.open(0, (1, 2), GREEDY, seed=0)
    sampler, asked = backend._samplers[0], []
    monkeypatch.setattr(candidates, "logits", lambda _context, _row: scores)
    candidates.fill(None, 0)
    expected = candidates.choose(sampler._chain)

    def sample(*_: Any) -> int | None:
        asked.append(kind)
        return expected

    monkeypatch.setattr(samplers, "sample", sample)
    assert sampler.choose(None, 0).tokens == (expected,)
    assert bool(asked) == bool(np.isnan(scores).any())
    backend.close(0)


def test_log_probabilities_are_those_of_the_whole_vocabulary_to_the_last_bit() -> None:
    for kind in ("any", "equals", "zeros of either sign", "a last one"):
        scores = scores_of(kind, 50_000)
        whole = scores.astype(np.float64)
        whole -= whole.max()
        whole -= math.log(np.exp(whole).sum())
        assert log_softmax(scores, range(0, 50_000, 7)) == whole[::7].tolist()
        assert most_probable(scores, 40) == most_probable(whole, 40)


def test_the_greedy_choice_is_the_most_probable(run: Run) -> None:
    run.add("r", TEXT, sampling=SamplingParams(temperature=0.0, num_probs=3))
    run.finish()
    for each in probs_of(run):
        assert each.top[0].token == each.token
        assert each.top[0].logprob == each.logprob


def test_the_pieces_of_the_chosen_are_the_text(run: Run) -> None:
    run.add("r", "Grüße aus Köln, ", sampling=warm())
    run.finish()
    assert b"".join(each.piece for each in probs_of(run)).decode("utf-8", "replace").startswith(run.text("r"))


# As sampling left them


@pytest.mark.parametrize(
    "changes",
    [
        {"top_k": 8, "top_p": 1.0, "min_p": 0.0},
        {"top_p": 0.9},
        {"typical_p": 0.7},
        {"mirostat": 2},
        {"mirostat": 1},
        {"grammar": "root ::= [a-z ]+", "top_k": 8},
        {"xtc_probability": 1.0, "xtc_threshold": 0.05},
    ],
)
def test_what_is_left_sums_to_one_and_holds_the_choice(
    backend: LlamaBackend, tokenizer: Tokenizer, changes: dict[str, Any]
) -> None:
    sampling = warm(num_probs=backend.n_vocab, post_sampling_probs=True, **changes)
    probs = first_choice(backend, tokenizer, sampling)
    assert math.fsum(math.exp(each.logprob) for each in probs.top) == pytest.approx(1.0, abs=1e-5)
    assert probs.logprob == next(each.logprob for each in probs.top if each.token == probs.token)
    assert [each.logprob for each in probs.top] == sorted((each.logprob for each in probs.top), reverse=True)
    if top_k := changes.get("top_k"):
        assert len(probs.top) <= top_k


def test_after_top_k_they_are_the_softmax_of_the_best(backend: LlamaBackend, tokenizer: Tokenizer) -> None:
    sampling = warm(num_probs=20, post_sampling_probs=True, top_k=4, top_p=1.0, min_p=0.0, temperature=0.5)
    probs = first_choice(backend, tokenizer, sampling)
    best = np.sort(logits(backend))[::-1][:4] / 0.5
    expected = np.exp(best - best.max()) / np.exp(best - best.max()).sum()
    assert [math.exp(each.logprob) for each in probs.top] == pytest.approx(list(expected), rel=1e-4)


def test_a_greedy_choice_is_certain_and_the_others_are_what_top_k_left(
    backend: LlamaBackend, tokenizer: Tokenizer
) -> None:
    sampling = warm(temperature=0.0, num_probs=10, post_sampling_probs=True, top_p=1.0, min_p=0.0)
    probs = first_choice(backend, tokenizer, sampling)
    assert probs.logprob == 0.0
    assert [each.logprob for each in probs.top] == [0.0] + [-math.inf] * 9
    assert [each.token for each in probs.top] == np.argsort(-logits(backend), kind="stable")[:10].tolist()


def test_a_forced_end_is_certain(run: Run) -> None:
    sampling = warm(grammar='root ::= "a"', post_sampling_probs=True, ignore_eos=True)
    run.add("r", TEXT, sampling=sampling)
    run.finish()
    assert run.finished("r").reason is FinishReason.EOS
    assert [each.piece for each in probs_of(run)] == [b"a", b""]
    assert probs_of(run)[-1].logprob == 0.0


# They belong to their tokens


def test_they_come_with_their_tokens_where_text_is_held_back(run: Run) -> None:
    run.add("r", "1 2 3 4 5 6", sampling=SamplingParams(temperature=0.0, num_probs=1), stop=(" 9 10 11 x", " 12"))
    run.finish()
    assert run.finished("r").stop_word == " 12"
    assert tuple(each.token for each in probs_of(run)) == run.tokens("r")
    assert len(probs_of(run)) == run.finished("r").receipt.completion_tokens


def test_a_verified_draft_has_one_for_each_token(backend: LlamaBackend, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("1, 2, 3, 4, 5, 6, 7, 8,", add_special=True)
    guesses = tokenizer.encode(" 9, 10,", add_special=False)
    backend.open(0, prompt, SamplingParams(temperature=0.0, num_probs=2), seed=0)
    (chosen,) = backend.execute([SlotWork(0, 0, prompt + guesses, samples=True, num_drafted=len(guesses))], ())
    backend.close(0)
    assert len(chosen.tokens) > 2
    assert tuple(each.token for each in chosen.probs) == chosen.tokens
    assert all(each.top[0].token == each.token for each in chosen.probs)


def test_neighbours_without_them_get_none(run: Run) -> None:
    run.add("r", TEXT, sampling=warm())
    run.add("other", TEXT, sampling=GREEDY)
    run.finish()
    assert probs_of(run)
    assert not [
        event for event in run.events if isinstance(event, Delta) and event.request_id == "other" and event.probs
    ]


def test_reading_a_row_copies_nothing(backend: LlamaBackend, tokenizer: Tokenizer) -> None:
    first_choice(backend, tokenizer, warm())
    row = backend._candidates.logits(backend._context, -1)
    address = ctypes.cast(native.llama_get_logits_ith(backend._context, -1), ctypes.c_void_p).value
    assert row.ctypes.data == address

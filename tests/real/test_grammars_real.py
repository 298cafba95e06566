"""Answers under a grammar, on the real model: valid, ended where they are complete, and the same with drafts."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from inference.engine import (
    Delta,
    EngineError,
    FinishReason,
    GenerationRequest,
    LlamaBackend,
    SamplingParams,
    SlotWork,
)
from inference.engine.backend import Chosen
from inference.engine.llama import samplers
from inference.engine.tokenizer import Tokenizer
from inference.intake.grammars import grammar_from
from tests.real.test_engine_real import Run
from tests.structured.corpus import EXAMPLES

pytestmark = pytest.mark.model

PROMPT = "Answer in JSON: "
DIGITS = 'root ::= [0-9]{4} "-" [0-9]{2}'
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 16}, "age": {"type": "integer", "maximum": 120}},
    "required": ["name", "age"],
}


@pytest.fixture(scope="module")
def backend(model_path: Path) -> Iterator[LlamaBackend]:
    backend = LlamaBackend.load(model_path, n_ctx=512, n_slots=8, n_threads=2, max_draft_tokens=32)
    yield backend
    backend.free()


@pytest.fixture
def run(backend: LlamaBackend, tokenizer: Tokenizer) -> Run:
    return Run(backend, tokenizer)


def warm(grammar: str | None, **fields: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "seed": 11, "grammar": grammar, **fields})


def person() -> str:
    grammar = grammar_from(None, PERSON)
    assert grammar is not None
    return grammar


# Valid


@pytest.mark.parametrize("example", EXAMPLES[:14], ids=lambda example: example.name)
def test_a_warm_model_answers_as_the_schema_says(run: Run, example: Any) -> None:
    """Three at once, from different seeds; an answer that was cut is no whole JSON, so only those that ended count."""
    grammar = grammar_from(None, example.schema)
    for seed in range(3):
        run.add(str(seed), PROMPT, sampling=warm(grammar, seed=seed), max_tokens=200)
    run.finish()
    whole = [seed for seed in range(3) if run.finished(str(seed)).reason is FinishReason.EOS]
    for seed in whole:
        jsonschema.validate(json.loads(run.text(str(seed))), example.schema)
    assert all(run.finished(str(seed)).reason in (FinishReason.EOS, FinishReason.LENGTH) for seed in range(3))
    assert whole


def test_an_answer_that_is_complete_ends(run: Run) -> None:
    run.add("r", "The year is ", sampling=warm(DIGITS), max_tokens=64)
    run.finish()
    assert run.finished("r").reason is FinishReason.EOS
    assert len(run.text("r")) == len("1999-01")


@pytest.mark.parametrize("changes", [{"ignore_eos": True}, {"logit_bias": ((0, float("-inf")), (2, float("-inf")))}])
def test_an_answer_that_cannot_go_on_ends_even_where_its_end_is_banned(run: Run, changes: dict[str, Any]) -> None:
    run.add("r", "The year is ", sampling=warm(DIGITS, **changes), max_tokens=64)
    run.finish()
    assert run.finished("r").reason is FinishReason.EOS
    assert len(run.text("r")) == 7


def test_ignore_eos_goes_on_where_the_grammar_may(run: Run) -> None:
    run.add("r", "One, two, ", sampling=warm('root ::= "x"+', ignore_eos=True), max_tokens=40)
    run.finish()
    assert run.finished("r").reason is FinishReason.LENGTH
    assert run.finished("r").receipt.completion_tokens == 40


def test_an_empty_grammar_is_an_empty_answer(run: Run) -> None:
    run.add("r", PROMPT, sampling=warm("root ::= "))
    run.finish()
    assert (run.text("r"), run.finished("r").reason) == ("", FinishReason.EOS)


# No way out


def test_a_dead_end_ends_the_sequence_alone(run: Run, tokenizer: Tokenizer) -> None:
    digits = {token for digit in "0123456789" for token in tokenizer.encode(digit, add_special=False)}
    bias = tuple((token, float("-inf")) for token in digits)
    run.add("stuck", PROMPT, sampling=warm('root ::= "a" [0-9]+', logit_bias=bias))
    run.add("fine", PROMPT, sampling=warm(DIGITS))
    run.finish()
    stuck = run.finished("stuck")
    assert (stuck.reason, stuck.error) == (FinishReason.ERROR, "grammar_dead_end")
    assert run.text("stuck") == "a"
    assert run.finished("fine").reason is FinishReason.EOS


def test_a_slot_that_met_a_dead_end_is_reused_rightly(run: Run, tokenizer: Tokenizer) -> None:
    """What the slot holds afterwards is what its sequence says, to the token."""
    digits = {token for digit in "0123456789" for token in tokenizer.encode(digit, add_special=False)}
    bias = tuple((token, float("-inf")) for token in digits)
    text = "Once upon a time there was a king who had three daughters"
    run.add("alone", text)
    run.finish()
    run.add("stuck", text, sampling=warm("root ::= [0-9]+", logit_bias=bias), cache_scope="t")
    run.finish()
    run.add("again", text, cache_scope="t")
    run.finish()
    assert run.finished("again").receipt.cached_tokens > 0
    assert run.tokens("again") == run.tokens("alone")


def test_a_grammar_that_llama_cpp_refuses_ends_the_sequence_alone(run: Run) -> None:
    run.add("bad", PROMPT, sampling=warm("root ::= <no-such-token>"))
    run.add("fine", PROMPT, sampling=warm(DIGITS))
    run.finish()
    assert (run.finished("bad").reason, run.finished("bad").error) == (FinishReason.ERROR, "invalid_grammar")
    assert run.finished("fine").reason is FinishReason.EOS


def test_a_grammar_that_is_too_slow_ends_the_sequence(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samplers, "MAX_GRAMMAR_SECONDS", 0.0)
    run.add("r", PROMPT, sampling=warm(DIGITS))
    run.finish()
    assert (run.finished("r").reason, run.finished("r").error) == (FinishReason.ERROR, "grammar_too_slow")
    assert run.finished("r").receipt.completion_tokens == 1


# The same tokens

MIXED = {
    "greedy": {"temperature": 0.0},
    "warm": {},
    "penalties": {"repeat_penalty": 1.3, "presence_penalty": 0.5},
    "dry": {"dry_multiplier": 0.8, "dry_allowed_length": 2},
    "mirostat": {"mirostat": 2},
    "mirostat 1": {"mirostat": 1},
    "typical": {"top_k": 0, "typical_p": 0.5},
    "xtc": {"xtc_probability": 0.5, "xtc_threshold": 0.05},
    "bias": {"logit_bias": ((18, -5.0),)},
    "no truncation": {"top_k": 0, "top_p": 1.0, "min_p": 0.0},
}


@pytest.mark.parametrize("changes", MIXED.values(), ids=MIXED)
def test_every_sampler_works_under_a_grammar_and_a_seed_repeats_it(run: Run, changes: dict[str, Any]) -> None:
    for request_id in ("once", "twice"):
        run.add(request_id, PROMPT, sampling=warm(person(), **changes), max_tokens=100)
    run.finish()
    assert run.tokens("once") == run.tokens("twice")
    assert all(run.finished(each).error is None for each in ("once", "twice"))
    if run.finished("once").reason is FinishReason.EOS:
        jsonschema.validate(json.loads(run.text("once")), PERSON)


def test_a_grammar_that_allows_everything_changes_nothing(run: Run) -> None:
    anything = r"root ::= [\x01-\U0010FFFF]*"
    run.add("free", "Once upon a time", sampling=warm(None))
    run.add("bound", "Once upon a time", sampling=warm(anything))
    run.finish()
    assert run.tokens("bound") == run.tokens("free")


def test_a_stop_string_ends_an_answer_under_a_grammar(run: Run) -> None:
    run.add("r", PROMPT, sampling=warm(person()), stop=('",',), max_tokens=100)
    run.finish()
    assert run.finished("r").stop_word == '",'
    assert run.text("r").startswith('{"name":')


class Drafted:
    """A slot driven by hand, as the engine does with a proposer: the draft is given, wrong guesses are forgotten."""

    def __init__(self, backend: LlamaBackend, tokenizer: Tokenizer, sampling: SamplingParams) -> None:
        self.backend = backend
        self.prompt = tokenizer.encode(PROMPT, add_special=True)
        self.tokens: list[int] = []
        self.probs: list[Any] = []
        self.num_accepted = 0
        backend.open(0, self.prompt, sampling, seed=sampling.seed or 0)

    def generate(self, draft: Callable[[list[int]], list[int]], number: int) -> list[int]:
        pending, start = self.prompt, 0
        while len(self.tokens) < number:
            guesses = draft(self.tokens)
            work = SlotWork(0, start, pending + guesses, samples=True, num_drafted=len(guesses))
            (chosen,) = self.backend.execute([work], ())
            assert isinstance(chosen, Chosen)
            assert chosen.error is None
            start += len(pending) + len(chosen.tokens) - 1
            self.num_accepted += len(chosen.tokens) - 1
            self.tokens += chosen.tokens
            self.probs += chosen.probs
            if ends := [place for place, token in enumerate(self.tokens) if self.backend.is_end(token)]:
                del self.tokens[ends[0] + 1 :], self.probs[ends[0] + 1 :]
                break
            pending = [self.tokens[-1]]
        self.backend.close(0)
        return self.tokens


@pytest.mark.parametrize("changes", MIXED.values(), ids=MIXED)
def test_drafts_never_change_what_a_grammar_allows(
    backend: LlamaBackend, tokenizer: Tokenizer, changes: dict[str, Any]
) -> None:
    sampling = warm(person(), num_probs=2, **changes)
    plain = Drafted(backend, tokenizer, sampling)
    expected = plain.generate(lambda _: [], 40)

    def half_right(tokens: list[int]) -> list[int]:
        """Two right guesses and a wrong one."""
        return [*expected[len(tokens) : len(tokens) + 2], 17][:3]

    drafted = Drafted(backend, tokenizer, sampling)
    assert drafted.generate(half_right, 40)[: len(expected)] == expected
    assert drafted.num_accepted > 0
    found = [each.token for each in drafted.probs]
    assert found == drafted.tokens
    for one, other in zip(plain.probs, drafted.probs, strict=False):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-3)


# Life


def _num_kilobytes() -> int:
    with Path("/proc/self/statm").open() as file:
        return int(file.read().split()[1]) * resource.getpagesize() // 1024


def test_samplers_with_grammars_are_freed(backend: LlamaBackend) -> None:
    """A grammar of this size is some 100 KB of llama.cpp's: 2,000 of them kept would be seen."""
    sampling = warm(person())

    def open_and_close(number: int) -> None:
        for _ in range(number):
            backend.open(0, [1, 2, 3], sampling, seed=1)
        backend.close(0)

    open_and_close(200)
    before = _num_kilobytes()
    open_and_close(2_000)
    assert _num_kilobytes() - before < 4_096


def test_refused_grammars_are_freed_too(backend: LlamaBackend) -> None:
    bad = warm("root ::= <no-such-token>")
    for _ in range(50):
        with pytest.raises(EngineError, match="refused the grammar"):
            backend.open(0, [1, 2, 3], bad, seed=1)
    backend.open(0, [1, 2, 3], replace(bad, grammar=DIGITS), seed=1)
    backend.close(0)


def test_the_bound_on_reported_tokens_is_the_vocabulary(run: Run, backend: LlamaBackend) -> None:
    request = GenerationRequest(
        request_id="r", prompt=(1,), max_tokens=1, sampling=SamplingParams(num_probs=backend.n_vocab + 1)
    )
    with pytest.raises(EngineError, match="num_probs"):
        run.engine.check(request)
    assert not [event for event in run.events if isinstance(event, Delta)]

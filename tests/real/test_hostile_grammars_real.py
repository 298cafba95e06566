"""Hostile grammars through admission's door and its dry run: a clear 400 in time, and no worker ever in danger.

What passes is then followed by a real engine, in this process: if one of them could end it, there were no report.
More of them: LLMSITE_FUZZ_GRAMMARS=2000.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from accounts.trail.refusals import Refusal
from inference.engine import FinishReason, LlamaBackend, SamplingParams
from inference.engine.tokenizer import Tokenizer
from inference.intake.grammars import Verdicts, grammar_from
from inference.tokenizers.pool import GRAMMAR_TIMEOUT_SECONDS, TokenizerPool
from tests.real.test_engine_real import Run
from tests.structured.compiling import to_grammar
from tests.structured.corpus import EXAMPLES
from tests.structured.grammars import BOMBS, FINE, WRONG
from tests.timing import Stopwatch

pytestmark = pytest.mark.model

MAX_SECONDS = 1.5
NUM_EDITED = int(os.environ.get("LLMSITE_FUZZ_GRAMMARS", "300"))
STALLING = BOMBS["2^40 ways to start"][0]
DOUBLING = 'root ::= expr\nexpr ::= term | term "+" expr\nterm ::= "(" expr ")"'
KILLING = "root ::= " + "(" * 60_000 + '"a"' + ")" * 60_000


@dataclass(frozen=True)
class Vocabulary:
    vocabulary_path: Path
    digest: str = "real"
    name: str = "smollm2"


@pytest.fixture(scope="module")
def model(model_path: Path) -> Vocabulary:
    return Vocabulary(model_path)


@pytest.fixture(scope="module")
def pool(model: Vocabulary) -> Iterator[TokenizerPool]:
    made = TokenizerPool(processes=2, timeout_seconds=GRAMMAR_TIMEOUT_SECONDS)
    made.info(model)
    yield made
    made.close()


@pytest.fixture
def verdicts(pool: TokenizerPool) -> Verdicts:
    return Verdicts(lambda: pool)


def said(verdicts: Verdicts, model: Vocabulary, grammar: str) -> Refusal | None:
    """What the whole way to the queue says of a grammar, None where it lets it through. Fails where that is late."""
    watch = Stopwatch()
    try:
        checked = grammar_from(grammar, None)
        assert checked is not None
        verdicts.check(model, checked)
    except Refusal as refusal:
        return refusal
    finally:
        assert watch.seconds() < MAX_SECONDS
    return None


def children(pool: TokenizerPool, model: Vocabulary) -> set[int]:
    return {child.pid for child in pool._family(model)._idle}


def edited(number: int, seed: int) -> list[str]:
    chance = random.Random(seed)
    return [_edit(chance.choice(list(FINE.values())), chance) for _ in range(number)]


def _edit(grammar: str, chance: random.Random) -> str:
    for _ in range(chance.randint(1, 4)):
        at, length = chance.randrange(len(grammar) + 1), chance.randint(0, 4)
        grammar = grammar[:at] + "".join(chance.choices('ab"()[]|*+?{}19,:= -^\\<>!.\n#', k=length)) + grammar[at + 1 :]
    return grammar


@pytest.mark.parametrize("grammar", [*(text for text, *_ in WRONG.values()), *(text for text, _ in BOMBS.values())])
def test_what_is_wrong_or_kills_is_refused_with_its_place(
    verdicts: Verdicts, pool: TokenizerPool, model: Vocabulary, grammar: str
) -> None:
    if not grammar:
        return  # "" is no grammar, as in llama.cpp
    before = children(pool, model)
    refusal = said(verdicts, model, grammar)
    assert refusal is not None
    assert refusal.code == "invalid_grammar"
    assert refusal.message.startswith("Field 'grammar': ")
    assert children(pool, model) == before  # not even a child has seen it


@pytest.mark.parametrize("name", FINE)
def test_what_is_fine_passes_or_is_not_in_the_vocabulary(verdicts: Verdicts, model: Vocabulary, name: str) -> None:
    assert said(verdicts, model, FINE[name]) is None


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_what_schemas_become_passes(verdicts: Verdicts, model: Vocabulary, example: object) -> None:
    grammar = grammar_from(None, example.schema)  # type: ignore[attr-defined]
    assert grammar is not None
    verdicts.check(model, grammar)


def test_a_token_that_the_model_lacks_is_refused_and_its_child_lives(
    verdicts: Verdicts, pool: TokenizerPool, model: Vocabulary
) -> None:
    before = children(pool, model)
    refusal = said(verdicts, model, "root ::= <no-such-token>")
    assert refusal is not None
    assert "a token that the model lacks" in refusal.message
    assert children(pool, model) == before


def test_edited_grammars_neither_kill_nor_stall(
    verdicts: Verdicts, pool: TokenizerPool, model: Vocabulary, model_path: Path
) -> None:
    before = children(pool, model)
    passed = []
    for grammar in edited(NUM_EDITED, seed=7):
        refusal = said(verdicts, model, grammar)
        if refusal is None:
            passed.append(grammar)
        else:
            assert refusal.code == "invalid_grammar"
    assert children(pool, model) == before
    assert len(passed) > NUM_EDITED / 100
    _follow(model_path, passed)


def _follow(model_path: Path, grammars: list[str]) -> None:
    """Each by a sequence of its own, beside others."""
    backend, tokenizer = LlamaBackend.load(model_path, n_ctx=64, n_slots=8, n_threads=2), Tokenizer.load(model_path)
    run = Run(backend, tokenizer)
    for number, grammar in enumerate(grammars):
        sampling = SamplingParams(temperature=1.5, seed=number, grammar=grammar)
        run.add(str(number), "Hello", sampling=sampling, max_tokens=6)
    run.finish()
    reasons = {run.finished(str(number)).reason for number in range(len(grammars))}
    backend.free()
    tokenizer.free()
    assert reasons <= {FinishReason.EOS, FinishReason.LENGTH}


# Past the validator: what only the child is there for


@pytest.mark.parametrize("grammar", [KILLING, STALLING], ids=["it dies", "it stalls"])
def test_a_grammar_that_ends_its_child_is_refused_in_time_and_remembered(
    verdicts: Verdicts, pool: TokenizerPool, model: Vocabulary, grammar: str
) -> None:
    pool.info(model)
    before = children(pool, model)
    watch = Stopwatch()
    with pytest.raises(Refusal) as first:
        verdicts.check(model, grammar)
    assert watch.seconds() < 2 * MAX_SECONDS  # with the start of a second child, where the first has died
    assert first.value.code == "invalid_grammar"
    assert "takes too long" in first.value.message
    pool.info(model)
    after = children(pool, model)
    assert after != before
    watch = Stopwatch()
    with pytest.raises(Refusal):
        verdicts.check(model, grammar)
    assert watch.seconds() < 0.05
    assert children(pool, model) == after


def test_a_grammar_whose_places_double_is_refused_by_its_child(
    verdicts: Verdicts, pool: TokenizerPool, model: Vocabulary
) -> None:
    pool.info(model)
    before = children(pool, model)
    with pytest.raises(Refusal, match="takes too long"):
        verdicts.check(model, DOUBLING)
    assert children(pool, model) == before


def test_the_largest_schema_passes_in_time(verdicts: Verdicts, model: Vocabulary) -> None:
    properties = {f"p{i}": {"type": "string", "maxLength": 400 + i} for i in range(24)}
    grammar = to_grammar({"type": "object", "properties": properties})
    watch = Stopwatch()
    verdicts.check(model, grammar)
    assert watch.seconds() < MAX_SECONDS

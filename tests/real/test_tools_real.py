"""A model of 135 million parameters, whose template shows no tools, calls them rightly where it is made to.

FORCED_ANSWERS=100 makes a hundred of each, with all schemas; the suite makes a few.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import jsonschema
import pytest

from inference.chat.child import special_tokens
from inference.chat.probing import examine
from inference.chat.prompt import ChatTemplate
from inference.chat.rendering import rendered
from inference.engine import EngineError, FinishReason, GenerationRequest, LlamaBackend, SamplingParams
from inference.engine.tokenizer import Tokenizer, answer
from inference.grammars import grammar_from
from inference.tools import collect, plan_tools
from tests.real.test_engine_real import Run
from tests.structured.tool_corpus import TOOLS, WIDE, tool

pytestmark = [pytest.mark.model, pytest.mark.timeout(1_800)]

NUM_ANSWERS = int(os.environ.get("FORCED_ANSWERS", "0"))
MAX_TOKENS = 384
N_SLOTS = 8
NO_CUT = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
"""The model's own probabilities, unlikely tokens included."""


@pytest.fixture(scope="module")
def tokenizer(model_path: Path) -> Iterator[Tokenizer]:
    tokenizer = Tokenizer.load(model_path)
    yield tokenizer
    tokenizer.free()


@pytest.fixture(scope="module")
def backend(model_path: Path) -> Iterator[LlamaBackend]:
    backend = LlamaBackend.load(model_path, n_ctx=1024, n_slots=N_SLOTS, n_threads=2)
    yield backend
    backend.free()


@pytest.fixture(scope="module")
def template(tokenizer: Tokenizer) -> ChatTemplate:
    source = tokenizer.info()["chat_template"]
    found = ChatTemplate.of(source, examine(source))
    assert found is not None
    assert not found.has_tools
    return found


def prompt_of(
    tokenizer: Tokenizer, template: ChatTemplate, ask: str, tools: list[dict[str, object]]
) -> tuple[int, ...]:
    prompt = {"messages": [{"role": "user", "content": ask}], "tools": tools}
    now = datetime(2024, 1, 1, tzinfo=UTC)
    segments = rendered(template.source, prompt, template.facts(), special_tokens(tokenizer), now=now)
    return tuple(tokenizer.encode_segments(segments))


def generate(run: Run, number: int, prompt: tuple[int, ...], grammar: str | None) -> None:
    sampling = SamplingParams(grammar=grammar, seed=number, **NO_CUT)  # type: ignore[arg-type]
    request = GenerationRequest(request_id=str(number), prompt=prompt, max_tokens=MAX_TOKENS, sampling=sampling)
    run.engine.check(request)
    run.engine.add(request, 0.0)


def ended(run: Run, number: int) -> bool:
    return run.finished(str(number)).reason is FinishReason.EOS


def test_every_forced_call_is_valid(backend: LlamaBackend, tokenizer: Tokenizer, template: ChatTemplate) -> None:
    """Read whole and piece by piece; several tools to choose from, and several calls at once, in every third."""
    run, plans = Run(backend, tokenizer), {}
    names = list(TOOLS)
    for number in range(NUM_ANSWERS or 12):
        name = names[number * 7 % len(names)]
        several = number % 3 == 0
        shown = [tool(name), tool("now"), tool("pick")] if several and name not in ("now", "pick") else [tool(name)]
        choice = {"choice": "required"} if several else {"name": name}
        plan = plan_tools(template, shown, parallel=several, max_chars=MAX_TOKENS, **choice)
        plans[number] = plan
        generate(run, number, prompt_of(tokenizer, template, TOOLS[name][0], list(plan.prompt_tools)), plan.grammar)
    run.finish()
    for number, plan in plans.items():
        text = run.text(str(number))
        assert ended(run, number), text
        content, calls = plan.read(text, rng=random.Random(number))
        assert content == ""
        assert calls
        for call in calls:
            assert call.name in plan.names
            jsonschema.validate(json.loads(call.arguments), TOOLS[call.name][1])
        stream = plan.stream(rng=random.Random(number))
        events = [event for character in text for event in stream.feed(character)]
        assert collect([*events, *stream.finish()]) == ("", calls)


def test_every_answer_in_a_schema_is_valid(backend: LlamaBackend, tokenizer: Tokenizer, template: ChatTemplate) -> None:
    run = Run(backend, tokenizer)
    schemas = [TOOLS[name][1] for name in WIDE]
    asks = [TOOLS[name][0] for name in WIDE]
    numbers = range(NUM_ANSWERS or 5)
    for number in numbers:
        which = number * 3 % len(WIDE)
        grammar = grammar_from(None, schemas[which], max_chars=MAX_TOKENS)
        generate(run, number, prompt_of(tokenizer, template, asks[which], []), grammar)
    run.finish()
    for number in numbers:
        assert ended(run, number), run.text(str(number))
        jsonschema.validate(json.loads(run.text(str(number))), schemas[number * 3 % len(WIDE)])


# Control tokens as marks of a call: this vocabulary has others than Mistral's or Llama's

MARK = "<repo_name>"


def test_a_control_token_is_seen_where_it_is_shown(backend: LlamaBackend, tokenizer: Tokenizer) -> None:
    (token,) = tokenizer.control_tokens([MARK, "[TOOL_CALLS]", "plain"])
    asked = answer(tokenizer, {"op": "control_tokens", "texts": [MARK]})
    assert asked == {"tokens": [token]}
    run = Run(backend, tokenizer)
    for request_id, shown in (("shown", (token,)), ("hidden", ())):
        sampling = SamplingParams(temperature=0.0, logit_bias=((token, 100.0),), shown_tokens=shown, num_probs=1)
        run.add(request_id, "Once", max_tokens=3, sampling=sampling)
    run.finish()
    assert (run.text("shown"), run.text("hidden")) == (MARK * 3, "")
    assert run.tokens("shown") == run.tokens("hidden") == (token,) * 3


@pytest.mark.parametrize("is_shown", [True, False])
def test_a_grammar_takes_a_shown_control_token_for_its_text(
    backend: LlamaBackend, tokenizer: Tokenizer, is_shown: bool
) -> None:
    """The text is the same either way: spelled out where the token is not shown."""
    (token,) = tokenizer.control_tokens([MARK])
    run = Run(backend, tokenizer)
    sampling = SamplingParams(
        grammar=f'root ::= "{MARK}" [0-9]',
        temperature=0.0,
        logit_bias=((token, 100.0),),
        shown_tokens=(token,) if is_shown else (),
    )
    run.add("r", "Once", max_tokens=24, sampling=sampling)
    run.finish()
    assert run.finished("r").reason is FinishReason.EOS
    assert run.text("r")[:-1] == MARK
    assert (run.tokens("r")[0] == token) is is_shown


@pytest.mark.parametrize("shown", [(-1,), (10**6,), tuple(range(65))])
def test_tokens_to_be_shown_are_bounded(backend: LlamaBackend, tokenizer: Tokenizer, shown: tuple[int, ...]) -> None:
    with pytest.raises(EngineError, match="shown_tokens"):
        Run(backend, tokenizer).add("r", "Once", sampling=SamplingParams(shown_tokens=shown))

"""Control tokens as marks of calls, with a real vocabulary. What is forced is in test_forced_real.py, over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from inference.engine import EngineError, FinishReason, LlamaBackend, SamplingParams
from inference.engine.tokenizer import Tokenizer, answer
from tests.real.test_engine_real import Run

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def backend(model_path: Path) -> Iterator[LlamaBackend]:
    backend = LlamaBackend.load(model_path, n_ctx=128, n_slots=2, n_threads=2)
    yield backend
    backend.free()


MARK = "<repo_name>"
"""This vocabulary has others than Mistral's or Llama's."""


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

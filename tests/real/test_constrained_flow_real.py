"""From an order with a JSON Schema through admission, its dry run, a ticket and a worker to text and probabilities."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from accounts.trail.refusals import Refusal
from inference.catalog import registry
from inference.catalog.served import Served
from inference.engine import Backend, LlamaBackend, SamplingParams
from inference.engine.tokenizer import Tokenizer
from inference.intake.admission import admit
from inference.intake.grammars import grammar_from, verdicts
from inference.models import Receipt
from inference.tokenizers.pool import grammar_pool
from inference.transport import doorbell
from inference.transport.stream import StreamEvent
from inference.vetting.inspection import vocabulary_path
from tests.inference.flow import (
    admitted,
    events,
    finish,
    new_id,
    order,
    principal_of,
    register,
    text_of,
    wait_for,
    worker,
)

pytestmark = [pytest.mark.model, pytest.mark.django_db(transaction=True)]

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "people": {"type": "integer", "minimum": 0}},
    "required": ["city", "people"],
}


@pytest.fixture
def prompt(model_path: Path) -> tuple[int, ...]:
    tokenizer = Tokenizer.load(model_path)
    tokens = tuple(tokenizer.encode("A city, in JSON: ", add_special=True))
    tokenizer.free()
    return tokens


@pytest.fixture
def load(model_path: Path) -> Callable[[Served], Backend]:
    return lambda served: LlamaBackend.load(model_path, n_ctx=served.n_ctx, n_slots=served.n_slots, n_threads=2)


@pytest.fixture
def alice(cast: Any, valkey: Any, monkeypatch: pytest.MonkeyPatch, model_path: Path) -> Iterator[Any]:
    """A tenant of the real model, whose vocabulary is where registration would have put it."""
    monkeypatch.setattr(doorbell, "ring", lambda pool: True)
    row = register(n_slots=2, path=str(model_path), digest="e" * 64)
    path = vocabulary_path(row.digest)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(model_path)
    yield cast.alice
    path.unlink()
    grammar_pool().close()
    verdicts.cache_clear()
    registry.forget()


def test_an_answer_is_valid_and_each_token_has_its_probability(
    alice: Any, valkey: Any, prompt: tuple[int, ...], load: Callable[[Served], Backend]
) -> None:
    sampling = SamplingParams(temperature=1.0, seed=8, grammar=grammar_from(None, SCHEMA), num_probs=3)
    with worker(valkey, threads=1, load=load):
        ticket = admitted(principal_of(alice), prompt=prompt, max_tokens=100, sampling=sampling, stream=True).ticket
        last = finish(valkey, ticket.request_id, seconds=60)
        wait_for(lambda: Receipt.objects.filter(request_id=ticket.request_id).exists())
    assert last["reason"] == "eos"
    found = events(valkey, ticket.request_id)
    jsonschema.validate(json.loads(text_of(found)), SCHEMA)
    probs = [each for event in found for each in StreamEvent("1-1", event).probs()]
    assert len(probs) == last["receipt"]["completion_tokens"]
    assert b"".join(each.piece for each in probs).decode() == text_of(found)
    assert all(len(each.top) == 3 and each.logprob <= 0 for each in probs)


def test_a_grammar_for_another_vocabulary_is_refused_before_it_is_queued(alice: Any, prompt: tuple[int, ...]) -> None:
    with pytest.raises(Refusal) as caught:
        admit(
            principal_of(alice),
            order(prompt=prompt, sampling=SamplingParams(grammar="root ::= <no-such-token>")),
            request_id=new_id(),
            route="/v1/generate",
        )
    assert caught.value.code == "invalid_grammar"


def test_a_stream_that_ends_in_a_dead_end_says_so_and_is_paid_for(
    alice: Any, valkey: Any, prompt: tuple[int, ...], load: Callable[[Served], Backend], model_path: Path
) -> None:
    tokenizer = Tokenizer.load(model_path)
    digits = {token for digit in "0123456789" for token in tokenizer.encode(digit, add_special=False)}
    tokenizer.free()
    bias = tuple((token, float("-inf")) for token in digits)
    sampling = SamplingParams(temperature=1.0, seed=8, grammar='root ::= "In " [0-9]+', logit_bias=bias)
    with worker(valkey, threads=1, load=load):
        ticket = admitted(principal_of(alice), prompt=prompt, sampling=sampling, stream=True).ticket
        last = finish(valkey, ticket.request_id, seconds=60)
        receipt = wait_for(lambda: Receipt.objects.filter(request_id=ticket.request_id).first())
    assert (last["reason"], last["error"]) == ("error", "grammar_dead_end")
    assert (receipt.status, receipt.error_code) == ("cancelled", "grammar_dead_end")
    assert receipt.charged_tokens == len(prompt) + receipt.completion_tokens > len(prompt)

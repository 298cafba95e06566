"""Vectors of texts, for every dialect: inputs to one order, one ticket for all of them, and the numbers that come back.

Limits, keys, ledger and receipts are those of requests that generate: prompt tokens are charged, and no output. The
handler runs in the hop, the waiting on the event loop, and large answers are written in the hop again.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from django.http import HttpResponse
from pydantic import Field
from pydantic_core import PydanticCustomError
from rest_framework.request import Request

from inference.api import cancelling
from inference.api.async_view import Later, Outcome, json_response
from inference.api.errors import wrong_field
from inference.api.following import Collected, collect
from inference.api.generation import GenerationView, answer_headers, is_all_or_nothing
from inference.api.hop import shared_hop
from inference.api.llamacpp.prompts import tokens_of_each
from inference.api.llamacpp.schemas import MAX_PIECES, Piece, Text, TokenId
from inference.api.parts import leave
from inference.catalog import adapters
from inference.catalog.served import Served
from inference.engine.types import EUCLIDEAN, Embedding, Pooling
from inference.intake.admission import Admitted, CachedAnswer
from inference.orders import GenerateOrder, Wanted

MAX_INPUTS = 2048
MAX_INPUT_TOKENS = 300_000
"""Of one request, as OpenAI's."""
MAX_NUMBERS = 1 << 21
"""Of one answer, 8 MiB: all of it is in memory at once, here, in Redis and in the worker."""

TokenInput = Annotated[list[TokenId], Field(max_length=MAX_INPUT_TOKENS)]
MixedInput = Annotated[list[TokenId | Text], Field(max_length=MAX_INPUT_TOKENS)]


@dataclass(frozen=True, slots=True)
class Vectors:
    """An answer: of each input its vectors as bytes, 32-bit floats, and what they cost."""

    inputs: tuple[tuple[bytes, ...], ...]
    prompt_tokens: int


def numbers(vector: bytes) -> list[float]:
    return array("f", vector).tolist()


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is wanted of all inputs of a request. pools: one vector an input is all that the dialect can say."""

    model: str | None
    inputs: Sequence[Piece]
    adapters: Wanted | None = None
    normalize: int = EUCLIDEAN
    dimensions: int | None = None
    pools: bool = False
    field: str = "input"
    """What the dialect calls them."""


Reply = Callable[[Served, Vectors], Any]
"""The answer's JSON."""


class EmbeddingView(GenerationView):
    """One ticket for all inputs of a request."""

    def embed(self, request: Request, asked: Asked, reply: Reply) -> Outcome:
        """Blocking. Raises Refusal."""
        self.stage = "admission"
        principal = self.admit_to_view()
        served, _ = adapters.resolve_model(asked.model, principal)
        served.check_ability(embeds=True)
        if asked.pools:
            served.check_pools()
        inputs = self._tokens(asked, served)
        lengths = tuple(map(len, inputs))
        _check_size(asked, lengths, served)
        wanted = Embedding(
            lengths=lengths, pooling=served.pooling, normalize=asked.normalize, dimensions=asked.dimensions
        )
        order = GenerateOrder(
            prompt=tuple(token for tokens in inputs for token in tokens),
            model=asked.model,
            max_tokens=0,
            adapters=asked.adapters,
            all_or_nothing=is_all_or_nothing(request),
            is_batch=len(inputs) > 1,
            embedding=wanted,
        )
        answer = self.admit(order)
        return Later(partial(self._reply, answer, reply), abandon=partial(leave, answer))

    @staticmethod
    def _tokens(asked: Asked, served: Served) -> list[tuple[int, ...]]:
        """Each with what the model wants around a text. Ends as soon as there are too many."""
        found: list[tuple[int, ...]] = []
        room = MAX_INPUT_TOKENS
        for tokens in tokens_of_each(asked.inputs, served):
            found.append(tokens)
            room -= len(tokens)
            if room < 0:
                raise wrong_field(asked.field, f"{MAX_INPUT_TOKENS} tokens at most in one request")
        return found

    async def _reply(self, answer: Admitted | CachedAnswer, reply: Reply) -> HttpResponse:
        self.stage = "generation"
        assert isinstance(answer, Admitted)  # vectors are not in the completion cache
        ticket = answer.ticket
        with cancelling.unless_finished(ticket.request_id, is_batch=ticket.is_batch):
            collected = await collect(ticket.request_id)
        headers = answer_headers(collected.ending, cached=False)
        make = partial(_response, reply, answer.served, collected, headers)
        return await shared_hop().run(make, abandon=lambda _: None)


def _response(reply: Reply, served: Served, collected: Collected, headers: dict[str, str]) -> HttpResponse:
    inputs = tuple(_cut(*collected.vectors[index]) for index in sorted(collected.vectors))
    vectors = Vectors(inputs, collected.ending.prompt_tokens)
    return json_response(reply(served, vectors), headers=headers)


def _cut(number: int, data: bytes) -> tuple[bytes, ...]:
    size = len(data) // number
    return tuple(data[start : start + size] for start in range(0, len(data), size))


def _check_size(asked: Asked, lengths: Sequence[int], served: Served) -> None:
    """Raises Refusal for more numbers than a vector has, or than fit an answer."""
    width = served.embedding_length
    if asked.dimensions is not None and width and asked.dimensions > width:
        raise wrong_field("dimensions", f"The vectors of {served.name!r} have {width} numbers, and no more")
    num_vectors = sum(lengths) if served.pooling is Pooling.NONE else len(lengths)
    if num_vectors * (asked.dimensions or width) > MAX_NUMBERS:
        most = MAX_NUMBERS // (asked.dimensions or width)
        raise wrong_field(asked.field, f"{most} vectors of this length at most in one answer; send several requests")


# Bodies


def check_input(value: Any, *, mixes: bool) -> Any:
    """By its JSON types alone: one sentence instead of one for each kind that it could have been. mixes: one input may
    be of texts and token ids."""
    is_many = isinstance(value, list) and any(isinstance(each, str | list) for each in value)
    inputs = value if is_many and {type(each) for each in value} <= {str, list} else [value]
    if not inputs or not all(_is_input(each, mixes) for each in inputs):
        raise PydanticCustomError(
            "input_kind", "Value must be a text, an array of token ids, or an array of texts or of arrays of token ids"
        )
    if len(inputs) > MAX_INPUTS:
        raise PydanticCustomError("too_long", "{most} inputs at most in one request", {"most": MAX_INPUTS})
    return value


def _is_input(value: Any, mixes: bool) -> bool:
    if isinstance(value, list):
        kinds = {type(each) for each in value}
        return (
            bool(value)
            and kinds <= ({int, str} if mixes else {int})
            and sum(isinstance(each, str) for each in value) <= MAX_PIECES
        )
    return isinstance(value, str)


def inputs_of(value: str | Sequence[Any]) -> list[Piece]:
    """Of a value that passed check_input."""
    if isinstance(value, str):
        return [value]
    if all(isinstance(each, str | list) for each in value):
        return [each if isinstance(each, str) else tuple(each) for each in value]
    return [tuple(value)]

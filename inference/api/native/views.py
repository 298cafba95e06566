"""POST /v1/generate and /v1/generate/batch: parse, admit in the hop, then follow the events on the loop."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from django.conf import settings
from django.http import HttpResponse
from drf_spectacular.utils import extend_schema
from rest_framework.request import Request

from accounts.trail.refusals import Refusal
from inference.api.answering import TextView
from inference.api.async_view import Later, Outcome, json_response
from inference.api.following import Collected, Ending
from inference.api.generation import ALL_OR_NOTHING, IDEMPOTENCY_KEY, GenerationView, is_all_or_nothing
from inference.api.native.schemas import (
    AcceptedReply,
    GenerateBatchBody,
    GenerateBatchReply,
    GenerateBody,
    GenerateEvent,
    GenerateReply,
    SamplingBody,
)
from inference.api.parts import Part, Parts
from inference.api.sse import frame
from inference.chat.prompt import ChatPrompt
from inference.engine.types import TokenProbs
from inference.intake.admission import Admitted, CachedAnswer
from inference.intake.grammars import form_from
from inference.orders import GenerateOrder
from inference.transport.stream import StreamEvent


def order_from(
    body: SamplingBody, prompt: str | ChatPrompt, request: Request, *, stream: bool = False, is_batch: bool = False
) -> GenerateOrder:
    wanted = body.max_new_tokens
    return GenerateOrder(
        prompt=prompt,
        model=body.model,
        max_tokens=settings.CONFIG.default_max_tokens if wanted is None else wanted,
        sampling=body.sampling(),
        form=form_from(body.json_schema),
        decoding=body.decoding(),
        stop=tuple(body.stop or ()),
        adapters=body.wanted_adapters(),
        stream=stream,
        use_cache=body.cache,
        cache_prompt=body.cache_prompt,
        keep_alive_seconds=body.keep_alive,
        session=body.session or "",
        all_or_nothing=is_all_or_nothing(request),
        is_batch=is_batch,
    )


class GenerateView(TextView):
    """One prompt, or one conversation. What its answer speaks of is the model's name."""

    route = "/v1/generate"

    @extend_schema(
        operation_id="generate",
        summary="Generate text from a prompt or a conversation",
        request=GenerateBody,
        parameters=[ALL_OR_NOTHING, IDEMPOTENCY_KEY],
        responses={
            200: GenerateReply,
            202: AcceptedReply,
            (200, "text/event-stream"): GenerateEvent,
        },
    )
    def post(self, request: Request) -> Outcome:
        body = self.parse(GenerateBody)
        self.admit_to_view()
        self.stage = "admission"
        order = order_from(body, body.prompt_or_chat(), request, stream=body.stream)
        answer = self.admit(order, background=body.background)
        return self.answer(answer.served.name, answer, stream=body.stream)

    def whole(self, asked: str, collected: Collected, *, cached: bool) -> dict[str, Any]:
        return {"model": asked, "output": collected.text, "cached": cached, **_probs(collected.probs)}

    def frames(self, asked: str, answer: Admitted | CachedAnswer) -> NativeFrames:
        return NativeFrames(self, asked, cached=isinstance(answer, CachedAnswer))


class NativeFrames:
    """delta, finished and error events."""

    def __init__(self, view: GenerationView, model: str, *, cached: bool = False) -> None:
        self._view, self._model, self._cached = view, model, cached

    def started(self, event: StreamEvent) -> bytes:
        return b""

    def delta(self, event: StreamEvent) -> bytes:
        return frame({"text": event.data["text"], **_probs(event.probs())}, event="delta", event_id=event.id)

    def end(self, ending: Ending, event_id: str) -> bytes:
        content = {
            "id": self._view.request_id,
            "model": self._model,
            "cached": self._cached,
            "finish_reason": ending.finish_reason,
            "usage": {
                "prompt_tokens": ending.prompt_tokens,
                "completion_tokens": ending.completion_tokens,
                "total_tokens": ending.prompt_tokens + ending.completion_tokens,
            },
        }
        if ending.receipt and not self._cached:
            content["timings_ms"] = {name: round(value * 1000, 1) for name, value in ending.seconds().items()}
            content.update(_drafts(ending.receipt))
        return frame(content, event="finished", event_id=event_id)

    def error(self, refusal: Refusal, event_id: str | None = None) -> bytes:
        self._view.log_fields["error_type"] = refusal.code
        content = {"code": refusal.code, "message": refusal.message, "request_id": self._view.request_id}
        return frame(content, event="error", event_id=event_id)


class GenerateBatchView(GenerationView):
    """Several prompts with the same parameters; each has its own ledger entry, receipt and cache entry."""

    route = "/v1/generate/batch"

    @extend_schema(
        operation_id="generate_batch",
        summary="Generate text from several prompts",
        request=GenerateBatchBody,
        parameters=[ALL_OR_NOTHING, IDEMPOTENCY_KEY],
        responses={
            200: GenerateBatchReply,
        },
    )
    def post(self, request: Request) -> Outcome:
        body = self.parse(GenerateBatchBody)
        principal = self.admit_to_view()
        self.stage = "admission"
        orders = [order_from(body, prompt, request, is_batch=True) for prompt in body.prompts]
        parts = self.parts(principal, orders)
        first = parts.admit(0)
        return Later(partial(self._reply, parts, first), abandon=partial(parts.drop, first))

    async def _reply(self, parts: Parts, first: Admitted | CachedAnswer) -> HttpResponse:
        self.stage = "generation"
        self.note_admission(first)
        results = await parts.run(first)
        headers = self.headers_of_parts(results)
        return json_response(
            {"model": first.served.name, "results": [_result(each) for each in results]}, headers=headers
        )


def _result(part: Part) -> dict[str, Any]:
    ending = part.collected.ending
    return {
        "output": part.collected.text,
        "cached": part.cached,
        "prompt_tokens": ending.prompt_tokens,
        "completion_tokens": ending.completion_tokens,
        **_probs(part.collected.probs),
    }


def _drafts(receipt: dict[str, Any]) -> dict[str, Any]:
    """Nothing where nobody guessed."""
    num_drafted = receipt.get("drafted_tokens", 0)
    return {"drafts": {"drafted": num_drafted, "accepted": receipt.get("accepted_tokens", 0)}} if num_drafted else {}


def _probs(probs: Sequence[TokenProbs]) -> dict[str, Any]:
    """Nothing where none were asked for."""
    if not probs:
        return {}
    return {"probs": [{**_likely(each), "top": [_likely(likely) for likely in each.top]} for each in probs]}


def _likely(probs: TokenProbs) -> dict[str, Any]:
    return {
        "id": probs.token,
        "text": probs.piece.decode("utf-8", "replace"),
        "bytes": list(probs.piece),
        "logprob": probs.logprob,
    }

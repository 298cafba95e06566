"""POST /v1/generate and /v1/generate/batch: parse, admit in the hop, then follow the events on the loop."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from functools import partial
from typing import Any

from django.conf import settings
from django.http import HttpResponse, HttpResponseBase
from drf_spectacular.utils import extend_schema
from rest_framework.request import Request

from accounts.refusals import Refusal
from inference import admission
from inference.admission import Admitted, CachedAnswer
from inference.api import cancelling
from inference.api.async_view import Later, Outcome, json_response
from inference.api.following import Ending, collect, ending_of_cached, events_of_cached
from inference.api.generation import ALL_OR_NOTHING, GenerationView, answer_headers, is_all_or_nothing
from inference.api.native.schemas import (
    ErrorReply,
    GenerateBatchBody,
    GenerateBatchReply,
    GenerateBody,
    GenerateEvent,
    GenerateReply,
    SamplingBody,
)
from inference.api.parts import Part, Parts, drop
from inference.api.sse import EventStream, frame
from inference.api.streaming import open_stream
from inference.engine.types import TokenProbs
from inference.orders import GenerateOrder
from inference.stream import StreamEvent


def order_from(
    body: SamplingBody, prompt: str, request: Request, *, stream: bool = False, is_batch: bool = False
) -> GenerateOrder:
    wanted = body.max_new_tokens
    return GenerateOrder(
        prompt=prompt,
        model=body.model,
        max_tokens=settings.CONFIG.default_max_tokens if wanted is None else wanted,
        sampling=body.sampling(),
        decoding=body.decoding(),
        stop=tuple(body.stop or ()),
        adapters=body.wanted_adapters(),
        stream=stream,
        use_cache=body.cache,
        cache_prompt=body.cache_prompt,
        all_or_nothing=is_all_or_nothing(request),
        is_batch=is_batch,
    )


class GenerateView(GenerationView):
    """One prompt."""

    route = "/v1/generate"

    @extend_schema(
        operation_id="generate",
        summary="Generate text from a prompt",
        request=GenerateBody,
        parameters=[ALL_OR_NOTHING],
        responses={200: GenerateReply, (200, "text/event-stream"): GenerateEvent, 402: ErrorReply, 504: ErrorReply},
    )
    def post(self, request: Request) -> Outcome:
        body = self.parse(GenerateBody)
        principal = self.admit_to_view()
        self.stage = "admission"
        order = order_from(body, body.prompt, request, stream=body.stream)
        answer = admission.admit(principal, order, request_id=self.request_id, route=self.route)
        self.note_admission(answer)
        if isinstance(answer, CachedAnswer):
            return self._stream_cached(answer) if body.stream else self._reply_cached(answer)
        run = self._stream if body.stream else self._reply
        return Later(partial(run, answer), abandon=partial(cancelling.cancel, self.request_id))

    # One JSON object

    async def _reply(self, admitted: Admitted) -> HttpResponse:
        self.stage = "generation"
        with cancelling.unless_finished(self.request_id):
            collected = await collect(self.request_id)
        ending = collected.ending
        content = {"model": admitted.served.name, "output": collected.text, "cached": False, **_probs(collected.probs)}
        return json_response(content, headers=answer_headers(ending, cached=False, clamped=admitted.clamped))

    def _reply_cached(self, answer: CachedAnswer) -> HttpResponse:
        content = {"model": answer.served.name, "output": answer.completion.output, "cached": True}
        return json_response(content, headers=answer_headers(ending_of_cached(answer.completion), cached=True))

    # Server-sent events

    async def _stream(self, admitted: Admitted) -> HttpResponseBase:
        self.stage = "generation"
        return await open_stream(admitted, NativeFrames(self, admitted.served.name))

    def _stream_cached(self, answer: CachedAnswer) -> EventStream:
        words = NativeFrames(self, answer.served.name, cached=True)

        async def frames() -> AsyncGenerator[bytes]:
            delta, ending, end_id = events_of_cached(answer.completion)
            yield words.delta(delta)
            yield words.end(ending, end_id)

        response = EventStream(frames(), abandon=lambda: None)
        response.headers["x-cache"] = "hit"
        return response


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
        parameters=[ALL_OR_NOTHING],
        responses={200: GenerateBatchReply, 402: ErrorReply, 504: ErrorReply},
    )
    def post(self, request: Request) -> Outcome:
        body = self.parse(GenerateBatchBody)
        principal = self.admit_to_view()
        self.stage = "admission"
        orders = [order_from(body, prompt, request, is_batch=True) for prompt in body.prompts]
        parts = Parts(principal, orders, self.request_id, self.route)
        first = parts.admit(0)
        return Later(partial(self._reply, parts, first), abandon=partial(drop, first))

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

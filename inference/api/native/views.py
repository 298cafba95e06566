"""POST /v1/generate and /v1/generate/batch: parse, admit in the hop, then follow the events on the loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

from django.conf import settings
from django.http import HttpResponse, HttpResponseBase
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework.request import Request

from accounts.principals import Principal
from accounts.refusals import Refusal
from inference import admission
from inference.admission import Admitted, CachedAnswer
from inference.api import cancelling
from inference.api.async_view import Later, Outcome, json_response
from inference.api.following import FINISH_REASONS, Collected, Ending, collect, ending_of, failure, follow
from inference.api.generation import GenerationView
from inference.api.headers import server_timing, usage_headers
from inference.api.hop import shared_hop
from inference.api.native.schemas import (
    ErrorReply,
    GenerateBatchBody,
    GenerateBatchReply,
    GenerateBody,
    GenerateEvent,
    GenerateReply,
    SamplingBody,
)
from inference.api.sse import KEEP_ALIVE_SECONDS, EventStream, frame, with_keep_alive
from inference.orders import GenerateOrder
from inference.stream import StreamEvent

ALL_OR_NOTHING = OpenApiParameter(
    "x-quota-all-or-nothing",
    bool,
    OpenApiParameter.HEADER,
    description="`true`: 402 rather than a shorter answer where the quota does not cover the output bound.",
)
PASSING = frozenset({"too_many_concurrent_requests", "queue_full", "quota_reserved"})
WAIT_FOR_ROOM_SECONDS = 0.25
MAX_AT_ONCE = 16
"""Prompts of one batch that are admitted at once; tighter where the key's places are fewer."""


def order_from(
    body: SamplingBody, prompt: str, request: Request, *, stream: bool = False, is_batch: bool = False
) -> GenerateOrder:
    wanted = body.max_new_tokens
    return GenerateOrder(
        prompt=prompt,
        model=body.model,
        max_tokens=settings.CONFIG.default_max_tokens if wanted is None else wanted,
        sampling=body.sampling(),
        stop=tuple(body.stop or ()),
        adapters=body.wanted_adapters(),
        stream=stream,
        use_cache=body.cache,
        cache_prompt=body.cache_prompt,
        all_or_nothing=request.META.get("HTTP_X_QUOTA_ALL_OR_NOTHING", "").lower() == "true",
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
        return self._object(admitted.served.name, collected.text, False, ending, x_quota_clamped=admitted.clamped)

    def _reply_cached(self, answer: CachedAnswer) -> HttpResponse:
        return self._object(answer.served.name, answer.completion.output, True, ending_of_cached(answer))

    def _object(
        self, model: str, output: str, cached: bool, ending: Ending, *, x_quota_clamped: bool = False
    ) -> HttpResponse:
        headers = usage_headers(ending.prompt_tokens, ending.completion_tokens)
        headers["x-cache"] = "hit" if cached else "miss"
        if x_quota_clamped:
            headers["x-quota-clamped"] = "true"
        if ending.receipt and not cached:
            headers["Server-Timing"] = server_timing(ending.seconds())
        return json_response({"model": model, "output": output, "cached": cached}, headers=headers)

    # Server-sent events

    async def _stream(self, admitted: Admitted) -> HttpResponseBase:
        """200 and headers come with the first text, or the first keep-alive; before that a failure has a status."""
        self.stage = "generation"
        events = follow(self.request_id)
        first = asyncio.ensure_future(anext(events))
        try:
            with cancelling.unless_finished(self.request_id):
                done, _ = await asyncio.wait([first], timeout=KEEP_ALIVE_SECONDS)
                if done:
                    _raise_failure(first.result())
        except BaseException:
            first.cancel()
            raise
        frames = with_keep_alive(self._frames(admitted, first, events), KEEP_ALIVE_SECONDS)
        response = EventStream(
            frames,
            abandon=partial(cancelling.cancel_soon, self.request_id),
            last_words=self._error_frame(Refusal("service_unavailable", "The server is restarting.", retry_after=2)),
        )
        response.headers["x-cache"] = "miss"
        if admitted.clamped:
            response.headers["x-quota-clamped"] = "true"
        return response

    async def _frames(
        self, admitted: Admitted, first: asyncio.Future[StreamEvent], events: AsyncGenerator[StreamEvent]
    ) -> AsyncGenerator[bytes]:
        try:
            event = await first
            while event.kind != "finished":
                yield frame({"text": event.data["text"]}, event="delta", event_id=event.id)
                event = await anext(events)
            yield self._last_frame(admitted.served.name, ending_of(event), event.id)
        except Refusal as refusal:
            yield self._error_frame(refusal)
        finally:
            await events.aclose()

    def _last_frame(self, model: str, ending: Ending, event_id: str | None, *, cached: bool = False) -> bytes:
        if ending.finish_reason is None:
            return self._error_frame(failure(ending), event_id)
        content = {
            "id": self.request_id,
            "model": model,
            "cached": cached,
            "finish_reason": ending.finish_reason,
            "usage": {
                "prompt_tokens": ending.prompt_tokens,
                "completion_tokens": ending.completion_tokens,
                "total_tokens": ending.prompt_tokens + ending.completion_tokens,
            },
        }
        if ending.receipt and not cached:
            content["timings_ms"] = {name: round(value * 1000, 1) for name, value in ending.seconds().items()}
        return frame(content, event="finished", event_id=event_id)

    def _error_frame(self, refusal: Refusal, event_id: str | None = None) -> bytes:
        self.log_fields["error_type"] = refusal.code
        content = {"code": refusal.code, "message": refusal.message, "request_id": self.request_id}
        return frame(content, event="error", event_id=event_id)

    def _stream_cached(self, answer: CachedAnswer) -> EventStream:
        async def frames() -> AsyncGenerator[bytes]:
            yield frame({"text": answer.completion.output}, event="delta", event_id="0-1")
            yield self._last_frame(answer.served.name, ending_of_cached(answer), "0-2", cached=True)

        response = EventStream(frames(), abandon=lambda: None)
        response.headers["x-cache"] = "hit"
        return response


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
        first = self._admit(principal, orders[0], 0)
        return Later(partial(self._reply, principal, orders, first), abandon=partial(_drop, first))

    def _admit(self, principal: Principal, order: GenerateOrder, number: int) -> Admitted | CachedAnswer:
        return admission.admit(
            principal, order, request_id=f"{self.request_id}.{number}", route=self.route, parent_id=self.request_id
        )

    async def _reply(
        self, principal: Principal, orders: list[GenerateOrder], first: Admitted | CachedAnswer
    ) -> HttpResponse:
        """The first prompt was admitted in the hop, so what is wrong with all of them is known by then.

        One that fails ends the others; those that had finished are in the completion cache, and free when tried again.
        """
        self.stage = "generation"
        self.note_admission(first)
        places = asyncio.Semaphore(min(MAX_AT_ONCE, principal.limit("concurrent_requests") or MAX_AT_ONCE))
        tasks = [
            asyncio.ensure_future(self._one(principal, order, number, first if number == 0 else None, places))
            for number, order in enumerate(orders)
        ]
        try:
            results = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        prompt_tokens = sum(result["prompt_tokens"] for result in results)
        completion_tokens = sum(result["completion_tokens"] for result in results)
        headers = usage_headers(prompt_tokens, completion_tokens)
        all_cached = all(result["cached"] for result in results)
        headers["x-cache"] = "hit" if all_cached else "miss"
        self.log_fields["cached"] = all_cached
        return json_response({"model": first.served.name, "results": results}, headers=headers)

    async def _one(
        self,
        principal: Principal,
        order: GenerateOrder,
        number: int,
        answer: Admitted | CachedAnswer | None,
        places: asyncio.Semaphore,
    ) -> dict[str, Any]:
        async with places:
            if answer is None:
                answer = await self._admit_when_there_is_room(principal, order, number)
            if isinstance(answer, CachedAnswer):
                return _result(Collected(answer.completion.output, ending_of_cached(answer)), cached=True)
            request_id = answer.ticket.request_id
            with cancelling.unless_finished(request_id):
                return _result(await collect(request_id), cached=False)

    async def _admit_when_there_is_room(
        self, principal: Principal, order: GenerateOrder, number: int
    ) -> Admitted | CachedAnswer:
        """The tenant's other requests may hold its places for a while: a batch that has begun waits for them."""
        give_up_at = time.monotonic() + settings.CONFIG.queue_timeout_seconds
        while True:
            try:
                return await shared_hop().run(lambda: self._admit(principal, order, number), abandon=_drop)
            except Refusal as refusal:
                if refusal.code not in PASSING or time.monotonic() > give_up_at:
                    raise
                await asyncio.sleep(WAIT_FOR_ROOM_SECONDS)


def _result(collected: Collected, *, cached: bool) -> dict[str, Any]:
    return {
        "output": collected.text,
        "cached": cached,
        "prompt_tokens": collected.ending.prompt_tokens,
        "completion_tokens": collected.ending.completion_tokens,
    }


def _drop(answer: Admitted | CachedAnswer) -> None:
    if isinstance(answer, Admitted):
        cancelling.cancel(answer.ticket.request_id)


def _raise_failure(event: StreamEvent) -> None:
    if event.kind == "finished" and ending_of(event).finish_reason is None:
        raise failure(ending_of(event))


def ending_of_cached(answer: CachedAnswer) -> Ending:
    """As the request ended that was computed."""
    found = answer.completion
    reason = found.finish_reason if found.finish_reason in FINISH_REASONS else "stop"
    receipt = {"prompt_tokens": found.prompt_tokens, "completion_tokens": found.completion_tokens}
    return Ending(reason, found.stop_word, receipt=receipt)

"""POST /completion: one prompt or several, at once or as a stream, in llama.cpp's words.

Limits, keys, ledger and receipts are those of every dialect: admission, parts and streaming are shared.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

from django.http import HttpResponse, HttpResponseBase
from drf_spectacular.utils import extend_schema, extend_schema_view
from rest_framework.request import Request

from accounts.principals import Principal
from accounts.refusals import Refusal
from inference import adapters, admission
from inference.admission import Admitted, CachedAnswer
from inference.api import cancelling
from inference.api.async_view import Later, Outcome, json_response
from inference.api.errors import LLAMA
from inference.api.following import CANCELLED, Collected, Ending, collect, ending_of_cached
from inference.api.generation import ALL_OR_NOTHING, GenerationView, answer_headers, is_all_or_nothing
from inference.api.llamacpp import replies
from inference.api.llamacpp.schemas import CompletionBody, CompletionReply, LlamaErrorReply
from inference.api.parts import Parts, drop
from inference.api.sse import EventStream, frame
from inference.api.streaming import open_stream
from inference.orders import GenerateOrder
from inference.registry import Served
from inference.stream import StreamEvent


class CompletionView(GenerationView):
    """Text from prompts; an array of prompts is answered by an array."""

    route = "/completion"
    tag = "llama.cpp"
    errors = LLAMA
    error_reply = LlamaErrorReply

    @extend_schema(
        operation_id="completion",
        summary="llama.cpp's completion",
        request=CompletionBody,
        parameters=[ALL_OR_NOTHING],
        responses={200: CompletionReply, 402: LlamaErrorReply, 504: LlamaErrorReply},
    )
    def post(self, request: Request) -> Outcome:
        body = self.parse(CompletionBody)
        principal = self.admit_to_view()
        if body.is_array and body.stream:
            raise Refusal("bad_request", "An array of prompts cannot be streamed.")
        self.stage = "admission"
        orders = [order_from(body, prompt, request) for prompt in body.prompts()]
        if body.is_array:
            parts = Parts(principal, orders, self.request_id, self.route)
            first = parts.admit(0)
            settings = _settings(body, principal, first.served)
            return Later(partial(self._reply_all, body, parts, first, settings), abandon=partial(drop, first))
        answer = admission.admit(principal, orders[0], request_id=self.request_id, route=self.route)
        self.note_admission(answer)
        settings = _settings(body, principal, answer.served)
        if isinstance(answer, CachedAnswer):
            return self._cached(body, answer, settings)
        run = self._stream if body.stream else self._reply
        return Later(partial(run, body, answer, settings), abandon=partial(cancelling.cancel, self.request_id))

    async def _reply(self, body: CompletionBody, admitted: Admitted, settings: dict[str, Any]) -> HttpResponse:
        self.stage = "generation"
        with cancelling.unless_finished(self.request_id):
            collected = await collect(self.request_id)
        content = replies.final(
            collected, model=admitted.served.name, settings=settings, with_tokens=bool(body.return_tokens)
        )
        return json_response(content, headers=answer_headers(collected.ending, cached=False, clamped=admitted.clamped))

    async def _reply_all(
        self, body: CompletionBody, parts: Parts, first: Admitted | CachedAnswer, settings: dict[str, Any]
    ) -> HttpResponse:
        self.stage = "generation"
        self.note_admission(first)
        results = await parts.run(first)
        content = [
            replies.final(
                part.collected,
                model=first.served.name,
                settings=settings,
                with_tokens=bool(body.return_tokens),
                index=index,
            )
            for index, part in enumerate(results)
        ]
        return json_response(content, headers=self.headers_of_parts(results))

    async def _stream(self, body: CompletionBody, admitted: Admitted, settings: dict[str, Any]) -> HttpResponseBase:
        self.stage = "generation"
        return await open_stream(
            admitted, LlamaFrames(self, body, admitted.served, settings, admitted.ticket.num_prompt_tokens)
        )

    def _cached(self, body: CompletionBody, answer: CachedAnswer, settings: dict[str, Any]) -> HttpResponseBase:
        found, ending = answer.completion, ending_of_cached(answer.completion)
        if not body.stream:
            content = replies.final(
                Collected(found.output, ending), model=answer.served.name, settings=settings, with_tokens=False
            )
            return json_response(content, headers=answer_headers(ending, cached=True))
        words = LlamaFrames(self, body, answer.served, settings, found.prompt_tokens)

        async def frames() -> AsyncGenerator[bytes]:
            yield words.delta(StreamEvent("0-1", {"text": found.output, "n": found.completion_tokens}))
            yield words.end(ending, "0-2")

        response = EventStream(frames(), abandon=lambda: None)
        response.headers["x-cache"] = "hit"
        return response


def order_from(body: CompletionBody, prompt: str | tuple[int, ...], request: Request) -> GenerateOrder:
    wanted = body.wanted_tokens
    if wanted == 0:
        raise Refusal("bad_request", "Field 'n_predict': 0 is not supported, -1 is as many as may be.")
    return GenerateOrder(
        prompt=prompt,
        model=body.model,
        max_tokens=None if wanted < 0 else wanted,
        sampling=body.sampling(),
        stop=body.stops(),
        adapters=body.wanted_adapters(),
        stream=bool(body.stream),
        return_tokens=bool(body.stream or body.return_tokens),
        use_cache=bool(body.cache) and not body.return_tokens,  # what is kept has no token ids
        cache_prompt=body.cache_prompt is not False,
        all_or_nothing=is_all_or_nothing(request),
        is_batch=body.is_array,
    )


def _settings(body: CompletionBody, principal: Principal, served: Served) -> dict[str, Any]:
    """Blocking: the tenant's default vector may have to be read."""
    default = [(adapter.position, scale) for adapter, scale in adapters.default_vector(principal, served)]
    return replies.generation_settings(
        body.sampling(),
        wanted_tokens=body.wanted_tokens,
        stop=body.stops(),
        stream=bool(body.stream),
        timings_per_token=bool(body.timings_per_token),
        lora=default if body.lora is None else [(each.id, each.scale) for each in body.lora],
    )


class LlamaFrames:
    """Partial results with the token ids of each, and a last one without text. Made when the first event is near."""

    def __init__(
        self,
        view: GenerationView,
        body: CompletionBody,
        served: Served,
        settings: dict[str, Any],
        num_prompt_tokens: int,
    ) -> None:
        self._view, self._body, self._served, self._settings = view, body, served, settings
        self._num_prompt_tokens = num_prompt_tokens
        self._num_predicted = 0
        self._has_new_line = False
        self._first_at: float | None = None

    def delta(self, event: StreamEvent) -> bytes:
        text, now = event.data["text"], time.perf_counter()
        self._first_at = self._first_at or now
        self._num_predicted += event.data["n"]
        self._has_new_line |= "\n" in text
        content = {
            "index": 0,
            "content": text,
            "tokens": event.data.get("tokens", []),
            "stop": False,
            "id_slot": -1,
            "tokens_predicted": self._num_predicted,
            "tokens_evaluated": self._num_prompt_tokens,
        }
        if self._body.timings_per_token:
            content["timings"] = replies.predicted_so_far(self._num_predicted, now - self._first_at)
        return frame(content, event_id=event.id)

    def end(self, ending: Ending, event_id: str) -> bytes:
        if ending.finish_reason == "cancelled":
            return self.error(Refusal(CANCELLED[0], CANCELLED[1]), event_id)
        whole = Collected("\n" if self._has_new_line else "", ending)
        content = replies.final(whole, model=self._served.name, settings=self._settings, with_tokens=False, content="")
        return frame(content, event_id=event_id)

    def error(self, refusal: Refusal, event_id: str | None = None) -> bytes:
        self._view.log_fields["error_type"] = refusal.code
        return frame({"error": LLAMA.error(refusal)}, event_id=event_id)


@extend_schema_view(post=extend_schema(operation_id="completions"))
class CompletionsView(CompletionView):
    """The same under llama.cpp's other name for it."""

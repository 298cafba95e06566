"""POST /completion and /infill: one prompt or several, at once or as a stream, in llama.cpp's words.

Limits, keys, ledger and receipts are those of every dialect: admission, parts and streaming are shared.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from functools import partial
from typing import Any

from django.http import HttpResponse, HttpResponseBase
from drf_spectacular.utils import extend_schema, extend_schema_view
from rest_framework.request import Request

from accounts.principals import Principal
from inference import adapters, admission
from inference.admission import Admitted, CachedAnswer
from inference.api import cancelling
from inference.api.async_view import Later, Outcome, json_response
from inference.api.errors import LLAMA
from inference.api.following import Collected, collect, ending_of_cached, events_of_cached
from inference.api.generation import ALL_OR_NOTHING, GenerationView, answer_headers, is_all_or_nothing
from inference.api.llamacpp import replies
from inference.api.llamacpp.frames import LlamaFrames
from inference.api.llamacpp.prompts import infill, texts_of, tokens_of
from inference.api.llamacpp.schemas import (
    CompletionBody,
    CompletionEvent,
    CompletionReply,
    InfillBody,
    LlamaErrorReply,
    SamplingBody,
)
from inference.api.part_streams import open_part_stream
from inference.api.parts import Parts, completions, drop
from inference.api.sse import EventStream
from inference.api.streaming import open_stream
from inference.orders import GenerateOrder
from inference.registry import Served

Prompt = tuple[int, ...]
EVENTS = (200, "text/event-stream")


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as all of its answers speak of it."""

    body: SamplingBody
    served: Served
    settings: dict[str, Any]
    prompts: tuple[str, ...]
    """As text, one for each answer."""

    def reply(self, index: int, collected: Collected) -> dict[str, Any]:
        content = replies.final(
            collected,
            model=self.served.name,
            settings=self.settings,
            with_tokens=bool(self.body.return_tokens),
            prompt=self.prompts[index],
            index=index,
        )
        return replies.selected(content, self.body.response_fields) if self.body.response_fields else content


class SamplingView(GenerationView):
    """What the views of this dialect that generate have in common: what follows once the prompts are known."""

    tag = "llama.cpp"
    errors = LLAMA
    error_reply = LlamaErrorReply

    def generate(self, request: Request, body: SamplingBody, served: Served, prompts: list[Prompt]) -> Outcome:
        """One answer, or one for each prompt and completion. Blocking. Raises Refusal."""
        self.stage = "admission"
        principal = self.admit_to_view()
        for prompt in prompts:  # all of them before anything runs: a stream of several has a status, too
            admission.check_length(len(prompt), admission.context_of(principal, served))
        settings = _settings(body, principal, served)
        orders = _orders(body, prompts, request)
        parts = Parts(principal, orders, self.request_id, self.route)
        if len(orders) > 1:
            answer = parts.admit(0)
        else:
            answer = admission.admit(principal, orders[0], request_id=self.request_id, route=self.route)
        self.note_admission(answer)
        try:  # while the engine has the prompt already
            asked = Asked(body, served, settings, _texts(body, prompts, served))
        except BaseException:
            drop(answer)
            raise
        if len(orders) > 1:
            run_all = self._stream_all if body.stream else self._reply_all
            return Later(partial(run_all, asked, parts, answer), abandon=partial(drop, answer))
        if isinstance(answer, CachedAnswer):
            return self._cached(asked, answer)
        run = self._stream if body.stream else self._reply
        return Later(partial(run, asked, answer), abandon=partial(drop, answer))

    async def _reply(self, asked: Asked, admitted: Admitted) -> HttpResponse:
        self.stage = "generation"
        with cancelling.unless_finished(self.request_id):
            collected = await collect(self.request_id)
        headers = answer_headers(collected.ending, cached=False, clamped=admitted.clamped)
        return json_response(asked.reply(0, collected), headers=headers)

    async def _reply_all(self, asked: Asked, parts: Parts, first: Admitted | CachedAnswer) -> HttpResponse:
        self.stage = "generation"
        results = await parts.run(first)
        content = [asked.reply(index, part.collected) for index, part in enumerate(results)]
        return json_response(content, headers=self.headers_of_parts(results))

    async def _stream(self, asked: Asked, admitted: Admitted) -> HttpResponseBase:
        self.stage = "generation"
        return await open_stream(
            admitted, self._frames(asked, 0, admitted), keep_alive_seconds=asked.body.keep_alive_seconds
        )

    async def _stream_all(self, asked: Asked, parts: Parts, first: Admitted | CachedAnswer) -> HttpResponseBase:
        self.stage = "generation"
        return await open_part_stream(
            parts, first, partial(self._frames, asked), keep_alive_seconds=asked.body.keep_alive_seconds
        )

    def _frames(self, asked: Asked, index: int, answer: Admitted | CachedAnswer) -> LlamaFrames:
        return LlamaFrames(
            asked.body,
            model=asked.served.name,
            settings=asked.settings,
            prompt=asked.prompts[index],
            num_prompt_tokens=(
                answer.ticket.num_prompt_tokens if isinstance(answer, Admitted) else answer.completion.prompt_tokens
            ),
            index=index,
            has_ids=len(asked.prompts) == 1,
            on_error=self._note_error,
        )

    def _note_error(self, code: str) -> None:
        self.log_fields["error_type"] = code

    def _cached(self, asked: Asked, answer: CachedAnswer) -> HttpResponseBase:
        if not asked.body.stream:
            ending = ending_of_cached(answer.completion)
            content = asked.reply(0, Collected(answer.completion.output, ending))
            return json_response(content, headers=answer_headers(ending, cached=True))
        words = self._frames(asked, 0, answer)

        async def frames() -> AsyncGenerator[bytes]:
            delta, ending, end_id = events_of_cached(answer.completion)
            yield words.delta(delta)
            yield words.end(ending, end_id)

        response = EventStream(frames(), abandon=lambda: None)
        response.headers["x-cache"] = "hit"
        return response


class CompletionView(SamplingView):
    """Text from prompts. Several prompts, or completions of one, are answered by an array, as one is by an object."""

    route = "/completion"

    @extend_schema(
        operation_id="completion",
        summary="llama.cpp's completion",
        request=CompletionBody,
        parameters=[ALL_OR_NOTHING],
        responses={200: CompletionReply, EVENTS: CompletionEvent, 402: LlamaErrorReply, 504: LlamaErrorReply},
    )
    def post(self, request: Request) -> Outcome:
        body = self.parse(CompletionBody)
        served, _ = adapters.resolve_model(body.model, self.admit_to_view())
        return self.generate(request, body, served, [tokens_of(prompt, served) for prompt in body.prompts()])


@extend_schema_view(post=extend_schema(operation_id="completions"))
class CompletionsView(CompletionView):
    """The same under llama.cpp's other name for it."""


class InfillView(SamplingView):
    """What belongs between a prefix and a suffix, from models that were trained to say so."""

    route = "/infill"

    @extend_schema(
        operation_id="infill",
        summary="Fill in the middle",
        request=InfillBody,
        parameters=[ALL_OR_NOTHING],
        responses={
            200: CompletionReply,
            EVENTS: CompletionEvent,
            402: LlamaErrorReply,
            501: LlamaErrorReply,
            504: LlamaErrorReply,
        },
    )
    def post(self, request: Request) -> Outcome:
        body = self.parse(InfillBody)
        principal = self.admit_to_view()
        served, _ = adapters.resolve_model(body.model, principal)
        return self.generate(request, body, served, [infill(body, served, admission.context_of(principal, served))])


def _orders(body: SamplingBody, prompts: list[Prompt], request: Request) -> list[GenerateOrder]:
    """One for each answer: the completions of the first prompt, then those of the next."""
    singles = [order_from(body, prompt, request, is_batch=len(prompts) > 1) for prompt in prompts]
    return [each for single in singles for each in completions(single, body.num_completions)]


def order_from(body: SamplingBody, prompt: Prompt, request: Request, *, is_batch: bool) -> GenerateOrder:
    wanted = body.wanted_tokens
    return GenerateOrder(
        prompt=prompt,
        model=body.model,
        max_tokens=None if wanted < 0 else wanted,
        sampling=body.sampling(),
        decoding=body.decoding(),
        stop=body.stops(),
        adapters=body.wanted_adapters(),
        stream=bool(body.stream),
        return_tokens=bool(body.stream or body.return_tokens),
        use_cache=bool(body.cache) and not body.return_tokens,  # what is kept has no token ids
        cache_prompt=body.cache_prompt is not False,
        all_or_nothing=is_all_or_nothing(request),
        is_batch=is_batch,
    )


def _texts(body: SamplingBody, prompts: list[Prompt], served: Served) -> tuple[str, ...]:
    """One for each answer; empty where no reply shows them."""
    if body.response_fields and "prompt" not in body.response_fields:
        return ("",) * (len(prompts) * body.num_completions)
    return tuple(text for text in texts_of(prompts, served) for _ in range(body.num_completions))


def _settings(body: SamplingBody, principal: Principal, served: Served) -> dict[str, Any]:
    """Blocking: the tenant's default vector may have to be read."""
    default = [(adapter.position, scale) for adapter, scale in adapters.default_vector(principal, served)]
    return replies.generation_settings(
        body.sampling(),
        decoding=body.decoding(),
        wanted_tokens=body.wanted_tokens,
        stop=body.stops(),
        stream=bool(body.stream),
        timings_per_token=bool(body.timings_per_token),
        draft_kind=served.draft_kind,
        lora=default if body.lora is None else [(each.id, each.scale) for each in body.lora],
    )

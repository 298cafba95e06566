"""POST /completion and /infill: one prompt or several, at once or as a stream, in llama.cpp's words.

Limits, keys, ledger and receipts are those of every dialect: admission, parts and streaming are shared.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from django.http import HttpResponse, HttpResponseBase
from drf_spectacular.utils import extend_schema, extend_schema_view
from rest_framework.request import Request

from accounts.identity.principals import Principal
from inference.api.answering import TextView, num_prompt_tokens
from inference.api.async_view import Later, Outcome, json_response
from inference.api.errors import LLAMA
from inference.api.following import Collected
from inference.api.generation import ALL_OR_NOTHING, IDEMPOTENCY_KEY, is_all_or_nothing
from inference.api.llamacpp import replies
from inference.api.llamacpp.frames import LlamaFrames
from inference.api.llamacpp.prompts import infill, texts_of, tokens_of, with_biased_texts
from inference.api.llamacpp.schemas import (
    CompletionBody,
    CompletionEvent,
    CompletionReply,
    InfillBody,
    LlamaErrorReply,
    SamplingBody,
)
from inference.api.native.schemas import AcceptedReply
from inference.api.part_streams import open_part_stream
from inference.api.parts import Parts, completions, dropped_on_error
from inference.catalog import adapters
from inference.catalog.served import Served
from inference.engine.types import SamplingParams
from inference.intake import admission
from inference.intake.admission import Admitted, CachedAnswer
from inference.orders import GenerateOrder

Prompt = tuple[int, ...]
EVENTS = (200, "text/event-stream")


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as all of its answers speak of it."""

    body: SamplingBody
    served: Served
    settings: dict[str, Any]
    """Of the first answer. The grammar of another may be narrower, where the quota has less room for it."""
    prompts: tuple[str, ...]
    """As text, one for each answer."""

    def settings_with(self, grammar: str | None) -> dict[str, Any]:
        return {**self.settings, "grammar": grammar or ""}

    def reply(self, index: int, collected: Collected, grammar: str | None) -> dict[str, Any]:
        content = replies.final(
            collected,
            model=self.served.name,
            settings=self.settings_with(grammar),
            with_tokens=bool(self.body.return_tokens),
            prompt=self.prompts[index],
            index=index,
        )
        return replies.selected(content, self.body.response_fields) if self.body.response_fields else content


class SamplingView(TextView):
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
        sampling = with_biased_texts(body.sampling(), body, served)
        settings = _settings(body, sampling, principal, served)
        orders = _orders(body, sampling, prompts, request)
        parts = self.parts(principal, orders, background=body.background)
        answer = self.admit_first(parts, background=body.background)
        with dropped_on_error(answer, parts.drop):  # while the engine has the prompt already
            asked = Asked(body, served, settings | {"grammar": answer.grammar or ""}, _texts(body, prompts, served))
        if len(orders) > 1:
            run_all = self._stream_all if body.stream else self._reply_all
            return Later(partial(run_all, asked, parts, answer), abandon=partial(parts.abandon, answer))
        return self.answer(asked, answer, stream=body.stream, keep_alive_seconds=body.keep_alive_seconds)

    def whole(self, asked: Asked, collected: Collected, *, cached: bool) -> dict[str, Any]:
        return asked.reply(0, collected, asked.settings["grammar"])

    def frames(self, asked: Asked, answer: Admitted | CachedAnswer) -> LlamaFrames:
        return self._frames_of(asked, 0, answer)

    async def _reply_all(self, asked: Asked, parts: Parts, first: Admitted | CachedAnswer) -> HttpResponse:
        self.stage = "generation"
        results = await parts.run(first)
        content = [asked.reply(index, part.collected, part.grammar) for index, part in enumerate(results)]
        return json_response(content, headers=self.headers_of_parts(results))

    async def _stream_all(self, asked: Asked, parts: Parts, first: Admitted | CachedAnswer) -> HttpResponseBase:
        self.stage = "generation"
        return await open_part_stream(
            parts, first, partial(self._frames_of, asked), keep_alive_seconds=asked.body.keep_alive_seconds
        )

    def _frames_of(self, asked: Asked, index: int, answer: Admitted | CachedAnswer) -> LlamaFrames:
        return LlamaFrames(
            asked.body,
            model=asked.served.name,
            settings=asked.settings_with(answer.grammar),
            prompt=asked.prompts[index],
            num_prompt_tokens=num_prompt_tokens(answer),
            index=index,
            has_ids=len(asked.prompts) == 1,
            on_error=self.note_error,
        )


class CompletionView(SamplingView):
    """Text from prompts. Several prompts, or completions of one, are answered by an array, as one is by an object."""

    route = "/completion"

    @extend_schema(
        operation_id="completion",
        summary="llama.cpp's completion",
        request=CompletionBody,
        parameters=[ALL_OR_NOTHING, IDEMPOTENCY_KEY],
        responses={
            200: CompletionReply,
            202: AcceptedReply,
            EVENTS: CompletionEvent,
        },
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
    error_codes = (*SamplingView.error_codes, "capability_disabled")

    @extend_schema(
        operation_id="infill",
        summary="Fill in the middle",
        request=InfillBody,
        parameters=[ALL_OR_NOTHING, IDEMPOTENCY_KEY],
        responses={
            200: CompletionReply,
            202: AcceptedReply,
            EVENTS: CompletionEvent,
        },
    )
    def post(self, request: Request) -> Outcome:
        body = self.parse(InfillBody)
        principal = self.admit_to_view()
        served, _ = adapters.resolve_model(body.model, principal)
        return self.generate(request, body, served, [infill(body, served, admission.context_of(principal, served))])


def _orders(
    body: SamplingBody, sampling: SamplingParams, prompts: list[Prompt], request: Request
) -> list[GenerateOrder]:
    """One for each answer: the completions of the first prompt, then those of the next."""
    single = body.order(prompts[0], all_or_nothing=is_all_or_nothing(request), is_batch=len(prompts) > 1)
    singles = [replace(single, prompt=prompt, sampling=sampling) for prompt in prompts]
    return [each for single in singles for each in completions(single, body.num_completions)]


def _texts(body: SamplingBody, prompts: list[Prompt], served: Served) -> tuple[str, ...]:
    """One for each answer; empty where no reply shows them."""
    if body.response_fields and "prompt" not in body.response_fields:
        return ("",) * (len(prompts) * body.num_completions)
    return tuple(text for text in texts_of(prompts, served) for _ in range(body.num_completions))


def _settings(body: SamplingBody, sampling: SamplingParams, principal: Principal, served: Served) -> dict[str, Any]:
    """Blocking: the tenant's adapters may have to be read."""
    return replies.generation_settings(
        sampling,
        decoding=body.decoding(),
        wanted_tokens=body.wanted_tokens,
        stop=body.stops(),
        stream=bool(body.stream),
        timings_per_token=bool(body.timings_per_token),
        draft_kind=served.draft_kind,
        lora=_scales(body, principal, served),
    )


def _scales(body: SamplingBody, principal: Principal, served: Served) -> list[tuple[int, float]]:
    """As admission sees it: an adapter in the model's name and those in the list add up; neither is the default. Which
    version of an alias answers is known later, and not said."""
    _, named = adapters.resolve_model(body.model, principal)
    if named is None and body.lora is None:
        return [(adapter.position, scale) for adapter, scale in adapters.default_vector(principal, served)]
    granted = {each.name: each for each in adapters.granted(principal, served)}
    found = [granted[name] for name, _ in named or () if name in granted]
    return [(each.position, each.default_scale) for each in found] + [(each.id, each.scale) for each in body.lora or ()]

"""POST /v1/chat/completions and /v1/completions: parse, admit in the hop, then follow the events on the loop.

Limits, keys, ledger and receipts are those of every dialect: admission, parts and streaming are shared.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar

from django.http import HttpResponse, HttpResponseBase
from drf_spectacular.utils import extend_schema, extend_schema_view
from rest_framework.request import Request

from inference import adapters, admission
from inference.admission import Admitted, CachedAnswer
from inference.api import cancelling
from inference.api.async_view import Later, Outcome, json_response
from inference.api.errors import OPENAI_CHAT, OPENAI_COMPLETIONS, OpenAIErrors
from inference.api.following import Collected, collect, ending_of_cached, events_of_cached
from inference.api.generation import ALL_OR_NOTHING, GenerationView, answer_headers, is_all_or_nothing
from inference.api.llamacpp.prompts import tokens_of
from inference.api.openai.asked import Asked, AskedChat, AskedText
from inference.api.openai.base import OpenAIView
from inference.api.openai.frames import ChunkFrames, closing
from inference.api.openai.replies import Tally
from inference.api.openai.schemas import (
    ChatBody,
    ChatChunk,
    ChatCompletion,
    CompletionsBody,
    OpenAIErrorReply,
    OpenAIFields,
    TextCompletion,
)
from inference.api.part_streams import open_part_stream
from inference.api.parts import Part, Parts, completions, drop
from inference.api.sse import EventStream
from inference.api.streaming import open_stream
from inference.chat.prompt import ChatPrompt
from inference.chat.thinking import tags_of
from inference.orders import GenerateOrder
from inference.registry import Served
from inference.tokenizers import pool
from inference.tools import plan_tools

TAIL_TOKENS = 16
"""Of a prompt: in them a template that lets the model think has opened its thoughts."""
EVENTS = (200, "text/event-stream")


class AnsweringView(OpenAIView, GenerationView):
    """What follows once it is known what to generate."""

    words: ClassVar[OpenAIErrors]

    def generate(self, body: OpenAIFields, asked: Asked, orders: list[GenerateOrder]) -> Outcome:
        """One choice for each order. Blocking. Raises Refusal."""
        self.stage = "admission"
        principal = self.admit_to_view()
        parts = Parts(principal, orders, self.request_id, self.route)
        if len(orders) > 1:
            answer = parts.admit(0)
        else:
            answer = admission.admit(principal, orders[0], request_id=self.request_id, route=self.route)
        self.note_admission(answer)
        try:
            asked = self.as_admitted(asked, answer)
        except BaseException:
            drop(answer)
            raise
        if len(orders) > 1:
            run_all = self._stream_all if body.stream else self._reply_all
            run = partial(run_all, asked, replace(parts, orders=rendered(orders, answer)), answer, body)
            return Later(run, abandon=partial(drop, answer))
        if isinstance(answer, CachedAnswer):
            return self._stream_cached(asked, answer) if body.stream else self._reply_cached(asked, answer)
        if body.stream:
            return Later(partial(self._stream, asked, answer, body), abandon=partial(drop, answer))
        return Later(partial(self._reply, asked, answer), abandon=partial(drop, answer))

    def as_admitted(self, asked: Asked, answer: Admitted | CachedAnswer) -> Asked:
        """With what is known of the prompt by then. Blocking. Raises Refusal."""
        return asked

    # One JSON object

    async def _reply(self, asked: Asked, admitted: Admitted) -> HttpResponse:
        self.stage = "generation"
        with cancelling.unless_finished(self.request_id):
            collected = await collect(self.request_id)
        headers = answer_headers(collected.ending, cached=False, clamped=admitted.clamped)
        return json_response(_whole(asked, collected), headers=headers)

    def _reply_cached(self, asked: Asked, answer: CachedAnswer) -> HttpResponse:
        ending = ending_of_cached(answer.completion)
        content = _whole(asked, Collected(answer.completion.output, ending))
        return json_response(content, headers=answer_headers(ending, cached=True))

    async def _reply_all(
        self, asked: Asked, parts: Parts, first: Admitted | CachedAnswer, body: OpenAIFields
    ) -> HttpResponse:
        self.stage = "generation"
        results = await parts.run(first)
        content = asked.reply([part.collected for part in results], _tally(results))
        return json_response(content, headers=self.headers_of_parts(results))

    # Server-sent events

    async def _stream(self, asked: Asked, admitted: Admitted, body: OpenAIFields) -> HttpResponseBase:
        self.stage = "generation"
        return await open_stream(admitted, self._frames(asked, Tally()), keep_alive_seconds=body.keep_alive_seconds)

    async def _stream_all(
        self, asked: Asked, parts: Parts, first: Admitted | CachedAnswer, body: OpenAIFields
    ) -> HttpResponseBase:
        self.stage = "generation"
        tally = Tally()

        def frames_of(index: int, answer: Admitted | CachedAnswer) -> ChunkFrames:
            shares = isinstance(answer, Admitted) and answer.ticket.shares_prompt
            return self._frames(asked, tally, index=index, shares_prompt=shares, is_alone=False)

        return await open_part_stream(
            parts,
            first,
            frames_of,
            keep_alive_seconds=body.keep_alive_seconds,
            closing=partial(closing, asked, tally),
        )

    def _stream_cached(self, asked: Asked, answer: CachedAnswer) -> EventStream:
        words = self._frames(asked, Tally())

        async def frames() -> AsyncGenerator[bytes]:
            delta, ending, end_id = events_of_cached(answer.completion)
            yield words.delta(delta)
            yield words.end(ending, end_id)

        response = EventStream(frames(), abandon=lambda: None)
        response.headers["x-cache"] = "hit"
        return response

    def _frames(
        self, asked: Asked, tally: Tally, *, index: int = 0, shares_prompt: bool = False, is_alone: bool = True
    ) -> ChunkFrames:
        return ChunkFrames(
            asked,
            tally,
            self.words,
            index=index,
            shares_prompt=shares_prompt,
            is_alone=is_alone,
            on_error=self._note_error,
        )

    def _note_error(self, code: str) -> None:
        self.log_fields["error_type"] = code


class ChatCompletionsView(AnsweringView):
    """The next turn of a conversation, by the model's chat template."""

    route = "/v1/chat/completions"
    errors = words = OPENAI_CHAT

    @extend_schema(
        operation_id="chat_completions",
        summary="OpenAI's chat completion",
        request=ChatBody,
        parameters=[ALL_OR_NOTHING],
        responses={200: ChatCompletion, EVENTS: ChatChunk, 504: OpenAIErrorReply},
    )
    def post(self, request: Request) -> Outcome:
        body = self.parse(ChatBody)
        served, _ = adapters.resolve_model(body.model, self.admit_to_view())
        prompt = body.prompt()
        template = served.template_for(prompt)
        plan = plan_tools(
            template,
            prompt.tools,
            body.choice,
            name=body.named_tool,
            parallel=body.parallel_tool_calls is not False,
            max_chars=body.wanted_tokens if body.wanted_tokens > 0 else None,
        )
        asked = AskedChat(
            request_id=self.request_id,
            served=served,
            model=body.model or served.name,
            include_usage=body.include_usage,
            body=body,
            prompt=replace(prompt, tools=plan.prompt_tools),
            plan=plan,
            tags=tags_of(template.source),
        )
        order = order_from(body, asked.prompt, request)
        if plan.grammar is not None:
            order = replace(order, sampling=replace(order.sampling, grammar=plan.grammar))
        shown = (asked.tags.start, asked.tags.end) if template.has_thinking else ()
        order = replace(order, shown_texts=(*plan.shown_texts, *shown))
        return self.generate(body, asked, completions(order, body.num_completions))

    def as_admitted(self, asked: Asked, answer: Admitted | CachedAnswer) -> Asked:
        """A template may open the model's thoughts itself, and so may the text that goes on."""
        assert isinstance(asked, AskedChat)
        prompt = asked.prompt
        begun = prompt.messages[-1].content or "" if prompt.continue_final_message else ""
        is_open = asked.tags.are_open_in(begun)
        if not is_open and asked.served.template_for(prompt).has_thinking:
            is_open = _tail(asked.served, prompt, answer).rstrip().endswith(asked.tags.start)
        return replace(asked, is_open=is_open)


@extend_schema_view(post=extend_schema(operation_id="chat_completions_short"))
class ShortChatCompletionsView(ChatCompletionsView):
    """The same where llama.cpp's server has it, too."""


class CompletionsView(AnsweringView):
    """Text that goes on, from one prompt or several."""

    route = "/v1/completions"
    errors = words = OPENAI_COMPLETIONS

    @extend_schema(
        operation_id="text_completions",
        summary="OpenAI's completion",
        request=CompletionsBody,
        parameters=[ALL_OR_NOTHING],
        responses={200: TextCompletion, EVENTS: TextCompletion, 504: OpenAIErrorReply},
    )
    def post(self, request: Request) -> Outcome:
        body = self.parse(CompletionsBody)
        principal = self.admit_to_view()
        served, _ = adapters.resolve_model(body.model, principal)
        prompts = [tokens_of(prompt, served) for prompt in body.prompts()]
        for prompt in prompts:  # all of them before anything runs: a stream of several has a status, too
            admission.check_length(len(prompt), admission.context_of(principal, served))
        asked = AskedText(
            request_id=self.request_id,
            served=served,
            model=body.model or served.name,
            include_usage=body.include_usage,
            body=body,
        )
        orders = [
            each
            for prompt in prompts
            for each in completions(order_from(body, prompt, request, is_batch=len(prompts) > 1), body.num_completions)
        ]
        return self.generate(body, asked, orders)


def order_from(
    body: OpenAIFields, prompt: ChatPrompt | tuple[int, ...], request: Request, *, is_batch: bool = False
) -> GenerateOrder:
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
        use_cache=bool(body.cache),
        cache_prompt=body.cache_prompt is not False,
        all_or_nothing=is_all_or_nothing(request),
        is_batch=is_batch,
    )


def rendered(orders: Sequence[GenerateOrder], first: Admitted | CachedAnswer) -> list[GenerateOrder]:
    """A conversation becomes tokens once, however many answers it gets."""
    if isinstance(first, CachedAnswer):
        return list(orders)
    return [
        replace(each, prompt=first.ticket.prompt) if isinstance(each.prompt, ChatPrompt) else each for each in orders
    ]


def _whole(asked: Asked, collected: Collected) -> dict[str, object]:
    tally = Tally()
    tally.add(collected.ending)
    return asked.reply([collected], tally)


def _tally(parts: Sequence[Part]) -> Tally:
    tally = Tally()
    for part in parts:
        tally.add(part.collected.ending, shares_prompt=part.shares_prompt)
    return tally


def _tail(served: Served, prompt: ChatPrompt, answer: Admitted | CachedAnswer) -> str:
    """How the prompt ends. Blocking: the model's tokenizer is asked. Raises Refusal."""
    tokenizers = pool.tokenizer_pool()
    if isinstance(answer, Admitted):
        tokens = answer.ticket.prompt
    else:
        tokens = tokenizers.chat(served, served.template_for(prompt), prompt)
    return tokenizers.decode(served, tokens[-TAIL_TOKENS:], special=True)

"""POST /v1/chat/completions and /v1/completions: parse, admit in the hop, then follow the events on the loop.

Limits, keys, ledger and receipts are those of every dialect: admission, parts and streaming are shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, TypeVar

from django.http import HttpResponse, HttpResponseBase
from drf_spectacular.utils import extend_schema, extend_schema_view
from rest_framework.request import Request

from inference.api import thoughts
from inference.api.answering import TextView
from inference.api.async_view import Later, Outcome, json_response
from inference.api.errors import OPENAI_CHAT, OPENAI_COMPLETIONS, OpenAIErrors
from inference.api.following import Collected
from inference.api.generation import ALL_OR_NOTHING, IDEMPOTENCY_KEY, is_all_or_nothing
from inference.api.llamacpp.prompts import tokens_of
from inference.api.native.schemas import AcceptedReply
from inference.api.openai.asked import Asked, AskedChat, AskedText
from inference.api.openai.base import OpenAIView
from inference.api.openai.frames import ChunkFrames, closing
from inference.api.openai.replies import Tally
from inference.api.openai.schemas import (
    ChatBody,
    ChatChunk,
    ChatCompletion,
    ChatFields,
    CompletionsBody,
    InputTokensReply,
    OpenAIFields,
    TextCompletion,
)
from inference.api.part_streams import open_part_stream
from inference.api.parts import Part, Parts, completions, dropped_on_error
from inference.api.streaming import Frames
from inference.catalog import adapters
from inference.chat.prompt import ChatPrompt
from inference.chat.thinking import tags_of
from inference.intake import admission
from inference.intake.admission import Admitted, CachedAnswer
from inference.orders import GenerateOrder
from inference.tokenizers import pool
from inference.tools import plan_tools

EVENTS = (200, "text/event-stream")
ChatAsked = TypeVar("ChatAsked", bound=AskedChat)


class AnsweringView(OpenAIView, TextView):
    """What follows once it is known what to generate."""

    words: ClassVar[OpenAIErrors]

    def generate(self, body: OpenAIFields, asked: Asked, orders: list[GenerateOrder]) -> Outcome:
        """One choice for each order. Blocking. Raises Refusal."""
        self.stage = "admission"
        principal = self.admit_to_view()
        parts = self.parts(principal, orders, background=body.background)
        answer = self.admit_first(parts, background=body.background)
        with dropped_on_error(answer, parts.drop):
            asked = self.as_admitted(asked, answer)
            if isinstance(answer, Admitted):
                asked = replace(asked, created=int(answer.ticket.created_at))
        if len(orders) > 1:
            run_all = self._stream_all if body.stream else self._reply_all
            return Later(partial(run_all, asked, parts, answer, body), abandon=partial(parts.abandon, answer))
        return self.answer(asked, answer, stream=body.stream, keep_alive_seconds=body.keep_alive_seconds)

    def as_admitted(self, asked: Asked, answer: Admitted | CachedAnswer) -> Asked:
        """With what is known of the prompt by then. Blocking. Raises Refusal."""
        return asked

    # One answer

    def whole(self, asked: Asked, collected: Collected, *, cached: bool) -> dict[str, Any]:
        tally = Tally()
        tally.add(collected.ending)
        return asked.reply([collected], tally)

    def frames(self, asked: Asked, answer: Admitted | CachedAnswer) -> Frames:
        return self._chunks(asked, Tally())

    # Several

    async def _reply_all(
        self, asked: Asked, parts: Parts, first: Admitted | CachedAnswer, body: OpenAIFields
    ) -> HttpResponse:
        self.stage = "generation"
        results = await parts.run(first)
        content = asked.reply([part.collected for part in results], _tally(results))
        return json_response(content, headers=self.headers_of_parts(results))

    async def _stream_all(
        self, asked: Asked, parts: Parts, first: Admitted | CachedAnswer, body: OpenAIFields
    ) -> HttpResponseBase:
        self.stage = "generation"
        tally = Tally()

        def frames_of(index: int, answer: Admitted | CachedAnswer) -> ChunkFrames:
            shares = isinstance(answer, Admitted) and answer.ticket.shares_prompt
            return self._chunks(asked, tally, index=index, shares_prompt=shares, is_alone=False)

        return await open_part_stream(
            parts,
            first,
            frames_of,
            keep_alive_seconds=body.keep_alive_seconds,
            closing=partial(closing, asked, tally),
        )

    def _chunks(
        self, asked: Asked, tally: Tally, *, index: int = 0, shares_prompt: bool = False, is_alone: bool = True
    ) -> ChunkFrames:
        return ChunkFrames(
            asked,
            tally,
            self.words,
            index=index,
            shares_prompt=shares_prompt,
            is_alone=is_alone,
            on_error=self.note_error,
        )


class ConversationView(AnsweringView):
    """What follows once it is known what is said to the model: the next turn, by its chat template."""

    def ask(
        self, kind: type[ChatAsked], body: ChatFields, prompt: ChatPrompt, request: Request, **more: Any
    ) -> tuple[ChatAsked, GenerateOrder]:
        """more: fields of this kind alone. Raises Refusal."""
        served, _ = adapters.resolve_model(body.model, self.admit_to_view())
        template = served.template_for(prompt)
        plan = plan_tools(
            template,
            prompt.tools,
            body.choice,
            name=body.named_tool,
            parallel=body.parallel_tool_calls is not False,
            answer=body.answer_form(),
        )
        tags = tags_of(template.source)
        tells_thoughts = body.reasoning_format != "none" or not (plan.is_forced or body.answer_schema is not None)
        asked = kind(
            request_id=self.request_id,
            served=served,
            model=body.model or served.name,
            include_usage=body.include_usage,
            body=body,
            prompt=replace(prompt, tools=plan.prompt_tools),
            plan=plan,
            tags=tags,
            opening=thoughts.opening_of(tags, served, prompt) if tells_thoughts and not body.grammar else None,
            **more,
        )
        order = body.order(asked.prompt, all_or_nothing=is_all_or_nothing(request))
        if plan.form is not None:
            order = replace(order, form=plan.form, sampling=replace(order.sampling, grammar=plan.grammar))
        shown = (tags.start, tags.end) if template.has_thinking else ()
        return asked, replace(
            order, opening=asked.opening, max_thought=body.max_thought, shown_texts=(*plan.shown_texts, *shown)
        )

    def count(self, asked: AskedChat) -> HttpResponse:
        """The tokens of the prompt, as they would be computed. Blocking. Raises Refusal."""
        tokens = pool.tokenizer_pool().chat(asked.served, asked.served.template_for(asked.prompt), asked.prompt)
        return json_response({"object": "response.input_tokens", "input_tokens": len(tokens)})

    def as_admitted(self, asked: Asked, answer: Admitted | CachedAnswer) -> Asked:
        """A template may open the model's thoughts itself, and so may the text that goes on."""
        assert isinstance(asked, AskedChat)
        return replace(asked, is_open=thoughts.are_open(asked.opening, asked.served, asked.prompt, answer))


class ChatCompletionsView(ConversationView):
    """The next turn of a conversation that is sent whole."""

    route = "/v1/chat/completions"
    errors = words = OPENAI_CHAT

    @extend_schema(
        operation_id="chat_completions",
        summary="OpenAI's chat completion",
        request=ChatBody,
        parameters=[ALL_OR_NOTHING, IDEMPOTENCY_KEY],
        responses={200: ChatCompletion, 202: AcceptedReply, EVENTS: ChatChunk},
    )
    def post(self, request: Request) -> Outcome:
        body = self.parse(ChatBody)
        self.admit_to_view()
        asked, order = self.ask(AskedChat, body, body.prompt(), request)
        return self.generate(body, asked, completions(order, body.num_completions))


@extend_schema_view(post=extend_schema(operation_id="chat_completions_short"))
class ShortChatCompletionsView(ChatCompletionsView):
    """The same where llama.cpp's server has it, too."""


class ChatInputTokensView(ConversationView):
    """How many tokens the prompt of a chat completion would have. Nothing is generated or charged."""

    route = "/v1/chat/completions/input_tokens"
    errors = words = OPENAI_CHAT

    @extend_schema(
        operation_id="chat_input_tokens",
        summary="Count the tokens of a conversation",
        request=ChatBody,
        responses=InputTokensReply,
    )
    def post(self, request: Request) -> HttpResponse:
        body = self.parse(ChatBody)
        self.admit_to_view()
        asked, _ = self.ask(AskedChat, body, body.prompt(), request)
        return self.count(asked)


@extend_schema_view(post=extend_schema(operation_id="chat_input_tokens_short"))
class ShortChatInputTokensView(ChatInputTokensView):
    """The same where llama.cpp's server has it, too."""


class CompletionsView(AnsweringView):
    """Text that goes on, from one prompt or several."""

    route = "/v1/completions"
    errors = words = OPENAI_COMPLETIONS

    @extend_schema(
        operation_id="text_completions",
        summary="OpenAI's completion",
        request=CompletionsBody,
        parameters=[ALL_OR_NOTHING, IDEMPOTENCY_KEY],
        responses={200: TextCompletion, 202: AcceptedReply, EVENTS: TextCompletion},
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
        everything, several = is_all_or_nothing(request), len(prompts) > 1
        singles = [body.order(prompt, all_or_nothing=everything, is_batch=several) for prompt in prompts]
        orders = [each for single in singles for each in completions(single, body.num_completions)]
        return self.generate(body, asked, orders)


def _tally(parts: Sequence[Part]) -> Tally:
    tally = Tally()
    for part in parts:
        tally.add(part.collected.ending, shares_prompt=part.shares_prompt)
    return tally

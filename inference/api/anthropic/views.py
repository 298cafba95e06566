"""POST /v1/messages and /v1/messages/count_tokens: parse, admit in the hop, then follow the events on the loop.

Limits, keys, ledger and receipts are those of every dialect: admission, following and streaming are shared.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from django.http import HttpResponse
from drf_spectacular.utils import extend_schema
from rest_framework.request import Request

from inference.api import thoughts
from inference.api.answering import TextView, num_prompt_tokens
from inference.api.anthropic.asked import AskedMessage
from inference.api.anthropic.base import AnthropicView
from inference.api.anthropic.frames import MessageFrames
from inference.api.anthropic.schemas import (
    CountTokensBody,
    MessageEvent,
    MessageReply,
    MessagesBody,
    TokenCount,
)
from inference.api.async_view import Outcome, json_response
from inference.api.following import Collected
from inference.api.generation import ALL_OR_NOTHING, IDEMPOTENCY_KEY, is_all_or_nothing
from inference.api.native.schemas import AcceptedReply
from inference.api.parts import dropped_on_error
from inference.catalog import adapters
from inference.chat.thinking import tags_of
from inference.intake.admission import Admitted, CachedAnswer
from inference.tokenizers import pool
from inference.tools import plan_tools

EVENTS = (200, "text/event-stream")


class MessagesView(AnthropicView, TextView):
    """The next turn of a conversation, by the model's chat template."""

    route = "/v1/messages"
    scopes: ClassVar[tuple[str, ...]] = ("generate",)

    @extend_schema(
        operation_id="messages",
        summary="Anthropic's message",
        request=MessagesBody,
        parameters=[ALL_OR_NOTHING, IDEMPOTENCY_KEY],
        responses={200: MessageReply, 202: AcceptedReply, EVENTS: MessageEvent},
    )
    def post(self, request: Request) -> Outcome:
        body = self.parse(MessagesBody)
        principal = self.admit_to_view()
        served, _ = adapters.resolve_model(body.model, principal)
        prompt = body.prompt()
        template = served.template_for(prompt)
        plan = plan_tools(
            template,
            prompt.tools,
            body.choice,
            name=body.named_tool,
            parallel=body.parallel,
            answer=body.answer_form(),
        )
        tags = tags_of(template.source)
        opening = None if body.grammar else thoughts.opening_of(tags, served, prompt)
        asked = AskedMessage(
            request_id=self.request_id,
            served=served,
            model=body.model or served.name,
            prompt=replace(prompt, tools=plan.prompt_tools),
            plan=plan,
            tags=tags,
            parallel=body.parallel,
        )
        order = body.order(asked.prompt, all_or_nothing=is_all_or_nothing(request))
        if plan.form is not None:
            order = replace(order, form=plan.form, sampling=replace(order.sampling, grammar=plan.grammar))
        shown = (tags.start, tags.end) if template.has_thinking else ()
        order = replace(order, opening=opening, max_thought=body.max_thought, shown_texts=(*plan.shown_texts, *shown))
        self.stage = "admission"
        answer = self.admit(order, background=body.background)
        with dropped_on_error(answer):
            asked = replace(asked, is_open=thoughts.are_open(opening, served, asked.prompt, answer))
        return self.answer(asked, answer, stream=body.stream, keep_alive_seconds=body.keep_alive_seconds)

    def whole(self, asked: AskedMessage, collected: Collected, *, cached: bool) -> dict[str, Any]:
        return asked.reply(collected)

    def frames(self, asked: AskedMessage, answer: Admitted | CachedAnswer) -> MessageFrames:
        return MessageFrames(asked, num_prompt_tokens(answer), on_error=self.note_error)


class CountTokensView(AnthropicView):
    """Exact: the prompt is rendered and tokenized as for an answer. Nothing is generated, held or charged."""

    route = "/v1/messages/count_tokens"

    @extend_schema(
        operation_id="messages_count_tokens",
        summary="Tokens of a conversation",
        request=CountTokensBody,
        responses=TokenCount,
    )
    def post(self, request: Request) -> HttpResponse:
        body = self.parse(CountTokensBody)
        served, _ = adapters.resolve_model(body.model, self.admit_to_view())
        prompt = body.prompt()
        tokens = pool.tokenizer_pool().chat(served, served.template_for(prompt), prompt)
        return json_response({"input_tokens": len(tokens)})

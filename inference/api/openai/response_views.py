"""/v1/responses: a chat completion in other clothes, and what a tenant has stored of them.

Nothing is stored unless the operator has given the tenant `response_days`; then `store`, which is true where it is
absent, keeps the conversation and the answer for `previous_response_id`, GET and DELETE.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, ClassVar, Literal

import structlog
from django.http import HttpResponse
from drf_spectacular.utils import OpenApiParameter, extend_schema, extend_schema_view
from pydantic import BaseModel, ConfigDict, Field
from rest_framework.request import Request

from accounts.identity.principals import Principal
from accounts.trail.refusals import Refusal
from inference import stored_responses
from inference.api import cancelling
from inference.api.async_view import Outcome, json_response
from inference.api.chat_schemas import MAX_MESSAGES
from inference.api.errors import OPENAI_RESPONSES, wrong_field
from inference.api.generation import ALL_OR_NOTHING, IDEMPOTENCY_KEY
from inference.api.hop import shared_hop
from inference.api.openai.asked import Asked
from inference.api.openai.base import OpenAIView
from inference.api.openai.response_frames import ResponseFrames
from inference.api.openai.response_items import (
    MAX_ITEMS,
    AnyItem,
    GivenItem,
    MessageItem,
    ReferenceItem,
    StoredItems,
    messages_of,
    without_oldest,
)
from inference.api.openai.response_output import ID_PREFIX, AskedResponse, thoughts_of
from inference.api.openai.response_schemas import (
    ItemList,
    ResponseDeleted,
    ResponseEvent,
    ResponseReply,
    ResponsesBody,
)
from inference.api.openai.schemas import InputTokensReply
from inference.api.openai.views import EVENTS, ConversationView
from inference.intake import admission
from inference.intake.admission import Admitted, CachedAnswer
from inference.orders import GenerateOrder
from inference.stored_responses import Stored
from inference.tokenizers import pool
from inference.transport.queue import ticket_queue

log = structlog.get_logger("llmsite.responses")
MAX_REFERRED = 4
"""Stored responses that are read for the references of one request."""
ITEM_ID = re.compile(r"[a-z]+_([0-9A-Za-z.-]{1,100})-(?:in)?[0-9]{1,5}")
"""Of an item that a response has made or listed: it has the request's."""
SWITCH = "the operator switches it on by `manage.py stored_responses --tenant NAME --days N`, or in the admin"


class ConversingView(ConversationView):
    """A conversation of items, earlier ones from the store: what responses and the count of their tokens share."""

    errors = words = OPENAI_RESPONSES

    def converse(self, body: ResponsesBody, request: Request) -> tuple[AskedResponse, GenerateOrder]:
        """Raises Refusal."""
        principal = self.admit_to_view()
        earlier = _earlier(body, principal)
        given = _looked_up(body.input or (), principal)
        items: list[AnyItem] = [*StoredItems.model_validate({"items": earlier}).items, *given]
        keeps = body.wants_store and principal.response_days is not None
        said = [each.stored(f"{self.request_id}-in{place}") for place, each in enumerate(given)]

        def ask(kept: Sequence[AnyItem]) -> tuple[AskedResponse, GenerateOrder]:
            messages = messages_of(kept, body.instructions)
            if not 1 <= len(messages) <= MAX_MESSAGES:
                raise wrong_field("input", f"a conversation has 1 to {MAX_MESSAGES} messages")
            listed = [*earlier, *said]
            return self.ask(AskedResponse, body, body.chat_prompt(messages), request, items=listed, keeps=keeps)

        asked, order = ask(items)
        if body.truncation != "auto":
            return asked, order
        n_ctx = admission.context_of(principal, asked.served)
        if num_tokens(asked, n_ctx) < n_ctx:
            return asked, order
        wanted = body.wanted_tokens if body.wanted_tokens > 0 else n_ctx // 4
        return ask(_fitting(items, n_ctx - min(wanted, n_ctx // 2), lambda kept: num_tokens(ask(kept)[0], n_ctx)))


class ResponsesView(ConversingView):
    """One answer, as items."""

    route = "/v1/responses"

    @extend_schema(
        operation_id="responses",
        summary="OpenAI's response",
        request=ResponsesBody,
        parameters=[ALL_OR_NOTHING, IDEMPOTENCY_KEY],
        responses={200: ResponseReply, EVENTS: ResponseEvent},
    )
    def post(self, request: Request) -> Outcome:
        body = self.parse(ResponsesBody)
        asked, order = self.converse(body, request)
        return self.generate(body, asked, [order])

    def frames(self, asked: Asked, answer: Admitted | CachedAnswer) -> ResponseFrames:
        assert isinstance(asked, AskedResponse)
        return ResponseFrames(asked, self.words, on_error=self.note_error)

    # The end of an answer

    def closing(self, asked: AskedResponse, frames: ResponseFrames) -> Callable[[], Awaitable[bytes]]:
        async def last() -> bytes:
            """Nothing more is said of a response that was cancelled."""
            if frames.response is None:
                return b""
            return frames.closing(await self.finish_soon(asked, frames.response))

        return last

    async def finish_soon(self, asked: AskedResponse, content: dict[str, Any]) -> dict[str, Any]:
        """Before the client has it, which may go on from it at once. A hop is made where there is something to do."""
        if not asked.keeps and not thoughts_of(content):
            return content
        try:
            return await shared_hop().run(lambda: self.finish(asked, content), abandon=lambda finished: None)
        except Refusal as refusal:
            log.warning("a response was not stored", response_id=asked.id, error_type=refusal.code)
            return {**content, "store": False}

    def finish(self, asked: AskedResponse, content: dict[str, Any]) -> dict[str, Any]:
        """Count the tokens of thoughts, and store it. Blocking."""
        if thoughts := thoughts_of(content):
            usage = content["usage"]
            number = min(_num_tokens_of(thoughts, asked), usage["output_tokens"])
            content = {**content, "usage": {**usage, "output_tokens_details": {"reasoning_tokens": number}}}
        assert self.principal is not None
        if asked.keeps and not stored_responses.put(self.principal, asked.items, content):
            content = {**content, "store": False}
        return content


@extend_schema_view(post=extend_schema(operation_id="responses_short"))
class ShortResponsesView(ResponsesView):
    """The same where llama.cpp's server has it, too."""


class InputTokensView(ConversingView):
    """How many tokens the prompt of a response would have. Nothing is generated or charged."""

    route = "/v1/responses/input_tokens"

    @extend_schema(
        operation_id="responses_input_tokens",
        summary="Count the tokens of a response's input",
        request=ResponsesBody,
        responses=InputTokensReply,
    )
    def post(self, request: Request) -> HttpResponse:
        asked, _ = self.converse(self.parse(ResponsesBody), request)
        return self.count(asked)


@extend_schema_view(post=extend_schema(operation_id="responses_input_tokens_short"))
class ShortInputTokensView(InputTokensView):
    """The same where llama.cpp's server has it, too."""


# What is stored


class StoredView(OpenAIView):
    """Of the caller's own tenant; what belongs to another does not exist."""

    scopes: ClassVar[tuple[str, ...]] = ("generate",)

    def stored(self, response_id: str) -> Stored:
        """Raises Refusal."""
        principal = self.admit_to_view()
        found = stored_responses.get(principal, response_id[:128])
        if found is None:
            raise _not_found(principal, response_id)
        return found


class ResponseView(StoredView):
    route = "/v1/responses/{id}"

    @extend_schema(operation_id="response", summary="A stored response", responses=ResponseReply)
    def get(self, request: Request, response_id: str) -> HttpResponse:
        if request.query_params.get("stream", "").lower() == "true":
            raise wrong_field("stream", "Not supported: a stored response is whole, retrieve it without")
        return json_response(self.stored(response_id).response)

    @extend_schema(operation_id="response_delete", summary="Delete a stored response", responses={200: ResponseDeleted})
    def delete(self, request: Request, response_id: str) -> HttpResponse:
        principal = self.admit_to_view()
        if not stored_responses.delete(principal, response_id[:128]):
            raise _not_found(principal, response_id)
        return json_response({"id": response_id, "object": "response", "deleted": True})


class CancelResponseView(StoredView):
    """End a response that is being made. One that has ended stays as it is."""

    route = "/v1/responses/{id}/cancel"

    @extend_schema(operation_id="response_cancel", summary="Cancel a response", request=None, responses=ResponseReply)
    def post(self, request: Request, response_id: str) -> HttpResponse:
        principal = self.admit_to_view()
        request_id = response_id.removeprefix(ID_PREFIX)
        state = ticket_queue().state(request_id) if response_id.startswith(ID_PREFIX) else None
        if state is None or state.tenant_id != principal.tenant_id or state.state == "done":
            return json_response(self.stored(response_id).response)
        cancelling.cancel(request_id)
        return json_response(_cancelled(response_id, int(state.created_at)))


class ItemQuery(BaseModel):
    """Of a list of items."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    limit: int = Field(20, ge=1, le=100)
    order: Literal["asc", "desc"] = "desc"
    after: str | None = Field(None, max_length=128)


class InputItemsView(StoredView):
    """The conversation that a stored response answered, earlier turns included."""

    route = "/v1/responses/{id}/input_items"

    @extend_schema(
        operation_id="response_input_items",
        summary="What a stored response answered",
        parameters=[
            OpenApiParameter("limit", int, description="1 to 100; 20 where it is absent."),
            OpenApiParameter(
                "order", str, enum=["asc", "desc"], description="desc, the newest first, where it is absent."
            ),
            OpenApiParameter("after", str, description="The id of an item, behind which the list begins."),
        ],
        responses=ItemList,
    )
    def get(self, request: Request, response_id: str) -> HttpResponse:
        query = ItemQuery.model_validate(request.query_params.dict())
        items = self.stored(response_id).items
        if query.order == "desc":
            items = items[::-1]
        if query.after is not None:
            places = [place for place, item in enumerate(items) if item["id"] == query.after]
            if not places:
                raise wrong_field("after", "no item of this response has this id")
            items = items[places[0] + 1 :]
        page = items[: query.limit]
        content = {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": len(items) > len(page),
        }
        return json_response(content)


def _earlier(body: ResponsesBody, principal: Principal) -> list[dict[str, Any]]:
    """The items of the conversation that goes on. Raises Refusal."""
    if body.previous_response_id is None:
        return []
    if principal.response_days is None:
        message = f"responses of this tenant are not stored: send the whole conversation as input, or {SWITCH}"
        raise wrong_field("previous_response_id", message)
    found = stored_responses.get(principal, body.previous_response_id)
    if found is None:
        raise Refusal(
            "previous_response_not_found",
            f"Previous response with id '{body.previous_response_id}' not found.",
            field="previous_response_id",
        )
    items = _conversation(found)
    if len(items) > MAX_ITEMS:
        raise wrong_field("previous_response_id", f"its conversation has more than {MAX_ITEMS} items: begin a new one")
    return items


def _looked_up(given: Sequence[GivenItem], principal: Principal) -> list[AnyItem]:
    """The items that references stand for in their places. Raises Refusal.

    From the end: what is stored of the newest response has the conversation before it, too. Each is there once, so that
    a short body says no more than is stored.
    """
    items: list[AnyItem] = []
    known: dict[str | None, AnyItem] = {}
    named: set[str] = set()
    num_read = 0
    for item in reversed(given):
        if not isinstance(item, ReferenceItem):
            items.append(item)
            continue
        if item.id in named:
            raise wrong_field("input", f"Duplicate item found with id '{item.id[:64]}'.")
        named.add(item.id)
        if item.id not in known and num_read < MAX_REFERRED:
            num_read += 1
            known = {each.id: each for each in _items_around(item.id, principal)} | known
        if item.id not in known:
            raise wrong_field("input", f"Item with id '{item.id[:64]}' not found.{_why_none(principal)}")
        items.append(known[item.id])
    return items[::-1]


def _why_none(principal: Principal) -> str:
    if principal.response_days is not None:
        return ""
    return f" Responses of this tenant are not stored: send items whole, as clients do with store=false, or {SWITCH}."


def _items_around(item_id: str, principal: Principal) -> list[AnyItem]:
    """Of the response that gave the item its id, as far as it is stored."""
    match = ITEM_ID.fullmatch(item_id)
    found = stored_responses.get(principal, ID_PREFIX + match[1]) if match else None
    return [] if found is None else StoredItems.model_validate({"items": _conversation(found)[-MAX_ITEMS:]}).items


def _conversation(stored: Stored) -> list[dict[str, Any]]:
    """Up to the answer."""
    return [*stored.items, *filter(_can_go_on, stored.response["output"])]


def _can_go_on(item: dict[str, Any]) -> bool:
    """A call that was cut is none: nobody can answer it, and its arguments are no JSON."""
    return not (item["type"] == "function_call" and item["status"] == "incomplete")


def _num_tokens_of(thoughts: str, asked: AskedResponse) -> int:
    """0 where the tokenizer does not answer: a count is no reason to lose the answer."""
    try:
        return len(pool.tokenizer_pool().encode(asked.served, thoughts, add_special=False))
    except Refusal as refusal:
        log.warning("thoughts were not counted", response_id=asked.id, error_type=refusal.code)
        return 0


def num_tokens(asked: AskedResponse, n_ctx: int) -> int:
    """Of the prompt; n_ctx where it is longer than anybody counts. Blocking. Raises Refusal."""
    try:
        return len(pool.tokenizer_pool().chat(asked.served, asked.served.template_for(asked.prompt), asked.prompt))
    except Refusal as refusal:
        if refusal.code != "context_length_exceeded":
            raise
        return n_ctx


def _fitting(items: list[AnyItem], room: int, count: Callable[[list[AnyItem]], int]) -> list[AnyItem]:
    """The longest end of the conversation that has `room` tokens at most, and begins with a user's message.

    The last such end where none fits: it is refused as any prompt that is too long.
    """
    places = [place for place, item in enumerate(items) if isinstance(item, MessageItem) and item.role == "user"]
    ends = [without_oldest(items, place) for place in places]
    if not ends:
        return items
    place = bisect_left(ends, True, key=lambda end: count(end) <= room)
    return ends[min(place, len(ends) - 1)]


def _not_found(principal: Principal, response_id: str) -> Refusal:
    message = f"Response with id '{response_id[:64]}' not found."
    if principal.response_days is None:
        message += f" Responses of this tenant are not stored: {SWITCH}."
    return Refusal("not_found", message)


def _cancelled(response_id: str, created_at: int) -> dict[str, Any]:
    """As much as is known while it runs; whoever waits for its answer reads that it was cancelled."""
    return {
        "id": response_id,
        "object": "response",
        "created_at": created_at,
        "status": "cancelled",
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "metadata": {},
        "model": "",
        "output": [],
        "parallel_tool_calls": True,
        "store": False,
        "temperature": None,
        "tool_choice": "auto",
        "tools": [],
        "top_p": None,
        "usage": None,
    }

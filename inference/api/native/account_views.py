"""GET /v1/models, /v1/me, /v1/requests/{id}, POST /v1/requests/{id}/cancel: what a key may know and end.

Each answers from the caller's own tenant; what belongs to another does not exist.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import orjson
from django.http import HttpResponse
from drf_spectacular.utils import OpenApiParameter, extend_schema, extend_schema_view
from redis import RedisError
from rest_framework.request import Request

from accounts import redis_client
from accounts.identity.principals import Principal
from accounts.ledger import quotas
from accounts.limits.precedence import LIMIT_NAMES
from accounts.trail import refusal_log
from accounts.trail.refusals import Refusal
from inference import settlement
from inference.api import cancelling, replaying
from inference.api.async_view import AsyncAPIView, Later, Outcome, json_response
from inference.api.errors import EVERY
from inference.api.native.schemas import (
    CancelReply,
    ErrorReply,
    GenerateEvent,
    MeReply,
    ModelsReply,
    RequestReply,
)
from inference.api.openai.base import OpenAIView
from inference.api.sse import position_of
from inference.catalog import adapters, registry
from inference.catalog.served import Served
from inference.models import Receipt
from inference.transport.holding import START, Position
from inference.transport.model_orders import ModelState, state_of
from inference.transport.queue import ticket_queue

RECEIPT_FIELDS = (
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "drafted_tokens",
    "accepted_tokens",
    "charged_tokens",
    "queue_seconds",
    "prefill_seconds",
    "decode_seconds",
    "total_seconds",
    "num_steps",
    "mean_batch_size",
    "mean_decode_batch_size",
    "seed",
    "worker",
)


class ModelsView(OpenAIView):
    """The models that this key may use, in OpenAI's, Anthropic's and the native shape at once; so are errors."""

    tag = "native"
    errors = EVERY
    error_reply = ErrorReply
    route = "/v1/models"
    scopes = ("generate", "usage", "operator")

    @extend_schema(operation_id="models", summary="Models of this key", responses=ModelsReply)
    def get(self, request: Request) -> HttpResponse:
        principal = self.admit_to_view()
        models = registry.visible(principal)
        states, usable = states_of(models), adapters.usable_on(principal, models)
        default = next((model.name for model in models if model.is_default), None)
        entries = [entry for model in models for entry in _openai_models(model, states[model.id], usable[model.id])]
        content = {
            "object": "list",
            "data": entries,
            "has_more": False,
            "first_id": entries[0]["id"] if entries else None,
            "last_id": entries[-1]["id"] if entries else None,
            "default_model": default,
            "models": [_native_model(model, states[model.id], usable[model.id]) for model in models],
            "deployment_capabilities": {"generate": True, "stream": True, "batch": True, "embeddings": True},
        }
        return json_response(content)


@extend_schema_view(get=extend_schema(operation_id="models_short"))
class ShortModelsView(ModelsView):
    """The same where llama.cpp's server has it, too."""


def states_of(models: Sequence[Served]) -> dict[int, ModelState]:
    """By the id of each. Without Redis nothing is known to be loaded; the registry is still worth an answer."""
    try:
        workers = ticket_queue().workers()
    except RedisError:
        workers = []
    return {model.id: state_of(model, workers) for model in models}


def _openai_models(model: Served, state: ModelState, usable: adapters.Usable) -> list[dict[str, Any]]:
    """The model, and it again with each adapter and alias that this tenant may use, under the names that requests can
    say."""
    base = openai_model(model, state)
    usable_names = [*(each.name for each in usable.adapters), *(each.name for each in usable.aliases)]
    names = (f"{model.name}:{name}" for name in usable_names)
    return [base, *({**base, "id": name, "display_name": name} for name in names)]


def openai_model(model: Served, state: ModelState) -> dict[str, Any]:
    """OpenAI's fields and Anthropic's."""
    return {
        "id": model.name,
        "object": "model",
        "created": model.created_unix,
        "owned_by": "llmsite",
        "type": "model",
        "display_name": model.name,
        "created_at": datetime.fromtimestamp(model.created_unix, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "lifecycle": "active",
        "max_input_tokens": model.n_ctx,
        "status": {"value": "loaded" if state.is_loaded else state.state, "progress": state.progress},
        "meta": {
            "n_ctx_train": model.trained_context,
            "n_ctx": model.n_ctx,
            "n_params": model.num_parameters,
            "n_vocab": model.vocabulary_size,
            "size": model.size_bytes,
        },
    }


def _native_model(model: Served, state: ModelState, usable: adapters.Usable) -> dict[str, Any]:
    return {
        "id": model.name,
        "name": model.name,
        "model": model.name,
        "aliases": list(model.aliases),
        "default": model.is_default,
        "backend": "llama.cpp",
        "capabilities": {
            **_chat_capabilities(model),
            **model.capabilities,
            "generate": model.generates,
            "embeddings": model.embeds,
        },
        "load_mode": model.load_mode,
        "loaded": state.is_loaded,
        "state": state.state,
        "progress": state.progress,
        "load_seconds": state.load_seconds,
        "context": model.n_ctx,
        "slots": model.n_slots,
        "architecture": model.architecture,
        "quantization": model.quantization,
        "adapters": [{"id": each.position, "name": each.name, "scale": each.default_scale} for each in usable.adapters],
        "adapter_aliases": [each.name for each in usable.aliases],
    }


def _chat_capabilities(model: Served) -> dict[str, bool]:
    """What its chat template was seen to do; the operator's switches have the last word on what is told."""
    templates = [template for template in (model.chat, model.chat_with_tools) if template]
    return {
        "chat": bool(templates),
        "tools": any(template.has_tools for template in templates),
        "thinking": any(template.has_thinking for template in templates),
    }


class MeView(AsyncAPIView):
    """Who this key is and what it may do."""

    route = "/v1/me"

    @extend_schema(operation_id="me", summary="The key's own identity and limits", responses=MeReply)
    def get(self, request: Request) -> HttpResponse:
        principal = self.admit_to_view()
        content = {
            "key": {
                "id": principal.public_id,
                "name": principal.key_name,
                "prefix": f"llms_{principal.public_id}_…",
                "role": principal.role,
                "scopes": sorted(principal.scopes),
            },
            "tenant": {"name": principal.tenant_name, "plan": principal.plan_name},
            "limits": {name: principal.limit(name) for name in LIMIT_NAMES},
        }
        return json_response(content)


# Requests


class RequestView(AsyncAPIView):
    """One request of the caller's tenant: its state while it runs, its receipt afterwards."""

    route = "/v1/requests/{id}"
    error_codes = ("generation_timeout",)
    scopes = ("generate", "usage")

    @extend_schema(operation_id="request", summary="State, or receipt and answer", responses=RequestReply)
    def get(self, request: Request, request_id: str) -> Outcome:
        principal = self.admit_to_view()
        receipt = find_receipt(principal, request_id)
        if receipt is not None:
            return self._ended(principal, receipt)
        state = ticket_queue().state(request_id)
        if state is None or state.tenant_id != principal.tenant_id:
            return _batch_or_nothing(principal, request_id)
        if state.state == "done" and (receipt := find_receipt(principal, request_id)):
            return self._ended(principal, receipt)  # it ended, or was settled, between two looks
        return json_response(
            {"id": request_id, "status": state.state, "position": state.position, "created_at": state.created_at}
        )

    def _ended(self, principal: Principal, receipt: Receipt) -> Outcome:
        """With the answer, where it was to be fetched here, is still kept, and this key may generate."""
        content = {**receipt_content(receipt), "cost": quotas.cost_of(receipt.request_id)}
        question = ticket_queue().question(receipt.request_id) if "generate" in principal.scopes else None
        if question is None or not question.is_background:
            return json_response(content)
        _, answer = replaying.replay(self, question, stream=False)

        async def run() -> HttpResponse:
            response = await answer.run()
            assert isinstance(response, HttpResponse)
            return json_response({**content, "answer": orjson.loads(response.content)})

        return Later(run, abandon=answer.abandon)


class EventsView(AsyncAPIView):
    """The stream of a request of the caller's tenant, in the dialect in which it was asked, behind what was read."""

    route = "/v1/requests/{id}/events"
    error_codes = ("events_not_kept", "generation_timeout")
    scopes = ("generate",)

    @extend_schema(
        operation_id="request_events",
        summary="Resume a stream",
        parameters=[
            OpenApiParameter(
                "Last-Event-ID", str, OpenApiParameter.HEADER, description="Of the last event that was read."
            ),
            OpenApiParameter("last_event_id", str, description="The same, for clients that cannot set headers."),
        ],
        responses={(200, "text/event-stream"): GenerateEvent},
    )
    def get(self, request: Request, request_id: str) -> Outcome:
        principal = self.admit_to_view()
        after = _position(request.META.get("HTTP_LAST_EVENT_ID") or request.GET.get("last_event_id"))
        question = ticket_queue().question(request_id)
        if question is not None and question.ticket.tenant_id == principal.tenant_id:
            return replaying.replay(self, question, stream=True, after=after)[1]
        state = ticket_queue().state(request_id)
        is_known = state is not None and state.tenant_id == principal.tenant_id
        if not is_known and find_receipt(principal, request_id) is None and not _live_parts(principal, request_id):
            _batch_or_nothing(principal, request_id)
        raise Refusal("events_not_kept", "The events of this request are not kept, or it has several answers.")


EVENT_ID = re.compile(r"[0-9]{1,15}(-[0-9]{1,15}(\.[0-9]{1,6})?)?")


def _position(last_event_id: str | None) -> Position:
    if not last_event_id:
        return START
    if not EVENT_ID.fullmatch(last_event_id):
        raise Refusal("bad_request", "Last-Event-ID is none that this server has sent.")
    return position_of(last_event_id)


def _live_parts(principal: Principal, request_id: str) -> list[str]:
    """Those of several answers of one request that have not ended."""
    live = ticket_queue().live_requests(tenant_id=principal.tenant_id)
    return [each for each in live if each.startswith(f"{request_id}.")]


def find_receipt(principal: Principal, request_id: str) -> Receipt | None:
    """From the database, or from the outcome that is still on its way there."""
    row = Receipt.objects.filter(request_id=request_id, tenant_id=principal.tenant_id).first()
    if row is not None:
        return row
    ended = settlement.pending(redis_client.client(), request_id)
    if ended is None or ended[0].tenant_id != principal.tenant_id:
        return None
    return settlement.receipt_row(*ended)


def receipt_content(receipt: Receipt) -> dict[str, Any]:
    return {
        "id": receipt.request_id,
        "status": receipt.status,
        "model": receipt.model,
        "adapters": [{"name": name, "scale": scale} for name, scale in receipt.adapters],
        "aliases": dict(receipt.aliases),
        "route": receipt.route,
        "finish_reason": receipt.finish_reason,
        "error_code": receipt.error_code or None,
        "cached": receipt.cached,
        "created_at": receipt.created_at,
        "finished_at": receipt.finished_at,
        "usage": {
            "prompt_tokens": receipt.prompt_tokens,
            "completion_tokens": receipt.completion_tokens,
            "total_tokens": receipt.prompt_tokens + receipt.completion_tokens,
        },
        "receipt": {name: getattr(receipt, name) for name in RECEIPT_FIELDS},
    }


def _batch_or_nothing(principal: Principal, request_id: str) -> HttpResponse:
    """A batch has no receipt of its own, but those of its parts; what was refused has none."""
    parts = Receipt.objects.filter(tenant_id=principal.tenant_id, parent_id=request_id).order_by("request_id")
    found = [receipt_content(row) for row in parts[:200]]
    if not found:
        refused = refusal_log.find(request_id, principal.tenant_id)
        if refused is None:
            raise Refusal("not_found", "There is no such request.")
        return json_response(refusal_log.as_json(refused))
    usage = {name: sum(part["usage"][name] for part in found) for name in found[0]["usage"]}
    return json_response({"id": request_id, "status": "completed", "usage": usage, "parts": found})


class CancelView(AsyncAPIView):
    """End a request of the caller's tenant now. What was generated until then is charged."""

    route = "/v1/requests/{id}/cancel"
    scopes = ("generate",)

    @extend_schema(operation_id="request_cancel", summary="Cancel", request=None, responses=CancelReply)
    def post(self, request: Request, request_id: str) -> HttpResponse:
        principal = self.admit_to_view()
        state = ticket_queue().state(request_id)
        if state is None or state.tenant_id != principal.tenant_id:
            return self._cancel_parts_of(principal, request_id)
        if state.state == "done":
            return json_response({"id": request_id, "status": "done"})
        cancelling.cancel(request_id)
        return json_response({"id": request_id, "status": "cancelling"})

    def _cancel_parts_of(self, principal: Principal, request_id: str) -> HttpResponse:
        """One that fails ends the others, those that were not admitted yet, too."""
        parts = _live_parts(principal, request_id)
        for part in parts:
            cancelling.cancel(part)
        receipt = find_receipt(principal, request_id)
        if not parts and receipt is None:
            raise Refusal("not_found", "There is no such request.")
        return json_response({"id": request_id, "status": receipt.status if receipt else "cancelling"})

"""GET /v1/models, /v1/me, /v1/me/usage, /v1/requests/{id}, POST /v1/requests/{id}/cancel: what a key may know and end.

Each answers from the caller's own tenant; what belongs to another does not exist.
"""

from __future__ import annotations

from typing import Any

from django.http import HttpResponse
from django.utils import timezone
from drf_spectacular.utils import extend_schema, extend_schema_view
from redis import RedisError
from rest_framework.request import Request

from accounts import redis_client
from accounts.limits import LIMIT_NAMES
from accounts.principals import Principal
from accounts.refusals import Refusal
from accounts.usage import usage
from inference import adapters, registry, settlement
from inference.api import cancelling
from inference.api.async_view import AsyncAPIView, json_response
from inference.api.errors import EVERY
from inference.api.health import worker_state
from inference.api.native.schemas import (
    CancelReply,
    ErrorReply,
    MeReply,
    ModelsReply,
    RequestReply,
    UsageReply,
)
from inference.api.openai.base import OpenAIView
from inference.models import Receipt
from inference.queue import WorkerInfo, ticket_queue
from inference.registry import Served

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
    """The models that this key may use, in OpenAI's and the native shape at once; errors too."""

    tag = "native"
    errors = EVERY
    error_reply = ErrorReply
    route = "/v1/models"
    scopes = ("generate", "usage", "operator")

    @extend_schema(operation_id="models", summary="Models of this key", responses=ModelsReply)
    def get(self, request: Request) -> HttpResponse:
        principal = self.admit_to_view()
        models = registry.visible(principal)
        try:
            workers = ticket_queue().workers()
        except RedisError:
            workers = []  # the registry is still worth an answer; nothing is known to be loaded
        default = next((model.name for model in models if model.is_default), None)
        content = {
            "object": "list",
            "data": [entry for model in models for entry in _openai_models(model, principal)],
            "default_model": default,
            "models": [_native_model(model, workers, principal) for model in models],
            "deployment_capabilities": {"generate": True, "stream": True, "batch": True},
        }
        return json_response(content)


@extend_schema_view(get=extend_schema(operation_id="models_short"))
class ShortModelsView(ModelsView):
    """The same where llama.cpp's server has it, too."""


def _openai_models(model: Served, principal: Principal) -> list[dict[str, Any]]:
    """The model, and it again with each adapter that this tenant may use, under the names that requests can say."""
    base = openai_model(model)
    return [base, *({**base, "id": f"{model.name}:{each.name}"} for each in adapters.granted(principal, model))]


def openai_model(model: Served) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created_unix,
        "owned_by": "llmsite",
        "meta": {
            "n_ctx_train": model.trained_context,
            "n_ctx": model.n_ctx,
            "n_params": model.num_parameters,
            "n_vocab": model.vocabulary_size,
            "size": model.size_bytes,
        },
    }


def _native_model(model: Served, workers: list[WorkerInfo], principal: Principal) -> dict[str, Any]:
    return {
        "id": model.name,
        "name": model.name,
        "model": model.name,
        "aliases": list(model.aliases),
        "default": model.is_default,
        "backend": "llama.cpp",
        "capabilities": {"generate": True, **_chat_capabilities(model), **model.capabilities},
        "load_mode": model.load_mode,
        "loaded": any(worker_state(worker, model).is_loaded for worker in workers),
        "context": model.n_ctx,
        "slots": model.n_slots,
        "architecture": model.architecture,
        "quantization": model.quantization,
        "adapters": [
            {"id": each.position, "name": each.name, "scale": each.default_scale}
            for each in adapters.granted(principal, model)
        ],
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


class UsageView(AsyncAPIView):
    """Quota and totals."""

    route = "/v1/me/usage"
    scopes = ("usage",)

    @extend_schema(operation_id="me_usage", summary="The key's own usage", responses=UsageReply)
    def get(self, request: Request) -> HttpResponse:
        principal = self.admit_to_view()
        remaining = self.request_rate.remaining if self.request_rate else None
        settlement.catch_up()
        return json_response({**usage(principal, timezone.now()), "rpm_remaining": remaining})


# Requests


class RequestView(AsyncAPIView):
    """One request of the caller's tenant: its state while it runs, its receipt afterwards."""

    route = "/v1/requests/{id}"
    scopes = ("generate", "usage")

    @extend_schema(operation_id="request", summary="State or receipt", responses=RequestReply)
    def get(self, request: Request, request_id: str) -> HttpResponse:
        principal = self.admit_to_view()
        receipt = find_receipt(principal, request_id)
        if receipt is not None:
            return json_response(receipt_content(receipt))
        state = ticket_queue().state(request_id)
        if state is None or state.tenant_id != principal.tenant_id:
            return _batch_or_nothing(principal, request_id)
        return json_response(
            {"id": request_id, "status": state.state, "position": state.position, "created_at": state.created_at}
        )


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
    """A batch has no receipt of its own, but those of its parts."""
    parts = Receipt.objects.filter(tenant_id=principal.tenant_id, parent_id=request_id).order_by("request_id")
    found = [receipt_content(row) for row in parts[:200]]
    if not found:
        raise Refusal("not_found", "There is no such request.")
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
            receipt = find_receipt(principal, request_id)
            if receipt is None:
                raise Refusal("not_found", "There is no such request.")
            return json_response({"id": request_id, "status": receipt.status})
        if state.state == "done":
            return json_response({"id": request_id, "status": "done"})
        cancelling.cancel(request_id)
        return json_response({"id": request_id, "status": "cancelling"})

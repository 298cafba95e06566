"""POST /v1/admin/models/load, unload and pin: what an operator wants of a model now. Workers do it within seconds."""

from __future__ import annotations

from typing import Any

from drf_spectacular.utils import extend_schema
from rest_framework.request import Request
from rest_framework.response import Response

from accounts.trail.refusals import Refusal
from inference.api.operator.base import OperatorView
from inference.api.operator.serializers import LoadForm, LoadReplySerializer, PinForm
from inference.catalog import model_rows, registry
from inference.catalog.served import Served
from inference.transport import model_orders
from inference.transport.queue import ticket_queue


class LoadView(OperatorView):
    """Load a model before somebody asks for it, or try one again that failed."""

    @extend_schema(request=LoadForm, responses=LoadReplySerializer, operation_id="admin_models_load")
    def post(self, request: Request) -> Response:
        served = _named(_asked(LoadForm, request))
        return _reply(already_loaded=not model_orders.load(served))


class UnloadView(OperatorView):
    """Unload a model as soon as it is idle; its next request loads it again. To keep it out, switch it off."""

    @extend_schema(request=LoadForm, responses=LoadReplySerializer, operation_id="admin_models_unload")
    def post(self, request: Request) -> Response:
        served = _named(_asked(LoadForm, request))
        return _reply(already_loaded=bool(model_orders.unload(served)))


class PinView(OperatorView):
    """Keep a model in memory once it is loaded, or let it go again. A pin outlives restarts."""

    @extend_schema(request=PinForm, responses=LoadReplySerializer, operation_id="admin_models_pin")
    def post(self, request: Request) -> Response:
        asked = _asked(PinForm, request)
        served = _named(asked)
        model_rows.pin([served.id], asked["pinned"])
        state = model_orders.state_of(served, ticket_queue().workers())
        return _reply(already_loaded=state.is_loaded)


def _asked(form: type[LoadForm], request: Request) -> dict[str, Any]:
    found = form(data=request.data)
    found.is_valid(raise_exception=True)
    return dict(found.validated_data)


def _named(asked: dict[str, Any]) -> Served:
    """Raises Refusal "model_not_found" or "no_model"."""
    name = asked.get("model_id")
    if name is None:
        if (found := registry.default()) is None:
            raise Refusal("no_model", "No model is registered on this server yet.")
        return found
    for served in registry.every():
        if name == served.name or name in served.aliases:
            return served
    raise Refusal("model_not_found", f"There is no model {name!r}.", model=name)


def _reply(*, already_loaded: bool) -> Response:
    models, workers = registry.every(), ticket_queue().workers()
    listed = [loaded_model(served, model_orders.state_of(served, workers)) for served in models]
    default = next((served.name for served in models if served.is_default), None)
    return Response({"ok": True, "already_loaded": already_loaded, "default_model": default, "models": listed})


def loaded_model(served: Served, state: model_orders.ModelState) -> dict[str, Any]:
    """A model as the workers have it, for operators."""
    return {
        "id": served.name,
        "default": served.is_default,
        "load_mode": served.load_mode,
        "pinned": served.is_pinned,
        "loaded": state.is_loaded,
        "state": state.state,
        "progress": state.progress,
        "load_seconds": state.load_seconds,
        "memory_bytes": served.memory.total_bytes,
        "error": state.error,
    }

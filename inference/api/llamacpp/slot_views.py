"""GET /slots and POST /slots/{id}?action=save|restore|erase: a tenant's own slots of one model, by its own numbers.

https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md. The hop checks and finds the worker; its
answer is awaited on the event loop. An operator's key sees every slot, as the worker numbers them, and never a prompt.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from django.conf import settings
from django.http import HttpResponse
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework.request import Request

from accounts.trail.refusals import Refusal
from inference.api.async_view import Later, json_response
from inference.api.llamacpp.model_views import MODEL, ModelView
from inference.api.llamacpp.slot_schemas import SlotActionReply, SlotFileBody, SlotsReply, is_label
from inference.catalog.served import Served
from inference.intake import admission
from inference.models import ServedModel
from inference.slots import actions as slot_actions
from inference.slots.actions import WAIT_SECONDS, SlotOrder

OPERATOR = "operator"
LIST_SECONDS = 2.0
ACTIONS = ("save", "restore", "erase")


class SlotsView(ModelView):
    """What runs in the slots, and how much they hold."""

    route = "/slots"
    scopes = ("generate", OPERATOR)

    @extend_schema(
        operation_id="slots",
        summary="Slots of a model",
        parameters=[
            MODEL,
            OpenApiParameter("fail_on_no_slot", str, OpenApiParameter.QUERY, description="1: 503 if none is free."),
        ],
        responses=SlotsReply,
    )
    def get(self, request: Request) -> Later:
        principal = self.admit_to_view()
        served = self.model(request.query_params.get("model"))
        worker_id, model = slot_actions.worker_of(served)
        sees_all = OPERATOR in principal.scopes
        order = SlotOrder(
            action="list",
            model_id=served.id,
            tenant_id=None if sees_all else principal.tenant_id,
            wait_seconds=LIST_SECONDS,
        )
        n_ctx = served.n_ctx if sees_all else admission.context_of(principal, served)
        must_be_free = request.query_params.get("fail_on_no_slot") == "1"
        can_draft = served.draft_kind != ServedModel.DraftKind.NONE and "trim" not in (model.get("cannot") or {})
        empty = {"n_ctx": n_ctx, "speculative": can_draft}
        return Later(partial(_list, worker_id, order, served, empty, must_be_free), abandon=_nothing)


async def _list(
    worker_id: str, order: SlotOrder, served: Served, empty: dict[str, Any], must_be_free: bool
) -> HttpResponse:
    """empty: what all slots of the model have in common."""
    answer = await slot_actions.ask(worker_id, order)
    key = "slot_id" if order.tenant_id is None else "number"
    known = {report[key]: report for report in answer["slots"]}
    slots = [{"id": number, **empty, **_state(known.get(number))} for number in range(served.num_slots)]
    if order.tenant_id is None:
        for slot in slots:
            slot["tenant"] = known[slot["id"]]["tenant"] if slot["id"] in known else None
    if must_be_free and all(slot["is_processing"] for slot in slots):
        raise Refusal("service_unavailable", "No slot is free.", retry_after=1)
    return json_response(slots)


def _state(report: dict[str, Any] | None) -> dict[str, Any]:
    """What runs in a slot, or ran in it last, as long as the slot holds something of it."""
    if report is None:
        return {"is_processing": False}
    is_busy = bool(report["request_id"])
    state: dict[str, Any] = {"is_processing": is_busy, "n_held": report["num_held"]}
    if task := report["task"]:
        decoded, left = task["num_decoded"], task["num_remaining"]
        state.update(
            id_task=task["request_id"],
            n_prompt_tokens=task["num_prompt"],
            n_prompt_tokens_processed=task["num_processed"],
            n_prompt_tokens_cache=task["num_cached"],
            params={"n_predict": decoded + left, "max_tokens": decoded + left},
            next_token=[{"has_next_token": is_busy and left > 0, "n_remain": left, "n_decoded": decoded}],
        )
    return state


class SlotActionView(ModelView):
    """What a slot holds, saved, restored or erased; a busy slot is waited for."""

    route = "/slots/{id_slot}"
    error_codes = ("capability_disabled",)

    @extend_schema(
        operation_id="slot_action",
        summary="Save, restore or erase a slot",
        parameters=[
            MODEL,
            OpenApiParameter("action", str, OpenApiParameter.QUERY, required=True, enum=list(ACTIONS)),
            OpenApiParameter("id_slot", str, OpenApiParameter.PATH),
        ],
        request=SlotFileBody,
        responses=SlotActionReply,
    )
    def post(self, request: Request, id_slot: str) -> Later:
        if not settings.CONFIG.slot_disk_mb:
            raise Refusal("capability_disabled", "This server does not save slots: SLOT_DISK_MB is 0.")
        principal = self.admit_to_view()
        served = self.model(request.query_params.get("model"))
        number = _number(id_slot, served)
        action = request.query_params.get("action", "")
        if action not in ACTIONS:
            raise Refusal("bad_request", f"Invalid action: use one of {', '.join(ACTIONS)}.")
        label = "" if action == "erase" else self._label()
        worker_id, report = slot_actions.worker_of(served)
        if action != "erase" and (why := (report.get("cannot") or {}).get("save")):
            raise Refusal("capability_disabled", f"This model's slots cannot be saved: {why}.")
        order = SlotOrder(
            action=action,  # type: ignore[arg-type]  # one of ACTIONS
            model_id=served.id,
            tenant_id=principal.tenant_id,
            number=number,
            label=label,
            wait_seconds=WAIT_SECONDS,
        )
        return Later(partial(_act, worker_id, order), abandon=_nothing)

    def _label(self) -> str:
        body = self.parse(SlotFileBody)
        if not is_label(body.filename):
            raise Refusal("bad_request", "Invalid filename")
        return body.filename


def _number(text: str, served: Served) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) < served.num_slots):
        raise Refusal("bad_request", f"Invalid slot ID: this model has 0 to {served.num_slots - 1}.")
    return int(text)


async def _act(worker_id: str, order: SlotOrder) -> HttpResponse:
    answer = await slot_actions.ask(worker_id, order)
    content: dict[str, Any] = {"id_slot": order.number}
    if order.action == "erase":
        content["n_erased"] = answer["tokens"]
    elif order.action == "save":
        content |= {"filename": order.label, "n_saved": answer["tokens"], "n_written": answer["bytes"]}
        content["timings"] = {"save_ms": answer["ms"]}
    else:
        content |= {"filename": order.label, "n_restored": answer["tokens"], "n_read": answer["bytes"]}
        content["timings"] = {"restore_ms": answer["ms"]}
    return json_response(content)


def _nothing() -> None:
    """Nothing was taken."""

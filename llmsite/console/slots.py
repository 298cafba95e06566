"""The console's page of slots and saved states: what workers hold in memory and on disk, for whom; and to drop it.

inference/slots/holdings.py asks the workers. Operators drop, auditors look (reach.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

import redis
from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.utils.safestring import SafeString
from django.views.decorators.http import require_GET, require_POST

from accounts.models import Tenant
from accounts.pages import console
from accounts.trail.refusals import Refusal
from inference.models import ServedModel
from inference.slots import holdings
from inference.slots.holdings import Disk, Loaded, Names
from llmsite.console.reach import may_inspect, may_run

T = TypeVar("T")
MAX_NUMBER = 10**9
MAX_NAME_CHARACTERS = 100


@dataclass(frozen=True, slots=True)
class SlotRow:
    number: int
    slot_id: int
    tenant_id: int | None
    tenant: str
    tenant_url: str
    request_id: str
    held: str
    decoded: str
    adapters: str


@dataclass(frozen=True, slots=True)
class Group:
    """The slots of one model on one worker; those that are free and hold nothing are only counted."""

    model_id: int
    model: str
    model_url: str
    worker: str
    num_empty: int
    rows: Sequence[SlotRow]
    problem: str = ""


@dataclass(frozen=True, slots=True)
class StateRow:
    worker: str
    host: str
    tenant_id: int
    tenant: str
    tenant_url: str
    name: str
    kind: str
    model: str
    tokens: str
    size: str
    written: SafeString | str


# The page


@require_GET
def page(request: HttpRequest) -> HttpResponse:
    if not may_inspect(request.user):
        raise PermissionDenied
    problem = ""
    groups: list[Group] = []
    states: list[StateRow] = []
    try:
        groups, states = _look()
    except redis.RedisError:
        problem = "Redis does not answer: what workers hold is unknown."
    context = {
        **admin.site.each_context(request),
        "title": "Slots and saved states",
        "groups": groups,
        "states": states,
        "problem": problem,
        "may_drop": may_run(request.user),
    }
    return render(request, "console/slots.html", context)


def _look() -> tuple[list[Group], list[StateRow]]:
    """Raises redis.RedisError."""
    found = holdings.look()
    groups = [_group(each, found.names) for each in found.loaded]
    return groups, [_state(file, disk, found.names) for disk in found.disks for file in disk.files()]


def _group(loaded: Loaded, names: Names) -> Group:
    answer, report = loaded.answer, loaded.report
    rows = [] if isinstance(answer, Refusal) else [_slot(each, names) for each in answer["slots"]]
    return Group(
        report["id"],
        report["name"],
        console.change_page("inference_servedmodel", report["id"]),
        loaded.worker,
        max(0, report["slots"] - len(rows)),
        rows,
        str(answer) if isinstance(answer, Refusal) else "",
    )


def _slot(slot: dict[str, Any], names: Names) -> SlotRow:
    tenant_id = slot["tenant"]
    decoded, left = (slot["task"]["num_decoded"], slot["task"]["num_remaining"]) if slot["request_id"] else (0, 0)
    return SlotRow(
        slot["number"],
        slot["slot_id"],
        tenant_id,
        names.tenants.get(tenant_id, "-"),
        console.change_page("accounts_tenant", tenant_id) if tenant_id in names.tenants else "",
        slot["request_id"] or "",
        console.whole(slot["num_held"]),
        f"{decoded:,} of at most {decoded + left:,}" if slot["request_id"] else "-",
        ", ".join(f"{names.adapters.get(digest, digest[:8])} × {scale:g}" for digest, scale in slot["adapters"]) or "-",
    )


def _state(file: dict[str, Any], disk: Disk, names: Names) -> StateRow:
    tenant_id, digest = file["tenant_id"], file["model_digest"]
    return StateRow(
        disk.worker,
        disk.host,
        tenant_id,
        names.tenants.get(tenant_id, f"tenant {tenant_id}, gone"),
        console.change_page("accounts_tenant", tenant_id) if tenant_id in names.tenants else "",
        file["name"],
        "kept while unloaded" if file["is_kept"] else "saved",
        names.models.get(digest) or (f"{digest[:8]}…, not served" if digest else "damaged"),
        "-" if file["num_tokens"] is None else console.whole(file["num_tokens"]),
        console.size(file["num_bytes"]),
        console.moment(datetime.fromtimestamp(file["written_at"], UTC)),
    )


# What is dropped


@require_POST
def erase(request: HttpRequest) -> HttpResponse:
    """A slot forgets what it holds; a request that runs in it is waited for."""
    tenant, worker = _meant(request)
    model = get_object_or_404(ServedModel, pk=_number(request, "model"))
    number = _number(request, "number")
    tokens = _told(request, lambda: holdings.erase(tenant, worker, model, number))
    if tokens is not None:
        messages.success(request, f"Slot {number} of {tenant.name} is empty: it held {tokens:,} tokens.")
    return redirect("console-slots")


@require_POST
def forget(request: HttpRequest) -> HttpResponse:
    """Removes a saved state from the disk of a worker."""
    tenant, worker = _meant(request)
    name = request.POST.get("name", "")[:MAX_NAME_CHARACTERS]
    is_removed = _told(request, lambda: holdings.forget(tenant, worker, name))
    if is_removed:
        messages.success(request, f"A saved state of {tenant.name} is removed.")
    elif is_removed is not None:
        messages.warning(request, "This state was gone already.")
    return redirect("console-slots")


def _meant(request: HttpRequest) -> tuple[Tenant, str]:
    """Whose, and which worker. Raises PermissionDenied or Http404."""
    if not may_run(request.user):
        raise PermissionDenied
    tenant = get_object_or_404(Tenant, pk=_number(request, "tenant"))
    return tenant, request.POST.get("worker", "")[:MAX_NAME_CHARACTERS]


def _number(request: HttpRequest, name: str) -> int:
    text = request.POST.get(name, "")
    return min(int(text), MAX_NUMBER) if text.isascii() and text.isdigit() and len(text) < 12 else MAX_NUMBER


def _told(request: HttpRequest, ask: Callable[[], T]) -> T | None:
    """What the worker did; None after a message that says why it did nothing."""
    try:
        return ask()
    except redis.RedisError:
        messages.error(request, "Redis does not answer: no worker can be told.")
    except Refusal as refusal:
        messages.error(request, refusal.message)
    return None

"""The console's page of requests that wait or run at this moment, and the button that cancels one.

What has ended has a receipt instead. All of it comes from Redis, at most MOST_SHOWN requests, by three round trips; the
names of tenants and keys by two queries. Seeing takes the right to see receipts, cancelling that to change tenants.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import redis
from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_GET, require_POST

from accounts.models import APIKey, Tenant
from accounts.pages import console
from inference.transport.queue import LiveRequest, ticket_queue
from inference.upkeep import by_hand
from llmsite.console.reach import may_run, tenants_of

MOST_SHOWN = 100
MAX_ID_CHARACTERS = 64


@dataclass(frozen=True, slots=True)
class Row:
    request_id: str
    state: str
    since: str
    tenant: str
    tenant_url: str
    key: str
    pool: str
    worker: str


@require_GET
def page(request: HttpRequest) -> HttpResponse:
    if not request.user.has_perm("inference.view_receipt"):
        raise PermissionDenied
    try:
        tenants = tenants_of(request.user)
        if tenants is None:
            found = ticket_queue().every_live(MOST_SHOWN)
        else:  # and which machine serves them is not for tenants to know
            found = [replace(each, pool="") for each in ticket_queue().live_of(tenants, MOST_SHOWN)[:MOST_SHOWN]]
        rows, problem = _rows(found, shows_workers=tenants is None), ""
    except redis.RedisError:
        rows, problem = [], "Redis does not answer: what waits and runs is unknown."
    context: dict[str, Any] = {
        **admin.site.each_context(request),
        "title": "Requests now",
        "rows": rows,
        "most": MOST_SHOWN,
        "problem": problem,
        "may_cancel": may_run(request.user),
    }
    return render(request, "console/live_requests.html", context)


def _rows(found: Sequence[LiveRequest], *, shows_workers: bool) -> list[Row]:
    tenants = dict(Tenant.objects.filter(pk__in={each.tenant_id for each in found}).values_list("pk", "name"))
    keys = dict(APIKey.objects.filter(pk__in={each.key_id for each in found}).values_list("pk", "name"))
    now = time.time()
    return [
        Row(
            request_id=each.request_id,
            state="running" if each.worker else "waiting",
            since=console.seconds(max(0.0, now - each.created_at)),
            tenant=tenants.get(each.tenant_id, "-"),
            tenant_url=console.change_page("accounts_tenant", each.tenant_id),
            key=keys.get(each.key_id, "-"),
            pool=each.pool,
            worker=each.worker if shows_workers else "",
        )
        for each in found
    ]


@require_POST
def cancel(request: HttpRequest) -> HttpResponse:
    if not may_run(request.user):
        raise PermissionDenied
    request_id = request.POST.get("request_id", "")[:MAX_ID_CHARACTERS]
    try:
        was = by_hand.cancel(request_id)
    except redis.RedisError:
        messages.error(request, "Redis does not answer: nothing was cancelled.")
    else:
        words = {None: "is not known", by_hand.DONE: "had ended already"}.get(was, "is cancelled")
        messages.success(request, f"The request {request_id} {words}.")
    return redirect("console-live-requests")

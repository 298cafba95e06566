"""The console's page of one request: all that is kept of it, why it was refused, and two things to do about it.

What `manage.py explain` says (inference/inquiry/explain.py), of whatever ended, runs, waits or was refused. A replay is
`manage.py replay` in a process of its own, since it loads the model, which the web never does: one at a time in the
whole installation, bounded in time, charged to nobody. People see their tenants' requests; operators replay.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import redis
from django.contrib import admin
from django.core.exceptions import PermissionDenied
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, render
from django.views.decorators.http import require_GET, require_POST

from accounts import redis_client
from accounts.models import Tenant
from accounts.pages import console
from accounts.trail import audit_log
from inference.inquiry import explain
from inference.models import Receipt
from llmsite.config import BASE_DIR
from llmsite.console.live_requests import MAX_ID_CHARACTERS
from llmsite.console.reach import may_run, tenants_of

REPLAY_SECONDS = 240
START_SECONDS = 60
"""Beside it, for the process to start and the model to load."""
MAX_BODY_CHARACTERS = 2**20
ONE_AT_A_TIME = "console:replay"
WORDS = {"same": "The same tokens", "differs": "Not the same tokens", "unknown": "Not known whether the same"}
HIDDEN_FROM_TENANTS = ("worker",)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a replay said. tone: of the notice, as console.css names it."""

    text: str
    tone: str = "is-bad"


@require_GET
def page(request: HttpRequest, request_id: str) -> HttpResponse:
    return _shown(request, request_id)


@require_POST
def replay(request: HttpRequest, request_id: str) -> HttpResponse:
    """The body is what was sent then: prompts are stored nowhere. Answers when it is done."""
    if not may_run(request.user):
        raise PermissionDenied
    receipt = get_object_or_404(Receipt, pk=request_id)
    body = request.POST.get("body", "")
    outcome = _replayed(receipt.pk, body)
    audit_log.acted(receipt, {"replay": (None, outcome.text)})
    return _shown(request, request_id, body=body, outcome=outcome)


def _shown(request: HttpRequest, request_id: str, *, body: str = "", outcome: Outcome | None = None) -> HttpResponse:
    """Raises PermissionDenied, or Http404 for what is not there or another tenant's."""
    if not request.user.has_perm("inference.view_receipt"):
        raise PermissionDenied
    found = explain.explain(request_id[:MAX_ID_CHARACTERS])
    tenants = tenants_of(request.user)
    if found is None or (tenants is not None and explain.tenant_of(found) not in tenants):
        raise Http404("There is no such request.")  # the same for what is another's
    operates = may_run(request.user)
    hidden = HIDDEN_FROM_TENANTS if tenants is not None else ()
    owner = explain.tenant_of(found)
    tenant = None if owner is None else Tenant.objects.filter(pk=owner).first()
    context = {
        **admin.site.each_context(request),
        "title": "Request",
        "request_id": found["id"],
        "found": found,
        "tenant": tenant,
        "tenant_url": console.change_page("accounts_tenant", tenant.pk) if tenant else "",
        "refusal": _facts(found["refusal"] or {}, ("id", "status", "tenant", "message")),
        "receipts": [(_page_of(each), _facts(each, ("tenant", *hidden))) for each in found["receipts"]],
        "may_cancel": operates and found["state"] is not None and found["state"]["state"] != "done",
        "may_replay": operates and any(each["request_id"] == found["id"] for each in found["receipts"]),
        "most": MAX_BODY_CHARACTERS,
        "body": body,
        "outcome": outcome,
    }
    return render(request, "console/request.html", context)


def _page_of(receipt: dict[str, Any]) -> str:
    return console.change_page("inference_receipt", receipt["request_id"])


def _facts(row: dict[str, Any], hidden: tuple[str, ...]) -> list[tuple[str, str]]:
    """(name, value) as a person reads them; what is not there is left out."""
    shown = ((name, value) for name, value in row.items() if name not in hidden and value not in (None, ""))
    return [(name.removesuffix("_seconds").replace("_", " ").capitalize(), _text(name, value)) for name, value in shown]


def _text(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and name.endswith("seconds"):
        return console.seconds(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:%Y-%m-%d %H:%M:%S} UTC" if hasattr(value, "isoformat") else str(value)


# A replay


def _replayed(request_id: str, body: str) -> Outcome:
    if not body.strip() or len(body) > MAX_BODY_CHARACTERS:
        return Outcome(f"Paste the body as it was sent, at most {MAX_BODY_CHARACTERS:,} characters.")
    try:
        lock = redis_client.client().lock(ONE_AT_A_TIME, timeout=REPLAY_SECONDS + START_SECONDS + 10)
        if not lock.acquire(blocking=False):
            return Outcome("Another request is being replayed: try again when it is done.", "is-warning")
    except redis.RedisError:
        return Outcome("Redis does not answer: nothing was replayed.")
    try:
        return _outcome(_child(request_id, body.encode()))
    except subprocess.TimeoutExpired:
        return Outcome(f"It was not done within {REPLAY_SECONDS} s. manage.py replay may take longer.")
    finally:
        _give_back(lock)


def _give_back(lock: Any) -> None:
    try:
        lock.release()
    except redis.RedisError:  # it ends by itself
        return


def _child(request_id: str, body: bytes) -> subprocess.CompletedProcess[bytes]:
    """Raises subprocess.TimeoutExpired. The command bounds itself, too: it may outlive this process by so much."""
    command = [sys.executable, str(BASE_DIR / "manage.py"), "replay", request_id]
    return subprocess.run(
        [*command, "--body", "-", "--json", "--timeout", str(REPLAY_SECONDS)],
        input=body,
        capture_output=True,
        timeout=REPLAY_SECONDS + START_SECONDS,
        cwd=BASE_DIR,
        check=False,
    )


def _outcome(done: subprocess.CompletedProcess[bytes]) -> Outcome:
    try:
        told = json.loads(done.stdout)
        if error := told.get("error"):
            return Outcome(f"It cannot be replayed: {error['message']}", "is-warning")
        text = f"{WORDS[told['verdict']]}: {told['completion_tokens']:,} computed, {told['finish_reason']}."
    except (ValueError, KeyError, TypeError, AttributeError):  # it crashed: its words are in the log of no one else
        return Outcome(f"The replay ended with status {done.returncode}: {done.stderr.decode(errors='replace')[-300:]}")
    return Outcome(f"{text} {told['reason']}".strip(), "" if told["verdict"] == "same" else "is-warning")

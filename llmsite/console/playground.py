"""The console's playground: a person tries models and adapters with a key of theirs, through the API's own view.

The browser never holds a key: `run` finds whom the chosen key stands for, as authentication does, and asks the view of
POST /v1/generate from within. So limits, quota, refusals, receipts and charges are those of the key. Operators may take
any tenant's key, members those of their tenants. What a model said travels as JSON and is shown as text.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from io import BytesIO
from typing import Any

import orjson
from django.core.handlers.asgi import ASGIRequest
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseBase, StreamingHttpResponse
from django.shortcuts import render
from django.utils import timezone
from django.views.decorators.http import require_GET, require_POST

from accounts.identity import key_rows, known_keys
from accounts.identity.principals import Principal
from accounts.identity.roles import reach
from accounts.models import APIKey, Membership, Scope, Tenant
from accounts.trail import audit_log
from inference.api.headers import log_fields, request_id_of
from inference.api.native.views import GenerateView
from inference.api.sse import HEADERS, frame
from inference.catalog import adapters, registry
from llmsite.console.reach import tenants_of
from llmsite.doors import close_response

MOST_KEYS = 100
NOTED = "keys_noted_in_the_playground"
TOLD_HEADERS = ("x-ratelimit-remaining-requests", "x-ratelimit-remaining-tokens", "x-cache", "x-quota-clamped")
MAY_PLAY = (Membership.MemberRole.OWNER, Membership.MemberRole.MEMBER)


@require_GET
def page(request: HttpRequest) -> HttpResponse:
    from django.contrib import admin

    keys = usable_keys(request.user, tenant_id=_number(request.GET.get("tenant")))
    wanted = _number(request.GET.get("key"))
    chosen = next((key for key in keys if key.pk == wanted), None)
    if chosen is None and wanted is not None:
        chosen = find_key(request.user, wanted)
        keys = [chosen, *keys]
    chosen = chosen or next(iter(keys), None)
    principal = _principal(chosen, is_used=False) if chosen else None
    context = {
        **admin.site.each_context(request),
        "title": "Playground",
        "keys": keys,
        "chosen": chosen,
        "is_refused": chosen is not None and principal is None,
        "models": _models(principal) if principal else [],
    }
    return render(request, "console/playground.html", context)


@require_POST
def run(request: HttpRequest) -> HttpResponseBase:
    """The body is one of POST /v1/generate. The first event says the answer's status, then come the API's own."""
    key_id = _number(request.GET.get("key"))
    principal = _principal(find_key(request.user, key_id), is_used=True) if key_id is not None else None
    if principal is None:
        return HttpResponse("This key cannot be used: it has ended, or its tenant is suspended.", status=403)
    log_fields(request)["console_user"] = request.user.get_username()
    _note_operator(request, principal)
    return StreamingHttpResponse(_answer(request, principal), content_type="text/event-stream", headers=HEADERS)


def _note_operator(request: HttpRequest, principal: Principal) -> None:
    """An operator who spends a tenant's quota is in the audit log, once a key and session."""
    noted: list[int] = request.session.get(NOTED, [])
    if principal.key_id in noted or _is_member(request.user, principal.tenant_id):
        return
    audit_log.acted(APIKey.objects.get(pk=principal.key_id), {"used in the playground": (None, True)})
    request.session[NOTED] = [*noted, principal.key_id][-MOST_KEYS:]


# Whose keys


def usable_keys(user: Any, *, tenant_id: int | None = None) -> list[APIKey]:
    """The keys that this person may generate with, those used last first, at most MOST_KEYS. One query, or two."""
    rows = APIKey.objects.filter(revoked_at__isnull=True, tenant__status=Tenant.Status.ACTIVE)
    if not _is_operator(user):
        mine = Membership.objects.filter(user_id=user.pk, role__in=MAY_PLAY).values("tenant_id")
        rows = rows.filter(tenant_id__in=mine)
    if tenant_id is not None:
        rows = rows.filter(tenant_id=tenant_id)
    now = timezone.now()
    newest = rows.select_related("tenant").order_by("-pk")[:MOST_KEYS]
    found = [key for key in newest if Scope.GENERATE.value in key.scopes and key.is_active(now)]
    return sorted(found, key=lambda key: key.last_used_at or key.created_at, reverse=True)


def find_key(user: Any, key_id: int) -> APIKey:
    """Raises Http404 for a key that is not there or none of this person's: not told apart."""
    key = APIKey.objects.select_related("tenant").filter(pk=key_id).first()
    if key is None or not (_is_operator(user) or _is_member(user, key.tenant_id)):
        raise Http404("There is no such key.")
    return key


def _is_operator(user: Any) -> bool:
    """Who may change every tenant's keys; an auditor sees them all, and may own one tenant beside."""
    return reach(user, "accounts.apikey", "change") is None and tenants_of(user) is None


def _is_member(user: Any, tenant_id: int) -> bool:
    return Membership.objects.filter(user_id=user.pk, tenant_id=tenant_id, role__in=MAY_PLAY).exists()


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() and len(text) < 19 else None


def _principal(key: APIKey, *, is_used: bool) -> Principal | None:
    """As authentication.py, without a secret; None where it would refuse. To look at the page is not to use the key."""
    now = timezone.now()
    credential = key_rows.find(key.public_id)
    if credential is None or not credential.is_usable:
        return None
    if credential.expires_at is not None and credential.expires_at <= now:
        return None
    credential = known_keys.current(credential, now)
    if is_used:
        key_rows.touch(credential, now)
    return credential.principal


def _models(principal: Principal) -> list[dict[str, Any]]:
    """What the page offers: only what the key may use."""
    models = registry.visible(principal)
    usable = adapters.usable_on(principal, models)
    return [
        {
            "name": served.name,
            "is_default": served.is_default,
            "adapters": [
                *({"name": each.name, "scale": each.default_scale} for each in usable[served.id].adapters),
                *({"name": each.name, "scale": each.target.default_scale} for each in usable[served.id].aliases),
            ],
        }
        for served in models
    ]


# On the event loop


async def _answer(request: HttpRequest, principal: Principal) -> AsyncGenerator[bytes]:
    """The events of one request. Closing it, as Django does when the client has gone, leaves the request."""
    view: Any = GenerateView.as_view(caller=principal)
    response: Any = await view(_as_api_request(request))
    try:
        headers = {name: response.headers[name] for name in TOLD_HEADERS if name in response.headers}
        said = {"status": response.status_code, "request_id": request_id_of(request), "headers": headers}
        yield frame(said, event="answer")
        if response.streaming:
            async with aclosing(response.parts) as parts:
                async for part in parts:
                    yield part
        else:
            yield frame(orjson.Fragment(response.content), event="reply")
    finally:
        close_response(response)


def _as_api_request(request: HttpRequest) -> ASGIRequest:
    """With the id, the address and the log line of the console's request, and none of its headers or cookies."""
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/generate",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(request.body)).encode())],
        "client": (request.META.get("REMOTE_ADDR", ""), 0),
        "llmsite.request_id": request_id_of(request),
        "llmsite.log": log_fields(request),
    }
    inner = ASGIRequest(scope, BytesIO(request.body))
    inner._body = request.body
    return inner

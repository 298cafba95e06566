"""Responses that a tenant has stored: written when an answer is whole, read by its tenant alone, removed in time.

Nothing is stored of a tenant without `response_days`. A row holds the whole conversation up to its answer, so each
stands alone: one goes without breaking those that went on from it. How old a row may be is asked when it is read, so a
shorter time counts at once; the sweep and `manage.py stored_responses` remove what is too old. Blocking; any thread.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import orjson
import structlog
from django.conf import settings
from django.db import DatabaseError
from django.db.models import Count, Q, QuerySet, Sum
from django.utils import timezone

from accounts.identity.principals import Principal
from accounts.models import Tenant
from accounts.trail import audit_log
from inference.models import StoredResponse

log = structlog.get_logger("llmsite.responses")

MAX_RESPONSES = 10_000
"""Of a tenant; the oldest make room."""
MAX_CONTENT_BYTES = 32 << 20
"""Of one, before it is compressed."""
CHUNK = 500
"""Rows that one DELETE removes."""
Rows = QuerySet[StoredResponse]


@dataclass(frozen=True, slots=True)
class Stored:
    """items: the conversation as it was sent, earlier turns included. response: as it was answered."""

    items: list[dict[str, Any]]
    response: dict[str, Any]


def put(principal: Principal, items: Sequence[dict[str, Any]], response: dict[str, Any]) -> bool:
    """Store it; False where it is too large, or the database does not take it. The answer stands either way.

    An answer may be worded more than once, by whoever resumes its stream or asks for it again: it is stored once.
    """
    text = orjson.dumps({"items": list(items), "response": response})
    content = zlib.compress(text)
    if len(text) > MAX_CONTENT_BYTES or len(content) > settings.CONFIG.responses_mb << 20:
        log.warning("a response is too large to be stored", response_id=response["id"], num_bytes=len(content))
        return False
    try:
        if StoredResponse.objects.filter(pk=response["id"], tenant_id=principal.tenant_id).exists():
            return True
        _make_room(principal.tenant_id, len(content))
        row = {"content": content, "num_bytes": len(content), "created_at": timezone.now()}
        StoredResponse.objects.get_or_create(id=response["id"], tenant_id=principal.tenant_id, defaults=row)
    except DatabaseError as error:
        log.warning("a response could not be stored", response_id=response["id"], error_type=type(error).__name__)
        return False
    return True


def get(principal: Principal, response_id: str) -> Stored | None:
    """None where there is no such response, or it is another tenant's, or too old."""
    row = _visible(principal).filter(pk=response_id).first()
    return None if row is None else Stored(**orjson.loads(zlib.decompress(row.content)))


def delete(principal: Principal, response_id: str) -> bool:
    return _remove(_visible(principal).filter(pk=response_id)) > 0


def purge(now: datetime, *, tenant: Tenant | None = None) -> int:
    """Remove what is too old, and what is of tenants that store no responses any more. Idempotent; how many rows."""
    rows = StoredResponse.objects.all() if tenant is None else StoredResponse.objects.filter(tenant=tenant)
    lasting = Tenant.objects.exclude(response_days=None).values_list("response_days", flat=True).distinct()
    old = Q(tenant__response_days=None)
    for days in lasting.order_by():
        assert days is not None
        old |= Q(tenant__response_days=days, created_at__lt=now - timedelta(days=days))
    return _remove(rows.filter(old))


def erase(tenant: Tenant) -> int:
    """Remove all of a tenant, by hand: the audit log has it. How many rows."""
    number = _remove(StoredResponse.objects.filter(tenant=tenant))
    if number:
        audit_log.acted(tenant, {"stored responses": (number, 0)})
    return number


def _visible(principal: Principal) -> Rows:
    if principal.response_days is None:
        return StoredResponse.objects.none()
    since = timezone.now() - timedelta(days=principal.response_days)
    return StoredResponse.objects.filter(tenant_id=principal.tenant_id, created_at__gte=since)


def _make_room(tenant_id: int, num_bytes: int) -> None:
    """Within the tenant's bounds. Two requests that store at the same time may be over by one response."""
    rows = StoredResponse.objects.filter(tenant_id=tenant_id).order_by("-created_at")
    room = (settings.CONFIG.responses_mb << 20) - num_bytes
    there = rows.aggregate(number=Count("pk"), size=Sum("num_bytes"))
    if there["number"] < MAX_RESPONSES and (there["size"] or 0) <= room:
        return
    kept = 0
    too_many: list[str] = []
    for number, (key, size) in enumerate(rows.values_list("pk", "num_bytes"), 1):
        kept += size
        if kept > room or number >= MAX_RESPONSES:
            too_many.append(key)
    for start in range(0, len(too_many), CHUNK):
        rows.filter(pk__in=too_many[start : start + CHUNK]).delete()


def _remove(rows: Rows) -> int:
    """In chunks, so that no transaction is long."""
    number = 0
    while keys := list(rows.values_list("pk", flat=True)[:CHUNK]):
        number += StoredResponse.objects.filter(pk__in=keys).delete()[0]
    return number

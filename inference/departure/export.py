"""Everything that is kept of a tenant, as lines of JSON: its rows, and the content of its files and stored responses.

No secret is among it: hashes of keys and passwords stay out, and of operators there is nothing. `WHOSE` has every model
with rows of tenants; a test sees that no model is in neither list. Read in chunks; blocking.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

import orjson
from django.apps import apps
from django.contrib.auth.models import User
from django.db.models import Model, Q, QuerySet

from accounts.identity.roles import SECRETS
from accounts.models import Tenant
from accounts.trail.refusals import Refusal
from inference.batches import files
from inference.batches.models import StoredFile
from inference.models import ServedModel, StoredResponse

FORMAT = 1
CHUNK_ROWS = 500
CHUNK_BYTES = 768 << 10
"""Of a file's content in one line; three quarters of a megabyte are one in base64."""
WHOSE: Mapping[str, str] = {
    "accounts.Tenant": "pk",
    "accounts.Membership": "tenant",
    "accounts.APIKey": "tenant",
    "accounts.LimitRule": "tenant|key__tenant",
    "accounts.QuotaRaise": "tenant",
    "accounts.QuotaPeriod": "tenant",
    "accounts.QuotaAlert": "period__tenant",
    "accounts.Reservation": "tenant_period__tenant",
    "accounts.LedgerEntry": "tenant_period__tenant",
    "accounts.DayUsage": "tenant",
    "accounts.Statement": "tenant",
    "accounts.RefusedRequest": "tenant",
    "inference.Adapter": "owner",
    "inference.AdapterGrant": "tenant",
    "inference.DefaultVector": "tenant",
    "inference.Receipt": "tenant",
    "inference.StoredResponse": "tenant",
    "inference.StoredFile": "tenant",
    "inference.Batch": "tenant",
    "inference.BatchLine": "batch__tenant",
}
"""Lookups of the tenant, with | between several."""
NOT_OF_TENANTS = (
    "accounts.Plan",
    "accounts.Price",
    "accounts.StaffRole",
    "accounts.AuditEntry",
    "accounts.DayTotal",
    "inference.ServedModel",
    "inference.ModelVariant",
    "inference.ModelImport",
    "inference.Optimization",
    "inference.AdapterAlias",
)
"""The installation's. What the audit log says of a tenant is of those who changed it."""


def rows_of(label: str, tenant: Tenant) -> QuerySet[Any]:
    wanted = Q()
    for lookup in WHOSE[label].split("|"):
        wanted |= Q(**{lookup: tenant.pk})
    rows: QuerySet[Any] = apps.get_model(label)._default_manager.filter(wanted).order_by("pk")
    return rows.distinct() if "|" in WHOSE[label] else rows


def lines(tenant: Tenant, now: datetime) -> Iterator[bytes]:
    """Each ends with a line feed. The first says what this is, the last how many there were of each kind."""
    counts: dict[str, int] = {}
    yield _line("export", {"format": FORMAT, "tenant": tenant.name, "at": now, "plan": tenant.plan.name})
    for kind, row in _everything(tenant):
        counts[kind] = counts.get(kind, 0) + 1
        yield _line(kind, row)
    yield _line("end", counts)


def _everything(tenant: Tenant) -> Iterator[tuple[str, dict[str, Any]]]:
    for label in WHOSE:
        for row in rows_of(label, tenant).iterator(CHUNK_ROWS):
            yield label, _response(row) if isinstance(row, StoredResponse) else _fields(row)
    for user in User.objects.filter(memberships__tenant=tenant).order_by("pk"):
        yield "auth.User", _fields(user)
    for name in ServedModel.objects.filter(granted_tenants=tenant).order_by("name").values_list("name", flat=True):
        yield "granted model", {"name": name}
    for file in rows_of("inference.StoredFile", tenant).iterator(CHUNK_ROWS):
        yield from (("content", each) for each in _content(file))


def _fields(row: Model) -> dict[str, Any]:
    """Of its own table, without secrets."""
    return {each.attname: getattr(row, each.attname) for each in row._meta.concrete_fields if each.name not in SECRETS}


def _response(row: StoredResponse) -> dict[str, Any]:
    return {**_fields(row), "content": orjson.loads(zlib.decompress(row.content))}


def _content(file: StoredFile) -> Iterable[dict[str, Any]]:
    """In pieces, in order; one that says so where the bytes are gone."""
    try:
        source = files.open_bytes(file)
    except Refusal as refusal:
        yield {"file": file.pk, "missing": refusal.message}
        return
    with source:
        offset = 0
        while piece := source.read(CHUNK_BYTES):
            yield {"file": file.pk, "offset": offset, "base64": base64.b64encode(piece).decode()}
            offset += len(piece)


def _line(kind: str, row: Mapping[str, Any]) -> bytes:
    return orjson.dumps({"kind": kind, "row": row}, default=str, option=orjson.OPT_APPEND_NEWLINE)

"""A tenant is erased: what it said and what names it goes, what accounting must keep stays as numbers.

Gone afterwards: secrets and names of keys, files, batches, stored responses, receipts, refusals, states of slots in
memory and on every machine's disk, all of its requests in Redis, members, accounts of people who belong to nothing
else, rows of its own adapters, and what console and audit log called it. Kept under `erased-<number>`: periods, ledger,
the sums of days, statements, and keys as public ids. Each step may be repeated, and the name goes last: whoever was
interrupted runs it again. Blocking; called by the command erase_tenant.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import User
from django.contrib.contenttypes.models import ContentType
from django.db import transaction
from django.db.models import Max, Model, Q, QuerySet
from django.utils import timezone

from accounts.identity import issuing, tenants
from accounts.ledger import quotas, retention
from accounts.ledger.quotas import ReleaseOrder
from accounts.models import (
    APIKey,
    AuditEntry,
    LedgerEntry,
    LimitRule,
    Membership,
    QuotaAlert,
    QuotaRaise,
    RefusedRequest,
    Reservation,
    Tenant,
)
from accounts.trail import audit_log
from inference import settlement
from inference.batches import book, files
from inference.batches.models import Batch, BatchLine, StoredFile
from inference.catalog import adapter_rows, aliases, granting, registry
from inference.models import Adapter, AdapterAlias, AdapterGrant, DefaultVector, Receipt, ServedModel, StoredResponse
from inference.slots import holdings
from inference.transport import forgetting
from inference.transport.queue import ticket_queue
from inference.upkeep import leftovers, reaper
from inference.worker.hosted import slot_files

logger = logging.getLogger(__name__)

ERASED = "(erased)"
NO_SECRET = "0" * 64
NO_PEPPER = "erased"
PATIENCE_SECONDS = 30.0
"""What runs is waited for so long after it was cancelled; then what is held for it is released."""
LOOK_SECONDS = 0.2
HEARD_SECONDS = 2.0
"""Until then another process may let in a request of a key that was revoked just now."""
CHUNK = 500


class Busy(Exception):
    """Requests or batches of the tenant have not ended; nothing was changed."""

    def __init__(self, num_requests: int, num_batches: int) -> None:
        super().__init__(f"{num_requests} requests wait or run, and {num_batches} batches are open")
        self.num_requests, self.num_batches = num_requests, num_batches


@dataclass(slots=True)
class Erased:
    """counts: rows, files and keys of Redis by their kind. problems: what is left on other machines, and why.
    files_kept: of adapters of its own, whose rows are gone."""

    name: str
    counts: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    files_kept: list[str] = field(default_factory=list)


def erase(tenant: Tenant, *, now_too: bool = False) -> Erased:
    """now_too: what waits and runs is cancelled; otherwise raises Busy where there is any. Raises redis.RedisError."""
    requests, batches = ticket_queue().live_requests(tenant_id=tenant.pk), _open_batches(tenant)
    if (requests or batches) and not now_too:
        raise Busy(len(requests), len(batches))
    told = Erased(f"erased-{tenant.pk}")
    trails = _trails_that_name_it(tenant)
    was_open = bool(tenants.set_status([tenant], Tenant.Status.SUSPENDED))
    for key in tenant.api_keys.filter(revoked_at=None):
        issuing.revoke(key)
    _end_what_runs(tenant, HEARD_SECONDS if was_open else 0.0)
    _forget_content(tenant, told)
    people = _forget_people(tenant)
    _forget_settings(tenant, told)
    _strip_names(tenant, told.name)
    _strip_trails(trails, people)
    audit_log.acted(tenant, {"erased": (None, told.counts)})
    leftovers.wipe(ticket_queue().client)
    return told


# What runs


def _open_batches(tenant: Tenant) -> list[Batch]:
    return list(Batch.objects.filter(tenant=tenant, status__in=files.OPEN_STATES))


def _end_what_runs(tenant: Tenant, heard_seconds: float) -> None:
    """Nothing new comes once all have heard that its keys are revoked. Ends with nothing live, nothing unsettled and
    nothing held."""
    for batch in _open_batches(tenant):
        book.cancel(batch.pk, timezone.now())
    heard_at = time.monotonic() + heard_seconds
    deadline, client = heard_at + PATIENCE_SECONDS, ticket_queue().client
    while True:
        reaper.cancel_where(tenant_id=tenant.pk)
        while settlement.settle_pending(client):
            pass
        held, is_heard = _held(tenant), time.monotonic() >= heard_at
        is_live = held or _open_batches(tenant) or ticket_queue().live_requests(tenant_id=tenant.pk)
        if is_heard and not is_live:
            return
        if time.monotonic() > deadline:
            break
        time.sleep(LOOK_SECONDS)
    logger.warning("%d requests of a tenant that is erased ended without a word: they are free", len(held))
    for batch in _open_batches(tenant):  # no web lives that would
        book.finalize(batch, timezone.now())
    now = timezone.now()
    quotas.release_many([ReleaseOrder(request_id=each, reason="tenant erased", now=now) for each in _held(tenant)])


def _held(tenant: Tenant) -> list[str]:
    rows = Reservation.objects.filter(tenant_period__tenant=tenant, state=Reservation.State.OPEN)
    return list(rows.values_list("request_id", flat=True))


# Content


def _forget_content(tenant: Tenant, told: Erased) -> None:
    client, receipts = ticket_queue().client, Receipt.objects.filter(tenant=tenant)
    request_ids = receipts.values_list("request_id", flat=True).iterator(CHUNK)
    told.counts["redis keys"] = forgetting.forget_tenant(client, tenant.pk, request_ids)
    told.problems += holdings.leave(tenant)
    slot_files().forget_tenant(tenant.pk)  # of a machine without a worker
    rows: tuple[QuerySet[Any], ...] = (
        StoredResponse.objects.filter(tenant=tenant),
        RefusedRequest.objects.filter(tenant=tenant),
        Receipt.objects.filter(tenant=tenant),
        BatchLine.objects.filter(batch__tenant=tenant),  # before their batches
        Batch.objects.filter(tenant=tenant),
        StoredFile.objects.filter(tenant=tenant),
    )
    for each in rows:
        told.counts[_label(each.model)] = retention.delete_in_chunks(each)
    folder = files.path_of(tenant.pk, "")
    if folder.exists():
        shutil.rmtree(folder)


# People and settings


def _forget_people(tenant: Tenant) -> list[str]:
    """Names of accounts that were this tenant's alone, and are gone."""
    mine = User.objects.filter(memberships__tenant=tenant, is_staff=False, is_superuser=False, staff_role=None)
    alone = [user for user in mine if not user.memberships.exclude(tenant=tenant).exists()]
    Membership.objects.filter(tenant=tenant).delete()
    for user in alone:
        user.delete()
    return [user.get_username() for user in alone]


def _forget_settings(tenant: Tenant, told: Erased) -> None:
    """Its rules, grants, defaults, and adapters of its own with the aliases that lead there."""
    for rule in LimitRule.objects.filter(Q(tenant=tenant) | Q(key__tenant=tenant)):
        rule.delete()
    for rows in (QuotaRaise.objects.filter(tenant=tenant), QuotaAlert.objects.filter(period__tenant=tenant)):
        rows.delete()
    DefaultVector.objects.filter(tenant=tenant).delete()
    own = list(Adapter.objects.filter(owner=tenant))
    leading = AdapterAlias.objects.filter(Q(target__in=own) | Q(canary__in=own))
    aliases.remove(list(leading.values_list("pk", flat=True)))
    adapter_rows.remove([row.pk for row in own])
    told.files_kept = sorted(row.path for row in own)
    for grant in AdapterGrant.objects.filter(tenant=tenant).select_related("adapter"):
        granting.revoke(grant.adapter, tenant)
    for model in ServedModel.objects.filter(granted_tenants=tenant):
        model.granted_tenants.remove(tenant)
    registry.changed()


def _strip_names(tenant: Tenant, name: str) -> None:
    """What the ledger refers to stays, and says nothing of anybody."""
    with transaction.atomic():
        for key in tenant.api_keys.all():
            key.name, key.secret_hash, key.pepper_id = name, NO_SECRET, NO_PEPPER
            key.allowed_models, key.allowed_adapters = None, None
            key.save()
        tenant.name, tenant.allowed_origins = name, []
        tenant.allowed_models, tenant.allowed_adapters, tenant.response_days = None, None, None
        tenant.save()
        corrections = LedgerEntry.objects.filter(tenant_period__tenant=tenant, kind=LedgerEntry.Kind.ADJUST)
        corrections.update(reason=ERASED)


# What was noted of it


@dataclass(frozen=True, slots=True)
class _Trail:
    """until: of rows that are somebody else's now; what was noted of them later is theirs."""

    model: type[Model]
    rows: Sequence[int | str]
    until: datetime | None = None


def _trails_that_name_it(tenant: Tenant) -> Sequence[_Trail]:
    """Rows whose entries in the audit log and in the console's history have names, those that were removed or given to
    others before, too; asked for while the others are there. What is found by another comes before it."""
    adapters_of_it = Adapter.objects.filter(owner=tenant)
    found: dict[type[Model], QuerySet[Any]] = {
        Tenant: Tenant.objects.filter(pk=tenant.pk),
        APIKey: APIKey.objects.filter(tenant=tenant),
        Membership: Membership.objects.filter(tenant=tenant),
        LimitRule: LimitRule.objects.filter(Q(tenant=tenant) | Q(key__tenant=tenant)),
        QuotaRaise: QuotaRaise.objects.filter(tenant=tenant),
        Batch: Batch.objects.filter(tenant=tenant),
        AdapterAlias: AdapterAlias.objects.filter(Q(target__in=adapters_of_it) | Q(canary__in=adapters_of_it)),
        AdapterGrant: AdapterGrant.objects.filter(Q(tenant=tenant) | Q(adapter__in=adapters_of_it)),
        Adapter: adapters_of_it,
        User: User.objects.filter(memberships__tenant=tenant, is_staff=False, is_superuser=False, staff_role=None),
    }
    of_it = {model: set(rows.values_list("pk", flat=True)) for model, rows in found.items()}
    given: list[_Trail] = []
    for model, column, whose in (
        (Membership, "tenant", Tenant),
        (LimitRule, "tenant", Tenant),
        (LimitRule, "key", APIKey),
        (Adapter, "owner", Tenant),
        (AdapterGrant, "tenant", Tenant),
        (AdapterGrant, "adapter", Adapter),
        (AdapterAlias, "target", Adapter),
        (AdapterAlias, "canary", Adapter),
    ):
        last_noted = _last_noted(model, column, list(of_it[whose]))
        there = set(model._default_manager.filter(pk__in=list(last_noted)).values_list("pk", flat=True))
        given += [_Trail(model, [pk], last_noted[pk]) for pk in there - of_it[model]]
        of_it[model] |= last_noted.keys() - there
    return [*given, *(_Trail(model, list(pks)) for model, pks in of_it.items())]


def _last_noted(model: type[Model], column: str, pks: Sequence[int]) -> Mapping[int, datetime]:
    """When the audit log was told for the last time that a row was of one of those."""
    was_of_it = Q(**{f"diff__{column}__0__in": pks}) | Q(**{f"diff__{column}__1__in": pks})
    rows = AuditEntry.objects.filter(was_of_it, model=_label(model)).order_by().values_list("row")
    return {int(row): noted_at for row, noted_at in rows.annotate(Max("created_at"))}


def _strip_trails(trails: Sequence[_Trail], people: Sequence[str]) -> None:
    """Who, when and which field stays; what it was and is, and how the rows were called, goes. The last entry of a row,
    by which it is found, goes last."""
    for trail in trails:
        pks, label = trail.rows, _label(trail.model)
        kept = set(User.objects.filter(pk__in=pks).values_list("pk", flat=True)) if trail.model is User else []
        gone = [str(pk) for pk in pks if pk not in kept]
        history = LogEntry.objects.filter(
            content_type=ContentType.objects.get_for_model(trail.model), object_id__in=gone
        )
        entries = AuditEntry.objects.filter(model=label, row__in=gone)
        if trail.until is not None:
            history = history.filter(action_time__lte=trail.until)
            entries = entries.filter(created_at__lte=trail.until)
        history.update(object_repr=ERASED, change_message="")
        for entry in entries.order_by("pk").iterator(CHUNK):
            diff = {
                name: [None if value is None else ERASED for value in values] for name, values in entry.diff.items()
            }
            AuditEntry.objects.filter(pk=entry.pk).update(name=f"{label} {entry.row} {ERASED}", diff=diff)
    of_people = AuditEntry.objects.filter(actor_kind=AuditEntry.ActorKind.PERSON, actor__in=people)
    of_people.filter(model__in=("", "auth.user")).update(name=ERASED, diff={})
    of_people.update(actor=ERASED)


def _label(model: type[Model]) -> str:
    return str(model._meta.label_lower)

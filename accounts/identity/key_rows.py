"""The row of a key, its tenant and its plan, with the rules of their limits, become a Credential. Any thread.

`find` is the only way from a presented key to its row; what it found is kept in memory (known_keys.py).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from django.db import DatabaseError
from django.db.models import Q, QuerySet
from django.db.models.functions import Coalesce
from django.utils import timezone

from accounts.identity.known_keys import CACHE, WATCHER
from accounts.identity.principals import Bounds, Credential, Principal
from accounts.limits import schedules
from accounts.limits.precedence import Allowed, Limits, narrowed
from accounts.limits.schedules import Rule
from accounts.models import APIKey, LimitRule, QuotaPeriod, Tenant

logger = logging.getLogger(__name__)

TOUCH_SECONDS = 60


def find(public_id: str) -> Credential | None:
    """The key with this id, revoked ones included; at most two queries, none where the answer is in memory."""
    WATCHER.ensure_started()
    is_cached, credential = CACHE.get(public_id, WATCHER.keep_seconds(), time.monotonic())
    if is_cached:
        return credential
    generation, read_at = CACHE.generation, time.monotonic()
    key = APIKey.objects.select_related("tenant__plan").filter(public_id=public_id).first()
    rules = rules_of(key)
    credential = credential_of(key, rules) if key is not None else None
    CACHE.put(public_id, credential, generation, read_at)
    return credential


def touch(credential: Credential, now: datetime) -> None:
    """Notes that the key was used, at most once a minute; a database that is busy loses the note, not the request."""
    last = credential.last_used_at
    due = now - timedelta(seconds=TOUCH_SECONDS)
    if last is not None and last > due:
        return
    principal = credential.principal
    if not CACHE.swap(principal.public_id, credential, replace(credential, last_used_at=now)):
        return
    try:
        APIKey.objects.filter(Q(last_used_at__isnull=True) | Q(last_used_at__lte=due), pk=principal.key_id).update(
            last_used_at=now
        )
    except DatabaseError as error:
        logger.warning("the last use of key %s was not noted", principal.public_id, exc_info=error)


def rules_of(key: APIKey | None) -> tuple[Rule, ...]:
    """The rules of the key, its tenant and its plan that have not ended, at most MAX_RULES; one query.

    For no key, too: an unknown one must cost what others cost.
    """
    ids = (0, 0, 0) if key is None else (key.first_id, key.tenant_id, key.tenant.plan_id)
    rows = _rows([ids[0]], [ids[1]], [ids[2]], timezone.now())
    return tuple(map(_rule, rows[: schedules.MAX_RULES]))


def _rows(chains: Collection[int], tenants: Collection[int], plans: Collection[int], now: datetime) -> QuerySet[Any]:
    """Rules that have not ended, the last made first; one query, in parts that follow indexes.

    `chain` is the first key of a rotation: all of its keys share their rates and periods, and so what limits these for
    a time, whichever key has the rule.
    """
    chain = Coalesce("key__quota_key_id", "key_id")
    to_come = LimitRule.objects.order_by().exclude(ends_at__lte=now).annotate(chain=chain)
    owned = to_come.filter(Q(key__in=chains) | Q(tenant__in=tenants) | Q(plan__in=plans))
    return owned.union(to_come.filter(key__quota_key__in=chains)).order_by("-id")


def _rule(row: LimitRule) -> Rule:
    hours = (row.daily_from, row.daily_until)
    is_daily = row.recurrence == LimitRule.Recurrence.DAILY
    return Rule(
        id=row.pk,
        level="plan" if row.plan_id else "tenant" if row.tenant_id else "key",
        limit=row.limit,
        value=row.value,
        starts_at=row.starts_at,
        ends_at=row.ends_at,
        daily=hours if is_daily and hours[0] is not None and hours[1] is not None else None,  # type: ignore[arg-type]
        last_days=row.last_days if row.recurrence == LimitRule.Recurrence.MONTH_END else None,
    )


def credential_of(key: APIKey, rules: tuple[Rule, ...] = (), now: datetime | None = None) -> Credential:
    """Reads `tenant` and `tenant.plan`: select them with the key."""
    tenant, plan, now = key.tenant, key.tenant.plan, now or timezone.now()
    bounds = Bounds(plan.limits, tenant.limit_overrides, key.limit_overrides, rules)
    tenant_limits, own, key_limits = bounds.limits(now)
    return Credential(
        principal=Principal(
            key_id=key.pk,
            quota_key_id=key.first_id,
            public_id=key.public_id,
            key_name=key.name,
            tenant_id=tenant.pk,
            tenant_name=tenant.name,
            plan_name=plan.name,
            role=plan.role,
            scopes=frozenset(key.scopes),
            tenant_limits=tenant_limits,
            tenant_overrides=own,
            key_limits=key_limits,
            quota_anchor_day=tenant.quota_anchor_day,
            response_days=tenant.response_days,
            allowed_origins=frozenset(tenant.allowed_origins),
            allowed_models=_narrowed(plan.allowed_models, tenant.allowed_models, key.allowed_models),
            allowed_adapters=_narrowed(plan.allowed_adapters, tenant.allowed_adapters, key.allowed_adapters),
            outage_policy=plan.redis_outage_policy,
            weight=plan.weight,
            max_slots=plan.max_slots,
        ),
        secret_hash=key.secret_hash,
        pepper_id=key.pepper_id,
        is_usable=key.revoked_at is None and tenant.status == Tenant.Status.ACTIVE,
        expires_at=key.expires_at,
        last_used_at=key.last_used_at,
        bounds=bounds,
        changes_at=schedules.next_change(rules, now),
    )


def _narrowed(*levels: list[str] | None) -> Allowed:
    plan, tenant, key = (None if names is None else frozenset(names) for names in levels)
    return narrowed(plan, tenant, key)


def principal_of(key: APIKey) -> Principal:
    """The principal that a request with this key would have; one query."""
    return credential_of(key, rules_of(key)).principal


def credentials_of(keys: Iterable[APIKey], now: datetime) -> dict[int, Credential]:
    """By the id of the key, rules included; one query. Reads `tenant` and `tenant.plan` of each."""
    rows = list(keys)
    tenants, plans = {key.tenant_id for key in rows}, {key.tenant.plan_id for key in rows}
    rules = list(_rows({key.first_id for key in rows}, tenants, plans, now))
    found = {}
    for key in rows:
        ids = (key.first_id, key.tenant_id, key.tenant.plan_id)
        own = [row for row in rules if ids == (row.chain or ids[0], row.tenant_id or ids[1], row.plan_id or ids[2])]
        found[key.pk] = credential_of(key, tuple(map(_rule, own[: schedules.MAX_RULES])), now)
    return found


def limits_of(tenant: Tenant, now: datetime) -> Limits:
    """The tenant's limits at this moment, rules included; one query. Reads `tenant.plan`."""
    return limits_of_tenants([tenant], now)[tenant.pk]


def limits_of_tenants(tenants: Iterable[Tenant], now: datetime) -> dict[int, Limits]:
    """By the id of the tenant, rules included; one query. Reads `plan` of each."""
    rows = {tenant.pk: tenant for tenant in tenants}
    rules = list(_rows((), rows, {tenant.plan_id for tenant in rows.values()}, now)) if rows else []
    found = {}
    for tenant in rows.values():
        own = [row for row in rules if tenant.pk == row.tenant_id or tenant.plan_id == row.plan_id]
        bounds = Bounds(tenant.plan.limits, tenant.limit_overrides, {}, tuple(map(_rule, own[: schedules.MAX_RULES])))
        found[tenant.pk] = bounds.limits(now)[0]
    return found


def limits_of_periods(periods: Iterable[QuotaPeriod], now: datetime) -> dict[int, Limits]:
    """By the id of the period: its tenant's, or its key's own; two queries. Reads `tenant.plan` and `key`."""
    rows = list(periods)
    of_tenants = limits_of_tenants((row.tenant for row in rows if row.key is None), now)
    keys = [row.key for row in rows if row.key is not None]
    for row in rows:
        if row.key is not None:
            row.key.tenant = row.tenant  # of the same id, and read with its plan
    of_keys = credentials_of(keys, now) if keys else {}
    return {
        row.pk: of_tenants[row.tenant_id] if row.key is None else of_keys[row.key.pk].principal.key_limits
        for row in rows
    }

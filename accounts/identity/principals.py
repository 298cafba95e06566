"""Who is calling, as everything that serves a request knows it. Values alone: no row, no Redis, no thread.

key_rows.py makes them from rows, known_keys.py keeps them in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from accounts.limits import schedules
from accounts.limits.precedence import NORMAL_WEIGHT, Allowed, Limits
from accounts.limits.schedules import Rule

UNLIMITED = Limits()


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """An authenticated key: DRF's request.user and request.auth."""

    key_id: int
    """For receipts and logs."""
    quota_key_id: int
    """The first key of a rotation: periods, rates and places are counted on it."""
    public_id: str
    key_name: str
    tenant_id: int
    tenant_name: str
    plan_name: str
    role: str
    scopes: frozenset[str]
    tenant_limits: Limits
    """The plan's, with the tenant's overrides."""
    tenant_overrides: frozenset[str] = frozenset()
    """Names of the limits that the operator set for this tenant."""
    key_limits: Limits = UNLIMITED
    quota_anchor_day: int = 1
    response_days: int | None = None
    """How long the tenant's responses are stored; None: none are."""
    allowed_origins: frozenset[str] = frozenset()
    """Of web pages that browsers let ask with the tenant's keys; see accounts/identity/origins.py."""
    allowed_models: Allowed = None
    """Names, of those that are granted; None: all of them."""
    allowed_adapters: Allowed = None
    """Names, as `adapter` or `model:adapter`."""
    outage_policy: str = ""
    """Of the plan, while Redis does not answer; empty: that of the installation."""
    weight: int = NORMAL_WEIGHT
    """Of the plan: percent of a normal share of the slots."""
    max_slots: int | None = None
    """Of the plan: requests of the tenant that run at once."""
    is_authenticated: bool = True

    def limit(self, name: str) -> int | None:
        """The tighter of the tenant's and the key's; None is unlimited."""
        bounds = [getattr(limits, name) for limits in (self.tenant_limits, self.key_limits)]
        return min((bound for bound in bounds if bound is not None), default=None)


@dataclass(frozen=True, slots=True)
class Credential:
    """What is needed to check a key that was presented, and whom it stands for."""

    principal: Principal
    secret_hash: str
    pepper_id: str
    is_usable: bool
    """Not revoked, and the tenant is active. The expiry is checked at every use."""
    expires_at: datetime | None
    last_used_at: datetime | None
    bounds: Bounds
    changes_at: datetime | None = None
    """When rules give the principal other limits; None: they never will."""

    def at(self, now: datetime) -> Credential:
        """With the limits of this moment: itself, unless a rule began or ended."""
        if self.changes_at is None or now < self.changes_at:
            return self
        tenant_limits, own, key_limits = self.bounds.limits(now)
        principal = replace(self.principal, tenant_limits=tenant_limits, tenant_overrides=own, key_limits=key_limits)
        return replace(self, principal=principal, changes_at=schedules.next_change(self.bounds.rules, now))


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the limits of a principal are made of, whatever the time."""

    plan: Limits
    tenant: Mapping[str, int | None]
    key: Mapping[str, int | None]
    rules: tuple[Rule, ...] = ()

    def limits(self, now: datetime) -> tuple[Limits, frozenset[str], Limits]:
        """(the tenant's, which of them are its own, the key's) at this moment; see docs/limits.md for the order."""
        plan = self.plan.overridden(schedules.in_force(self.rules, "plan", now))
        own = {**self.tenant, **schedules.in_force(self.rules, "tenant", now)}
        key = {**self.key, **schedules.in_force(self.rules, "key", now)}
        return plan.overridden(own), frozenset(own), UNLIMITED.overridden(key)

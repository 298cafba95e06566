"""Whose rows a person sees on the pages that are more than lists: everyone's, or those of the tenants they belong to.

Permissions say which parts of a page are shown; this says of whom, by accounts/identity/roles.py.
"""

from __future__ import annotations

from typing import Any, TypeVar

from django.db.models import Model, QuerySet

from accounts.identity.roles import reach, roles_of

M = TypeVar("M", bound=Model)
Tenants = frozenset[int] | None
"""None: all there are."""


def tenants_of(user: Any) -> Tenants:
    """Members see their tenants, whatever else they may do; staff, and whom a superuser gave permissions, all."""
    found = roles_of(user)
    if user.is_superuser or found.staff:
        return None
    return frozenset(found.tenants) or None


def may_run(user: Any) -> bool:
    """Whether a person may act on what runs, whoever's it is: superusers and operators."""
    return reach(user, "accounts.tenant", "change") is None


def may_inspect(user: Any) -> bool:
    """Whether a person may see what machines and models do: superusers, operators and auditors."""
    return reach(user, "inference.servedmodel", "view") is None


def within(tenants: Tenants, rows: QuerySet[M], lookup: str = "tenant_id") -> QuerySet[M]:
    return rows if tenants is None else rows.filter(**{f"{lookup}__in": tenants})

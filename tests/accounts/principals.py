"""Two tenants as a request knows them, without a database; both without limits."""

from __future__ import annotations

from dataclasses import replace

from accounts.identity.principals import Principal
from accounts.limits.precedence import Limits

ALICE = Principal(
    key_id=11,
    quota_key_id=11,
    public_id="alice",
    key_name="main",
    tenant_id=1,
    tenant_name="Alice's",
    plan_name="p",
    role="standard",
    scopes=frozenset(["generate"]),
    tenant_limits=Limits(),
    key_limits=Limits(),
)
BOB = replace(ALICE, tenant_id=2, tenant_name="Bob's", key_id=21, quota_key_id=21)


def on_plan(who: Principal = ALICE, *, key: dict[str, int] | None = None, **limits: int | None) -> Principal:
    return replace(who, tenant_limits=Limits(**limits), key_limits=Limits(**(key or {})))

"""A correction of what was used, by hand: one way for the console, the command and the operator's API. Month's clock.

It moves the current period by a ledger entry with its reason (quotas.adjust) and leaves an entry in the audit log.
"""

from __future__ import annotations

import uuid
from datetime import datetime
from decimal import Decimal

from django.db import transaction

from accounts.ledger import prices, quotas
from accounts.limits import raises
from accounts.limits.approval import RaiseError
from accounts.models import APIKey, Tenant
from accounts.trail import audit_log


def adjust(
    tenant: Tenant,
    key: APIKey | None,
    *,
    tokens: int = 0,
    requests: int = 0,
    cost: Decimal = Decimal(0),
    reason: str,
    now: datetime,
) -> str:
    """Returns the id of the correction in the ledger. cost: in the currency; negative numbers give back.

    Raises ValueError, and nothing is moved: no reason, nothing to correct, more given back than was used, or more than
    one operator may give back (QUOTA_APPROVAL_TOKENS).
    """
    if not (tokens or requests or cost):
        raise ValueError("Say what to correct: tokens, requests or cost.")
    request_id = f"adjust-{uuid.uuid4()}"
    moved = {"used_tokens": tokens, "used_requests": requests, "cost": str(cost)}
    with transaction.atomic():
        # Corrections of one tenant come one after the other: each is checked with those before it.
        Tenant.objects.select_for_update(no_key=True).get(pk=tenant.pk)
        try:
            raises.check_refund(tenant.pk, tokens, now)
        except RaiseError as error:
            raise ValueError(error.message) from error
        quotas.adjust(
            request_id=request_id,
            tenant_id=tenant.pk,
            key_id=(key.quota_key_id or key.pk) if key else None,
            anchor_day=tenant.quota_anchor_day,
            tokens=tokens,
            requests=requests,
            cost_nanos=prices.nanos(cost),
            reason=reason,
            now=now,
        )
        audit_log.acted(key or tenant, {"adjusted": (None, {**moved, "reason": reason, "ledger": request_id})})
    return request_id

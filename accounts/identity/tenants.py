"""Suspending tenants and letting them back in: one way for the console's list and the command.

Each row is saved, so that it announces itself to all processes and the audit log sees it; what runs of a suspended
tenant ends within a second (inference/upkeep/entitlements.py). Month's clock.
"""

from __future__ import annotations

from collections.abc import Iterable

from django.db import transaction

from accounts.models import Tenant


def set_status(rows: Iterable[Tenant], status: Tenant.Status) -> list[Tenant]:
    """Those that had another status. All of them, or none."""
    with transaction.atomic():
        changed = [tenant for tenant in rows if tenant.status != status]
        for tenant in changed:
            tenant.status = status
            tenant.save(update_fields=["status"])
    return changed

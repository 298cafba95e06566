"""A request that a person cancels: one way for the console and the command, and an entry in the audit log. Blocking."""

from __future__ import annotations

from accounts.models import Tenant
from accounts.trail import audit_log
from inference.transport.queue import ticket_queue
from inference.upkeep import reaper

DONE = "done"


def cancel(request_id: str) -> str | None:
    """As reaper.cancel: what it was. Raises redis.RedisError."""
    known = ticket_queue().state(request_id)
    was = reaper.cancel(request_id)
    if known is not None and was not in (None, DONE):
        for tenant in Tenant.objects.filter(pk=known.tenant_id):
            audit_log.acted(tenant, {f"request {request_id}": (was, "cancelled")})
    return was

"""Which origins any tenant lists: for what carries no key, such as a browser's question before its request.

One set in memory, read whole with one query when somebody asks for it, so that no number of made-up origins costs
queries. It is forgotten with the keys of known_keys.py, which hear of every change, and is as old as they may be.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

from accounts.identity.known_keys import CACHE, WATCHER
from accounts.models import Tenant

logger = logging.getLogger(__name__)

MAX_KNOWN = 100_000
"""Origins of all tenants together; those of the oldest tenants count."""


@dataclass(frozen=True, slots=True)
class _Snapshot:
    origins: frozenset[str]
    generation: int
    read_at: float

    @property
    def is_fresh(self) -> bool:
        return self.generation == CACHE.generation and time.monotonic() - self.read_at < WATCHER.keep_seconds()


_reading = threading.Lock()
_snapshot: _Snapshot | None = None


def remembered() -> frozenset[str] | None:
    """All of them, if they were read just now; does not block."""
    found = _snapshot
    return found.origins if found is not None and found.is_fresh else None


def all_of_them() -> frozenset[str]:
    """At most one query at a time, and none while what was read is fresh. Blocking. Raises DatabaseError."""
    global _snapshot
    with _reading:
        found = remembered()
        if found is None:
            WATCHER.ensure_started()
            generation, read_at = CACHE.generation, time.monotonic()
            found = _read()
            _snapshot = _Snapshot(found, generation, read_at)
        return found


def _read() -> frozenset[str]:
    rows = Tenant.objects.filter(status=Tenant.Status.ACTIVE).exclude(allowed_origins=[])
    found: set[str] = set()
    for origins in rows.order_by("pk").values_list("allowed_origins", flat=True).iterator():
        if len(found) + len(origins) > MAX_KNOWN:
            logger.warning("tenants list more than %d origins: those of the newest tenants are left out", MAX_KNOWN)
            break
        found.update(origins)
    return frozenset(found)

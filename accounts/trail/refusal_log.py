"""Why requests were refused: noted in memory by whoever answers, written in groups by one daemon thread a process.

A note is a few microseconds and no I/O, also on the event loop. What is kept is bounded: of each tenant MAX_EACH a
second, of what nobody has read MAX_UNREAD, in all MAX_NOTES; what is beyond is counted in the last row of the same. A
process that is killed loses the last second of notes, never a charge. Nothing that a request said is kept: words only
where they are the server's own.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from django.db import DatabaseError, connection

from accounts.identity.principals import Principal
from accounts.models import RefusedRequest
from accounts.trail.refusals import Refusal

logger = logging.getLogger(__name__)

EVERY_SECONDS = 1.0
MAX_EACH = 50
MAX_UNREAD = 10
"""Anybody can send what is refused unread, without a key; a flood of it must not fill the table."""
MAX_NOTES = 2000
MAX_VALUE = 2**63 - 1
NOTHING_THERE = frozenset({"not_found", "method_not_allowed"})
OWN_WORDS = frozenset(
    {
        "missing_api_key",
        "invalid_api_key",
        "expired_api_key",
        "forbidden",
        "tenant_suspended",
        "quota_exhausted",
        "quota_reserved",
        "rate_limit_exceeded",
        "too_many_concurrent_requests",
        "too_many_concurrent_streams",
        "context_length_exceeded",
        "queue_full",
        "service_unavailable",
        "llm_not_loaded",
        "no_model",
        "request_too_large",
        "request_timeout",
        "request_header_fields_too_large",
    }
)
"""Codes whose messages are made of numbers and the server's words alone."""


UNREAD = "unread"
Whose = int | str | None
"""A tenant; nobody known; UNREAD, apart from them, so that a flood of those pushes out no other."""


@dataclass(slots=True)
class _Notes:
    """Those of one tenant since the last writing."""

    rows: list[RefusedRequest] = field(default_factory=list)
    num_more: int = 0


class RefusalLog:
    """The notes of one process. Any thread, the event loop too."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_tenant: dict[Whose, _Notes] = {}
        self._num_notes = 0
        self._on_the_way: list[RefusedRequest] = []
        self._writing = threading.Lock()
        self._thread: threading.Thread | None = None
        self._process_id = 0

    def note(
        self, refusal: Refusal, *, request_id: str, route: str, principal: Principal | None, is_unread: bool = False
    ) -> None:
        """Never blocks on I/O, never raises for what the refusal holds. Questions after what is not there are no
        refusals."""
        if refusal.code in NOTHING_THERE:
            return
        whose: Whose = UNREAD if is_unread else principal.tenant_id if principal else None
        with self._lock:
            notes = self._by_tenant.setdefault(whose, _Notes())
            if len(notes.rows) >= _most(whose) or self._num_notes >= MAX_NOTES:
                notes.num_more += 1
                return
            self._num_notes += 1
            notes.rows.append(row_of(refusal, request_id=request_id, route=route, principal=principal))
        self._ensure_started()

    def find(self, request_id: str, tenant_id: int | None = None) -> RefusedRequest | None:
        """One that is not written yet."""
        with self._lock:
            rows = self._on_the_way + [row for notes in self._by_tenant.values() for row in notes.rows]
        found = (row for row in rows if row.request_id == request_id and tenant_id in (None, row.tenant_id))
        return next(found, None)

    def write(self) -> int:
        """Everything noted so far, in the calling thread; how many rows. Raises DatabaseError: the notes are kept."""
        with self._writing:
            with self._lock:
                taken, self._by_tenant = self._by_tenant, {}
                self._num_notes = 0
                rows = self._on_the_way = [row for notes in taken.values() for row in notes.rows]
            for notes in taken.values():
                if notes.rows:
                    notes.rows[-1].num_more += notes.num_more
                    notes.num_more = 0
            try:
                RefusedRequest.objects.bulk_create(rows, batch_size=100)
            except DatabaseError:
                self._put_back(taken)
                raise
            finally:
                with self._lock:
                    self._on_the_way = []
        return len(rows)

    def forget(self) -> None:
        """What is noted and not written yet is never written."""
        with self._writing, self._lock:
            self._by_tenant.clear()
            self._num_notes = 0

    def _put_back(self, taken: dict[Whose, _Notes]) -> None:
        """Older ones first; what no longer fits is counted."""
        with self._lock:
            for whose, notes in taken.items():
                newer = self._by_tenant.setdefault(whose, _Notes())
                kept = (notes.rows + newer.rows)[: _most(whose)]
                newer.num_more += len(notes.rows) + len(newer.rows) - len(kept)
                newer.rows = kept
            self._num_notes = sum(len(notes.rows) for notes in self._by_tenant.values())

    def _ensure_started(self) -> None:
        if self._thread is not None and self._process_id == os.getpid():
            return
        with self._lock:
            if self._thread is None or self._process_id != os.getpid():
                self._process_id = os.getpid()
                self._thread = threading.Thread(target=self._run, name="refusal-log", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        is_failing = False
        while True:
            time.sleep(EVERY_SECONDS)
            if not self._num_notes:
                continue
            try:
                self.write()
                is_failing = False
            except DatabaseError as error:
                if not is_failing:
                    logger.warning("refusals are written later: %s", error)
                is_failing = True
            except Exception:
                logger.exception("refusals were not written")
            finally:
                connection.close()


def _most(whose: Whose) -> int:
    return MAX_UNREAD if whose == UNREAD else MAX_EACH


LOG = RefusalLog()


def note(refusal: Refusal, *, request_id: str, route: str, principal: Principal | None) -> None:
    LOG.note(refusal, request_id=request_id, route=route, principal=principal)


def note_unread(refusal: Refusal, *, request_id: str, route: str) -> None:
    """What was refused before anybody looked at its key."""
    LOG.note(refusal, request_id=request_id, route=route, principal=None, is_unread=True)


def write_rest() -> None:
    """At the end of the process. Those that the database does not take are lost."""
    try:
        LOG.write()
    except DatabaseError as error:
        logger.warning("the last refusals are lost: %s", error)
    finally:
        connection.close()


def find(request_id: str, tenant_id: int | None = None) -> RefusedRequest | None:
    """A refusal by the id of its request; of one tenant, or of anybody. One query at most."""
    found = LOG.find(request_id, tenant_id)
    if found is not None:
        return found
    rows = RefusedRequest.objects.filter(request_id=request_id)
    if tenant_id is not None:
        rows = rows.filter(tenant_id=tenant_id)
    return rows.order_by("-pk").first()


def row_of(refusal: Refusal, *, request_id: str, route: str, principal: Principal | None) -> RefusedRequest:
    now = datetime.now(UTC)
    facts = refusal.extra
    return RefusedRequest(
        request_id=request_id[:64],
        tenant_id=principal.tenant_id if principal else None,
        key_id=principal.key_id if principal else None,
        route=route[:64],
        code=refusal.code[:64],
        limit=str(facts.get("limit", ""))[:32],
        bound_to=str(facts.get("of", ""))[:8],
        value=_whole(facts.get("value")),
        frees_at=frees_at(refusal, now),
        message=refusal.message[:500] if refusal.code in OWN_WORDS else "",
        created_at=now,
    )


def frees_at(refusal: Refusal, now: datetime) -> datetime | None:
    """When the same request may pass; None: never, or it is wrong in itself."""
    if refusal.retry_after is not None:
        return now + timedelta(seconds=refusal.retry_after)
    reset_at = refusal.extra.get("reset_at")
    return datetime.fromisoformat(str(reset_at)) if reset_at else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and 0 <= value <= MAX_VALUE else None


def as_json(row: RefusedRequest) -> dict[str, Any]:
    """What a tenant, an operator and `manage.py explain` are told."""
    return {
        "id": row.request_id,
        "status": "refused",
        "route": row.route,
        "code": row.code,
        "message": row.message or None,
        "limit": row.limit or None,
        "of": row.bound_to or None,
        "value": row.value,
        "frees_at": row.frees_at,
        "created_at": row.created_at,
        "num_more": row.num_more,
    }

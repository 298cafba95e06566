"""The book of searches: who may begin one, what is written while it goes on, how it ends. Every write is conditional.

One that has ended is never written again: whoever still works on it hears so (Over) at its next word. Called by the
console, commands and the optimizer.
"""

from __future__ import annotations

import contextlib
import platform
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import IntegrityError, transaction
from django.db.models import Q, QuerySet
from django.utils import timezone

from accounts.ledger import retention
from accounts.trail import audit_log
from inference.tuning.models import BOUNDS, Optimization
from inference.tuning.workshop import is_free
from inference.vetting.inspection import RegistrationError

SILENT_MINUTES = 15
"""A run on another machine that says nothing for so long is dead: its longest silence is a trial load, ten minutes."""
State = Optimization.State


class Over(Exception):
    """It has ended meanwhile: it was cancelled, or another process ended it."""


def ask(row: Optimization) -> None:
    """Write down a new search. Raises RegistrationError where one runs; then nothing has changed."""
    assert row.base_model is not None
    now, who = timezone.now(), audit_log.actor()
    end_the_dead(now)
    _forget_old(now)
    row.name, row.asked_by_kind, row.asked_by = row.base_model.name, who.kind[:16], who.name[:150]
    row.folder = row.folder or str(Path(settings.CONFIG.state) / "models" / "variants")
    asked: dict[str, Any] = {"model": row.name, "formats": row.formats, "settings": row.tunes_settings}
    asked |= {name: getattr(row, name) for name in BOUNDS}
    try:
        with transaction.atomic():
            row.save(force_insert=True)
            audit_log.acted(row, {"asked for": (None, asked)})
    except IntegrityError as error:
        raise RegistrationError(
            "optimization_running",
            "Another model is being measured, or this one already: two would measure each other. Wait until it has "
            "ended, or cancel it.",
        ) from error


def _running() -> QuerySet[Optimization]:
    return Optimization.objects.filter(state=State.RUNNING).select_related("base_model")


def due() -> Optimization | None:
    """What the optimizer has to begin."""
    return _running().filter(started_at=None, is_attended=False).first()


def begin(row: Optimization) -> None:
    """It is this process that works on it. Called by who holds the folder's lock, and so until its end. Raises Over."""
    note(row, started_at=timezone.now(), host=platform.node())


def note(row: Optimization, **values: Any) -> None:
    """Write fields of a search that runs, and that nobody else has begun. Raises Over."""
    values["updated_at"] = timezone.now()
    rows = Optimization.objects.filter(pk=row.pk, state=State.RUNNING, started_at=row.started_at)
    if not rows.update(**values):
        raise Over
    for name, value in values.items():
        setattr(row, name, value)


def finish(row: Optimization, result: dict[str, Any]) -> None:
    """Raises Over."""
    note(row, state=State.DONE, result=result, part=0.0, steps_done=row.steps_total)


def fail(row: Optimization, code: str, message: str) -> None:
    """It ends without a table; nothing happens where it has ended already."""
    with contextlib.suppress(Over):
        note(row, state=State.FAILED, problem_code=code[:64], problem=message[:2000])


def cancel(row: Optimization) -> bool:
    """Whether it ran. Who works on it hears it within a second or so and leaves nothing. The audit log has it."""
    with transaction.atomic():
        now = timezone.now()
        rows = Optimization.objects.filter(pk=row.pk, state=State.RUNNING)
        if not rows.update(state=State.CANCELLED, updated_at=now):
            return False
        audit_log.acted(row, {"state": (State.RUNNING, State.CANCELLED)})
    row.state, row.updated_at = State.CANCELLED, now
    return True


def end_the_dead(now: datetime) -> None:
    """What a process began that is no more ends with that reason. Idempotent."""
    for row in _running().filter(Q(started_at__isnull=False) | Q(is_attended=True)):
        if _is_dead(row, now):
            fail(row, "interrupted", "The process that measured ended before it was done: nothing is kept. Start anew.")


def _is_dead(row: Optimization, now: datetime) -> bool:
    if row.started_at is not None and row.host == platform.node():
        return is_free(Path(row.folder))
    return row.updated_at < now - timedelta(minutes=SILENT_MINUTES)


def _forget_old(now: datetime) -> None:
    if days := settings.CONFIG.audit_days:
        old = Optimization.objects.filter(updated_at__lt=now - timedelta(days=days)).exclude(state=State.RUNNING)
        retention.delete_in_chunks(old)

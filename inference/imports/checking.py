"""The gates between quarantine and the registry: header, SHA-256, trial load in a limited child, proof of effect.

model_rows.py and adapter_rows.py have them, for files of any way in; here their progress becomes states of the import,
and what has passed becomes a served model or an adapter in the transaction that ends the import.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from django.db import transaction

from accounts.trail import audit_log
from inference.catalog import adapter_rows, model_rows
from inference.imports import desk, quarantine
from inference.imports.models import ModelImport
from inference.models import ServedModel
from inference.vetting.adapter_file import ExaminedAdapter, inspect_adapter
from inference.vetting.inspection import Inspected, Progress, RegistrationError, inspect, stamp_of
from inference.vetting.trial import Trial

MAX_CHECKS = 5
"""Checks that were begun and not ended: whatever stops the process again and again is not tried for ever."""
Found = Inspected | ExaminedAdapter
State = ModelImport.State


def check(row: ModelImport, tick: Callable[[int], None], trial: Trial | None = None) -> None:
    """Bring a received import to its end. tick: hears of the bytes hashed, and stops the check by what it raises.

    Raises RegistrationError with the reason why it is not taken, or desk.Over.
    """
    if row.num_checks >= MAX_CHECKS:
        raise RegistrationError("check_interrupted", f"Its checks were interrupted {MAX_CHECKS} times.")
    desk.note(row, state=State.READING, num_checks=row.num_checks + 1, checked_bytes=0, bytes_per_second=0.0)
    first = quarantine.folder_of(row.pk) / row.files[0]["name"]
    base = _base_of(row)

    def follow(done: int, total: int) -> None:
        if row.state == State.READING:
            desk.note(row, state=State.HASHING)
        tick(done)
        if done == total:
            desk.note(row, state=State.LOADING, checked_bytes=done)

    found = _examine(row, first, base, follow, trial)
    _let_in(row, found, base)


def _base_of(row: ModelImport) -> ServedModel | None:
    if row.kind == ModelImport.Kind.ADAPTER and row.base_model is None:
        raise RegistrationError("adapter_wrong_base", "The model that it is for was removed meanwhile.")
    return row.base_model


def _examine(row: ModelImport, first: Path, base: ServedModel | None, follow: Progress, trial: Trial | None) -> Found:
    if base is None:
        return inspect(first, progress=follow, trial=trial, expected_digest=row.sha256)
    return inspect_adapter(first, adapter_rows.base_of(base), progress=follow, trial=trial, expected_digest=row.sha256)


def _let_in(row: ModelImport, found: Found, base: ServedModel | None) -> None:
    label = row.name if base is None else f"{base.name}-{row.name}"
    target, is_new = quarantine.let_in(found.path, label, found.digest)
    found = replace(found, path=target, metadata={**found.metadata, "file": stamp_of(target)})
    who = audit_log.Actor(row.asked_by_kind, row.asked_by)
    try:
        with audit_log.acting(lambda: who), transaction.atomic():
            desk.note(row, state=State.READY, digest=found.digest, bytes_per_second=0.0)
            _register(row, found, base)
    except BaseException:
        if is_new:
            quarantine.turn_away(target)
        raise
    quarantine.remove(row.pk)


def _register(row: ModelImport, found: Found, base: ServedModel | None) -> None:
    """Raises RegistrationError; then the transaction is rolled back."""
    desk.check_name(row.kind, row.name, base, replaces=row.replaces)
    options: dict[str, Any] = {"visibility": row.visibility} if row.visibility else {}
    if isinstance(found, Inspected):
        model_rows.save(row.name, found, default=row.is_default or None, **options)
    elif base is not None:
        adapter_rows.save(base, row.name, found, **options)

"""Who changed what, when, and how: an entry for each row that people's work creates, changes or deletes.

What is watched is audited.py's. Rows come by Django's signals for save and delete (of many-to-many, too) and by those
of audited.py for UPDATEs and bulk inserts. The actor is of the context: a console person (middleware), a key (the
operator's API), a command. Entries are written in the transaction of the change. Counters, receipts and ledgers have
proofs of their own and are not here.
"""

from __future__ import annotations

import getpass
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from django.apps import apps
from django.core.serializers.json import DjangoJSONEncoder
from django.db import models
from django.db.models.signals import m2m_changed, post_delete, post_save, pre_save
from django.utils import timezone

from accounts.models import AuditEntry
from accounts.trail.audited import AUDITED, fields_of, rows_inserted, rows_updated, values_of

MASKED = frozenset({"secret_hash", "pepper_id", "password"})
"""An entry says that they changed, and nothing more."""
MASK = "(secret)"
MAX_TEXT = 300


@dataclass(frozen=True, slots=True)
class Actor:
    kind: str
    """person, key, command, system or unknown."""
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


SYSTEM = Actor("system", "llmsite")
_actor: ContextVar[Callable[[], Actor] | None] = ContextVar("llmsite_actor", default=None)


def actor() -> Actor:
    """Who acts in this context."""
    found = _actor.get()
    return SYSTEM if found is None else found()


@contextmanager
def acting(who: Callable[[], Actor]) -> Iterator[None]:
    """`who` is asked when something changes."""
    token = _actor.set(who)
    try:
        yield
    finally:
        _actor.reset(token)


def act_as(who: Actor) -> None:
    """Within `acting`: it is known only now who acts."""
    _actor.set(lambda: who)


def of_the_shell(command: str) -> Actor:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = "somebody"
    return Actor("command", f"{user}: {command}"[:150])


# Rows


def _shown(name: str, value: Any) -> Any:
    """As JSON has it, without secrets, and short."""
    if value is None or value == "":
        return value
    if name in MASKED:
        return MASK
    if isinstance(value, (bool, int, float)):
        return value
    encoded = DjangoJSONEncoder().encode(value)
    text = value if isinstance(value, str) else encoded
    if len(text) > MAX_TEXT:
        return f"{text[:MAX_TEXT]}… ({len(text)} characters)"
    return json.loads(encoded)


def created(row: models.Model) -> None:
    values = {name: [None, _shown(name, value)] for name, value in values_of(row).items() if value not in (None, "")}
    _write(AuditEntry.Action.CREATE, row, values)


def changed(row: models.Model, before: dict[str, Any]) -> None:
    """Nothing is written where nothing differs."""
    after = values_of(row)
    moved = {
        name: [_shown(name, before[name]), _shown(name, value)]
        for name, value in after.items()
        if name in before and before[name] != value
    }
    if moved:
        _write(AuditEntry.Action.CHANGE, row, moved)


def deleted(row: models.Model) -> None:
    values = {name: [_shown(name, value), None] for name, value in values_of(row).items() if value not in (None, "")}
    _write(AuditEntry.Action.DELETE, row, values)


def acted(row: models.Model, what: Mapping[str, Any]) -> None:
    """An action that changes no watched row: thing → what it was and what it is, under the row it belongs to."""
    shown = {name: [_shown(name, was), _shown(name, now)] for name, (was, now) in what.items()}
    _write(AuditEntry.Action.CHANGE, row, shown)


def _write(action: str, row: models.Model, diff: dict[str, Any]) -> None:
    note(action, actor(), row, diff)


def note(action: str, who: Actor, row: models.Model | None, diff: dict[str, Any], *, model: str = "") -> None:
    """Also what is no change of a row, such as a sign-in. model: where there is no row."""
    AuditEntry.objects.create(
        action=action,
        actor_kind=who.kind,
        actor=who.name[:150],
        model=model if row is None else row._meta.label_lower,
        row="" if row is None else str(row.pk)[:64],
        name="" if row is None else _name(row),
        diff=diff,
        created_at=timezone.now(),
    )


def _name(row: models.Model) -> str:
    try:
        return str(row)[:200]
    except models.ObjectDoesNotExist:  # what it is named after went first
        return f"{row._meta.verbose_name} {row.pk}"[:200]


# Signals


def connect() -> None:
    """Once, when all models are there. AppConfig.ready calls it."""
    for label in AUDITED:
        model = apps.get_model(label)
        pre_save.connect(_before_save, sender=model, dispatch_uid=f"audit-before-{label}")
        post_save.connect(_after_save, sender=model, dispatch_uid=f"audit-after-{label}")
        post_delete.connect(_after_delete, sender=model, dispatch_uid=f"audit-deleted-{label}")
        rows_updated.connect(_after_update, sender=model, dispatch_uid=f"audit-updated-{label}")
        rows_inserted.connect(_after_insert, sender=model, dispatch_uid=f"audit-inserted-{label}")
        for each in model._meta.many_to_many:
            m2m_changed.connect(
                _after_links, sender=each.remote_field.through, dispatch_uid=f"audit-{label}-{each.name}"
            )


def _before_save(sender: type[models.Model], instance: models.Model, raw: bool, **kwargs: Any) -> None:
    fields = kwargs.get("update_fields")
    instance._audit_before = None  # type: ignore[attr-defined]
    if raw or instance.pk is None or (fields is not None and not set(fields) & fields_of(sender)):
        return
    row = sender._base_manager.filter(pk=instance.pk).first()
    instance._audit_before = None if row is None else values_of(row)  # type: ignore[attr-defined]


def _after_save(sender: type[models.Model], instance: models.Model, raw: bool, **kwargs: Any) -> None:
    if raw:
        return
    fields = kwargs.get("update_fields")
    before = instance.__dict__.pop("_audit_before", None)
    if kwargs["created"]:
        created(instance)
    elif before is not None:
        known = fields_of(sender) if fields is None else set(fields)
        attnames = {each.attname: each.name for each in sender._meta.concrete_fields}
        names = {attnames.get(name, name) for name in known}
        changed(instance, {name: value for name, value in before.items() if name in names})


def _after_delete(sender: type[models.Model], instance: models.Model, **kwargs: Any) -> None:
    deleted(instance)


def _after_update(
    sender: type[models.Model], rows: Sequence[models.Model], before: Mapping[Any, dict[str, Any]], **kwargs: Any
) -> None:
    for row in rows:
        changed(row, before[row.pk])


def _after_insert(sender: type[models.Model], rows: Sequence[models.Model], **kwargs: Any) -> None:
    for row in rows:
        created(row)


def _after_links(sender: Any, instance: models.Model, action: str, pk_set: set[Any] | None, **kwargs: Any) -> None:
    """Many-to-many: what was linked and unlinked."""
    if action in ("post_add", "post_remove") and pk_set:
        links = sorted(map(str, pk_set))[:50]
        field = sender._meta.model_name
        moved = [None, links] if action == "post_add" else [links, None]
        _write(AuditEntry.Action.CHANGE, instance, {field: moved})
    elif action == "post_clear":
        _write(AuditEntry.Action.CHANGE, instance, {sender._meta.model_name: ["all of them", None]})

"""What a configuration file would change, before it does: data, and the comparison of one row with what is wanted.

Filled by inference/site_file/site_yaml.py and the modules for parts of the file; written by site_yaml.apply.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from django.core.exceptions import ValidationError

from accounts.identity import known_keys
from accounts.models import APIKey, LimitRule, Plan, Price, Tenant, announce_tenant
from inference.site_file.models_yaml import Prepared

Kind = Literal["plan", "tenant", "key", "price", "limit_rule", "model", "default"]
Row = Plan | Tenant | APIKey | Price | LimitRule
NOTHING = ("unchanged", "left")
"""Actions that change nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What happens to one thing. action: created, updated, unchanged, switched_off, suspended, or left (not in the
    file). details: field → `before → after`."""

    kind: Kind
    name: str
    action: str
    details: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Wish:
    """Rows as the file wants them, not saved yet: which fields of which row differ; a new row has no `fields`."""

    row: Row
    fields: list[str]


@dataclass(slots=True)
class SitePlan:
    """A file that was understood and compared. Only what was prepared without `dry_run` can be applied."""

    changes: list[Change] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    plans: dict[str, Plan] = field(default_factory=dict)
    tenants: dict[str, Tenant] = field(default_factory=dict)
    wishes: list[Wish] = field(default_factory=list)
    grants: dict[str, dict[tuple[str, str], int | None]] = field(default_factory=dict)
    """Tenant → (model, adapter) → position; every one that is wanted."""
    vectors: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """Tenant → model → adapter → scale; of each model that is named, the whole default vector."""
    models: Prepared | None = None

    @property
    def differs(self) -> bool:
        return any(change.action not in NOTHING for change in self.changes)

    @property
    def suspended(self) -> list[Tenant]:
        """The tenants that were active before."""
        named = {
            change.name
            for change in self.changes
            if change.kind == "tenant" and ("status" in change.details or change.action == "suspended")
        }
        return [row for name, row in self.tenants.items() if name in named and row.status == Tenant.Status.SUSPENDED]


def compare_row(
    plan: SitePlan,
    kind: Kind,
    place: str,
    row: Row,
    given: Mapping[str, Any],
    *,
    more: Mapping[str, str] | None = None,
    words: Mapping[str, str] | None = None,
) -> None:
    """Set what is given, note what that changes, and check it.

    more: differences in what belongs to the row. words: field of the row → key in the file, where they differ.
    """
    is_new = row.pk is None
    before = {} if is_new else {name: getattr(row, name) for name in given}
    for name, value in given.items():
        setattr(row, name, value)
    try:
        row.clean_fields(exclude=["plan", "tenant", "key"])
        row.clean()
    except ValidationError as error:
        for name, texts in error.update_error_dict({}).items():
            listed = " ".join(ValidationError(texts).messages)
            plan.problems.append(f"{place}.{(words or {}).get(name, name)}: {listed}".replace(".__all__", ""))
    fields = [name for name in given if is_new or before[name] != given[name]]
    details = {} if is_new else {name: f"{_shown(before[name])} → {_shown(given[name])}" for name in fields}
    details.update(more or {})
    if is_new or fields:
        plan.wishes.append(Wish(row, [] if is_new else fields))
    action = "created" if is_new else "updated" if details else "unchanged"
    plan.changes.append(Change(kind=kind, name=_name_of(row), action=action, details=details))


def _name_of(row: Row) -> str:
    if isinstance(row, APIKey):
        return row.display
    return row.name if isinstance(row, (Plan, Tenant)) else str(row)


def _shown(value: object) -> str:
    if isinstance(value, Plan):
        return value.name
    return "none" if value is None else str(value)


def refuse_twice(plan: SitePlan, place: str, names: Sequence[object]) -> None:
    seen: set[object] = set()
    for number, name in enumerate(names):
        if name in seen:
            shown = repr(name) if isinstance(name, str) else "of this row"
            plan.problems.append(f"{place}.{number}: the name {shown} is there twice")
        seen.add(name)


def save(wish: Wish) -> None:
    """Within the caller's transaction; every process hears of it. Raises ValidationError."""
    row = wish.row
    if wish.fields:
        row.save(update_fields=wish.fields)
    else:
        row.save()
    if isinstance(row, Tenant):
        announce_tenant(row.pk)
    elif isinstance(row, APIKey):
        known_keys.announce_change(row.public_id)
    else:
        known_keys.announce_change(known_keys.EVERYTHING)

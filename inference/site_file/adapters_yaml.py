"""The `adapters` of a model in models.yaml: what the file wants, what would change, and changing it.

Called by models_yaml.py, which reads the file and holds the transaction; inference/catalog/adapter_rows.py writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from accounts.models import Tenant
from inference.catalog import adapter_rows, granting
from inference.models import MAX_SCALE, Adapter, ServedModel
from inference.vetting.adapter_file import Base, ExaminedAdapter, check_adapter
from inference.vetting.inspection import Progress, RegistrationError, absolute
from inference.vetting.trial import Trial

MAX_ADAPTERS = 1000


class AdapterEntry(BaseModel):
    """One adapter of a model. As a bare string it is a file, whose stem is the name."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(min_length=1, max_length=64)
    path: str = Field(min_length=1, max_length=1000)
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    default_scale: float = Field(1.0, ge=-MAX_SCALE, le=MAX_SCALE, allow_inf_nan=False)
    visibility: Literal["shared", "granted"] = "granted"
    enabled: bool = True
    owner: str | None = None
    granted_tenants: list[str] | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: object) -> object:
        return {"name": Path(value).stem, "path": value} if isinstance(value, str) else value

    def given(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in adapter_rows.OPTIONS if name in self.model_fields_set}


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedAdapter:
    """One adapter as the file wants it; `options` are adapter_rows.save's. granted_tenants: these and no others."""

    place: str
    name: str
    path: Path
    sha256: str | None = None
    options: dict[str, Any]
    granted_tenants: list[Tenant] | None


@dataclass(slots=True)
class AdapterPlan:
    """All adapters of one model. `known`: the rows there are, by name."""

    wanted: list[WantedAdapter] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    known: dict[str, Adapter] = field(default_factory=dict)
    examined: dict[str, ExaminedAdapter | None] = field(default_factory=dict)


def tenants_named(names: Iterable[str], coming: Mapping[str, Tenant]) -> dict[str, Tenant]:
    """Those there are, and those that the same file makes."""
    wanted = set(names)
    rows = {tenant.name: tenant for tenant in Tenant.objects.filter(name__in=wanted)}
    return {**rows, **{name: tenant for name, tenant in coming.items() if name in wanted}}


def other_file(place: str, sha256: str | None, digest: str) -> list[str]:
    """The problem of a file that is not the one that was asked for."""
    if sha256 in (None, digest):
        return []
    return [f"{place}.sha256: the file is another one, its SHA-256 is {digest}"]


def plan_adapters(
    place: str,
    entries: list[AdapterEntry],
    folder: Path,
    model_name: str,
    coming: Mapping[str, Tenant] | None = None,
) -> AdapterPlan:
    """Understand what one model's list says; touches no adapter's file."""
    known = {row.name: row for row in Adapter.objects.select_related("owner").filter(base_model__name=model_name)}
    plan = AdapterPlan(known=known)
    for number, entry in enumerate(entries):
        _plan_entry(plan, f"{place}.adapters.{number}", entry, folder, coming or {})
    return plan


def _plan_entry(plan: AdapterPlan, place: str, entry: AdapterEntry, folder: Path, coming: Mapping[str, Tenant]) -> None:
    if any(entry.name == other.name for other in plan.wanted):
        plan.problems.append(f"{place}: the name {entry.name!r} is there twice")
    names = [*(entry.granted_tenants or ()), *((entry.owner,) if entry.owner else ())]
    tenants = tenants_named(names, coming)
    plan.problems += [f"{place}: there is no tenant {name!r}" for name in names if name not in tenants]
    options = entry.given()
    if "owner" in options:
        options["owner"] = tenants.get(entry.owner or "")
    granted = None if entry.granted_tenants is None else [tenants[n] for n in entry.granted_tenants if n in tenants]
    path = absolute(folder / Path(entry.path).expanduser())
    plan.wanted.append(
        WantedAdapter(
            place=place, name=entry.name, path=path, sha256=entry.sha256, options=options, granted_tenants=granted
        )
    )


def check_all(plan: AdapterPlan, base_path: Path) -> None:
    """Headers only; adds to the plan's problems."""
    for wanted in plan.wanted:
        try:
            check_adapter(wanted.path, base_path)
        except RegistrationError as error:
            plan.problems.append(f"{wanted.place}.path: {error.message}")


def examine_all(plan: AdapterPlan, base: Base, progress: Progress | None, trial: Trial | None) -> None:
    """Whole files, those that changed; adds to the plan's problems."""
    for wanted in plan.wanted:
        try:
            plan.examined[wanted.name] = adapter_rows.examine(
                wanted.path, base, known=plan.known.get(wanted.name), progress=progress, trial=trial
            )
        except RegistrationError as error:
            plan.problems.append(f"{wanted.place}.path: {error.message}")
        else:
            examined = plan.examined[wanted.name]
            known = plan.known.get(wanted.name)
            digest = examined.digest if examined else known.digest if known else ""
            plan.problems += other_file(wanted.place, wanted.sha256, digest)


def differences(plan: AdapterPlan) -> dict[str, str]:
    """`adapters.<name>` → what would change. Compares files only where they have been examined."""
    found = {f"adapters.{wanted.name}": _difference(plan, wanted) for wanted in plan.wanted}
    return {name: text for name, text in found.items() if text}


def _difference(plan: AdapterPlan, wanted: WantedAdapter) -> str:
    row = plan.known.get(wanted.name)
    if row is None:
        return "new"
    texts = [
        f"{name} {getattr(row, name)} → {value}"
        for name, value in wanted.options.items()
        if getattr(row, name) != value
    ]
    if row.path != str(wanted.path) or plan.examined.get(wanted.name) is not None:
        texts.append("the file changed")
    if wanted.granted_tenants is not None and _granted(row) != (after := _wanted_names(wanted, row)):
        texts.append(f"granted_tenants {sorted(_granted(row))} → {sorted(after)}")
    return ", ".join(texts)


def _granted(row: Adapter) -> set[str]:
    return set(row.grants.values_list("tenant__name", flat=True))


def _wanted_names(wanted: WantedAdapter, row: Adapter | None) -> set[str]:
    """The owner always has it."""
    owner = wanted.options.get("owner", row.owner if row else None)
    return {tenant.name for tenant in wanted.granted_tenants or ()} | ({owner.name} if owner else set())


def apply(plan: AdapterPlan, base: ServedModel, changes: Mapping[str, str]) -> list[str]:
    """Write what differs; returns the problems. Within the caller's transaction."""
    problems = []
    for wanted in plan.wanted:
        if f"adapters.{wanted.name}" not in changes:
            continue
        try:
            _apply_one(plan, wanted, base)
        except RegistrationError as error:
            problems += [f"{wanted.place}.{key}: {' '.join(texts)}" for key, texts in error.fields.items()]
    return problems


def _apply_one(plan: AdapterPlan, wanted: WantedAdapter, base: ServedModel) -> None:
    tenants = wanted.granted_tenants or ()
    row = adapter_rows.save(base, wanted.name, plan.examined[wanted.name], granted_tenants=tenants, **wanted.options)
    if wanted.granted_tenants is None:
        return
    keep = _wanted_names(wanted, row)
    for grant in row.grants.select_related("tenant"):
        if grant.tenant.name not in keep:
            granting.revoke(row, grant.tenant)

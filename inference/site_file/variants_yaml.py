"""The `variants` of a model in models.yaml: other files and settings of it, and which of them is served.

Called by models_yaml.py, which reads the file and holds the transaction; inference/catalog/variants.py writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from inference.catalog import variants
from inference.models import ModelVariant, ServedModel
from inference.site_file.adapters_yaml import other_file
from inference.vetting.inspection import (
    Inspected,
    Progress,
    RegistrationError,
    absolute,
    check_header,
    inspect,
    is_unchanged,
)
from inference.vetting.trial import Trial

MAX_VARIANTS = 100
SETTINGS = ("n_threads", "flash_attention", "measured")


class VariantEntry(BaseModel):
    """Another file or other settings for this model. At most one is active."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    path: str = Field(min_length=1, max_length=1000)
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    n_threads: int | None = Field(None, ge=1, le=512)
    flash_attention: bool | None = None
    measured: dict[str, Any] = Field(default_factory=dict, max_length=1000)
    active: bool = False

    def given(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in SETTINGS if name in self.model_fields_set}


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedVariant:
    """One variant as the file wants it. active: None where it says nothing."""

    place: str
    name: str
    path: Path
    sha256: str | None
    settings: dict[str, Any]
    active: bool | None


@dataclass(slots=True)
class VariantPlan:
    """All variants of one model. `known`: the rows there are, by name."""

    wanted: list[WantedVariant] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    known: dict[str, ModelVariant] = field(default_factory=dict)
    inspected: dict[str, Inspected] = field(default_factory=dict)


def plan_variants(place: str, entries: list[VariantEntry], folder: Path, model_name: str) -> VariantPlan:
    """Understand what one model's list says; touches no file."""
    rows = ModelVariant.objects.select_related("base_model").filter(base_model__name=model_name)
    plan = VariantPlan(known={row.name: row for row in rows})
    for number, entry in enumerate(entries):
        where = f"{place}.variants.{number}"
        if any(entry.name == other.name for other in plan.wanted):
            plan.problems.append(f"{where}: the name {entry.name!r} is there twice")
        plan.wanted.append(
            WantedVariant(
                place=where,
                name=entry.name,
                path=absolute(folder / Path(entry.path).expanduser()),
                sha256=entry.sha256,
                settings=entry.given(),
                active=entry.active if "active" in entry.model_fields_set else None,
            )
        )
    if sum(wanted.active is True for wanted in plan.wanted) > 1:
        plan.problems.append(f"{place}.variants: one of them can be active")
    return plan


def check_all(plan: VariantPlan) -> None:
    """Headers only; adds to the plan's problems."""
    for wanted in plan.wanted:
        try:
            check_header(wanted.path)
        except RegistrationError as error:
            plan.problems.append(f"{wanted.place}.path: {error.message}")


def inspect_all(plan: VariantPlan, name: str, base: Inspected, progress: Progress | None, trial: Trial | None) -> None:
    """Whole files, those that changed; adds to the plan's problems. name: of the model. base: its own file."""
    for wanted in plan.wanted:
        try:
            file = _inspected(plan.known.get(wanted.name), wanted.path, base, progress, trial)
            variants.check_fit(name, base.metadata, file)
        except RegistrationError as error:
            plan.problems.append(f"{wanted.place}.path: {error.message}")
        else:
            plan.inspected[wanted.name] = file
            plan.problems += other_file(wanted.place, wanted.sha256, file.digest)


def _inspected(
    row: ModelVariant | None, path: Path, base: Inspected, progress: Progress | None, trial: Trial | None
) -> Inspected:
    if path == base.path:  # other settings of the same file
        return base
    if row is not None and row.path == str(path) and is_unchanged(path, row.digest, row.metadata):
        return Inspected(path=path, digest=row.digest, size_bytes=row.size_bytes, metadata=row.metadata)
    return inspect(path, progress=progress, trial=trial)


def differences(plan: VariantPlan, base_digest: str) -> dict[str, str]:
    """`variants.<name>` → what would change. base_digest: of the model's own file, once the file is applied."""
    found = {f"variants.{wanted.name}": _difference(plan, wanted, base_digest) for wanted in plan.wanted}
    return {name: text for name, text in found.items() if text}


def _difference(plan: VariantPlan, wanted: WantedVariant, base_digest: str) -> str:
    row = plan.known.get(wanted.name)
    if row is None:
        return "new"
    texts = [
        f"{name} {getattr(row, name)} → {value}"
        for name, value in wanted.settings.items()
        if getattr(row, name) != value
    ]
    file = plan.inspected.get(wanted.name)
    is_same = file.digest == row.digest if file else is_unchanged(wanted.path, row.digest, row.metadata)
    if row.path != str(wanted.path) or not is_same:
        texts.append("the file changed")
    if row.source_digest != base_digest:
        texts.append("made of another file of the model")
    if wanted.active not in (None, row.is_active):
        texts.append(f"active {row.is_active} → {wanted.active}")
    return ", ".join(texts)


def apply(plan: VariantPlan, base: ServedModel, changes: Mapping[str, str]) -> list[str]:
    """Write what differs; returns the problems. Within the caller's transaction."""
    problems = []
    for wanted in plan.wanted:
        if f"variants.{wanted.name}" not in changes:
            continue
        try:
            row = variants.keep(base, wanted.name, plan.inspected[wanted.name], **wanted.settings)
            if wanted.active:
                variants.activate(row)
            elif wanted.active is False and row.is_active:
                variants.revert(base)
        except RegistrationError as error:
            problems.append(f"{wanted.place}: {error.message}")
    return problems

"""The `adapter_aliases` of a model in models.yaml: names, the versions that they lead to, and trials.

Called by models_yaml.py, which reads the file and holds the transaction; inference/catalog/aliases.py writes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from inference.catalog import aliases
from inference.models import Adapter, AdapterAlias, ServedModel, adapter_name_validator
from inference.vetting.inspection import RegistrationError

MAX_ALIASES = 1000
VERSIONS = ("target", "canary", "previous")


class AliasEntry(BaseModel):
    """Where a name leads. As a bare string it is the target, and nothing is on trial."""

    model_config = ConfigDict(extra="forbid", strict=True)

    target: str = Field(max_length=64)
    canary: str | None = Field(None, max_length=64)
    share: int = Field(0, ge=0, le=100)
    previous: str | None = Field(None, max_length=64)

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: object) -> object:
        return {"target": value, "canary": None, "share": 0} if isinstance(value, str) else value

    def given(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in (*VERSIONS, "share") if name in self.model_fields_set}


@dataclass(slots=True)
class AliasPlan:
    """All aliases of one model. `known`: as the rows there are would be written, by name."""

    place: str = ""
    wanted: dict[str, dict[str, Any]] = field(default_factory=dict)
    known: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def plan_aliases(place: str, entries: Mapping[str, AliasEntry], model_name: str, adapters: Iterable[str]) -> AliasPlan:
    """Understand what one model's aliases say. adapters: names that are there, or come with the file."""
    rows = AdapterAlias.objects.select_related(*VERSIONS).filter(base_model__name=model_name)
    plan = AliasPlan(f"{place}.adapter_aliases", known={row.name: as_entry(row) for row in rows})
    names = set(adapters)
    for name, entry in entries.items():
        plan.wanted[name] = entry.given()
        plan.problems += [f"{plan.place}.{name}: {sentence}" for sentence in _problems(name, entry, names)]
    taken = names & plan.known.keys()
    plan.problems += [f"{place}.adapters: {name!r} is an alias already" for name in sorted(taken - plan.wanted.keys())]
    return plan


def _problems(name: str, entry: AliasEntry, adapters: set[str]) -> Iterator[str]:
    if not re.fullmatch(adapter_name_validator.regex, name):
        yield str(adapter_name_validator.message)
    if name in adapters:
        yield "is an adapter: choose a name that says no version"
    for version in (entry.target, entry.canary, entry.previous):
        if version is not None and version not in adapters:
            yield f"there is no adapter {version!r} of this model"
    if entry.canary == entry.target:
        yield "the canary answers already: choose another one"
    if entry.share and entry.canary is None and "canary" in entry.model_fields_set:
        yield "a share needs a canary"


def as_entry(row: AdapterAlias) -> dict[str, Any]:
    versions: dict[str, Adapter | None] = {name: getattr(row, name) for name in VERSIONS}
    return {**{name: found.name if found else None for name, found in versions.items()}, "share": row.share}


def differences(plan: AliasPlan) -> dict[str, str]:
    """`adapter_aliases.<name>` → what would change."""
    found = {f"adapter_aliases.{name}": _difference(plan.known.get(name), plan.wanted[name]) for name in plan.wanted}
    return {name: text for name, text in found.items() if text}


def _difference(known: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> str:
    if known is None:
        return "new"
    return ", ".join(f"{name} {known[name]} → {value}" for name, value in wanted.items() if known[name] != value)


def apply(plan: AliasPlan, base: ServedModel, changes: Mapping[str, str]) -> list[str]:
    """Write what differs; returns the problems. Within the caller's transaction."""
    problems = []
    rows = {row.name: row for row in Adapter.objects.filter(base_model=base)}
    for name, wanted in plan.wanted.items():
        if f"adapter_aliases.{name}" not in changes:
            continue
        values = {key: rows.get(value) if key in VERSIONS else value for key, value in wanted.items()}
        try:
            aliases.restore(base, name, **values)
        except RegistrationError as error:
            problems.append(f"{plan.place}.{name}: {error.message}")
    return problems

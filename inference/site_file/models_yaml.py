"""models.yaml: the registry as a file. Says what would change, changes it all or not at all.

The file names what it wants; what it does not name stays as it is in the registry. Called by the command sync_models,
and by site_yaml.py, whose file is this one with tenants and plans. models_form.py reads the file, models_plan.py
understands it, the catalogue (catalog/model_rows.py) does the writing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from django.db import transaction

from inference.catalog import model_rows
from inference.models import ServedModel
from inference.site_file import adapters_yaml, aliases_yaml, variants_yaml
from inference.site_file.models_form import ModelsYamlError, read_file
from inference.site_file.models_plan import Plan, Wanted, understand
from inference.vetting.adapter_file import Base
from inference.vetting.inspection import Inspected, Progress, RegistrationError, check_header, is_unchanged
from inference.vetting.trial import Trial

MAX_SHOWN = 200
"""Characters of a value in a list of changes."""


def read(path: Path) -> Plan:
    """Read and understand the file; touches no model file. Raises ModelsYamlError with all problems at once."""
    plan = understand(read_file(path), path)
    if plan.problems:
        raise ModelsYamlError("models_yaml_invalid", plan.problems)
    return plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What happens to one model. action: created, updated, unchanged, switched_off, or left (not in the file)."""

    name: str
    action: Literal["created", "updated", "unchanged", "switched_off", "left"]
    details: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    path: Path
    default: str | None
    changes: list[Change]
    warnings: list[str]


def sync(
    path: Path,
    *,
    dry_run: bool = False,
    prune: bool = False,
    progress: Progress | None = None,
    trial: Trial | None = None,
) -> Outcome:
    """Make the registry what the file says. Idempotent: a second run changes nothing.

    dry_run: check and compare only; files are not hashed or loaded. prune: switch off models that the file does not
    name. Raises ModelsYamlError with every problem; then nothing has changed.
    """
    prepared = prepare(read(path), dry_run=dry_run, prune=prune, progress=progress, trial=trial)
    if not dry_run:
        apply(prepared)
    return Outcome(path=path, default=prepared.default, changes=prepared.changes, warnings=prepared.plan.warnings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A plan whose files were looked at: what would change. Only one whose files were hashed can be applied."""

    plan: Plan
    inspected: Mapping[str, Inspected]
    changes: list[Change]
    default: str | None
    default_now: str | None


def prepare(
    plan: Plan,
    *,
    dry_run: bool = False,
    prune: bool = False,
    progress: Progress | None = None,
    trial: Trial | None = None,
) -> Prepared:
    """Look at the files and compare. Changes nothing. Raises ModelsYamlError."""
    rows = {
        row.name: row for row in ServedModel.objects.select_related("draft_model").prefetch_related("granted_tenants")
    }
    inspected = _check_all(plan, rows) if dry_run else _inspect_all(plan, rows, progress, trial)
    changes = [_compare(wanted, rows.get(wanted.name), inspected.get(wanted.name)) for wanted in plan.models]
    named = {wanted.name for wanted in plan.models}
    changes += [_compare_unnamed(row, prune) for row in rows.values() if row.name not in named]
    default_now = next((row.name for row in rows.values() if row.is_default), None)
    default = plan.default or _default_after(plan, rows, changes)
    return Prepared(plan=plan, inspected=inspected, changes=changes, default=default, default_now=default_now)


def apply(prepared: Prepared) -> None:
    """Write it: all of it in one transaction, or nothing. Raises ModelsYamlError."""
    _apply(prepared.plan, prepared.inspected, prepared.changes, prepared.default)


def _default_after(plan: Plan, rows: Mapping[str, ServedModel], changes: list[Change]) -> str | None:
    """Where the file names none: the default of now unless it is switched off, else the file's first that is not."""
    off = {change.name for change in changes if change.action == "switched_off"}
    off |= {wanted.name for wanted in plan.models if wanted.options.get("load_mode") == "off"}
    now = next((row.name for row in rows.values() if row.is_default), None)
    if now and now not in off:
        return now
    return next((wanted.name for wanted in plan.models if wanted.name not in off), now)


def _check_all(plan: Plan, rows: Mapping[str, ServedModel]) -> dict[str, Inspected]:
    problems = []
    for wanted in plan.models:
        row = rows.get(wanted.name)
        if row and row.path == str(wanted.path) and is_unchanged(wanted.path, row.digest, row.metadata):
            problems += adapters_yaml.other_file(wanted.place, wanted.sha256, row.digest)
        try:
            check_header(wanted.path)
        except RegistrationError as error:
            problems.append(f"{wanted.place}.path: {error.message}")
        else:
            adapters_yaml.check_all(wanted.adapters, wanted.path)
            variants_yaml.check_all(wanted.variants)
            problems += wanted.adapters.problems + wanted.variants.problems
    if problems:
        raise ModelsYamlError("models_yaml_invalid", problems)
    return {}


def _inspect_all(
    plan: Plan, rows: Mapping[str, ServedModel], progress: Progress | None, trial: Trial | None
) -> dict[str, Inspected]:
    _check_all(plan, rows)  # quick, so a typing error at the end of the file does not wait for hashing at its start
    problems, inspected = [], {}
    for wanted in plan.models:
        try:
            model_rows.check_template(wanted.options.get("chat_template", ""), wanted.name)
        except RegistrationError as error:
            problems.append(f"{wanted.place}.chat_template: {error.message}")
            continue
        try:
            inspected[wanted.name] = model_rows.examine(
                wanted.path, known=rows.get(wanted.name), progress=progress, trial=trial
            )
        except RegistrationError as error:
            problems.append(f"{wanted.place}.path: {error.message}")
        else:
            base = Base(path=wanted.path, digest=inspected[wanted.name].digest)
            problems += adapters_yaml.other_file(wanted.place, wanted.sha256, base.digest)
            adapters_yaml.examine_all(wanted.adapters, base, progress, trial)
            variants_yaml.inspect_all(wanted.variants, wanted.name, inspected[wanted.name], progress, trial)
            problems += wanted.adapters.problems + wanted.variants.problems
    if problems:
        raise ModelsYamlError("models_yaml_invalid", problems)
    return inspected


def _compare(wanted: Wanted, row: ServedModel | None, inspected: Inspected | None) -> Change:
    digest = inspected.digest if inspected else row.digest if row else ""
    parts = {
        **adapters_yaml.differences(wanted.adapters),
        **aliases_yaml.differences(wanted.aliases),
        **variants_yaml.differences(wanted.variants, digest),
    }
    if row is None:
        return Change(name=wanted.name, action="created", details=parts)
    details = {
        name: f"{_short(now)} → {_short(value)}"
        for name, value in wanted.options.items()
        if (now := _option(row, name)) != value
    }
    if row.path != str(wanted.path):
        details["path"] = f"{row.path} → {wanted.path}"
    if inspected.digest != row.digest if inspected else not is_unchanged(wanted.path, row.digest, row.metadata):
        details["file"] = "the file changed"
    if wanted.granted_tenants is not None:
        before, after = ({t.name for t in tenants} for tenants in (row.granted_tenants.all(), wanted.granted_tenants))
        if before != after:
            details["granted_tenants"] = f"{sorted(before)} → {sorted(after)}"
    details |= parts
    return Change(name=wanted.name, action="updated" if details else "unchanged", details=details)


def _short(value: object) -> str:
    """A template is a page long."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def _option(row: ServedModel, name: str) -> Any:
    """As the file would say it."""
    value = getattr(row, name)
    return value.name if isinstance(value, ServedModel) else value


def _compare_unnamed(row: ServedModel, prune: bool) -> Change:
    off = ServedModel.LoadMode.OFF
    return Change(name=row.name, action="switched_off" if prune and row.load_mode != off else "left")


def _apply(plan: Plan, inspected: Mapping[str, Inspected], changes: list[Change], default: str | None) -> None:
    """All of it in one transaction."""
    details = {change.name: change.details for change in changes if change.action in {"created", "updated"}}
    changing = [wanted for wanted in plan.models if wanted.name in details]
    changing.sort(key=lambda wanted: bool(wanted.options.get("draft_model")))  # those that guess for others first
    with transaction.atomic():
        # First no model has aliases that move, so they may move in any order.
        moving = [wanted.name for wanted in changing if "aliases" in wanted.options]
        ServedModel.objects.filter(name__in=moving).update(aliases=[])
        problems = [
            problem for wanted in changing for problem in _save(wanted, inspected[wanted.name], details[wanted.name])
        ]
        if problems:
            raise ModelsYamlError("models_yaml_invalid", problems)
        _switch_off([change.name for change in changes if change.action == "switched_off"])
        if default and not ServedModel.objects.filter(name=default, is_default=True).exists():
            model_rows.make_default(ServedModel.objects.get(name=default).pk)


def _switch_off(names: list[str]) -> None:
    if names:
        keys = ServedModel.objects.filter(name__in=names).values_list("pk", flat=True)
        model_rows.set_load_mode(keys, ServedModel.LoadMode.OFF)


def _save(wanted: Wanted, inspected: Inspected, details: Mapping[str, str]) -> list[str]:
    try:
        row = model_rows.save(wanted.name, inspected, granted_tenants=wanted.granted_tenants, **wanted.options)
    except RegistrationError as error:
        return [f"{wanted.place}.{key}: {' '.join(texts)}" for key, texts in error.fields.items()]
    problems = adapters_yaml.apply(wanted.adapters, row, details)
    problems += aliases_yaml.apply(wanted.aliases, row, details)
    return problems + variants_yaml.apply(wanted.variants, row, details)

"""models.yaml: the registry as a file. Reads it strictly, says what would change, changes it all or not at all.

The file names what it wants; what it does not name stays as it is in the registry. Called by the command sync_models;
the registry (inference/registry.py) does the writing. The format is described in docs/registry.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from django.conf import settings
from django.db import transaction
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from accounts.models import Tenant
from inference import models_yaml_adapters, registry
from inference.adapter_file import Base
from inference.chat.prompt import MAX_TEMPLATE_BYTES
from inference.engine.drafting import MAX_DRAFT
from inference.inspection import Inspected, Progress, RegistrationError, absolute, check_header, is_unchanged
from inference.models import ServedModel
from inference.models_yaml_adapters import MAX_ADAPTERS, AdapterEntry, AdapterPlan
from inference.trial import Trial

DEFAULT_PLACE = Path("config") / "models.yaml"
MAX_FILE_BYTES = 1 << 20
MAX_MODELS = 1000
MAX_SHOWN = 200
"""Characters of a value in a list of changes."""


class ModelsYamlError(Exception):
    """`code` is models_yaml_missing or models_yaml_invalid; `problems` holds one sentence each, with its place."""

    def __init__(self, code: str, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.code = code
        self.problems = problems


# The form of the file


class Options(BaseModel):
    """Keys that `defaults` and each model may have. Absent and null differ: null means the registry's own default."""

    model_config = ConfigDict(extra="forbid", strict=True)

    backend: Literal["local", "remote"] | None = None
    base_url: str | None = None
    load_mode: Literal["eager", "lazy", "off"] | None = None
    device: Literal["auto", "cuda", "mps", "cpu"] | None = None
    dtype: str | None = None
    text_only: bool | None = None
    trust_remote_code: bool | None = None
    quantization: str | None = None
    max_context: int | None = Field(None, ge=8, le=1 << 20)
    capabilities: dict[str, bool] | None = None

    n_ctx: int | None = Field(None, ge=8, le=1 << 20)
    n_slots: int | None = Field(None, ge=1, le=256)
    n_lanes: int | None = Field(None, ge=1, le=16)
    n_threads: int | None = Field(None, ge=1, le=512)
    n_gpu_layers: int | None = Field(None, ge=-1, le=10000)
    kv_type: Literal["f16", "q8_0", "q4_0"] | None = None
    context_shift: bool | None = None
    draft_kind: Literal["none", "prompt_lookup", "model"] | None = None
    draft_model: str | None = Field(None, max_length=100)
    draft_n_min: int | None = Field(None, ge=0, le=MAX_DRAFT)
    draft_n_max: int | None = Field(None, ge=1, le=MAX_DRAFT)
    draft_p_min: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    draft_policy: Literal["adaptive", "always"] | None = None
    keep_alive_seconds: int | None = Field(None, ge=0, le=2**31 - 1)
    visibility: Literal["shared", "granted"] | None = None
    granted_tenants: list[str] | None = None
    pool: str | None = Field(None, pattern=r"^[a-z0-9-]{1,32}$")

    def given(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.model_fields_set}


class Entry(Options):
    """One model. As a bare string it is its id, or a file whose stem is the id."""

    id: str = Field(min_length=1, max_length=100)
    path: str | None = Field(None, min_length=1, max_length=1000)
    aliases: list[str] | None = None
    notes: str | None = Field(None, max_length=10_000)
    chat_template: str | None = Field(None, max_length=MAX_TEMPLATE_BYTES)
    adapters: list[AdapterEntry] | None = Field(None, max_length=MAX_ADAPTERS)

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        return {"id": Path(value).stem, "path": value} if value.endswith(".gguf") else {"id": value}


class File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    default_model: str | None = None
    defaults: Options = Field(default_factory=Options)
    models: list[Entry] = Field(min_length=1, max_length=MAX_MODELS)


# Reading it


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One model as the file wants it. `place` is where it stands in the file; `options` are registry.save's."""

    place: str
    name: str
    path: Path
    options: dict[str, Any]
    granted_tenants: list[Tenant] | None
    adapters: AdapterPlan = field(default_factory=AdapterPlan)


@dataclass(slots=True)
class Plan:
    """The whole file, understood. `default` is the name of the wanted default, if the file says."""

    path: Path
    models: list[Wanted] = field(default_factory=list)
    default: str | None = None
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def place_of_file(named: str | Path | None = None) -> Path:
    """MODELS_YAML from the environment, else the `named` file, else config/models.yaml; relative to where we run."""
    configured: Path | None = settings.CONFIG.models_yaml
    return absolute(configured or named or DEFAULT_PLACE)


def read(path: Path) -> Plan:
    """Read and understand the file; touches no model file. Raises ModelsYamlError with all problems at once."""
    file = _parse(path)
    plan = Plan(path)
    rows = {row.name: row for row in ServedModel.objects.all()}
    for position, entry in enumerate(file.models):
        _plan_entry(plan, f"models.{position}", entry, file.defaults, rows)
    _check_names(plan)
    plan.default = _plan_default(plan, file.default_model)
    if plan.problems:
        raise ModelsYamlError("models_yaml_invalid", plan.problems)
    return plan


def _parse(path: Path) -> File:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ModelsYamlError("models_yaml_invalid", [f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB."])
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ModelsYamlError(
            "models_yaml_missing", [f"There is no file {path}: write it, or name another with --file or MODELS_YAML."]
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ModelsYamlError("models_yaml_invalid", [f"{path} cannot be read: {error}"]) from error
    try:
        return File.model_validate(yaml.load(text, _UniqueKeyLoader))
    except (yaml.YAMLError, RecursionError) as error:
        raise ModelsYamlError("models_yaml_invalid", [f"{path} is not YAML: {error}"]) from error
    except ValidationError as error:
        raise ModelsYamlError("models_yaml_invalid", [_sentence(problem) for problem in error.errors()]) from error


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML lets a second key of the same name win silently; here it is a problem."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key in (key for key, count in keys.items() if count > 1):
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


def _sentence(problem: Any) -> str:
    place = ".".join(str(part) for part in problem["loc"]) or "the file"
    return f"{place}: {problem['msg']}"


def _plan_entry(plan: Plan, place: str, entry: Entry, defaults: Options, rows: Mapping[str, ServedModel]) -> None:
    given = {**defaults.given(), **entry.given()}
    plan.problems += [f"{place}.{key}: {sentence}" for key, sentence in _refusals(given)]
    plan.warnings += [f"{place}.{key}: {sentence}" for key, sentence in _ignored(given)]
    path = _path_of(entry, plan.path.parent, rows.get(entry.id))
    if path is None:
        plan.problems.append(f"{place}.path: name the .gguf file, or put it beside this file as {entry.id}.gguf")
        return
    tenants = _tenants(plan, place, given.get("granted_tenants")) if "granted_tenants" in given else None
    adapters = models_yaml_adapters.plan_adapters(place, entry.adapters or [], plan.path.parent, entry.id)
    plan.problems += adapters.problems
    plan.models.append(
        Wanted(
            place=place,
            name=entry.id,
            path=path,
            options=_options(given),
            granted_tenants=tenants,
            adapters=adapters,
        )
    )


def _refusals(given: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Keys of the same file elsewhere whose silent loss would serve something else than was asked for."""
    if given.get("backend") == "remote" or given.get("base_url"):
        yield "backend", "only local GGUF files are served; remove remote models from this file"
    if given.get("trust_remote_code"):
        yield "trust_remote_code", "a GGUF file carries no code to trust; remove the key"
    if given.get("quantization"):
        yield "quantization", "the file decides: name a GGUF that is quantized as you want it"
    if None not in (given.get("n_ctx"), given.get("max_context")) and given["n_ctx"] != given["max_context"]:
        yield "max_context", f"is another name of n_ctx, which says {given['n_ctx']}; keep one of them"


def _ignored(given: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Keys that change nothing here, harmlessly."""
    if given.get("dtype") not in (None, "auto"):
        yield "dtype", "ignored: the GGUF file decides the type of the weights"
    if given.get("text_only") is False:
        yield "text_only", "ignored: only text is served"


def _path_of(entry: Entry, folder: Path, row: ServedModel | None) -> Path | None:
    if entry.path:
        return absolute(folder / Path(entry.path).expanduser())
    beside = absolute(folder / f"{entry.id}.gguf")
    if beside.is_file():
        return beside
    return Path(row.path) if row else None


def _options(given: Mapping[str, Any]) -> dict[str, Any]:
    """registry.save's options; null becomes the field's default."""
    options = {name: given[name] for name in registry.OPTIONS if name in given}
    if given.get("max_context") is not None:
        options["n_ctx"] = given["max_context"]
    if given.get("n_gpu_layers") is None and given.get("device") in {"cpu", "cuda", "mps"}:
        options["n_gpu_layers"] = 0 if given["device"] == "cpu" else -1
    fresh = ServedModel()
    return {name: getattr(fresh, name) if value is None else value for name, value in options.items()}


def _tenants(plan: Plan, place: str, names: list[str] | None) -> list[Tenant]:
    found = {tenant.name: tenant for tenant in Tenant.objects.filter(name__in=names or [])}
    plan.problems += [
        f"{place}.granted_tenants: there is no tenant {name!r}" for name in names or [] if name not in found
    ]
    return list(found.values())


def _check_names(plan: Plan) -> None:
    owners: dict[str, str] = {}
    for wanted in plan.models:
        for name in (wanted.name, *wanted.options.get("aliases", ())):
            if name in owners:
                plan.problems.append(f"{wanted.place}: the name {name!r} is there twice, see {owners[name]}")
            owners.setdefault(name, wanted.place)


def _plan_default(plan: Plan, name: str | None) -> str | None:
    if name is None:
        return None
    for wanted in plan.models:
        if name == wanted.name or name in wanted.options.get("aliases", ()):
            if wanted.options.get("load_mode") == "off":
                plan.problems.append(f"default_model: {name!r} has load_mode off")
            return wanted.name
    if not plan.problems:  # else the model may be missing for another reason, which is listed
        plan.problems.append(f"default_model: {name!r} is none of the models")
    return None


# Applying it


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
    plan = read(path)
    rows = {
        row.name: row for row in ServedModel.objects.select_related("draft_model").prefetch_related("granted_tenants")
    }
    inspected = _check_all(plan) if dry_run else _inspect_all(plan, rows, progress, trial)
    changes = [_compare(wanted, rows.get(wanted.name), inspected.get(wanted.name)) for wanted in plan.models]
    named = {wanted.name for wanted in plan.models}
    changes += [_compare_unnamed(row, prune) for row in rows.values() if row.name not in named]
    default = plan.default or _default_after(plan, rows, changes)
    if not dry_run:
        _apply(plan, inspected, changes, default)
    return Outcome(path=path, default=default, changes=changes, warnings=plan.warnings)


def _default_after(plan: Plan, rows: Mapping[str, ServedModel], changes: list[Change]) -> str | None:
    """Where the file names none: the default of now unless it is switched off, else the file's first that is not."""
    off = {change.name for change in changes if change.action == "switched_off"}
    off |= {wanted.name for wanted in plan.models if wanted.options.get("load_mode") == "off"}
    now = next((row.name for row in rows.values() if row.is_default), None)
    if now and now not in off:
        return now
    return next((wanted.name for wanted in plan.models if wanted.name not in off), now)


def _check_all(plan: Plan) -> dict[str, Inspected]:
    problems = []
    for wanted in plan.models:
        try:
            check_header(wanted.path)
        except RegistrationError as error:
            problems.append(f"{wanted.place}.path: {error.message}")
        else:
            models_yaml_adapters.check_all(wanted.adapters, wanted.path)
            problems += wanted.adapters.problems
    if problems:
        raise ModelsYamlError("models_yaml_invalid", problems)
    return {}


def _inspect_all(
    plan: Plan, rows: Mapping[str, ServedModel], progress: Progress | None, trial: Trial | None
) -> dict[str, Inspected]:
    _check_all(plan)  # quick, so a typing error at the end of the file does not wait for hashing at its start
    problems, inspected = [], {}
    for wanted in plan.models:
        try:
            registry.check_template(wanted.options.get("chat_template", ""), wanted.name)
        except RegistrationError as error:
            problems.append(f"{wanted.place}.chat_template: {error.message}")
            continue
        try:
            inspected[wanted.name] = registry.examine(
                wanted.path, known=rows.get(wanted.name), progress=progress, trial=trial
            )
        except RegistrationError as error:
            problems.append(f"{wanted.place}.path: {error.message}")
        else:
            base = Base(path=wanted.path, digest=inspected[wanted.name].digest)
            models_yaml_adapters.examine_all(wanted.adapters, base, progress, trial)
            problems += wanted.adapters.problems
    if problems:
        raise ModelsYamlError("models_yaml_invalid", problems)
    return inspected


def _compare(wanted: Wanted, row: ServedModel | None, inspected: Inspected | None) -> Change:
    adapters = models_yaml_adapters.differences(wanted.adapters)
    if row is None:
        return Change(name=wanted.name, action="created", details=adapters)
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
    details |= adapters
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
            registry.make_default(ServedModel.objects.get(name=default).pk)


def _switch_off(names: list[str]) -> None:
    if names:
        keys = ServedModel.objects.filter(name__in=names).values_list("pk", flat=True)
        registry.set_load_mode(keys, ServedModel.LoadMode.OFF)


def _save(wanted: Wanted, inspected: Inspected, details: Mapping[str, str]) -> list[str]:
    try:
        row = registry.save(wanted.name, inspected, granted_tenants=wanted.granted_tenants, **wanted.options)
    except RegistrationError as error:
        return [f"{wanted.place}.{key}: {' '.join(texts)}" for key, texts in error.fields.items()]
    return models_yaml_adapters.apply(wanted.adapters, row, details)

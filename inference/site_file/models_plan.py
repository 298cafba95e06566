"""What models.yaml wants of each model, understood with its problems; touches no model file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accounts.models import Tenant
from inference.catalog import model_rows
from inference.models import ServedModel
from inference.site_file import adapters_yaml, aliases_yaml, variants_yaml
from inference.site_file.adapters_yaml import AdapterPlan
from inference.site_file.aliases_yaml import AliasPlan
from inference.site_file.models_form import Entry, File, Options
from inference.site_file.variants_yaml import VariantPlan
from inference.vetting.inspection import absolute


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One model as the file wants it. `place` is where it stands in the file; `options` are model_rows.save's."""

    place: str
    name: str
    path: Path
    sha256: str | None = None
    options: dict[str, Any]
    granted_tenants: list[Tenant] | None
    adapters: AdapterPlan = field(default_factory=AdapterPlan)
    aliases: AliasPlan = field(default_factory=AliasPlan)
    variants: VariantPlan = field(default_factory=VariantPlan)


@dataclass(slots=True)
class Plan:
    """The whole file, understood. `default` is the name of the wanted default, if the file says."""

    path: Path
    models: list[Wanted] = field(default_factory=list)
    default: str | None = None
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    coming: Mapping[str, Tenant] = field(default_factory=dict)


def understand(file: File, path: Path, coming: Mapping[str, Tenant] | None = None) -> Plan:
    """What the file asks for, with its problems. coming: tenants by name that will be saved before it is applied."""
    plan = Plan(path, coming=coming or {})
    rows = {row.name: row for row in ServedModel.objects.all()}
    for position, entry in enumerate(file.models):
        _plan_entry(plan, f"models.{position}", entry, file.defaults, rows)
    _check_names(plan)
    plan.default = _plan_default(plan, file.default_model)
    return plan


def _plan_entry(plan: Plan, place: str, entry: Entry, defaults: Options, rows: Mapping[str, ServedModel]) -> None:
    given = {**defaults.given(), **entry.given()}
    plan.problems += [f"{place}.{key}: {sentence}" for key, sentence in _refusals(given)]
    plan.warnings += [f"{place}.{key}: {sentence}" for key, sentence in _ignored(given)]
    path = _path_of(entry, plan.path.parent, rows.get(entry.id))
    if path is None:
        plan.problems.append(f"{place}.path: name the .gguf file, or put it beside this file as {entry.id}.gguf")
        return
    tenants = _tenants(plan, place, given.get("granted_tenants")) if "granted_tenants" in given else None
    listed = entry.adapters or []
    adapters = adapters_yaml.plan_adapters(place, listed, plan.path.parent, entry.id, plan.coming)
    names = {*adapters.known, *(each.name for each in adapters.wanted)}
    aliases = aliases_yaml.plan_aliases(place, entry.adapter_aliases or {}, entry.id, names)
    variants = variants_yaml.plan_variants(place, entry.variants or [], plan.path.parent, entry.id)
    plan.problems += [*adapters.problems, *aliases.problems, *variants.problems]
    plan.models.append(
        Wanted(
            place=place,
            name=entry.id,
            path=path,
            sha256=entry.sha256,
            options=_options(given),
            granted_tenants=tenants,
            adapters=adapters,
            aliases=aliases,
            variants=variants,
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
    """model_rows.save's options; null becomes the field's default."""
    options = {name: given[name] for name in model_rows.OPTIONS if name in given}
    if given.get("max_context") is not None:
        options["n_ctx"] = given["max_context"]
    if given.get("n_gpu_layers") is None and given.get("device") in {"cpu", "cuda", "mps"}:
        options["n_gpu_layers"] = 0 if given["device"] == "cpu" else -1
    fresh = ServedModel()
    return {name: getattr(fresh, name) if value is None else value for name, value in options.items()}


def _tenants(plan: Plan, place: str, names: list[str] | None) -> list[Tenant]:
    found = adapters_yaml.tenants_named(names or [], plan.coming)
    plan.problems += [
        f"{place}.granted_tenants: there is no tenant {name!r}" for name in names or [] if name not in found
    ]
    return [found[name] for name in dict.fromkeys(names or []) if name in found]


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

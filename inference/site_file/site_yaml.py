"""The whole configuration as a file: models.yaml with plans, tenants, prices and limits for a time beside the models.

A file without `plans` and `tenants` is a models.yaml, and is read, bounded and refused by the same code
(models_yaml.py). No secret is in it: keys are named by their public part. Read and compared first, written in
one transaction. Called by export_config, diff_config and apply_config; the format is described in docs/commands.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from django.db import transaction
from pydantic import BaseModel, ConfigDict, Field

from accounts.identity.origins import MAX_ORIGINS
from accounts.limits.precedence import LIMIT_NAMES, MAX_LIMIT, NORMAL_WEIGHT
from accounts.models import MAX_SLOTS, MAX_WEIGHT, APIKey, Plan, Scope, Tenant
from inference.catalog import adapters, granting, model_rows
from inference.models import MAX_SCALE, Adapter, ModelVariant, ServedModel
from inference.site_file import aliases_yaml, models_yaml, rules_yaml, variants_yaml, vectors_yaml
from inference.site_file.models_form import MAX_MODELS, Entry, File, ModelsYamlError, parse_text
from inference.site_file.models_plan import understand
from inference.site_file.models_yaml import Prepared
from inference.site_file.plan import Change, SitePlan, Wish, compare_row, refuse_twice, save
from inference.site_file.rules_yaml import MAX_PRICES, MAX_RULES, LimitRuleEntry, PriceEntry
from inference.site_file.vectors_yaml import Vectors
from inference.vetting.inspection import Progress, RegistrationError
from inference.vetting.trial import Trial

MAX_FILE_BYTES = 32 << 20
MAX_PLANS = 1000
MAX_TENANTS = 100_000
MAX_KEYS = 10_000
MAX_GRANTS = 1000
MAX_POSITION = 2**31 - 1
ALLOWED = ("allowed_models", "allowed_adapters")

Limit = int | None
Names = list[str] | None
PLAN_FIELDS = ("role", *LIMIT_NAMES, *ALLOWED, "redis_outage_policy", "weight", "max_slots")
Scale = Annotated[float, Field(ge=-MAX_SCALE, le=MAX_SCALE, allow_inf_nan=False)]


# The form of the file


class PlanEntry(BaseModel):
    """A plan. A limit that is absent stays as it is; null is unlimited."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(min_length=1, max_length=64)
    role: Literal["admin", "standard", "free"] = "standard"
    requests_per_minute: Limit = Field(None, ge=0, le=MAX_LIMIT)
    tokens_per_minute: Limit = Field(None, ge=0, le=MAX_LIMIT)
    concurrent_requests: Limit = Field(None, ge=0, le=MAX_LIMIT)
    concurrent_streams: Limit = Field(None, ge=0, le=MAX_LIMIT)
    queue_length: Limit = Field(None, ge=0, le=MAX_LIMIT)
    monthly_tokens: Limit = Field(None, ge=0, le=MAX_LIMIT)
    monthly_requests: Limit = Field(None, ge=0, le=MAX_LIMIT)
    max_context: Limit = Field(None, ge=0, le=MAX_LIMIT)
    max_output: Limit = Field(None, ge=0, le=MAX_LIMIT)
    allowed_models: Names = None
    allowed_adapters: Names = None
    redis_outage_policy: Literal["", "closed", "open"] = ""
    weight: int = Field(NORMAL_WEIGHT, ge=1, le=MAX_WEIGHT)
    max_slots: int | None = Field(None, ge=1, le=MAX_SLOTS)


class KeyEntry(BaseModel):
    """A key that is there already: its text cannot be in a file, so a file cannot make one."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prefix: str = Field(min_length=1, max_length=12)
    name: str = Field(min_length=1, max_length=100)
    scopes: list[Literal["generate", "usage", "operator"]] = Field(min_length=1, max_length=len(Scope.values))
    limits: dict[str, Limit] = Field(default_factory=dict)
    allowed_models: Names = None
    allowed_adapters: Names = None


class TenantEntry(BaseModel):
    """A tenant. `adapters`: model → adapter → its number in llama.cpp's dialect (null: the next); no others.
    `default_vectors`: model → adapter → scale."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(min_length=1, max_length=100)
    plan: str = Field(min_length=1, max_length=64)
    status: Literal["active", "suspended"] = "active"
    quota_anchor_day: int = Field(1, ge=1, le=28)
    response_days: int | None = Field(None, ge=1, le=400)
    allowed_origins: list[str] = Field(default_factory=list, max_length=MAX_ORIGINS)
    limits: dict[str, Limit] = Field(default_factory=dict)
    allowed_models: Names = None
    allowed_adapters: Names = None
    adapters: dict[str, dict[str, int | None]] | None = Field(None, max_length=MAX_GRANTS)
    default_vectors: dict[str, dict[str, Scale]] | None = Field(None, max_length=MAX_GRANTS)
    keys: list[KeyEntry] = Field(default_factory=list, max_length=MAX_KEYS)


class SiteFile(File):
    """models.yaml with what it names tenants by. Only here may there be no model."""

    plans: list[PlanEntry] = Field(default_factory=list, max_length=MAX_PLANS)
    tenants: list[TenantEntry] = Field(default_factory=list, max_length=MAX_TENANTS)
    prices: list[PriceEntry] = Field(default_factory=list, max_length=MAX_PRICES)
    limit_rules: list[LimitRuleEntry] = Field(default_factory=list, max_length=MAX_RULES)
    models: list[Entry] = Field(default_factory=list, max_length=MAX_MODELS)


def parse(text: str, place: str) -> SiteFile:
    """Raises ModelsYamlError with every problem."""
    return parse_text(text, SiteFile, place)


def prepare(
    file: SiteFile,
    path: Path,
    *,
    dry_run: bool = False,
    prune: bool = False,
    progress: Progress | None = None,
    trial: Trial | None = None,
) -> SitePlan:
    """Understand and compare; writes nothing. `path` is where the file is: paths of models are relative to its folder.

    dry_run: model files are not hashed or loaded. prune: what its lists do not name is switched off (models) or
    suspended (tenants); a file without the list is not about them. Raises ModelsYamlError with every problem at once.
    """
    plan = SitePlan()
    _compare_plans(plan, file)
    _compare_tenants(plan, file, prune and "tenants" in file.model_fields_set)
    if "prices" in file.model_fields_set:
        rules_yaml.compare_prices(plan, file.prices)
    if "limit_rules" in file.model_fields_set:
        rules_yaml.compare_rules(plan, file.limit_rules)
    coming = {name: row for name, row in plan.tenants.items() if row.pk is None}
    wanted = understand(file, path, coming)
    plan.problems += wanted.problems
    _check_grants(plan, file)
    if plan.problems:
        raise ModelsYamlError("config_invalid", plan.problems)
    prunes_models = prune and "models" in file.model_fields_set
    plan.models = models_yaml.prepare(wanted, dry_run=dry_run, prune=prunes_models, progress=progress, trial=trial)
    plan.warnings += wanted.warnings
    plan.changes += _model_changes(plan.models)
    return plan


def _model_changes(prepared: Prepared) -> Iterator[Change]:
    for each in prepared.changes:
        yield Change(kind="model", name=each.name, action=each.action, details=each.details)
    if prepared.default != prepared.default_now and prepared.default is not None:
        details = {"default_model": f"{prepared.default_now} → {prepared.default}"}
        yield Change(kind="default", name=prepared.default, action="updated", details=details)


def _compare_plans(plan: SitePlan, file: SiteFile) -> None:
    plan.plans = {row.name: row for row in Plan.objects.all()}
    refuse_twice(plan, "plans", [entry.name for entry in file.plans])
    named = {entry.name for entry in file.plans}
    for place, entry in enumerate(file.plans):
        row = plan.plans.setdefault(entry.name, Plan(name=entry.name))
        given = {name: getattr(entry, name) for name in PLAN_FIELDS if name in entry.model_fields_set}
        compare_row(plan, "plan", f"plans.{place}", row, given)
    plan.changes += [Change(kind="plan", name=name, action="left") for name in plan.plans if name not in named]


def _compare_tenants(plan: SitePlan, file: SiteFile, prune: bool) -> None:
    plan.tenants = {row.name: row for row in Tenant.objects.select_related("plan").order_by("pk")}
    refuse_twice(plan, "tenants", [entry.name for entry in file.tenants])
    named = {entry.name for entry in file.tenants}
    others = [row for name, row in plan.tenants.items() if name not in named]
    vectors = vectors_yaml.read()
    for place, entry in enumerate(file.tenants):
        where = f"tenants.{place}"
        row = plan.tenants.setdefault(entry.name, Tenant(name=entry.name))
        if entry.plan not in plan.plans:
            plan.problems.append(f"{where}.plan: there is no plan {entry.plan!r}, here or in the database")
            continue
        given = {
            name: getattr(entry, source)
            for name, source in TENANT_FIELDS.items()
            if source in entry.model_fields_set or source == "plan"
        }
        given["plan"] = plan.plans[entry.plan]
        details = _grant_details(plan, where, entry, row)
        if entry.default_vectors is not None:
            plan.vectors[entry.name] = entry.default_vectors
            details |= vectors_yaml.differences(vectors.get(row.pk or 0, {}), entry.default_vectors)
        compare_row(plan, "tenant", where, row, given, more=details, words=TENANT_FIELDS)
        _compare_keys(plan, where, entry, row)
    for row in others:
        _compare_unnamed(plan, row, prune)


TENANT_FIELDS = {
    "plan": "plan",
    "status": "status",
    "quota_anchor_day": "quota_anchor_day",
    "response_days": "response_days",
    "allowed_origins": "allowed_origins",
    "limit_overrides": "limits",
    "allowed_models": "allowed_models",
    "allowed_adapters": "allowed_adapters",
}
"""Field of the row → key in the file."""


def _compare_unnamed(plan: SitePlan, row: Tenant, prune: bool) -> None:
    if not prune or row.status == Tenant.Status.SUSPENDED:
        plan.changes.append(Change(kind="tenant", name=row.name, action="left"))
        return
    row.status = Tenant.Status.SUSPENDED
    plan.wishes.append(Wish(row, ["status"]))
    plan.changes.append(Change(kind="tenant", name=row.name, action="suspended"))


def _compare_keys(plan: SitePlan, place: str, entry: TenantEntry, tenant: Tenant) -> None:
    """Keys that are not there cannot be made from a file: that is said, and is no difference."""
    wanted = {key.prefix: key for key in entry.keys}
    rows = {key.public_id: key for key in APIKey.objects.filter(public_id__in=wanted).select_related("tenant")}
    for number, key in enumerate(entry.keys):
        where, row = f"{place}.keys.{number}", rows.get(key.prefix)
        if row is None or row.revoked_at is not None:
            state = "is not there" if row is None else "is revoked"
            plan.warnings.append(f"{where}: the key {key.name!r} {state}: issue another with `manage.py create_key`.")
        elif row.tenant_id != tenant.pk:
            plan.problems.append(f"{where}.prefix: this is a key of another tenant")
        else:
            given = {"name": key.name, "scopes": list(key.scopes)}
            optional = {name: TENANT_FIELDS[name] for name in ("limit_overrides", *ALLOWED)}
            given |= {name: getattr(key, word) for name, word in optional.items() if word in key.model_fields_set}
            compare_row(plan, "key", where, row, given, words=TENANT_FIELDS)


def _grant_details(plan: SitePlan, place: str, entry: TenantEntry, tenant: Tenant) -> dict[str, str]:
    if entry.adapters is None:
        return {}
    wanted = {(model, name): at for model, names in entry.adapters.items() for name, at in names.items()}
    plan.grants[entry.name] = wanted
    now = _granted(tenant)
    details = {}
    for (model, name), position in wanted.items():
        where = f"{place}.adapters.{model}.{name}"
        if position is not None and not 0 <= position <= MAX_POSITION:
            plan.problems.append(f"{where}: a position is a number from 0 to {MAX_POSITION}")
        elif (model, name) not in now:
            if any(position == at and model == of for (of, _), at in now.items()):
                plan.problems.append(f"{where}: position {position} is another adapter's")
            details[f"adapters.{model}.{name}"] = "granted"
        elif position not in (None, now[model, name]):
            plan.problems.append(
                f"{where}: its position is {now[model, name]} and stays while it is granted; revoke it first"
            )
    own = set(tenant.own_adapters.values_list("base_model__name", "name")) if tenant.pk else set()
    details.update({f"adapters.{model}.{name}": "revoked" for model, name in {*now} - {*wanted} - own})
    return details


def _granted(tenant: Tenant) -> dict[tuple[str, str], int]:
    if not tenant.pk:
        return {}
    rows = tenant.adapter_grants.values_list("base_model__name", "adapter__name", "position")
    return {(model, name): position for model, name, position in rows}


def _check_grants(plan: SitePlan, file: SiteFile) -> None:
    """Grants name adapters that are there, or come with this file; a number of a tenant means one adapter."""
    listed = [(model.id, adapter) for model in file.models for adapter in model.adapters or ()]
    known = {(model, adapter.name) for model, adapter in listed}
    known.update(Adapter.objects.values_list("base_model__name", "name"))
    if plan.grants and any(adapter.granted_tenants is not None for _, adapter in listed):
        plan.problems.append("models: adapters have granted_tenants and tenants have adapters: keep one of them")
    for tenant, vectors in plan.vectors.items():
        plan.problems += vectors_yaml.check(f"tenants: {tenant}", vectors, known)
    for tenant, wanted in plan.grants.items():
        taken: set[tuple[str, int]] = set()
        for (model, name), position in wanted.items():
            if (model, name) not in known:
                plan.problems.append(f"tenants: {tenant}: there is no adapter {model}:{name}")
            if position is not None and (model, position) in taken:
                plan.problems.append(f"tenants: {tenant}: position {position} of {model} is there twice")
            taken.add((model, -1 if position is None else position))


# Writing it


def apply(plan: SitePlan) -> None:
    """All of it in one transaction. Raises ModelsYamlError; then nothing has changed."""
    assert plan.models is not None
    try:
        with transaction.atomic():
            for wish in plan.wishes:
                save(wish)
            before = set(Adapter.objects.values_list("pk", flat=True))
            models_yaml.apply(plan.models)
            for name, wanted in plan.grants.items():
                _grant(plan.tenants[name], wanted, before)
            for name, vectors in plan.vectors.items():
                vectors_yaml.apply(plan.tenants[name], vectors)
    except RegistrationError as error:
        raise ModelsYamlError("config_invalid", [error.message]) from error
    finally:
        adapters.forget()  # what was read within a transaction that was taken back


def _grant(tenant: Tenant, wanted: Mapping[tuple[str, str], int | None], before: set[int]) -> None:
    """Revoke what is not wanted, then grant. A new adapter is granted to its owner when it is saved, at a position that
    nobody has seen yet: it moves to the one in the file."""
    wanted = dict(wanted)
    for grant in tenant.adapter_grants.select_related("adapter__base_model"):
        row = grant.adapter
        name = (row.base_model.name, row.name)
        is_new = row.pk not in before
        if is_new:
            wanted.setdefault(name, None)
        if is_new or (name not in wanted and row.owner_id != tenant.pk):
            granting.revoke(row, tenant)
    rows = {(row.base_model.name, row.name): row for row in Adapter.objects.select_related("base_model", "owner")}
    for name, position in sorted(wanted.items(), key=lambda item: (item[1] is None, item[1] or 0)):
        granting.grant(rows[name], tenant, position)


# The file of what there is


def export() -> dict[str, Any]:
    """The configuration as JSON-able data, in the order in which things were made. No secret, no usage."""
    found: dict[str, Any] = {"plans": _plans(), "tenants": _tenants()}
    found |= {"prices": rules_yaml.prices(), "limit_rules": rules_yaml.rules()}
    default = ServedModel.objects.filter(is_default=True).exclude(load_mode=ServedModel.LoadMode.OFF).first()
    if default is not None:
        found["default_model"] = default.name
    return {**found, "models": _models()}


def _plans() -> list[dict[str, Any]]:
    return [{name: getattr(row, name) for name in ("name", *PLAN_FIELDS)} for row in Plan.objects.order_by("pk")]


def _tenants() -> list[dict[str, Any]]:
    rows = Tenant.objects.select_related("plan").order_by("pk")
    rows = rows.prefetch_related("adapter_grants__adapter__base_model", "api_keys")
    vectors = vectors_yaml.read()
    return [_tenant(row, vectors.get(row.pk, {})) for row in rows]


def _tenant(row: Tenant, vectors: Vectors) -> dict[str, Any]:
    granted: dict[str, dict[str, int]] = {}
    for grant in row.adapter_grants.all():
        granted.setdefault(grant.adapter.base_model.name, {})[grant.adapter.name] = grant.position
    keys = sorted((key for key in row.api_keys.all() if key.revoked_at is None), key=lambda key: key.pk)
    return {
        "name": row.name,
        "plan": row.plan.name,
        "status": row.status,
        "quota_anchor_day": row.quota_anchor_day,
        "response_days": row.response_days,
        "allowed_origins": row.allowed_origins,
        "limits": row.limit_overrides,
        "allowed_models": row.allowed_models,
        "allowed_adapters": row.allowed_adapters,
        "adapters": granted,
        "default_vectors": vectors,
        "keys": [
            {
                "prefix": key.public_id,
                "name": key.name,
                "scopes": key.scopes,
                "limits": key.limit_overrides,
                "allowed_models": key.allowed_models,
                "allowed_adapters": key.allowed_adapters,
            }
            for key in keys
        ],
    }


def _models() -> list[dict[str, Any]]:
    rows = ServedModel.objects.select_related("draft_model").order_by("pk")
    of_aliases = (f"adapter_aliases__{name}" for name in aliases_yaml.VERSIONS)
    parts = ("granted_tenants", "adapters__owner", "variants", *of_aliases)
    return [_model(row) for row in rows.prefetch_related(*parts)]


def _model(row: ServedModel) -> dict[str, Any]:
    options = {name: getattr(row, name) for name in model_rows.OPTIONS}
    options["draft_model"] = row.draft_model.name if row.draft_model else None
    made: dict[str, Any] = {"id": row.name, "path": row.path, "sha256": row.digest, **options}
    made["granted_tenants"] = sorted(tenant.name for tenant in row.granted_tenants.all())
    made["adapters"] = [_adapter(each) for each in sorted(row.adapters.all(), key=lambda each: each.pk)]
    made["adapter_aliases"] = {each.name: aliases_yaml.as_entry(each) for each in row.adapter_aliases.all()}
    made["variants"] = [_variant(each) for each in row.variants.all() if each.source_digest == row.digest]
    return made


def _variant(row: ModelVariant) -> dict[str, Any]:
    settings = {name: getattr(row, name) for name in variants_yaml.SETTINGS}
    return {"name": row.name, "path": row.path, "sha256": row.digest, **settings, "active": row.is_active}


def _adapter(row: Adapter) -> dict[str, Any]:
    return {
        "name": row.name,
        "path": row.path,
        "sha256": row.digest,
        "default_scale": row.default_scale,
        "owner": row.owner.name if row.owner else None,
        "visibility": row.visibility,
        "enabled": row.enabled,
    }


def as_yaml(content: Mapping[str, Any]) -> str:
    dumped: str = yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True, width=120)
    return dumped

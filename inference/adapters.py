"""Which LoRA adapters are served, to whom, and at what scale: the one place that writes their rows and answers by name.

Readers get frozen snapshots from a cache of this process, per tenant and model, as old as the registry's at most. Runs
on admission threads, in workers, commands and the admin; never imports llama_cpp. Files are checked in adapter_file.py.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from django.core.exceptions import ValidationError
from django.db import IntegrityError, transaction
from django.db.models import Max, Q

from accounts import principals
from accounts.models import Tenant
from accounts.refusals import Refusal
from inference import registry
from inference.adapter_file import Base, ExaminedAdapter, inspect_adapter
from inference.engine.types import AdapterVector
from inference.inspection import Progress, RegistrationError, absolute, stamp_of
from inference.models import MAX_SCALE, Adapter, AdapterGrant, DefaultVector, ServedModel
from inference.registry import HasTenant, Served
from inference.trial import Trial

MAX_VECTOR = 16
"""Adapters of one request; each adds its matrices to every step."""
MAX_VIEWS = 4096
OPTIONS = ("default_scale", "owner", "visibility", "enabled")
"""Fields of Adapter that registration may set."""

Wanted = Sequence[tuple[str | int, float | None]]
"""What a request asks for: (name, or position as llama.cpp's id; scale, or None for the adapter's own)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantedAdapter:
    """An adapter that one tenant may use on one model. `position` is its id in llama.cpp's dialect."""

    id: int
    name: str
    digest: str
    path: Path
    default_scale: float
    position: int
    rank: int
    alpha: float
    task_name: str
    prompt_prefix: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFile:
    """What a worker loads. `digest` is what vectors name it by."""

    id: int
    name: str
    digest: str
    path: Path
    size_bytes: int
    rank: int


# Reading


@dataclass(frozen=True, slots=True)
class _View:
    """The adapters of one tenant on one model, by position. `read_at` is monotonic seconds."""

    adapters: tuple[GrantedAdapter, ...]
    by_key: Mapping[str | int, GrantedAdapter]
    default: tuple[tuple[GrantedAdapter, float], ...]
    read_at: float
    version: int


_lock = threading.Lock()
_views: dict[tuple[int, int], _View] = {}
_generation = 0


def forget() -> None:
    """Read the adapters anew at the next question. Every change in this process calls it."""
    global _generation
    with _lock:
        _views.clear()
        _generation += 1


def _view_of(who: HasTenant | int, served: Served) -> _View:
    key = (who if isinstance(who, int) else who.tenant_id, served.id)
    cached, generation, version = _views.get(key), _generation, principals.CACHE.generation
    if cached and cached.version == version and time.monotonic() - cached.read_at < registry.CACHE_SECONDS:
        return cached
    fresh = _read(*key, version)
    with _lock:
        if generation == _generation:  # else a change came in between: what was read may be older than it
            if len(_views) >= MAX_VIEWS:
                _views.clear()
            _views[key] = fresh
    return fresh


def _read(tenant_id: int, base_id: int, version: int) -> _View:
    """Three queries at most; one for a model without adapters."""
    read_at = time.monotonic()
    rows = Adapter.objects.filter(base_model_id=base_id).order_by("pk")
    shared = Q(visibility=Adapter.Visibility.SHARED)
    known = {row.pk: row for row in rows.filter(shared | Q(grants__tenant_id=tenant_id)).distinct()}
    places = _places(tenant_id, base_id, known) if known else {}
    adapters = tuple(_granted(known[pk], place) for pk, place in places.items() if known[pk].enabled)
    by_key: dict[str | int, GrantedAdapter] = {adapter.position: adapter for adapter in adapters}
    by_key.update({adapter.name: adapter for adapter in adapters})
    return _View(adapters, by_key, _read_default(tenant_id, base_id, adapters), read_at, version)


def _places(tenant_id: int, base_id: int, known: Iterable[int]) -> dict[int, int]:
    """Row number → position: grants keep theirs, and shared adapters without a grant follow, the oldest first."""
    grants = AdapterGrant.objects.filter(tenant_id=tenant_id, base_model_id=base_id).order_by("position")
    places = {grant.adapter_id: grant.position for grant in grants if grant.adapter_id in known}
    following = max(places.values(), default=-1) + 1
    return places | {pk: following + nth for nth, pk in enumerate(pk for pk in known if pk not in places)}


def _granted(row: Adapter, position: int) -> GrantedAdapter:
    return GrantedAdapter(
        id=row.pk,
        name=row.name,
        digest=row.digest,
        path=Path(row.path),
        default_scale=row.default_scale,
        position=position,
        rank=row.rank,
        alpha=row.alpha,
        task_name=row.task_name,
        prompt_prefix=row.prompt_prefix,
    )


def _read_default(
    tenant_id: int, base_id: int, adapters: Sequence[GrantedAdapter]
) -> tuple[tuple[GrantedAdapter, float], ...]:
    """What was switched off or revoked since then is left out."""
    if not adapters:
        return ()
    row = DefaultVector.objects.filter(tenant_id=tenant_id, base_model_id=base_id).first()
    by_id = {adapter.id: adapter for adapter in adapters}
    return tuple((by_id[pk], scale) for pk, scale in (row.scales if row else ()) if pk in by_id)


def granted(who: HasTenant | int, served: Served) -> tuple[GrantedAdapter, ...]:
    """The adapters that a principal (or a tenant, by its row number) may use on this model, by position."""
    return _view_of(who, served).adapters


def default_vector(who: HasTenant | int, served: Served) -> tuple[tuple[GrantedAdapter, float], ...]:
    """The tenant's own default for this model: adapters and scales that are not 0; () unless it was set."""
    return _view_of(who, served).default


def resolve_vector(who: HasTenant | int, served: Served, wanted: Wanted | None) -> AdapterVector:
    """What `wanted` means for this tenant, as the engine takes it: None is the tenant's default, [] no adapter.

    Scale 0 equals no adapter and is dropped. Raises Refusal: `adapter_not_found` for what does not exist or is not
    granted, in the same words; `validation_error` for a scale out of range, or an adapter that is named twice.
    """
    view = _view_of(who, served)
    return vector(view.default if wanted is None else _chosen(view, wanted))


def resolve_model(name: str | None, principal: HasTenant) -> tuple[Served, Wanted | None]:
    """registry.resolve, where a name may also be `model:adapter`; then with that adapter at its own scale, else None.

    Raises Refusal as registry.resolve does; `model_not_found` for adapters too.
    """
    base, colon, adapter = (name or "").partition(":")  # no name of a model holds a colon
    if name is None or not colon:
        return registry.resolve(name, principal), None
    unknown = Refusal(
        "model_not_found", f"There is no model {name[:100]!r}. GET /v1/models lists yours.", model=name[:100]
    )
    try:
        served = registry.resolve(base, principal)
    except Refusal as refusal:
        raise (unknown if refusal.code == "model_not_found" else refusal) from None
    if adapter not in _view_of(principal, served).by_key:
        raise unknown
    return served, [(adapter, None)]


def files_of(served: Served) -> tuple[AdapterFile, ...]:
    """What a worker that holds this model may be asked for; one query, not from the cache."""
    rows = Adapter.objects.filter(base_model_id=served.id, enabled=True).order_by("pk")
    return tuple(
        AdapterFile(
            id=row.pk,
            name=row.name,
            digest=row.digest,
            path=Path(row.path),
            size_bytes=row.size_bytes,
            rank=row.rank,
        )
        for row in rows
    )


def vector(pairs: Iterable[tuple[GrantedAdapter, float]]) -> AdapterVector:
    """Sorted (digest, scale) pairs. Two names of one file are one adapter, whose scales add up."""
    sums: dict[str, float] = {}
    for adapter, scale in pairs:
        sums[adapter.digest] = sums.get(adapter.digest, 0.0) + scale
    return tuple(sorted((digest, scale) for digest, scale in sums.items() if scale != 0.0))


def _chosen(view: _View, wanted: Wanted) -> list[tuple[GrantedAdapter, float]]:
    if len(wanted) > MAX_VECTOR:
        raise _invalid(f"{MAX_VECTOR} adapters are the most of one request.", ())
    chosen: dict[int, tuple[GrantedAdapter, float]] = {}
    for place, (key, scale) in enumerate(wanted):
        adapter = None if isinstance(key, bool) else view.by_key.get(key)
        if adapter is None:
            raise Refusal("adapter_not_found", f"There is no adapter {str(key)[:100]!r} for this model.")
        if adapter.id in chosen:
            raise _invalid(f"The adapter {adapter.name!r} is there twice.", (place,))
        chosen[adapter.id] = (adapter, adapter.default_scale if scale is None else _checked(scale, place))
    return list(chosen.values())


def _checked(scale: float, place: int) -> float:
    if isinstance(scale, bool) or not math.isfinite(scale) or abs(scale) > MAX_SCALE:
        raise _invalid(f"A scale is a number from {-MAX_SCALE:g} to {MAX_SCALE:g}.", (place, "scale"))
    return float(scale)


def _invalid(message: str, place: tuple[int | str, ...]) -> Refusal:
    loc = ["adapters", *(str(part) for part in place)]
    field = {"field": ".".join(loc), "loc": loc, "message": message, "type": "value_error"}
    return Refusal("validation_error", f"The request is not valid: {message}", fields=[field])


# The tenant's own default


def set_default_vector(
    who: HasTenant | int, served: Served, wanted: Wanted
) -> tuple[tuple[GrantedAdapter, float], ...]:
    """From now on this tenant's requests for this model that name no adapter have these; those not named have none.

    Raises Refusal as resolve_vector does; then nothing has changed. Idempotent, and silent where nothing changes.
    """
    tenant_id = who if isinstance(who, int) else who.tenant_id
    chosen = [(adapter, scale) for adapter, scale in _chosen(_view_of(who, served), wanted) if scale != 0.0]
    scales = [[adapter.id, scale] for adapter, scale in chosen]
    rows = DefaultVector.objects.filter(tenant_id=tenant_id, base_model_id=served.id)
    present = rows.first()
    if (present.scales if present else []) == scales:
        return tuple(chosen)
    with transaction.atomic():
        if scales:
            DefaultVector.objects.update_or_create(
                tenant_id=tenant_id, base_model_id=served.id, defaults={"scales": scales}
            )
        else:
            rows.delete()
        _changed_for(tenant_id)
    return tuple(chosen)


# Grants


def grant(adapter: Adapter, tenant: Tenant) -> AdapterGrant:
    """The tenant may use it from now on, at the position after its last one. Idempotent. Raises RegistrationError."""
    try:
        with transaction.atomic():
            Tenant.objects.select_for_update().get(pk=tenant.pk)  # positions of one tenant are given one by one
            present = AdapterGrant.objects.filter(adapter=adapter, tenant=tenant).first()
            if present is not None:
                return present
            last = AdapterGrant.objects.filter(tenant=tenant, base_model=adapter.base_model_id).aggregate(
                last=Max("position", default=-1)
            )["last"]
            made = AdapterGrant.objects.create(
                adapter=adapter, tenant=tenant, base_model_id=adapter.base_model_id, position=last + 1
            )
            _changed_for(tenant.pk)
            return made
    except IntegrityError as error:
        raise RegistrationError("conflict", "The registry was changed at the same moment. Try again.") from error


def revoke(adapter: Adapter, tenant: Tenant) -> bool:
    """Whether it was granted. The other adapters of the tenant keep their positions; its default loses this one."""
    with transaction.atomic():
        count, _ = AdapterGrant.objects.filter(adapter=adapter, tenant=tenant).delete()
        if count:
            _leave_defaults([adapter.pk], DefaultVector.objects.filter(tenant=tenant))
            _changed_for(tenant.pk)
    return count > 0


def _leave_defaults(pks: Sequence[int], rows: Any) -> None:
    for row in rows.select_for_update():
        scales = [pair for pair in row.scales if pair[0] not in pks]
        if scales != row.scales:
            row.scales = scales
            row.save(update_fields=["scales", "updated_at"])


def _changed_for(tenant_id: int) -> None:
    """Every process reads this tenant's adapters anew once the transaction has committed."""
    forget()
    transaction.on_commit(forget)
    principals.announce_tenant(tenant_id)


# Registering


def register(
    path: str | Path,
    base: ServedModel,
    name: str,
    *,
    granted_tenants: Iterable[Tenant] = (),
    progress: Progress | None = None,
    force: bool = False,
    trial: Trial | None = None,
    **options: Any,
) -> Adapter:
    """Check the file and create or update the adapter `name` of `base`; options that are not given stay as they are.

    granted_tenants are granted it in addition. force: check again even if the file looks unchanged. Raises
    RegistrationError; then nothing has changed.
    """
    known = Adapter.objects.filter(base_model=base, name=name).first()
    examined = examine(path, base_of(base), known=known, progress=progress, force=force, trial=trial)
    return save(base, name, examined, granted_tenants=granted_tenants, **options)


def base_of(row: ServedModel) -> Base:
    return Base(path=Path(row.path), digest=row.digest)


def examine(
    path: str | Path,
    base: Base,
    *,
    known: Adapter | None = None,
    progress: Progress | None = None,
    force: bool = False,
    trial: Trial | None = None,
) -> ExaminedAdapter | None:
    """Check the file against its base; None if it is what is `known`. Raises RegistrationError."""
    place = absolute(path)
    if known and not force and is_unchanged(known, place, base):
        return None
    return inspect_adapter(place, base, progress=progress, trial=trial)


def is_unchanged(known: Adapter, path: Path, base: Base) -> bool:
    """Whether this is the file, and the base the one, that it was checked with."""
    stamp, digest = known.metadata.get("file"), known.metadata.get("base_digest")
    return known.path == str(path) and digest == base.digest and bool(stamp) and stamp == stamp_of(path)


def save(
    base: ServedModel,
    name: str,
    examined: ExaminedAdapter | None,
    *,
    granted_tenants: Iterable[Tenant] = (),
    **options: Any,
) -> Adapter:
    """Write the row of a checked file; None: of the file it has. Raises RegistrationError."""
    if unknown := set(options) - set(OPTIONS):
        raise TypeError(f"unknown options: {', '.join(sorted(unknown))}")
    try:
        with transaction.atomic():
            row = Adapter.objects.filter(base_model=base, name=name).first() or Adapter(base_model=base, name=name)
            if examined is not None:
                fill(row, examined)
            for option, value in options.items():
                setattr(row, option, value)
            row.clean_fields()
            row.clean()
            row.save()
            saved(row)
            for tenant in granted_tenants:
                grant(row, tenant)
    except ValidationError as error:
        fields = {field: [str(text) for text in texts] for field, texts in error.message_dict.items()}
        sentences = "; ".join(f"{field}: {' '.join(texts)}" for field, texts in fields.items())
        raise RegistrationError("invalid", sentences, fields) from error
    except IntegrityError as error:
        raise RegistrationError("conflict", "The registry was changed at the same moment. Try again.") from error
    return row


def fill(row: Adapter, examined: ExaminedAdapter) -> None:
    facts = examined.facts
    row.path = str(examined.path)
    row.digest = examined.digest
    row.size_bytes = facts.size_bytes
    row.rank = facts.rank
    row.alpha = facts.alpha
    row.targets = list(facts.targets)
    row.task_name = facts.task_name
    row.prompt_prefix = facts.prompt_prefix
    row.metadata = examined.metadata


def saved(row: Adapter) -> None:
    """Whoever writes an Adapter row calls this: its owner is granted it, and every process reads anew."""
    if row.owner is not None:
        grant(row, row.owner)
    changed()


def changed() -> None:
    """Adapters came, went or changed, for any tenant."""
    forget()
    transaction.on_commit(forget)
    registry.changed()


def set_enabled(pks: Iterable[int], enabled: bool) -> int:
    """Switch adapters on, or off: then they do not exist for tenants. Returns how many changed."""
    with transaction.atomic():
        count = Adapter.objects.filter(pk__in=list(pks)).exclude(enabled=enabled).update(enabled=enabled)
        changed()
    return count


def remove(pks: Iterable[int]) -> int:
    """Forget these adapters, with their grants."""
    with transaction.atomic():
        keys = list(pks)
        bases = Adapter.objects.filter(pk__in=keys).values_list("base_model_id", flat=True)
        _leave_defaults(keys, DefaultVector.objects.filter(base_model_id__in=list(bases)))
        Adapter.objects.filter(pk__in=keys).delete()
        changed()
    return len(keys)

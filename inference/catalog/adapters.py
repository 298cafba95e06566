"""Which LoRA adapters a tenant may use on a model, and what those that a request names mean: answers by name.

Readers get frozen snapshots from a cache of this process, per tenant and model, as old as the registry's at most. Runs
on admission threads, in workers, commands and the admin; never imports llama_cpp. Rows are written by adapter_rows.py
and granting.py.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from django.db.models import Q

from accounts.identity import known_keys
from accounts.limits.precedence import Allowed
from accounts.trail.refusals import Refusal
from inference.catalog import registry
from inference.catalog.alias_choice import goes_to_canary
from inference.catalog.served import HasTenant, Served
from inference.engine.types import AdapterVector
from inference.models import MAX_SCALE, Adapter, AdapterAlias, AdapterGrant, DefaultVector

MAX_VECTOR = 16
"""Adapters of one request; each adds its matrices to every step."""
MAX_VIEWS = 4096

Session = Callable[[], bytes]
"""What an alias with a canary chooses by."""
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
class GrantedAlias:
    """A name for one version of an adapter that a tenant may use, and for another one on trial if it may use that, too.
    share: percent of its conversations that the canary answers."""

    id: int
    name: str
    target: GrantedAdapter
    canary: GrantedAdapter | None
    share: int

    def version(self, tenant_id: int, session: Session) -> GrantedAdapter:
        """The one that answers, see alias_choice.py. session: asked for only where it matters."""
        if self.canary is None or not self.share:
            return self.target
        is_canary = goes_to_canary(
            tenant_id=tenant_id, alias_id=self.id, canary_id=self.canary.id, share=self.share, session=session()
        )
        return self.canary if is_canary else self.target


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The adapters of one request. names: of each adapter of the vector, as the tenant knows it. aliases: pairs of an
    alias that was asked for and the adapter that stands for it."""

    vector: AdapterVector
    names: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFile:
    """What a worker loads. `digest` is what vectors name it by."""

    id: int
    name: str
    digest: str
    path: Path
    size_bytes: int
    rank: int


class Usable(NamedTuple):
    """The adapters of one tenant on one model, by position, and its aliases there, by name."""

    adapters: tuple[GrantedAdapter, ...]
    aliases: tuple[GrantedAlias, ...]


# Reading


@dataclass(frozen=True, slots=True)
class _View:
    """The adapters of one tenant on one model, by position. `read_at` is monotonic seconds."""

    adapters: tuple[GrantedAdapter, ...]
    by_key: Mapping[str | int, GrantedAdapter]
    aliases: Mapping[str, GrantedAlias]
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
    return _narrowed(_tenant_views(who, [served.id])[served.id], who, served)


def _narrowed(view: _View, who: HasTenant | int, served: Served) -> _View:
    """The tenant's view as plan, tenant and key allow it."""
    allowed = None if isinstance(who, int) else who.allowed_adapters
    return view if allowed is None else _only(view, allowed, served.name)


def _only(view: _View, allowed: frozenset[str], model: str) -> _View:
    """Positions stay; what is not allowed does not exist, in the default vector neither."""
    ids = {each.id for each in view.adapters if is_named(each.name, model, allowed)}
    for alias in view.aliases.values():
        if is_named(alias.name, model, allowed):
            ids |= {each.id for each in (alias.target, alias.canary) if each is not None}
    adapters = tuple(each for each in view.adapters if each.id in ids)
    by_key = {key: each for key, each in view.by_key.items() if each.id in ids}
    default = tuple((each, scale) for each, scale in view.default if each.id in ids)
    aliases = {
        name: alias if alias.canary is None or alias.canary.id in ids else replace(alias, canary=None)
        for name, alias in view.aliases.items()
        if alias.target.id in ids
    }
    return replace(view, adapters=adapters, by_key=by_key, aliases=aliases, default=default)


def is_named(name: str, model: str, allowed: Allowed) -> bool:
    """Whether a list of allowed adapters names this adapter or alias. One that names an alias allows its versions."""
    return allowed is None or not allowed.isdisjoint((name, f"{model}:{name}"))


def _tenant_views(who: HasTenant | int, models: Collection[int]) -> dict[int, _View]:
    """By model; those that are not in memory by four queries at most, however many they are."""
    tenant = who if isinstance(who, int) else who.tenant_id
    generation, version, now = _generation, known_keys.CACHE.generation, time.monotonic()
    known = {model: _views.get((tenant, model)) for model in models}
    found = {
        model: view
        for model, view in known.items()
        if view and view.version == version and now - view.read_at < registry.CACHE_SECONDS
    }
    missing = [model for model in known if model not in found]
    if missing:
        fresh = _read(tenant, missing, version)
        found.update(fresh)
        with _lock:
            if generation == _generation:  # else a change came in between: what was read may be older than it
                if len(_views) + len(fresh) > MAX_VIEWS:
                    _views.clear()
                _views.update({(tenant, model): view for model, view in fresh.items()})
    return found


def _read(tenant_id: int, models: Sequence[int], version: int) -> dict[int, _View]:
    """Four queries at most; one for models without adapters."""
    read_at = time.monotonic()
    rows = Adapter.objects.filter(base_model_id__in=models).order_by("pk")
    shared = Q(visibility=Adapter.Visibility.SHARED)
    known: dict[int, dict[int, Adapter]] = {model: {} for model in models}
    for row in rows.filter(shared | Q(grants__tenant_id=tenant_id)).distinct():
        known[row.base_model_id][row.pk] = row
    has_any = any(known.values())
    grants = AdapterGrant.objects.filter(tenant_id=tenant_id, base_model_id__in=models).order_by("position")
    vectors = DefaultVector.objects.filter(tenant_id=tenant_id, base_model_id__in=models)
    granted_places = [(grant.adapter_id, grant.position) for grant in grants] if has_any else []
    scales = {row.base_model_id: row.scales for row in vectors} if has_any else {}
    aliases: dict[int, list[AdapterAlias]] = {model: [] for model in models}
    targets = [pk for rows_of_it in known.values() for pk in rows_of_it]
    for alias in AdapterAlias.objects.filter(base_model_id__in=models, target__in=targets) if has_any else ():
        aliases[alias.base_model_id].append(alias)
    return {
        model: _view(rows_of_it, granted_places, scales.get(model, ()), aliases[model], read_at, version)
        for model, rows_of_it in known.items()
    }


def _view(
    known: Mapping[int, Adapter],
    grants: Sequence[tuple[int, int]],
    scales: Iterable[tuple[int, float]],
    rows_of_aliases: Iterable[AdapterAlias],
    read_at: float,
    version: int,
) -> _View:
    """Of one model. In the default vector, what was switched off or revoked since then is left out."""
    places = _places(known, grants)
    adapters = tuple(_granted(known[pk], place) for pk, place in places.items() if known[pk].enabled)
    by_key: dict[str | int, GrantedAdapter] = {adapter.position: adapter for adapter in adapters}
    by_key.update({adapter.name: adapter for adapter in adapters})
    by_id = {adapter.id: adapter for adapter in adapters}
    default = tuple((by_id[pk], scale) for pk, scale in scales if pk in by_id)
    return _View(adapters, by_key, _aliases(rows_of_aliases, by_id), default, read_at, version)


def _aliases(rows: Iterable[AdapterAlias], by_id: Mapping[int, GrantedAdapter]) -> dict[str, GrantedAlias]:
    """Those whose target the tenant may use. For it there is no canary that it may not use."""
    return {
        row.name: GrantedAlias(
            id=row.pk,
            name=row.name,
            target=by_id[row.target_id],
            canary=by_id.get(row.canary_id or 0),
            share=row.share,
        )
        for row in rows
        if row.target_id in by_id
    }


def _places(known: Iterable[int], grants: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Row number → position: grants keep theirs, and shared adapters without a grant follow, the oldest first."""
    places = {adapter: position for adapter, position in grants if adapter in known}
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


def granted(who: HasTenant | int, served: Served) -> tuple[GrantedAdapter, ...]:
    """The adapters that a principal (or a tenant, by its row number) may use on this model, by position."""
    return _view_of(who, served).adapters


def granted_aliases(who: HasTenant | int, served: Served) -> tuple[GrantedAlias, ...]:
    """The aliases that a principal (or a tenant, by its row number) may use on this model, by name."""
    return _by_name(_view_of(who, served))


def usable_on(who: HasTenant | int, models: Collection[Served]) -> dict[int, Usable]:
    """What `granted` and `granted_aliases` say, of many models by their ids: four queries at most."""
    views = _tenant_views(who, [served.id for served in models])
    narrowed = {served.id: _narrowed(views[served.id], who, served) for served in models}
    return {model: Usable(view.adapters, _by_name(view)) for model, view in narrowed.items()}


def _by_name(view: _View) -> tuple[GrantedAlias, ...]:
    return tuple(sorted(view.aliases.values(), key=lambda alias: alias.name))


def default_vector(who: HasTenant | int, served: Served) -> tuple[tuple[GrantedAdapter, float], ...]:
    """The tenant's own default for this model: adapters and scales that are not 0; () unless it was set."""
    return _view_of(who, served).default


def choose(who: HasTenant | int, served: Served, wanted: Wanted | None, session: Session = bytes) -> Choice:
    """What `wanted` means for this tenant, as the engine takes it: None is the tenant's default, [] no adapter.

    session: see alias_choice.session_of. Scale 0 equals no adapter and is dropped.
    Raises Refusal: `adapter_not_found` for what does not exist or is not granted, in the same words;
    `validation_error` for a scale out of range, or an adapter that is named twice.
    """
    view, aliases = _view_of(who, served), dict[str, str]()
    if wanted is None:
        pairs: Sequence[tuple[GrantedAdapter, float]] = view.default
    else:
        tenant_id = who if isinstance(who, int) else who.tenant_id
        versions = {name: each.version(tenant_id, session) for name, each in _asked(view, wanted)}
        known: dict[str | int, GrantedAdapter] = {**view.by_key}
        known.update(versions)  # no adapter of the model has the name of an alias
        pairs = _chosen(known, wanted)
        aliases = {name: version.name for name, version in versions.items()}
    chosen = vector(pairs)
    names = {adapter.digest: adapter.name for adapter, _ in reversed(pairs)}
    return Choice(vector=chosen, names=tuple(names[digest] for digest, _ in chosen), aliases=tuple(aliases.items()))


def _asked(view: _View, wanted: Wanted) -> Iterator[tuple[str, GrantedAlias]]:
    for key, _ in wanted[:MAX_VECTOR]:
        if isinstance(key, str) and key in view.aliases:
            yield key, view.aliases[key]


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
    view = _view_of(principal, served)
    if adapter not in view.by_key and adapter not in view.aliases:
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


def named(who: HasTenant | int, served: Served, wanted: Wanted) -> list[tuple[GrantedAdapter, float]]:
    """The adapters that are named, with their scales, aliases apart. Raises Refusal as `choose` does."""
    return _chosen(_view_of(who, served).by_key, wanted)


def vector(pairs: Iterable[tuple[GrantedAdapter, float]]) -> AdapterVector:
    """Sorted (digest, scale) pairs. Two names of one file are one adapter, whose scales add up."""
    sums: dict[str, float] = {}
    for adapter, scale in pairs:
        sums[adapter.digest] = sums.get(adapter.digest, 0.0) + scale
    return tuple(sorted((digest, scale) for digest, scale in sums.items() if scale != 0.0))


def _chosen(known: Mapping[str | int, GrantedAdapter], wanted: Wanted) -> list[tuple[GrantedAdapter, float]]:
    if len(wanted) > MAX_VECTOR:
        raise _invalid(f"{MAX_VECTOR} adapters are the most of one request.", ())
    chosen: dict[int, tuple[GrantedAdapter, float]] = {}
    for place, (key, scale) in enumerate(wanted):
        adapter = None if isinstance(key, bool) else known.get(key)
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

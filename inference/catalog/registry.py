"""Which models are served, and to whom: answers by name, from snapshots of their rows (model_rows.py writes those).

Readers get frozen snapshots from a cache of this process, so admission costs no query per request. It is 5 s old at
most, and read anew as soon as the counter moves that announces changes of keys and models (identity/known_keys.py).
Runs on admission threads, in workers, commands and the admin; never imports llama_cpp.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

from django.db import transaction
from django.db.models import Prefetch, QuerySet

from accounts.identity import known_keys
from accounts.trail.refusals import Refusal
from inference.catalog.served import HasTenant, Served, snapshot
from inference.models import ModelVariant, ServedModel

CACHE_SECONDS = 5.0
NOT_LOADED_RETRY_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class _Catalogue:
    """All models by every name they answer to. `read_at` is monotonic seconds."""

    models: tuple[Served, ...]
    by_name: Mapping[str, Served]
    default: Served | None
    read_at: float
    version: int


_lock = threading.Lock()
_catalogue: _Catalogue | None = None
_generation = 0


def _read(version: int) -> _Catalogue:
    """Three queries, however many models there are."""
    read_at = time.monotonic()
    found = ServedModel.objects.select_related("draft_model").prefetch_related("granted_tenants").order_by("name")
    rows = with_active_variants(found)
    models = tuple(
        snapshot(row, (tenant.pk for tenant in row.granted_tenants.all()), row.active_variant) for row in rows
    )
    by_name = {alias: model for model in models for alias in model.aliases}
    by_name.update({model.name: model for model in models})
    default = next((model for model in models if model.is_default), None)
    return _Catalogue(models, by_name, default, read_at, version)


def with_active_variants(rows: QuerySet[ServedModel]) -> QuerySet[ServedModel]:
    """So that `active_variant` of each costs no query of its own."""
    active = ModelVariant.objects.filter(is_active=True).defer("measured")
    return rows.prefetch_related(Prefetch("variants", queryset=active))


def _current() -> _Catalogue:
    global _catalogue
    cached, generation, version = _catalogue, _generation, known_keys.CACHE.generation
    if cached and cached.version == version and time.monotonic() - cached.read_at < CACHE_SECONDS:
        return cached
    fresh = _read(version)
    with _lock:
        if generation == _generation:  # else a change came in between: what was read may be older than it
            _catalogue = fresh
    return fresh


def forget() -> None:
    """Read the registry anew at the next question. Every change in this process calls it."""
    global _catalogue, _generation
    with _lock:
        _catalogue = None
        _generation += 1


def resolve(name: str | None, principal: HasTenant) -> Served:
    """The model that `name` (None: the default) means to this principal.

    Raises Refusal: `model_not_found` also for a model that exists and is not granted, so names cannot be probed;
    `no_model` where nothing is registered; `llm_not_loaded` where the model is switched off.
    """
    catalogue = _current()
    if name is None:
        return _resolve_default(catalogue, principal)
    model = catalogue.by_name.get(name)
    if model is None or not model.is_visible_to(principal):
        raise Refusal(
            "model_not_found", f"There is no model {name[:100]!r}. GET /v1/models lists yours.", model=name[:100]
        )
    return _switched_on(model)


def _resolve_default(catalogue: _Catalogue, principal: HasTenant) -> Served:
    if catalogue.default is None:
        raise Refusal("no_model", "No model is registered on this server yet.", retry_after=NOT_LOADED_RETRY_SECONDS)
    if not catalogue.default.is_visible_to(principal):
        raise Refusal("model_not_found", "Name a model: GET /v1/models lists yours.")
    return _switched_on(catalogue.default)


def _switched_on(model: Served) -> Served:
    if model.is_off:
        raise Refusal("llm_not_loaded", f"The model {model.name!r} is switched off.", model=model.name)
    return model


def visible(principal: HasTenant) -> list[Served]:
    """The models that this principal may use, by name."""
    return [model for model in _current().models if not model.is_off and model.is_visible_to(principal)]


def in_pool(pool: str) -> list[Served]:
    """The models that a worker of `pool` holds."""
    return [model for model in _current().models if model.pool == pool and not model.is_off]


def default() -> Served | None:
    """The model of requests that name none."""
    return _current().default


def every() -> list[Served]:
    """All models, switched off ones too, for operators."""
    return list(_current().models)


def changed() -> None:
    """Whoever writes a ServedModel row calls this: every process reads anew once the transaction has committed.

    Forgets now too, for readers within the transaction.
    """
    forget()
    transaction.on_commit(forget)
    known_keys.announce_change(known_keys.EVERYTHING)

"""The default vectors of tenants in a configuration file: what would change, writing it, and the file of what there is.

Called by inference/site_file/site_yaml.py within its transaction; inference/catalog/granting.py writes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from accounts.models import Tenant
from accounts.trail.refusals import Refusal
from inference.catalog import adapters, granting, registry
from inference.models import Adapter, AdapterGrant, DefaultVector
from inference.vetting.inspection import RegistrationError

Vectors = dict[str, dict[str, float]]
"""Model → adapter → scale."""


def read() -> Mapping[int, Vectors]:
    """Tenant's row number → its vectors, as its requests have them: without what was switched off or is not for it any
    more. Three queries."""
    rows = list(DefaultVector.objects.select_related("base_model").order_by("base_model__name"))
    wanted = {pk for row in rows for pk, _ in row.scales}
    known = {each.pk: each for each in Adapter.objects.filter(pk__in=wanted, enabled=True)}
    granted = set(AdapterGrant.objects.filter(adapter__in=wanted).values_list("tenant_id", "adapter_id"))
    found: defaultdict[int, Vectors] = defaultdict(dict)
    for row in rows:
        scales = {
            known[pk].name: scale
            for pk, scale in row.scales
            if pk in known and (known[pk].visibility == Adapter.Visibility.SHARED or (row.tenant_id, pk) in granted)
        }
        if scales:
            found[row.tenant_id][row.base_model.name] = scales
    return found


def differences(now: Vectors, wanted: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """`default_vectors.<model>` → `before → after`, of the models that are named."""
    return {
        f"default_vectors.{model}": f"{now.get(model, {})} → {dict(scales)}"
        for model, scales in wanted.items()
        if now.get(model, {}) != {name: scale for name, scale in scales.items() if scale}
    }


def check(place: str, wanted: Mapping[str, Mapping[str, float]], known: set[tuple[str, str]]) -> list[str]:
    """Problems with names and numbers. known: (model, adapter) that are there, or come with the file."""
    limit, models = adapters.MAX_VECTOR, {model for model, _ in known}
    problems = [f"{place}.default_vectors.{model}: it has no adapter" for model in wanted if model not in models]
    problems += [
        f"{place}.default_vectors.{model}.{name}: there is no adapter {model}:{name}"
        for model, scales in wanted.items()
        for name in scales
        if model in models and (model, name) not in known
    ]
    crowded = [model for model, scales in wanted.items() if len(scales) > limit]
    return problems + [f"{place}.default_vectors.{model}: {limit} adapters are the most" for model in crowded]


def apply(tenant: Tenant, wanted: Mapping[str, Mapping[str, float]]) -> None:
    """Raises RegistrationError where the tenant may not use what it names."""
    served: dict[str, Any] = {each.name: each for each in registry.every()}
    for model, scales in wanted.items():
        try:
            granting.set_default_vector(tenant.pk, served[model], list(scales.items()))
        except Refusal as refusal:
            place = f"{tenant.name}: default_vectors.{model}"
            raise RegistrationError("invalid", f"{place}: {refusal.message}") from refusal

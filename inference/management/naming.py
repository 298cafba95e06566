"""Words that commands share on the command line: a model's name, and `model:adapter`."""

from __future__ import annotations

from typing import Any

from accounts.management.base import HouseCommand
from inference.catalog import registry
from inference.catalog.served import Served
from inference.models import Adapter, ServedModel


def model_named(command: HouseCommand, name: str) -> ServedModel:
    row = ServedModel.objects.filter(name=name).first()
    if row is None:
        command.fail("model_not_found", f"There is no model {name!r}: `manage.py models` lists them.")
    return row


def served_named(command: HouseCommand, name: str) -> Served:
    """By name or alias, as workers know it."""
    found = next((each for each in registry.every() if name in (each.name, *each.aliases)), None)
    if found is None:
        command.fail("model_not_found", f"There is no model {name!r}: `manage.py models` lists them.")
    return found


def adapter_named(command: HouseCommand, text: str) -> Adapter:
    """By `model:adapter`; the adapter's name alone does where one model has it."""
    model, _, name = text.rpartition(":")
    rows = Adapter.objects.select_related("base_model", "owner").filter(name=name)
    found = list((rows.filter(base_model__name=model) if model else rows)[:2])
    if len(found) > 1:
        command.fail("adapter_ambiguous", f"Several models have an adapter {name!r}: write model:{name}.")
    if not found:
        command.fail("adapter_not_found", f"There is no adapter {text!r}: `manage.py adapters` lists them.")
    return found[0]


def as_adapter_row(row: Adapter) -> dict[str, Any]:
    """JSON about one adapter, for operators. `granted`: tenants and their ids in llama.cpp's dialect."""
    grants = row.grants.select_related("tenant").order_by("tenant__name")
    return {
        "name": row.name,
        "model": row.base_model.name,
        "path": row.path,
        "digest": row.digest,
        "size_bytes": row.size_bytes,
        "rank": row.rank,
        "alpha": row.alpha,
        "targets": row.targets,
        "task_name": row.task_name,
        "effect": row.metadata.get("trial", {}).get("effect"),
        "default_scale": row.default_scale,
        "owner": row.owner.name if row.owner else None,
        "visibility": row.visibility,
        "enabled": row.enabled,
        "granted": {grant.tenant.name: grant.position for grant in grants},
    }

"""Adapter rows: the one place that writes them. Files are checked in vetting/adapter_file.py.

Runs in commands, the admin and imports; never imports llama_cpp. Every write is announced.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from django.core.exceptions import ValidationError
from django.db import IntegrityError, transaction
from django.db.models import Q

from accounts.models import Tenant
from inference.catalog import adapters, registry
from inference.catalog.granting import grant, leave_defaults
from inference.models import Adapter, AdapterAlias, DefaultVector, ServedModel
from inference.vetting.adapter_file import Base, ExaminedAdapter, inspect_adapter
from inference.vetting.inspection import Progress, RegistrationError, absolute, stamp_of
from inference.vetting.trial import Trial

OPTIONS = ("default_scale", "owner", "visibility", "enabled")
"""Fields of Adapter that registration may set."""


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
            ServedModel.objects.select_for_update().get(pk=base.pk)  # names of one model are given one by one
            check_name(base, name)
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


def check_name(base: ServedModel, name: str) -> None:
    """Raises ValidationError where tenants mean an alias by it."""
    if AdapterAlias.objects.filter(base_model=base, name=name).exists():
        raise ValidationError({"name": f"{name!r} is an alias: register the version under a name of its own."})


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
    adapters.forget()
    transaction.on_commit(adapters.forget)
    registry.changed()


def set_enabled(pks: Iterable[int], enabled: bool) -> int:
    """Switch adapters on, or off: then they do not exist for tenants. Returns how many changed."""
    with transaction.atomic():
        count = Adapter.objects.filter(pk__in=list(pks)).exclude(enabled=enabled).update(enabled=enabled)
        changed()
    return count


def remove(pks: Iterable[int]) -> int:
    """Forget these adapters, with their grants. Raises RegistrationError where an alias leads to one."""
    with transaction.atomic():
        keys = list(pks)
        leading = AdapterAlias.objects.select_related("base_model").filter(Q(target__in=keys) | Q(canary__in=keys))
        if alias := leading.first():
            raise RegistrationError(
                "adapter_in_use", f"The alias {alias} leads to it: point that elsewhere, or end its canary, first."
            )
        bases = Adapter.objects.filter(pk__in=keys).values_list("base_model_id", flat=True)
        leave_defaults(keys, DefaultVector.objects.filter(base_model_id__in=list(bases)))
        Adapter.objects.filter(pk__in=keys).delete()
        changed()
    return len(keys)

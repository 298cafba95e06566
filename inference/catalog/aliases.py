"""Aliases of adapters: which version a name means, which other one is on trial, the way back. Alone writes their rows.

A version is an adapter of its own, under a name of its own; inference/catalog/adapters.py reads aliases for requests.
Each change is one transaction, is in the audit log, and reaches every process within a second. Called by the command,
the operator's API and the console.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from django.core.exceptions import ValidationError
from django.db import IntegrityError, transaction

from accounts.models import Tenant
from inference.catalog import adapter_rows
from inference.models import Adapter, AdapterAlias, ServedModel
from inference.vetting.inspection import RegistrationError

MAX_NAMED = 3
"""Tenants that a refusal names."""


def find(base: ServedModel, name: str) -> AdapterAlias | None:
    return (
        AdapterAlias.objects.select_related("base_model", "target", "canary", "previous")
        .filter(base_model=base, name=name)
        .first()
    )


def version_of(base: ServedModel, name: str, field: str = "target") -> Adapter:
    """The adapter that an alias of this model may lead to. field: that names it. Raises RegistrationError."""
    row = Adapter.objects.select_related("base_model").filter(base_model=base, name=name).first()
    if row is not None:
        return row
    if AdapterAlias.objects.filter(base_model=base, name=name).exists():
        raise _invalid(field, f"{name!r} is an alias itself: name the adapter that it leads to.")
    sentence = f"The model {base.name!r} has no adapter {name[:100]!r}."
    raise RegistrationError("adapter_not_found", sentence, {field: [sentence]})


def point(base: ServedModel, name: str, target: Adapter, *, force: bool = False) -> AdapterAlias:
    """The name means this version from now on, and nothing is on trial; a new name is made. Idempotent.

    What it meant before is what a roll back returns to. force: also where tenants that may use that version may not
    use this one. Raises RegistrationError.
    """
    with _changing(base):
        row = _locked(base, name) or AdapterAlias(base_model=base, name=name, target=target)
        if row.pk is None or row.target_id != target.pk or row.canary_id is not None:
            if row.pk is not None and not force:
                _refuse_loss(row.target, target)
            _lead(row, target)
        return row


def try_out(alias: AdapterAlias, canary: Adapter, share: int) -> AdapterAlias:
    """Let another version answer `share` percent of the conversations of tenants that may use it. 0 prepares it.

    Raises RegistrationError.
    """
    with _changing(alias.base_model):
        row = _still_there(alias)
        row.canary, row.share = canary, share
        _save(row)
        return row


def end_trial(alias: AdapterAlias) -> AdapterAlias:
    """The target answers everything. Idempotent."""
    with _changing(alias.base_model):
        row = _still_there(alias)
        if row.canary_id is not None:
            row.canary, row.share = None, 0
            _save(row)
        return row


def promote(alias: AdapterAlias, *, force: bool = False) -> AdapterAlias:
    """What was on trial is what the name means. Raises RegistrationError where nothing is; force: as in `point`."""
    with _changing(alias.base_model):
        row = _still_there(alias)
        if row.canary is None:
            raise RegistrationError("conflict", f"{row} has no canary to promote.")
        if not force:
            _refuse_loss(row.target, row.canary)
        _lead(row, row.canary)
        return row


def roll_back(alias: AdapterAlias) -> AdapterAlias:
    """One step back: a canary that answers ends, and the target answers everything; without one the name means what it
    meant before. Asking twice goes no further. Raises RegistrationError where there is no way back."""
    with _changing(alias.base_model):
        row = _still_there(alias)
        if row.share > 0:
            row.canary, row.share = None, 0
        elif row.previous is not None:
            row.target, row.previous, row.canary = row.previous, None, None
        else:
            raise RegistrationError("conflict", f"{row} has no version to return to: point it at one.")
        _save(row)
        return row


def restore(base: ServedModel, name: str, **values: Any) -> AdapterAlias:
    """Target, canary, share and previous as a file says. Raises RegistrationError."""
    with _changing(base):
        row = _locked(base, name) or AdapterAlias(base_model=base, name=name)
        for field, value in values.items():
            setattr(row, field, value)
        _save(row, is_kept=True)
        return row


def remove(pks: Iterable[int]) -> int:
    """Forget these aliases; for tenants the names do not exist any more. The adapters stay."""
    with transaction.atomic():
        count, _ = AdapterAlias.objects.filter(pk__in=list(pks)).delete()
        adapter_rows.changed()
    return count


def check(row: AdapterAlias, *, is_kept: bool = False) -> None:
    """What one field's validators cannot see. is_kept: it leads there already, also to what is switched off.

    Raises ValidationError with a sentence for the field at fault.
    """
    row.clean_fields(exclude=["base_model", "target", "canary", "previous"])
    if Adapter.objects.filter(base_model_id=row.base_model_id, name=row.name).exists():
        raise ValidationError({"name": f"{row.name!r} is an adapter: choose a name that says no version."})
    for field in ("target", "canary"):
        version: Adapter | None = getattr(row, field)
        if version is None:
            continue
        if version.base_model_id != row.base_model_id:
            raise ValidationError({field: f"{version} belongs to another model."})
        if not version.enabled and not is_kept:
            raise ValidationError({field: f"{version} is switched off."})
    if row.canary_id is not None and row.canary_id == row.target_id:
        raise ValidationError({"canary": "This version answers already: choose another one."})
    if row.canary_id is None and row.share:
        raise ValidationError({"share": "Choose the canary that is to answer them."})


def loses(before: Adapter, after: Adapter) -> list[str]:
    """Names of the tenants that may use one version and not the other, at most MAX_NAMED and one more."""
    if after.visibility == Adapter.Visibility.SHARED:
        return []
    rows = Tenant.objects.filter(status=Tenant.Status.ACTIVE).exclude(adapter_grants__adapter=after)
    if before.visibility != Adapter.Visibility.SHARED:
        rows = rows.filter(adapter_grants__adapter=before)
    return list(rows.order_by("name").values_list("name", flat=True)[: MAX_NAMED + 1])


def _refuse_loss(before: Adapter, after: Adapter) -> None:
    if names := loses(before, after):
        more = " and others" if len(names) > MAX_NAMED else ""
        raise RegistrationError(
            "alias_loses_tenants",
            f"{', '.join(names[:MAX_NAMED])}{more} may use {before} and not {after}: the name would not exist for "
            "them. Grant it to them first, or force it.",
        )


def _lead(row: AdapterAlias, target: Adapter) -> None:
    """A roll back returns to what it leads to now."""
    if row.pk is not None and row.target_id != target.pk:
        row.previous = row.target
    row.target, row.canary, row.share = target, None, 0
    _save(row)


def _save(row: AdapterAlias, *, is_kept: bool = False) -> None:
    check(row, is_kept=is_kept)
    row.save()
    adapter_rows.changed()


def _locked(base: ServedModel, name: str) -> AdapterAlias | None:
    rows = AdapterAlias.objects.select_for_update(of=("self",))
    return rows.select_related("base_model", "target", "canary", "previous").filter(base_model=base, name=name).first()


def _still_there(alias: AdapterAlias) -> AdapterAlias:
    row = _locked(alias.base_model, alias.name)
    if row is None:
        raise RegistrationError("alias_not_found", f"There is no alias {alias} any more.")
    return row


@contextmanager
def _changing(base: ServedModel) -> Iterator[None]:
    """One transaction; names of one model are given one by one. What is wrong becomes a RegistrationError."""
    try:
        with transaction.atomic():
            ServedModel.objects.select_for_update().get(pk=base.pk)
            yield
    except ValidationError as error:
        raise _invalid(*next((field, str(texts[0])) for field, texts in error.message_dict.items())) from error
    except IntegrityError as error:
        raise RegistrationError("conflict", "The registry was changed at the same moment. Try again.") from error


def _invalid(field: str, sentence: str) -> RegistrationError:
    return RegistrationError("invalid", sentence, {field: [sentence]})


def as_alias_row(row: AdapterAlias) -> dict[str, Any]:
    """JSON about one alias, for operators."""
    return {
        "name": row.name,
        "model": row.base_model.name,
        "target": row.target.name,
        "canary": row.canary.name if row.canary else None,
        "share": row.share,
        "previous": row.previous.name if row.previous else None,
        "updated_at": row.updated_at,
    }

"""ServedModel rows: the one place that writes them. Registers files, chooses the default, switches models off.

Runs in commands, the admin and imports; never imports llama_cpp. Every write is announced (registry.changed).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from django.core.exceptions import ValidationError
from django.db import IntegrityError, transaction

from accounts.models import Tenant
from inference.catalog.registry import changed
from inference.chat.prompt import digest_of
from inference.models import ServedModel
from inference.vetting.inspection import (
    Inspected,
    Progress,
    RegistrationError,
    absolute,
    check_draft,
    inspect,
    is_unchanged,
    template_facts,
)
from inference.vetting.trial import Trial

OPTIONS = (
    "aliases",
    "visibility",
    "pool",
    "n_ctx",
    "n_slots",
    "n_lanes",
    "n_threads",
    "n_gpu_layers",
    "kv_type",
    "context_shift",
    "draft_kind",
    "draft_model",
    "draft_n_min",
    "draft_n_max",
    "draft_p_min",
    "draft_policy",
    "load_mode",
    "keep_alive_seconds",
    "is_pinned",
    "capabilities",
    "embedding_pooling",
    "chat_template",
    "notes",
)
"""Fields of ServedModel that registration may set."""


def register(
    path: str | Path,
    name: str,
    *,
    default: bool | None = None,
    granted_tenants: Iterable[Tenant] | None = None,
    progress: Progress | None = None,
    force: bool = False,
    trial: Trial | None = None,
    **options: Any,
) -> ServedModel:
    """Inspect the file and create or update the model `name`; options that are not given stay as they are.

    default: True makes it the default, None leaves that alone (the first model becomes it anyway). force: inspect
    again even if the file looks unchanged. Raises RegistrationError; then nothing has changed.
    """
    inspected = examine(
        path, known=ServedModel.objects.filter(name=name).first(), progress=progress, force=force, trial=trial
    )
    return save(name, inspected, default=default, granted_tenants=granted_tenants, **options)


def examine(
    path: str | Path,
    *,
    known: ServedModel | None = None,
    progress: Progress | None = None,
    force: bool = False,
    trial: Trial | None = None,
) -> Inspected:
    """Inspect the file, or take over what is `known` of it if it has not changed. Raises RegistrationError."""
    place = absolute(path)
    if known and not force and known.path == str(place) and is_unchanged(place, known.digest, known.metadata):
        return Inspected(path=place, digest=known.digest, size_bytes=known.size_bytes, metadata=known.metadata)
    return inspect(place, progress=progress, trial=trial)


def save(
    name: str,
    inspected: Inspected,
    *,
    default: bool | None = None,
    granted_tenants: Iterable[Tenant] | None = None,
    **options: Any,
) -> ServedModel:
    """Write the row of an inspected file; exactly one row is the default afterwards. Raises RegistrationError.

    The option draft_model is a row, or the name of one.
    """
    if unknown := set(options) - set(OPTIONS):
        raise TypeError(f"unknown options: {', '.join(sorted(unknown))}")
    facts = check_template(options["chat_template"], name) if "chat_template" in options else None
    if isinstance(options.get("draft_model"), str):
        options["draft_model"] = _named(options["draft_model"])
    check_draft_model(name, inspected.digest, options)
    try:
        with transaction.atomic():
            row = ServedModel.objects.filter(name=name).first() or _new(name, inspected)
            _fill(row, inspected, options)
            row.chat_facts = row.chat_facts if facts is None else facts
            row.clean_fields()
            row.clean()
            row.save()
            if granted_tenants is not None:
                row.granted_tenants.set(granted_tenants)
            settle_default(row if default else None)
            changed()
    except ValidationError as error:
        fields = {field: [str(text) for text in texts] for field, texts in error.message_dict.items()}
        sentences = "; ".join(f"{field}: {' '.join(texts)}" for field, texts in fields.items())
        raise RegistrationError("invalid", sentences, fields) from error
    except IntegrityError as error:
        raise RegistrationError("conflict", "The registry was changed at the same moment. Try again.") from error
    row.refresh_from_db()
    return row


def check_template(source: str, name: str = "") -> dict[str, Any]:
    """What an operator's own template does, tried in a child; {} for none. Raises RegistrationError.

    One that the model `name` has already is not tried again.
    """
    if not source:
        return {}
    known = ServedModel.objects.filter(name=name, chat_template=source).values_list("chat_facts", flat=True).first()
    facts = known if known and known.get("digest") == digest_of(source) else template_facts(source)
    if error := facts.get("error"):
        raise RegistrationError(
            "chat_template_invalid", f"The template is no good: {error}.", {"chat_template": [error]}
        )
    return facts


def _named(name: str) -> ServedModel:
    row = ServedModel.objects.filter(name=name).first()
    if row is None:
        message = f"There is no model {name!r}: register the one that guesses first."
        raise RegistrationError("invalid", message, {"draft_model": [message]})
    return row


def check_draft_model(name: str, digest: str, options: Mapping[str, Any]) -> None:
    """See that a model, who guesses for it and those that it guesses for have one vocabulary. Raises RegistrationError.

    options: those of draft_kind and draft_model that change.
    """
    row = ServedModel.objects.filter(name=name).select_related("draft_model").first()
    kind = options.get("draft_kind", row.draft_kind if row else ServedModel.DraftKind.NONE)
    draft: ServedModel | None = options.get("draft_model", row.draft_model if row else None)
    if kind == ServedModel.DraftKind.MODEL and draft is not None:
        check_draft(digest, draft.name, draft.digest)
    for target in ServedModel.objects.filter(draft_model__name=name, draft_kind=ServedModel.DraftKind.MODEL):
        check_draft(target.digest, name, digest)


def _new(name: str, inspected: Inspected) -> ServedModel:
    """A row with defaults that fit the file."""
    row = ServedModel(name=name)
    row.n_ctx = min(row.n_ctx, inspected.metadata["context_length"])
    return row


def _fill(row: ServedModel, inspected: Inspected, options: Mapping[str, Any]) -> None:
    row.path = str(inspected.path)
    row.digest = inspected.digest
    row.size_bytes = inspected.size_bytes
    row.metadata = inspected.metadata
    for option, value in options.items():
        setattr(row, option, value)


def settle_default(wanted: ServedModel | None = None) -> None:
    """Make `wanted` the default; without it, keep the one there is or promote the oldest that is switched on."""
    defaults = ServedModel.objects.filter(is_default=True)
    if wanted is None:
        if defaults.exists():
            return
        wanted = ServedModel.objects.exclude(load_mode=ServedModel.LoadMode.OFF).order_by("pk").first()
    if wanted is not None:
        defaults.exclude(pk=wanted.pk).update(is_default=False)
        ServedModel.objects.filter(pk=wanted.pk).update(is_default=True)


def make_default(pk: int) -> None:
    """Requests that name no model go to this one from now on."""
    with transaction.atomic():
        settle_default(ServedModel.objects.get(pk=pk))
        changed()


def set_load_mode(pks: Iterable[int], load_mode: str) -> int:
    """When these models are loaded, or that they are not served; returns how many changed."""
    mode = ServedModel.LoadMode(load_mode)
    with transaction.atomic():
        count = ServedModel.objects.filter(pk__in=list(pks)).exclude(load_mode=mode).update(load_mode=mode)
        settle_default()
        changed()
    return count


def pin(pks: Iterable[int], is_pinned: bool) -> int:
    """Whether these models stay in memory once they are loaded; returns how many changed."""
    with transaction.atomic():
        count = ServedModel.objects.filter(pk__in=list(pks)).exclude(is_pinned=is_pinned).update(is_pinned=is_pinned)
        changed()
    return count


def remove(pks: Iterable[int]) -> int:
    """Forget these models; receipts keep their names. Another becomes the default if it was among them."""
    with transaction.atomic():
        ServedModel.objects.filter(pk__in=(keys := list(pks))).delete()
        settle_default()
        changed()
    return len(keys)

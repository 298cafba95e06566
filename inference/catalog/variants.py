"""Variants of served models: what `optimize_model` made, and which of them is served. Alone writes their rows.

Activating swaps the file and the settings that workers load under the model's name; names, grants and adapters stay.
Used by commands and the admin; llama.cpp is called in children only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from django.db import IntegrityError, transaction

from inference.catalog import registry
from inference.models import ModelVariant, ServedModel
from inference.vetting.inspection import Inspected, Progress, RegistrationError, inspect, is_unchanged
from inference.vetting.trial import Trial


def register(
    base: ServedModel,
    name: str,
    path: Path,
    *,
    n_threads: int | None,
    flash_attention: bool | None,
    measured: Mapping[str, Any],
    progress: Progress | None = None,
    trial: Trial | None = None,
    then: Callable[[ModelVariant], None] | None = None,
) -> ModelVariant:
    """Inspect the file and keep it as an inactive variant. One of that name is replaced, but never the active one: then
    the name gets a number. Raises RegistrationError; then nothing has changed. `then` is called in the transaction:
    what it raises undoes that."""
    file = _inspected(base, path, progress, trial)
    check_fit(base.name, base.metadata, file)
    try:
        with transaction.atomic():
            present = ServedModel.objects.select_for_update().get(pk=base.pk)
            if present.digest != base.digest:
                raise RegistrationError("variant_stale", "The model's file was changed meanwhile. Try again.")
            free = _free_name(base, name)
            settings = {"n_threads": n_threads, "flash_attention": flash_attention, "measured": dict(measured)}
            row = keep(base, free, file, **settings)
            if then is not None:
                then(row)
    except ServedModel.DoesNotExist as error:
        raise RegistrationError("model_not_found", "The model was removed meanwhile.") from error
    except IntegrityError as error:
        raise RegistrationError("conflict", "The registry was changed at the same moment. Try again.") from error
    return row


def keep(base: ServedModel, name: str, file: Inspected, **settings: Any) -> ModelVariant:
    """The row of this name with this file, and with those settings that are given. Within the caller's transaction."""
    row = ModelVariant.objects.filter(base_model=base, name=name).first() or ModelVariant(base_model=base, name=name)
    row.source_digest = base.digest
    row.path, row.digest, row.size_bytes = str(file.path), file.digest, file.size_bytes
    row.metadata = file.metadata
    for setting, value in settings.items():
        setattr(row, setting, value)
    row.save()
    if row.is_active:
        registry.changed()
    return row


def _inspected(base: ServedModel, path: Path, progress: Progress | None, trial: Trial | None) -> Inspected:
    """A variant of settings alone has the model's own file, which is known."""
    if str(path) == base.path:
        return Inspected(path=path, digest=base.digest, size_bytes=base.size_bytes, metadata=base.metadata)
    return inspect(path, progress=progress, trial=trial)


def check_fit(name: str, metadata: Mapping[str, Any], file: Inspected) -> None:
    """Raises RegistrationError where the file is of another model than that of this name and header.

    Prompts are tokenized for one and computed by the other while a swap is under way; adapters fit both.
    """
    for fact in ("architecture", "vocabulary_size", "block_count", "embedding_length"):
        if metadata.get(fact) != file.metadata.get(fact):
            raise RegistrationError("variant_differs", f"The file is of another model than {name}: see its {fact}.")


def _free_name(base: ServedModel, name: str) -> str:
    active = set(ModelVariant.objects.filter(base_model=base, is_active=True).values_list("name", flat=True))
    names = [name, f"{name}-2"]
    return next(each for each in names if each not in active)


def activate(variant: ModelVariant) -> bool:
    """Serve it in place of what is served now; whether that changes anything. Raises RegistrationError."""
    base = variant.base_model
    if variant.source_digest != base.digest:
        raise RegistrationError(
            "variant_stale",
            f"{base.name} has another file than the one {variant.name} was made of: run optimize_model again.",
        )
    if not is_unchanged(Path(variant.path), variant.digest, variant.metadata):
        raise RegistrationError(
            "variant_file_changed",
            f"{variant.path} is missing or not the file that was registered: run optimize_model again.",
        )
    with transaction.atomic():
        ServedModel.objects.select_for_update().get(pk=base.pk)
        others = ModelVariant.objects.filter(base_model=base, is_active=True).exclude(pk=variant.pk)
        others.update(is_active=False)
        count = ModelVariant.objects.filter(pk=variant.pk, is_active=False).update(is_active=True)
        if count:
            registry.changed()
    variant.is_active = True
    return count > 0


def revert(base: ServedModel) -> bool:
    """Serve the model's own file with its own settings again; whether that changes anything."""
    with transaction.atomic():
        count = ModelVariant.objects.filter(base_model=base, is_active=True).update(is_active=False)
        if count:
            registry.changed()
    return count > 0


def remove(pks: Iterable[int]) -> int:
    """Forget these variants; their files stay. A model whose active variant goes is served from its own file again."""
    with transaction.atomic():
        count, _ = ModelVariant.objects.filter(pk__in=list(pks)).delete()
        registry.changed()
    return count


def as_variant_row(variant: ModelVariant) -> dict[str, Any]:
    """JSON about one variant, for operators."""
    return {
        "name": variant.name,
        "model": variant.base_model.name,
        "active": variant.is_active,
        "stale": variant.source_digest != variant.base_model.digest,
        "path": variant.path,
        "digest": variant.digest,
        "size_bytes": variant.size_bytes,
        "quantization": variant.metadata.get("quantization"),
        "n_threads": variant.n_threads,
        "flash_attention": variant.flash_attention,
        "gain": variant.measured.get("gain"),
        "perplexity_increase_percent": variant.measured.get("perplexity_increase_percent"),
    }

"""Which models are served, how, and to whom: the one place that writes ServedModel rows and answers by name.

Readers get frozen snapshots from a cache of this process, so admission costs no query per request. It is 5 s old at
most, and read anew as soon as the counter moves that announces changes of keys and models (accounts/principals.py).
Runs on admission threads, in workers, commands and the admin; never imports llama_cpp.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from django.core.exceptions import ValidationError
from django.db import IntegrityError, transaction
from django.db.models import Prefetch, QuerySet

from accounts import principals
from accounts.models import Tenant
from accounts.refusals import Refusal
from inference.chat.prompt import ChatPrompt, ChatTemplate, digest_of
from inference.inspection import (
    Inspected,
    Progress,
    RegistrationError,
    absolute,
    check_draft,
    inspect,
    is_unchanged,
    template_facts,
    vocabulary_path,
)
from inference.models import ModelVariant, ServedModel
from inference.trial import Trial

CACHE_SECONDS = 5.0
NOT_LOADED_RETRY_SECONDS = 10.0
CONTEXT_STEP = 256
"""llama.cpp rounds the context of a sequence up to a multiple of this."""
COMPUTE_BATCH = 512
"""Tokens of the largest step; scores for all of them are reserved."""
KV_BYTES: Mapping[str, float] = {"f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
"""Bytes of one number in the key-value cache."""
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
    "capabilities",
    "chat_template",
    "notes",
)
"""Fields of ServedModel that registration may set."""


class HasTenant(Protocol):
    """As much of a principal as the registry looks at."""

    @property
    def tenant_id(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A served model as it was when the snapshot was taken. n_ctx is the context of one slot, in tokens."""

    id: int
    name: str
    aliases: tuple[str, ...]
    is_default: bool
    visibility: str
    granted_tenant_ids: frozenset[int]
    pool: str
    path: Path
    vocabulary_path: Path
    digest: str
    size_bytes: int
    n_ctx: int
    n_slots: int
    n_lanes: int = 1
    n_threads: int | None
    flash_attention: bool | None
    n_gpu_layers: int
    kv_type: str
    context_shift: bool
    draft_kind: str
    draft_path: Path | None
    draft_digest: str
    draft_n_min: int
    draft_n_max: int
    draft_p_min: float
    draft_policy: str
    load_mode: str
    keep_alive_seconds: int | None
    capabilities: Mapping[str, Any]
    architecture: str
    quantization: str
    num_parameters: int
    trained_context: int
    vocabulary_size: int
    bos_token_id: int | None
    eos_token_id: int | None
    add_bos_token: bool
    chat_template: str | None = field(repr=False)
    """As text: the operator's, else the file's. It is rendered only where it was found good, see `template_for`."""
    chat: ChatTemplate | None = field(repr=False)
    chat_with_tools: ChatTemplate | None = field(repr=False)
    created_unix: int

    @property
    def is_off(self) -> bool:
        return self.load_mode == ServedModel.LoadMode.OFF

    def is_visible_to(self, principal: HasTenant) -> bool:
        shared = self.visibility == ServedModel.Visibility.SHARED
        return shared or principal.tenant_id in self.granted_tenant_ids

    @property
    def num_slots(self) -> int:
        """Slots that requests can name: each lane has its own."""
        return self.n_slots * self.n_lanes

    def template_for(self, prompt: ChatPrompt) -> ChatTemplate:
        """The template that renders this conversation. Tools and calls that it does not show become plain text
        (chat/tool_text.py). Raises Refusal where there is none."""
        template = (self.chat_with_tools if prompt.tools else None) or self.chat
        if template is None:
            raise Refusal(
                "capability_not_supported",
                f"The model {self.name!r} has no chat template that can be used: send a prompt instead of messages.",
            )
        return template


def snapshot(row: ServedModel, granted_tenant_ids: Iterable[int] = (), variant: ModelVariant | None = None) -> Served:
    """The row without the ORM, with the file and the settings of its active variant. Grants and variant are passed
    in, so that no query hides here."""
    file = variant or row
    data, trial = file.metadata, file.metadata.get("trial", {})
    # A quantized key-value cache needs flash attention, whatever was measured before.
    flash_attention = variant.flash_attention if variant and row.kv_type == ServedModel.KVType.F16 else None
    draft = row.draft_model if row.draft_kind == ServedModel.DraftKind.MODEL else None
    return Served(
        id=row.pk,
        name=row.name,
        aliases=tuple(row.aliases),
        is_default=row.is_default,
        visibility=row.visibility,
        granted_tenant_ids=frozenset(granted_tenant_ids),
        pool=row.pool,
        path=Path(file.path),
        vocabulary_path=vocabulary_path(file.digest),
        digest=file.digest,
        size_bytes=file.size_bytes,
        n_ctx=row.n_ctx,
        n_slots=row.n_slots,
        n_threads=file.n_threads or row.n_threads,
        flash_attention=flash_attention,
        n_lanes=row.n_lanes,
        n_gpu_layers=row.n_gpu_layers,
        kv_type=row.kv_type,
        context_shift=row.context_shift,
        draft_kind=row.draft_kind,
        draft_path=Path(draft.path) if draft else None,
        draft_digest=draft.digest if draft else "",
        draft_n_min=row.draft_n_min,
        draft_n_max=row.draft_n_max,
        draft_p_min=row.draft_p_min,
        draft_policy=row.draft_policy,
        load_mode=row.load_mode,
        keep_alive_seconds=row.keep_alive_seconds,
        capabilities=dict(row.capabilities),
        architecture=data.get("architecture") or "",
        quantization=data.get("quantization") or "",
        num_parameters=data.get("num_parameters") or 0,
        trained_context=data.get("context_length") or 0,
        vocabulary_size=trial.get("vocabulary_size") or data.get("vocabulary_size") or 0,
        bos_token_id=data.get("bos_token_id"),
        eos_token_id=data.get("eos_token_id"),
        add_bos_token=bool(trial.get("add_bos_token", data.get("add_bos_token"))),
        chat_template=row.chat_template or (data.get("chat_templates") or {}).get("default"),
        chat=chat_template_of(row, "default"),
        chat_with_tools=None if row.chat_template else chat_template_of(row, "tool_use"),
        created_unix=int(row.created_at.timestamp()),
    )


def chat_template_of(row: ServedModel, name: str) -> ChatTemplate | None:
    """The operator's template, else the file's of that name; None where there is none, or it was found no good."""
    if row.chat_template:
        return ChatTemplate.of(row.chat_template, row.chat_facts)
    source = (row.metadata.get("chat_templates") or {}).get(name)
    return ChatTemplate.of(source, row.metadata.get("chat", {}).get(name, {})) if source else None


# Reading


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
    cached, generation, version = _catalogue, _generation, principals.CACHE.generation
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


# Writing


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


def changed() -> None:
    """Whoever writes a ServedModel row calls this: every process reads anew once the transaction has committed.

    Forgets now too, for readers within the transaction.
    """
    forget()
    transaction.on_commit(forget)
    principals.announce_change(principals.EVERYTHING)


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


def remove(pks: Iterable[int]) -> int:
    """Forget these models; receipts keep their names. Another becomes the default if it was among them."""
    with transaction.atomic():
        ServedModel.objects.filter(pk__in=(keys := list(pks))).delete()
        settle_default()
        changed()
    return len(keys)


# Memory


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes that a worker needs for one model, before it is loaded."""

    weights_bytes: int
    kv_bytes: int
    compute_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.compute_bytes


def estimate_memory(
    metadata: Mapping[str, Any], *, n_ctx: int, n_slots: int, kv_type: str, n_lanes: int = 1
) -> MemoryEstimate:
    """From the header alone: an upper bound for models with sliding windows or recurrent layers. Lanes have only the
    weights in common."""
    room = -(-n_ctx // CONTEXT_STEP) * CONTEXT_STEP * n_slots
    elements = metadata.get("kv_elements_per_token") or 0
    scores = (metadata.get("vocabulary_size") or 0) * 4
    return MemoryEstimate(
        weights_bytes=metadata.get("tensor_bytes") or 0,
        kv_bytes=n_lanes * int(room * elements * KV_BYTES[kv_type]),
        compute_bytes=n_lanes * scores * (COMPUTE_BATCH + n_slots),
    )


def memory_of(row: ServedModel) -> MemoryEstimate:
    """Of a served model, and of the one that guesses for it."""
    file = row.active_variant or row
    own = estimate_memory(file.metadata, n_ctx=row.n_ctx, n_slots=row.n_slots, kv_type=row.kv_type, n_lanes=row.n_lanes)
    if row.draft_kind != ServedModel.DraftKind.MODEL or row.draft_model is None:
        return own
    draft = estimate_memory(
        row.draft_model.metadata, n_ctx=row.n_ctx, n_slots=row.n_slots, kv_type="f16", n_lanes=row.n_lanes
    )
    return MemoryEstimate(
        weights_bytes=own.weights_bytes + draft.weights_bytes,
        kv_bytes=own.kv_bytes + draft.kv_bytes,
        compute_bytes=own.compute_bytes + draft.compute_bytes,
    )

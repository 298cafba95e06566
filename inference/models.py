"""The registry's rows and the receipts: which models are served, and what each request really used."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from django.core.exceptions import ValidationError
from django.core.validators import MaxValueValidator, MinValueValidator, RegexValidator
from django.db import models
from django.db.models import F, Q
from django.utils import timezone

from accounts.models import Announced, APIKey, Tenant
from accounts.trail.audited import AuditedManager
from inference.batches.models import Batch, BatchLine, StoredFile  # noqa: F401  Django reads all rows from here
from inference.chat.prompt import MAX_TEMPLATE_BYTES
from inference.engine.drafting import MAX_DRAFT
from inference.imports.models import ModelImport  # noqa: F401
from inference.tuning.models import Optimization  # noqa: F401

MAX_ALIASES = 32
model_name_validator = RegexValidator(
    r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,99}\Z", "Use 1 to 100 letters, digits, dots, dashes, underscores and slashes."
)
adapter_name_validator = RegexValidator(
    r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z", "Use 1 to 64 letters, digits, dots, dashes and underscores."
)
MAX_SCALE = 16.0
"""Of an adapter, in both directions; far outside of what a trained adapter stands."""


class ServedModel(Announced):
    """A GGUF file and how it is served. `name` is what tenants write into `model`."""

    class KVType(models.TextChoices):
        F16 = "f16", "f16"
        Q8_0 = "q8_0", "q8_0"
        Q4_0 = "q4_0", "q4_0"

    class LoadMode(models.TextChoices):
        EAGER = "eager", "When the worker starts"
        LAZY = "lazy", "On the first request"
        OFF = "off", "Not served"

    class Visibility(models.TextChoices):
        SHARED = "shared", "Every tenant"
        GRANTED = "granted", "Granted tenants only"

    class EmbeddingPooling(models.TextChoices):
        AUTO = "auto", "As the file says, else the mean"
        NONE = "none", "None: one vector for each token"
        MEAN = "mean", "The mean of all tokens"
        CLS = "cls", "The first token"
        LAST = "last", "The last token"

    class DraftKind(models.TextChoices):
        NONE = "none", "Nobody"
        PROMPT_LOOKUP = "prompt_lookup", "The text itself"
        MODEL = "model", "A smaller model"

    class DraftPolicy(models.TextChoices):
        ADAPTIVE = "adaptive", "As long as it pays"
        ALWAYS = "always", "Always"

    name = models.CharField(max_length=100, unique=True, validators=[model_name_validator])
    aliases = models.JSONField(default=list, blank=True, help_text='Other names, such as ["default-chat"].')
    is_default = models.BooleanField(default=False, help_text="Serves requests that name no model. Exactly one.")
    visibility = models.CharField(max_length=8, choices=Visibility.choices, default=Visibility.SHARED)
    granted_tenants = models.ManyToManyField(Tenant, blank=True, related_name="granted_models")
    pool = models.CharField(
        max_length=32,
        default="default",
        validators=[RegexValidator(r"^[a-z0-9-]{1,32}\Z")],
        help_text="The group of workers that holds this model.",
    )

    path = models.CharField(max_length=1000, help_text="GGUF file on the worker's disk.")
    digest = models.CharField(max_length=64, editable=False, help_text="SHA-256 of the file.")
    size_bytes = models.BigIntegerField(default=0, editable=False)
    metadata = models.JSONField(default=dict, editable=False, help_text="Read from the file's header.")

    n_ctx = models.PositiveIntegerField(
        default=2048,
        validators=[MinValueValidator(8), MaxValueValidator(1 << 20)],
        help_text="Context of one slot, in tokens.",
    )
    n_slots = models.PositiveSmallIntegerField(
        default=8, validators=[MinValueValidator(1), MaxValueValidator(256)], help_text="Sequences decoded at once."
    )
    n_lanes = models.PositiveSmallIntegerField(
        default=1,
        validators=[MinValueValidator(1), MaxValueValidator(16)],
        help_text="Adapter vectors computed side by side. Each lane needs the key-value memory of all slots.",
    )
    n_threads = models.PositiveSmallIntegerField(
        null=True,
        blank=True,
        validators=[MinValueValidator(1), MaxValueValidator(512)],
        help_text="Empty: one per physical core.",
    )
    n_gpu_layers = models.IntegerField(default=0, validators=[MinValueValidator(-1), MaxValueValidator(10000)])
    kv_type = models.CharField(max_length=8, choices=KVType.choices, default=KVType.F16)
    context_shift = models.BooleanField(
        default=True,
        help_text="Requests that ask for more than the context holds go on without the oldest tokens of it.",
    )
    load_mode = models.CharField(max_length=8, choices=LoadMode.choices, default=LoadMode.EAGER)
    keep_alive_seconds = models.PositiveIntegerField(
        null=True,
        blank=True,
        help_text="Idle time after which it is unloaded. Empty: MODEL_IDLE_TIMEOUT_SECONDS, or never if it is loaded "
        "when the worker starts.",
    )
    is_pinned = models.BooleanField(
        default=False, help_text="Once it is loaded it stays: neither idle time nor another model unloads it."
    )
    chat_template = models.TextField(
        blank=True,
        max_length=MAX_TEMPLATE_BYTES,
        help_text="Jinja that is used in place of the file's own chat template. Empty: the file's.",
    )
    chat_facts = models.JSONField(default=dict, editable=False, help_text="What that template was seen to do.")
    draft_kind = models.CharField(
        max_length=16,
        choices=DraftKind.choices,
        default=DraftKind.NONE,
        help_text="Who guesses the next tokens, which the model then verifies several at once.",
    )
    draft_model = models.ForeignKey(
        "self",
        on_delete=models.PROTECT,
        null=True,
        blank=True,
        related_name="drafts_for",
        help_text="The smaller model that guesses. It must have the same vocabulary.",
    )
    draft_n_min = models.PositiveSmallIntegerField(
        default=0, validators=[MaxValueValidator(MAX_DRAFT)], help_text="Shorter drafts are thrown away."
    )
    draft_n_max = models.PositiveSmallIntegerField(
        default=16,
        validators=[MinValueValidator(1), MaxValueValidator(MAX_DRAFT)],
        help_text="Guesses of a step at most; a request may ask for less.",
    )
    draft_p_min = models.FloatField(
        default=0.0,
        validators=[MinValueValidator(0.0), MaxValueValidator(1.0)],
        help_text="A draft model stops guessing below this probability.",
    )
    draft_policy = models.CharField(max_length=8, choices=DraftPolicy.choices, default=DraftPolicy.ADAPTIVE)
    capabilities = models.JSONField(
        default=dict,
        blank=True,
        help_text='Switches: {"generate": false}, {"embeddings": true}. What is not named is as the file is made for.',
    )
    embedding_pooling = models.CharField(
        max_length=8,
        choices=EmbeddingPooling.choices,
        default=EmbeddingPooling.AUTO,
        help_text="How the vectors of a text's tokens become one.",
    )
    notes = models.TextField(blank=True)
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    updated_at = models.DateTimeField(auto_now=True)
    objects = AuditedManager()

    class Meta:
        ordering = ["name"]
        constraints = [
            models.UniqueConstraint(
                fields=["is_default"], condition=Q(is_default=True), name="served_model_one_default"
            ),
            models.CheckConstraint(condition=Q(n_slots__gte=1, n_ctx__gte=8), name="served_model_has_room"),
            models.CheckConstraint(
                condition=Q(
                    draft_n_max__range=(1, MAX_DRAFT), draft_n_min__lte=F("draft_n_max"), draft_p_min__range=(0, 1)
                ),
                name="served_model_draft_is_bounded",
            ),
            models.CheckConstraint(
                condition=~Q(draft_kind="model") | Q(draft_model__isnull=False), name="served_model_draft_has_a_model"
            ),
            models.CheckConstraint(condition=Q(n_lanes__gte=1, n_lanes__lte=16), name="served_model_lanes"),
        ]

    def __str__(self) -> str:
        return self.name

    @property
    def active_variant(self) -> ModelVariant | None:
        """What is loaded in place of the model's own file. A query, unless `variants` was prefetched."""
        made = (each for each in self.variants.all() if each.is_active and each.source_digest == self.digest)
        return next(made, None)

    def clean(self) -> None:
        """What one field's validators cannot see. Raises ValidationError with a sentence for each field at fault."""
        problems = {
            "aliases": list(self._alias_problems()),
            "name": list(self._name_problems()),
            "n_ctx": list(self._context_problems()),
            "draft_model": list(self._draft_model_problems()),
            "draft_n_min": list(self._draft_length_problems()),
            "draft_p_min": list(self._draft_chance_problems()),
            "capabilities": []
            if isinstance(self.capabilities, dict)
            else ['Use an object such as {"generate": true}.'],
        }
        if found := {field: sentences for field, sentences in problems.items() if sentences}:
            raise ValidationError(found)

    def _alias_problems(self) -> Iterator[str]:
        if not isinstance(self.aliases, list) or not all(isinstance(alias, str) for alias in self.aliases):
            yield 'Use a list of names such as ["default-chat"].'
            return
        if len(self.aliases) > MAX_ALIASES:
            yield f"{MAX_ALIASES} are the most."
            return
        for alias in self.aliases:
            if not re.fullmatch(model_name_validator.regex, alias):
                yield f"{alias[:100]!r}: {model_name_validator.message}"
        if len({self.name, *self.aliases}) <= len(self.aliases):
            yield "A name is there twice."
        taken = self._taken_names()
        yield from (f"{alias!r} already means the model {taken[alias]!r}." for alias in self.aliases if alias in taken)

    def _name_problems(self) -> Iterator[str]:
        owner = self._taken_names().get(self.name)
        if owner is not None:
            yield f"{self.name!r} already means the model {owner!r}."

    def _taken_names(self) -> dict[str, str]:
        """Every name that other models answer to, with the model's own name."""
        others = ServedModel.objects.exclude(pk=self.pk).values_list("name", "aliases")
        return {taken: name for name, aliases in others for taken in (name, *aliases)}

    def _draft_model_problems(self) -> Iterator[str]:
        if self.draft_model_id is not None and self.draft_model_id == self.pk:
            yield "A model that guesses for itself is no faster: choose a smaller one."
        if self.draft_kind == self.DraftKind.MODEL and self.draft_model_id is None:
            yield "Choose the model that guesses."

    def _draft_length_problems(self) -> Iterator[str]:
        if None not in (self.draft_n_min, self.draft_n_max) and self.draft_n_min > self.draft_n_max:
            yield f"More than the longest draft, {self.draft_n_max}: no draft would be long enough."

    def _draft_chance_problems(self) -> Iterator[str]:
        if self.draft_p_min is not None and not math.isfinite(self.draft_p_min):
            yield "Use a number."

    def _context_problems(self) -> Iterator[str]:
        trained = self.metadata.get("context_length")
        if trained and self.n_ctx is not None and self.n_ctx > trained:
            yield f"The model was trained for {trained} tokens; {self.n_ctx} are more."


class ModelVariant(models.Model):
    """The same model in another file or with other settings, made for this machine. Written by catalog/variants.py.

    The active one is what workers load under the model's name, while the model's own file is that of `source_digest`.
    """

    base_model = models.ForeignKey(ServedModel, on_delete=models.CASCADE, related_name="variants")
    name = models.CharField(max_length=64, validators=[adapter_name_validator])
    source_digest = models.CharField(max_length=64, help_text="SHA-256 of the model's file that it was made of.")
    path = models.CharField(max_length=1000, help_text="GGUF file on the worker's disk.")
    digest = models.CharField(max_length=64, help_text="SHA-256 of the file.")
    size_bytes = models.BigIntegerField(default=0)
    metadata = models.JSONField(default=dict, help_text="Read from the file's header.")
    n_threads = models.PositiveSmallIntegerField(
        null=True, validators=[MinValueValidator(1), MaxValueValidator(512)], help_text="Empty: as the model has it."
    )
    flash_attention = models.BooleanField(null=True, help_text="Empty: llama.cpp decides.")
    measured = models.JSONField(default=dict, help_text="Speeds, perplexity and gain when it was made.")
    is_active = models.BooleanField(default=False)
    created_at = models.DateTimeField(default=timezone.now)
    objects = AuditedManager()

    class Meta:
        ordering = ["base_model", "name"]
        constraints = [
            models.UniqueConstraint(fields=["base_model", "name"], name="model_variant_one_name"),
            models.UniqueConstraint(
                fields=["base_model"], condition=Q(is_active=True), name="model_variant_one_active"
            ),
        ]

    def __str__(self) -> str:
        return f"{self.name} of {self.base_model}"


class Adapter(Announced):
    """A LoRA adapter for one served model. The file says rank, alpha, targets; catalog/adapter_rows.py alone writes it.

    Who may use it: every tenant where it is shared, else those with a grant.
    """

    class Visibility(models.TextChoices):
        SHARED = "shared", "Every tenant"
        GRANTED = "granted", "Granted tenants only"

    name = models.CharField(
        max_length=64, validators=[adapter_name_validator], help_text="What tenants write, also as `model:name`."
    )
    base_model = models.ForeignKey(ServedModel, on_delete=models.PROTECT, related_name="adapters")
    path = models.CharField(max_length=1000, help_text="GGUF file on the worker's disk.")
    digest = models.CharField(max_length=64, editable=False, help_text="SHA-256 of the file.")
    size_bytes = models.BigIntegerField(default=0, editable=False)
    rank = models.PositiveIntegerField(default=0, editable=False)
    alpha = models.FloatField(default=0.0, editable=False)
    targets = models.JSONField(default=list, editable=False, help_text="Kinds of tensors that it changes.")
    task_name = models.TextField(blank=True, editable=False)
    prompt_prefix = models.TextField(blank=True, editable=False)
    metadata = models.JSONField(default=dict, editable=False, help_text="Read from the file's header, and its trial.")
    default_scale = models.FloatField(
        default=1.0,
        validators=[MinValueValidator(-MAX_SCALE), MaxValueValidator(MAX_SCALE)],
        help_text="Where a request names the adapter and no scale.",
    )
    owner = models.ForeignKey(
        Tenant,
        on_delete=models.PROTECT,
        null=True,
        blank=True,
        related_name="own_adapters",
        help_text="The tenant it was made for, which is granted it. Empty: the house's.",
    )
    visibility = models.CharField(max_length=8, choices=Visibility.choices, default=Visibility.GRANTED)
    enabled = models.BooleanField(default=True, help_text="Off: for tenants it does not exist, its place is kept.")
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    objects = AuditedManager()

    class Meta:
        ordering = ["base_model", "name"]
        constraints = [
            models.UniqueConstraint(fields=["base_model", "name"], name="adapter_one_name_per_model"),
            models.CheckConstraint(
                condition=Q(default_scale__range=(-MAX_SCALE, MAX_SCALE)), name="adapter_scale_is_bounded"
            ),
            models.CheckConstraint(
                condition=Q(owner__isnull=True) | Q(visibility="granted"), name="adapter_of_a_tenant_is_not_shared"
            ),
        ]

    def __str__(self) -> str:
        return f"{self.base_model.name}:{self.name}"

    def clean(self) -> None:
        if not math.isfinite(self.default_scale):  # a comparison lets not-a-number pass
            raise ValidationError({"default_scale": "Use a number."})
        if self.owner_id is not None and self.visibility == self.Visibility.SHARED:
            raise ValidationError({"visibility": "A tenant's own adapter is not shared with every tenant."})


class AdapterAlias(Announced):
    """A name that tenants ask for in the place of an adapter's, and the version of it that answers now. Written by
    inference/catalog/aliases.py alone.

    Each version is an adapter of its own. The canary answers `share` percent of the conversations, the target the rest.
    """

    name = models.CharField(
        max_length=64, validators=[adapter_name_validator], help_text="What tenants write, also as `model:name`."
    )
    base_model = models.ForeignKey(ServedModel, on_delete=models.CASCADE, related_name="adapter_aliases")
    target = models.ForeignKey(
        Adapter, on_delete=models.PROTECT, related_name="aliases", help_text="The version that answers."
    )
    canary = models.ForeignKey(
        Adapter,
        on_delete=models.PROTECT,
        null=True,
        blank=True,
        related_name="canary_of",
        help_text="The version on trial, for tenants that may use it.",
    )
    share = models.PositiveSmallIntegerField(
        default=0,
        validators=[MaxValueValidator(100)],
        help_text="Percent of the conversations that the canary answers.",
    )
    previous = models.ForeignKey(
        Adapter,
        on_delete=models.SET_NULL,
        null=True,
        blank=True,
        editable=False,
        related_name="+",
        help_text="What it led to before: a roll back returns there.",
    )
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    updated_at = models.DateTimeField(auto_now=True)
    objects = AuditedManager()

    class Meta:
        verbose_name = "adapter alias"
        verbose_name_plural = "adapter aliases"
        ordering = ["base_model", "name"]
        constraints = [
            models.UniqueConstraint(fields=["base_model", "name"], name="adapter_alias_one_name_per_model"),
            models.CheckConstraint(condition=Q(share__range=(0, 100)), name="adapter_alias_share_is_a_percentage"),
            models.CheckConstraint(
                condition=Q(share=0) | Q(canary__isnull=False), name="adapter_alias_share_has_a_canary"
            ),
            models.CheckConstraint(
                condition=Q(canary__isnull=True) | ~Q(canary=F("target")), name="adapter_alias_canary_is_another"
            ),
        ]

    def __str__(self) -> str:
        return f"{self.base_model.name}:{self.name}"


class AdapterGrant(Announced):
    """A tenant may use an adapter. `position` is its id in llama.cpp's dialect and does not change while granted."""

    tenant = models.ForeignKey(Tenant, on_delete=models.CASCADE, related_name="adapter_grants")
    adapter = models.ForeignKey(Adapter, on_delete=models.CASCADE, related_name="grants")
    base_model = models.ForeignKey(
        ServedModel, on_delete=models.CASCADE, related_name="+", editable=False, help_text="The adapter's."
    )
    position = models.PositiveIntegerField(editable=False)
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    objects = AuditedManager()

    class Meta:
        ordering = ["tenant", "base_model", "position"]
        constraints = [
            models.UniqueConstraint(fields=["tenant", "adapter"], name="adapter_grant_once"),
            models.UniqueConstraint(fields=["tenant", "base_model", "position"], name="adapter_grant_one_position"),
        ]

    def __str__(self) -> str:
        return f"{self.adapter} for {self.tenant}"


class DefaultVector(models.Model):
    """The adapters of a tenant's requests that name none, for one model. No row: no adapter."""

    tenant = models.ForeignKey(Tenant, on_delete=models.CASCADE, related_name="default_vectors")
    base_model = models.ForeignKey(ServedModel, on_delete=models.CASCADE, related_name="default_vectors")
    scales = models.JSONField(default=list, help_text="Pairs of an adapter's row number and a scale that is not 0.")
    updated_at = models.DateTimeField(auto_now=True)

    class Meta:
        ordering = ["tenant", "base_model"]
        constraints = [models.UniqueConstraint(fields=["tenant", "base_model"], name="default_vector_once")]

    def __str__(self) -> str:
        return f"{self.tenant} on {self.base_model}"


class Receipt(models.Model):
    """What one finished request used. Written once, at settlement; holds no prompt and no output.

    While a request is waiting or running its state is in Redis (inference/transport/queue.py).
    """

    class Status(models.TextChoices):
        COMPLETED = "completed", "Completed"
        CANCELLED = "cancelled", "Cancelled"
        FAILED = "failed", "Failed"

    request_id = models.CharField(max_length=64, primary_key=True)
    tenant = models.ForeignKey(Tenant, on_delete=models.PROTECT, related_name="receipts", db_index=False)
    key = models.ForeignKey(APIKey, on_delete=models.PROTECT, related_name="receipts", db_index=False)
    parent_id = models.CharField(
        max_length=64, blank=True, help_text="The request that this one is a part of, such as a batch."
    )
    model = models.CharField(max_length=100)
    model_digest = models.CharField(max_length=64)
    adapters = models.JSONField(default=list, blank=True, help_text="Pairs of an adapter's name and its scale.")
    aliases = models.JSONField(
        default=list, blank=True, help_text="Pairs of an alias that was asked for and the adapter that answered."
    )
    route = models.CharField(max_length=64)
    status = models.CharField(max_length=12, choices=Status.choices)
    finish_reason = models.CharField(max_length=16)
    error_code = models.CharField(max_length=64, blank=True)
    cached = models.BooleanField(default=False, help_text="Answered from the completion cache.")
    prompt_tokens = models.PositiveIntegerField(default=0)
    cached_tokens = models.PositiveIntegerField(default=0)
    completion_tokens = models.PositiveIntegerField(default=0)
    drafted_tokens = models.PositiveIntegerField(default=0)
    accepted_tokens = models.PositiveIntegerField(default=0)
    charged_tokens = models.PositiveIntegerField(default=0)
    queue_seconds = models.FloatField(default=0)
    prefill_seconds = models.FloatField(default=0)
    decode_seconds = models.FloatField(default=0)
    total_seconds = models.FloatField(default=0)
    num_steps = models.PositiveIntegerField(default=0)
    mean_batch_size = models.FloatField(
        default=0, help_text="Sequences in the executed plans that carried this one, on average."
    )
    mean_decode_batch_size = models.FloatField(default=0)
    seed = models.BigIntegerField(null=True)
    digests = models.JSONField(
        default=dict,
        blank=True,
        editable=False,
        help_text="HMACs of prompt, settings and answer, for `manage.py replay`.",
    )
    worker = models.CharField(max_length=64, blank=True)
    created_at = models.DateTimeField(help_text="When the request was admitted.")
    finished_at = models.DateTimeField()

    class Meta:
        ordering = ["-created_at"]
        indexes = [
            models.Index(fields=["tenant", "-created_at"], name="receipt_by_tenant"),
            models.Index(fields=["-created_at"], name="receipt_by_time"),
            # with all that the operator's sums by key read
            models.Index(
                fields=["key", "-created_at", "prompt_tokens", "completion_tokens", "charged_tokens"],
                name="receipt_by_key",
            ),
        ]

    def __str__(self) -> str:
        return self.request_id


class StoredResponse(models.Model):
    """A response that its tenant wants kept: the conversation and the answer (stored_responses.py alone reads them)."""

    id = models.CharField(max_length=64, primary_key=True)
    tenant = models.ForeignKey(Tenant, on_delete=models.CASCADE, related_name="stored_responses", db_index=False)
    content = models.BinaryField(help_text="Compressed JSON.")
    num_bytes = models.PositiveIntegerField()
    created_at = models.DateTimeField()

    class Meta:
        ordering = ["-created_at"]
        indexes = [models.Index(fields=["tenant", "created_at", "num_bytes"], name="stored_response_by_tenant")]

    def __str__(self) -> str:
        return self.id

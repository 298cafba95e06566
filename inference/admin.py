"""The operator's pages for served models, adapters and receipts.

A model or adapter is registered by its path: the form inspects the file in a child process and shows what is wrong on
the field. Receipts are read-only and listed without ever counting the table. Writes go through inference/registry.py
and inference/adapters.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import redis
from django import forms
from django.contrib import admin, messages
from django.contrib.admin.views.main import ChangeList
from django.db import transaction
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from unfold.admin import ModelAdmin, TabularInline
from unfold.contrib.filters.admin import AutocompleteSelectFilter
from unfold.decorators import display
from unfold.widgets import UnfoldAdminTextareaWidget, UnfoldAdminTextInputWidget, UnfoldBooleanWidget

from accounts import console
from accounts.admin import ReadOnlyAdmin
from inference import adapters, queue, registry, variants
from inference.chat.prompt import MAX_TEMPLATE_BYTES
from inference.inspection import RegistrationError
from inference.models import Adapter, AdapterGrant, DefaultVector, ModelVariant, Receipt, ServedModel

if TYPE_CHECKING:  # Django's own classes take no type arguments at run time
    ServedModelFormBase = forms.ModelForm[ServedModel]
    AdapterFormBase = forms.ModelForm[Adapter]
else:
    ServedModelFormBase = AdapterFormBase = forms.ModelForm

FACTS = (
    ("architecture", "Architecture"),
    ("title", "Title in the file"),
    ("license", "License"),
    ("quantization", "File type"),
    ("num_parameters", "Parameters"),
    ("num_tensors", "Tensors"),
    ("context_length", "Trained context"),
    ("block_count", "Layers"),
    ("embedding_length", "Embedding"),
    ("vocabulary_size", "Vocabulary"),
    ("tokenizer_model", "Tokenizer"),
    ("bos_token_id", "BOS token"),
    ("eos_token_id", "EOS token"),
)

CHAT_FACTS = (
    ("has_system", "system messages"),
    ("has_tools", "tools"),
    ("has_tool_calls", "calls of tools"),
    ("has_thinking", "thinking"),
)

TONES = {
    "loaded": "success",
    "loading": "info",
    "retiring": "info",
    "unloaded": "",
    "off": "",
    "missing": "warning",
    "failed": "danger",
    "unknown": "danger",
}
"""Colour of a state in the list, by its first word."""
MOST_SHOWN = 40
"""Characters of a worker's state that a list has room for."""

# Live state


def live_states() -> Mapping[int, str]:
    """What the workers say about each model, by its id. Raises redis.RedisError."""
    found: dict[int, list[str]] = {}
    for worker in queue.ticket_queue().workers():
        for report in worker.info.get("models", ()):
            found.setdefault(report["id"], []).append(_describe(report, worker.worker_id))
    return {model_id: "; ".join(states) for model_id, states in found.items()}


def _describe(report: Mapping[str, Any], worker_id: str) -> str:
    """One line of a heartbeat (HostedModel.report) as a phrase."""
    if report["error"]:
        return f"{report['state']} on {worker_id}: {report['error']}"
    if report["state"] == "ready":
        without = "".join(f"; no {name}: {reason}" for name, reason in (report.get("cannot") or {}).items())
        return f"loaded on {worker_id}, {report['busy']} of {report['slots']} slots busy{without}"
    return f"{report['state']} on {worker_id}"


def live_state(model: ServedModel, states: Mapping[int, str]) -> str:
    if model.load_mode == ServedModel.LoadMode.OFF and model.pk not in states:
        return "off"
    return states.get(model.pk, "no worker holds it")


def states_or_reason() -> tuple[Mapping[int, str], str | None]:
    try:
        return live_states(), None
    except redis.RedisError:
        return {}, "unknown: Redis does not answer"


# Served models


class NamesField(forms.CharField):
    """A list of names, written with commas between them."""

    def prepare_value(self, value: Any) -> Any:
        return ", ".join(map(str, value)) if isinstance(value, list) else value

    def to_python(self, value: Any) -> Any:
        names = value if isinstance(value, list) else str(value or "").split(",")
        return [name.strip() for name in names if str(name).strip()]

    def has_changed(self, initial: Any, data: Any) -> bool:
        return bool(self.to_python(initial) != self.to_python(data))


class SourceField(forms.CharField):
    """Text whose lines end as they did before a browser sent it."""

    def to_python(self, value: Any) -> Any:
        text = super().to_python(value)
        return text.replace("\r\n", "\n") if isinstance(text, str) else text


class ServedModelForm(ServedModelFormBase):
    """Inspects the file when its path is new; everything that is wrong with it is an error of the field `path`."""

    aliases = NamesField(
        required=False,
        widget=UnfoldAdminTextInputWidget,
        help_text="Other names that requests may use, separated by commas, such as chat, default-chat.",
    )
    chat_template = SourceField(
        required=False,
        strip=False,
        max_length=MAX_TEMPLATE_BYTES,
        label="Chat template of your own",
        widget=UnfoldAdminTextareaWidget(attrs={"rows": 6, "spellcheck": "false"}),
        help_text="Jinja in place of the file's template, which is shown below. It is tried when you save.",
    )
    inspect_again = forms.BooleanField(
        required=False,
        label="Inspect the file again",
        help_text="After it was replaced under the same path.",
        widget=UnfoldBooleanWidget,
    )

    class Meta:
        model = ServedModel
        fields = "__all__"
        labels = {
            "path": "Path of the file",
            "n_ctx": "Context of one slot",
            "n_slots": "Slots",
            "n_lanes": "Lanes",
            "n_threads": "Threads",
            "n_gpu_layers": "Layers on the GPU",
            "kv_type": "Type of the key-value cache",
            "context_shift": "Shift full contexts",
            "load_mode": "Load it",
            "keep_alive_seconds": "Unload after idle seconds",
            "draft_kind": "Who guesses tokens",
            "draft_model": "Model that guesses",
            "draft_n_min": "Shortest draft",
            "draft_n_max": "Longest draft",
            "draft_p_min": "Least probability of a guess",
            "draft_policy": "Draft",
            "pool": "Pool of workers",
        }
        help_texts = {
            "name": "What requests call it in their field model.",
            "path": "GGUF file on the worker's disk. It is read, hashed and loaded for a trial when you save.",
            "n_gpu_layers": "0: none. -1: all.",
            "kv_type": "q8_0 and q4_0 need less memory and are less exact.",
            "keep_alive_seconds": "Empty: never.",
            "granted_tenants": "Counts where only granted tenants may use the model.",
            "notes": "For operators; tenants do not see them.",
        }
        widgets = {"notes": UnfoldAdminTextareaWidget(attrs={"rows": 3})}

    def clean(self) -> dict[str, Any] | None:
        cleaned = super().clean()
        if not self.errors and "path" in self.fields and self._is_due():
            self._inspect(self.cleaned_data["path"])
        if not self.errors and "chat_template" in self.changed_data:
            self._try_template(self.cleaned_data["chat_template"])
        if not self.errors:
            self._check_draft()
        return cleaned

    def _try_template(self, source: str) -> None:
        try:
            self.instance.chat_facts = registry.check_template(source)
        except RegistrationError as error:
            self.add_error("chat_template", error.message)

    def _check_draft(self) -> None:
        try:
            registry.check_draft_model(self.instance.name, self.instance.digest, self.cleaned_data)
        except RegistrationError as error:
            self.add_error("draft_model", error.message)

    def _is_due(self) -> bool:
        return not self.instance.digest or "path" in self.changed_data or bool(self.cleaned_data.get("inspect_again"))

    def _inspect(self, path: str) -> None:
        try:
            inspected = registry.examine(path)
        except RegistrationError as error:
            self.add_error("path", error.message)
            return
        self.cleaned_data["path"] = str(inspected.path)
        self.instance.digest = inspected.digest
        self.instance.size_bytes = inspected.size_bytes
        self.instance.metadata = inspected.metadata


@admin.register(ServedModel)
class ServedModelAdmin(ModelAdmin):
    form = ServedModelForm
    list_display = (
        "name",
        "is_default",
        "worker_label",
        "slots",
        "file_type",
        "memory",
        "loading",
        "visibility",
        "pool",
        "see",
    )
    list_filter = ("load_mode", "visibility", "pool")
    list_filter_submit = True
    search_fields = ("name",)
    list_select_related = ("draft_model",)
    autocomplete_fields = ("granted_tenants", "draft_model")
    readonly_fields = (
        "is_default",
        "worker_state",
        "memory_in_detail",
        "see",
        "digest",
        "size",
        "facts",
        "conversations",
        "template_of_file",
        "created_at",
        "updated_at",
    )
    actions = ("make_default", "load_eagerly", "load_on_request", "switch_off")
    fieldsets = (
        (None, {"fields": ("name", "aliases", "path", "inspect_again", "is_default", "notes")}),
        ("Now", {"fields": ("worker_state", "memory_in_detail", "see")}),
        ("Who may use it", {"fields": ("visibility", "granted_tenants")}),
        (
            "How it is served",
            {
                "fields": (
                    ("n_ctx", "n_slots", "n_lanes"),
                    ("n_threads", "n_gpu_layers"),
                    ("kv_type", "context_shift"),
                    "pool",
                    ("load_mode", "keep_alive_seconds"),
                )
            },
        ),
        (
            "Drafts",
            {
                "fields": (
                    ("draft_kind", "draft_model"),
                    ("draft_n_min", "draft_n_max"),
                    ("draft_p_min", "draft_policy"),
                )
            },
        ),
        ("Conversations", {"fields": ("conversations", "chat_template", "template_of_file")}),
        ("The file", {"fields": ("digest", "size", "facts", ("created_at", "updated_at"))}),
    )
    fields_for_registration = (
        (None, {"fields": ("name", "path", "aliases", "notes")}),
        *fieldsets[2:5],
    )

    def get_fieldsets(self, request: HttpRequest, obj: ServedModel | None = None) -> Any:
        return self.fieldsets if obj else self.fields_for_registration

    def get_queryset(self, request: HttpRequest) -> QuerySet[ServedModel]:
        return registry.with_active_variants(super().get_queryset(request))

    def get_changelist_instance(self, request: HttpRequest) -> ChangeList:
        """One question to Redis for the whole page."""
        page: ChangeList = super().get_changelist_instance(request)
        states, reason = states_or_reason()
        for row in page.result_list:
            row.live_state = reason or live_state(row, states)
        return page

    # What the pages show

    @admin.display(description="Worker")
    def worker_state(self, row: ServedModel) -> str:
        known: str | None = getattr(row, "live_state", None)
        if known is None:
            states, reason = states_or_reason()
            known = reason or live_state(row, states)
        return known

    @display(
        description="Worker",
        label=TONES,
    )
    def worker_label(self, row: ServedModel) -> tuple[str, str]:
        """The first word of the state chooses the colour; the page of the model has the whole of it."""
        state = self.worker_state(row)
        first = "missing" if state.startswith("no worker") else state.split(maxsplit=1)[0].rstrip(":")
        _, _, slots = state.partition(", ")
        if first == "loaded":
            return first, f"{first}, {slots}"
        return first, state if len(state) <= MOST_SHOWN else first

    @admin.display(description="Loaded", ordering="load_mode")
    def loading(self, row: ServedModel) -> str:
        return row.get_load_mode_display()

    @admin.display(description="Look at")
    def see(self, row: ServedModel) -> SafeString:
        return console.link(console.listing("inference_receipt", model=row.name), "Receipts")

    @admin.display(description="File type")
    def file_type(self, row: ServedModel) -> str:
        own = str(row.metadata.get("quantization", ""))
        variant = row.active_variant
        return f"{variant.metadata.get('quantization', '')} (variant {variant.name} of {own})" if variant else own

    @admin.display(description="Slots × context")
    def slots(self, row: ServedModel) -> str:
        return f"{row.n_slots} × {row.n_ctx:,}"

    @admin.display(description="Size of the file")
    def size(self, row: ServedModel) -> str:
        return _megabytes(row.size_bytes)

    @admin.display(description="Memory")
    def memory(self, row: ServedModel) -> str:
        return _megabytes(_estimate(row).total_bytes)

    @admin.display(description="Memory in the worker, about")
    def memory_in_detail(self, row: ServedModel) -> str:
        need = _estimate(row)
        return (
            f"{_megabytes(need.total_bytes)}: weights {_megabytes(need.weights_bytes)}, "
            f"key-value cache {_megabytes(need.kv_bytes)}, computing {_megabytes(need.compute_bytes)}"
        )

    @admin.display(description="What the file says")
    def facts(self, row: ServedModel) -> SafeString:
        known = [
            (label, _fact(row.metadata[name])) for name, label in FACTS if row.metadata.get(name) not in (None, "")
        ]
        return format_html('<dl class="console-facts">{}</dl>', format_html_join("", "<dt>{}</dt><dd>{}</dd>", known))

    @admin.display(description="What the chat template can do")
    def conversations(self, row: ServedModel) -> SafeString | str:
        """As it was seen when it was tried; of each template, for files that have several."""
        found = {"yours": row.chat_facts} if row.chat_template else row.metadata.get("chat") or {}
        known = [(name, _chat_facts(facts)) for name, facts in found.items()]
        listed = format_html_join("", "<dt>{}</dt><dd>{}</dd>", known)
        return format_html('<dl class="console-facts">{}</dl>', listed) if known else "There is none."

    @admin.display(description="Chat template of the file")
    def template_of_file(self, row: ServedModel) -> SafeString | str:
        found = row.metadata.get("chat_templates") or {}
        shown = [(name, source) for name, source in found.items()]
        return format_html_join("", '{}<pre class="console-template">{}</pre>', shown) if shown else "none"

    # What they change

    def save_model(self, request: HttpRequest, obj: ServedModel, form: Any, change: bool) -> None:
        with transaction.atomic():
            super().save_model(request, obj, form, change)
            registry.settle_default()
            registry.changed()

    def save_related(self, request: HttpRequest, form: Any, formsets: Any, change: bool) -> None:
        super().save_related(request, form, formsets, change)
        registry.changed()  # the grants come after the row

    def delete_model(self, request: HttpRequest, obj: ServedModel) -> None:
        registry.remove([obj.pk])

    def delete_queryset(self, request: HttpRequest, queryset: QuerySet[ServedModel]) -> None:
        registry.remove(queryset.values_list("pk", flat=True))

    @admin.action(description="Make it the default model", permissions=["change"])
    def make_default(self, request: HttpRequest, queryset: QuerySet[ServedModel]) -> None:
        chosen = list(queryset[:2])
        if len(chosen) != 1:
            self.message_user(request, "Choose exactly one model.", messages.ERROR)
            return
        registry.make_default(chosen[0].pk)
        self.message_user(request, f"{chosen[0].name} is the default model now.", messages.SUCCESS)

    @admin.action(description="Load when the worker starts", permissions=["change"])
    def load_eagerly(self, request: HttpRequest, queryset: QuerySet[ServedModel]) -> None:
        self._set_load_mode(request, queryset, ServedModel.LoadMode.EAGER)

    @admin.action(description="Load on the first request", permissions=["change"])
    def load_on_request(self, request: HttpRequest, queryset: QuerySet[ServedModel]) -> None:
        self._set_load_mode(request, queryset, ServedModel.LoadMode.LAZY)

    @admin.action(description="Switch off", permissions=["change"])
    def switch_off(self, request: HttpRequest, queryset: QuerySet[ServedModel]) -> None:
        self._set_load_mode(request, queryset, ServedModel.LoadMode.OFF)

    def _set_load_mode(self, request: HttpRequest, queryset: QuerySet[ServedModel], mode: ServedModel.LoadMode) -> None:
        count = registry.set_load_mode(queryset.values_list("pk", flat=True), mode)
        self.message_user(request, f"{count} changed: {mode.label.lower()}.", messages.SUCCESS)


def _estimate(row: ServedModel) -> registry.MemoryEstimate:
    return registry.memory_of(row)


def _chat_facts(facts: Mapping[str, Any]) -> str:
    """In words, with the beginning of the template's digest."""
    if error := facts.get("error"):
        return f"cannot be used: {error}"
    shown = [words for name, words in CHAT_FACTS if facts.get(name)]
    return f"{', '.join(shown) or 'users and answers alone'} (SHA-256 {facts.get('digest', '')[:12]}…)"


def _fact(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


# Variants


@admin.register(ModelVariant)
class ModelVariantAdmin(ModelAdmin):
    """What `manage.py optimize_model` kept. Activating one swaps the file that its model is served from."""

    list_display = ("name", "base_model", "file_type", "is_active", "gain", "perplexity", "created_at")
    list_select_related = ("base_model",)
    list_filter = ("base_model", "is_active")
    actions = ("activate", "serve_own_file")
    fields = (
        "base_model",
        "name",
        "is_active",
        "gain",
        "perplexity",
        "path",
        "size",
        "digest",
        "source_digest",
        "n_threads",
        "flash_attention",
        "created_at",
    )

    @admin.display(description="File type")
    def file_type(self, row: ModelVariant) -> str:
        return str(row.metadata.get("quantization", ""))

    @admin.display(description="Speed")
    def gain(self, row: ModelVariant) -> str:
        gained = row.measured.get("gain")
        return f"{gained:.2f} times the model's own" if gained else "not measured"

    @admin.display(description="Perplexity")
    def perplexity(self, row: ModelVariant) -> str:
        percent = row.measured.get("perplexity_increase_percent")
        return "not measured" if percent is None else f"{percent:+.2f} %"

    @admin.display(description="Size of the file")
    def size(self, row: ModelVariant) -> str:
        return _megabytes(row.size_bytes)

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: ModelVariant | None = None) -> bool:
        return False

    def delete_model(self, request: HttpRequest, obj: ModelVariant) -> None:
        variants.remove([obj.pk])

    def delete_queryset(self, request: HttpRequest, queryset: QuerySet[ModelVariant]) -> None:
        variants.remove(queryset.values_list("pk", flat=True))

    def has_change_servedmodel_permission(self, request: HttpRequest) -> bool:
        """What is served is a matter of the model."""
        return bool(request.user.has_perm("inference.change_servedmodel"))

    @admin.action(description="Serve it under the model's name", permissions=["change_servedmodel"])
    def activate(self, request: HttpRequest, queryset: QuerySet[ModelVariant]) -> None:
        chosen = list(queryset.select_related("base_model")[:2])
        if len(chosen) != 1:
            self.message_user(request, "Choose exactly one variant.", messages.ERROR)
            return
        try:
            variants.activate(chosen[0])
        except RegistrationError as error:
            self.message_user(request, error.message, messages.ERROR)
            return
        self.message_user(request, f"{chosen[0].base_model} is served from {chosen[0].name} now.", messages.SUCCESS)

    @admin.action(description="Serve the model's own file again", permissions=["change_servedmodel"])
    def serve_own_file(self, request: HttpRequest, queryset: QuerySet[ModelVariant]) -> None:
        for base in ServedModel.objects.filter(variants__in=queryset).distinct():
            variants.revert(base)
            self.message_user(request, f"{base} is served from its own file.", messages.SUCCESS)


# Adapters


class AdapterForm(AdapterFormBase):
    """Checks the file against its base model when its path is new; what is wrong with it is an error of `path`."""

    inspect_again = forms.BooleanField(
        required=False, label="Check the file again", help_text="After it or its base model's was replaced."
    )

    def clean(self) -> dict[str, Any] | None:
        cleaned = super().clean()
        if not self.errors and "path" in self.fields and self._is_due():
            self._examine(self.cleaned_data["path"], self.cleaned_data.get("base_model") or self.instance.base_model)
        return cleaned

    def _is_due(self) -> bool:
        return not self.instance.digest or "path" in self.changed_data or bool(self.cleaned_data.get("inspect_again"))

    def _examine(self, path: str, base: ServedModel) -> None:
        try:
            examined = adapters.examine(path, adapters.base_of(base))
        except RegistrationError as error:
            self.add_error("path", error.message)
            return
        if examined is not None:
            self.cleaned_data["path"] = str(examined.path)
            adapters.fill(self.instance, examined)


class AdapterGrantInline(TabularInline):
    """Grants come and go and are never changed: a position stands for one adapter."""

    model = AdapterGrant
    fields = ("tenant", "position", "created_at")
    readonly_fields = ("position", "created_at")
    autocomplete_fields = ("tenant",)
    extra = 0

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


@admin.register(Adapter)
class AdapterAdmin(ModelAdmin):
    form = AdapterForm
    list_display = ("name", "base_model", "rank", "changes", "size", "default_scale", "visibility", "enabled")
    list_select_related = ("base_model",)
    list_filter = ("base_model", "visibility", "enabled")
    search_fields = ("name",)
    autocomplete_fields = ("base_model", "owner")
    inlines = (AdapterGrantInline,)
    actions = ("switch_on", "switch_off")
    facts = (
        "digest",
        "size",
        "rank",
        "alpha",
        "changes",
        "effect",
        "task_name",
        "prompt_prefix",
        "checked",
        "created_at",
    )
    fieldsets = (
        (None, {"fields": ("name", "base_model", "path", "inspect_again", "default_scale", "enabled")}),
        ("Who may use it", {"fields": ("visibility", "owner")}),
        ("The file", {"fields": facts}),
    )
    fields_for_registration = (
        (None, {"fields": ("name", "base_model", "path", "default_scale")}),
        fieldsets[1],
    )

    def get_fieldsets(self, request: HttpRequest, obj: Adapter | None = None) -> Any:
        return self.fieldsets if obj else self.fields_for_registration

    def get_readonly_fields(self, request: HttpRequest, obj: Adapter | None = None) -> tuple[str, ...]:
        return ("base_model", *self.facts) if obj else ()

    @admin.display(description="Changes")
    def changes(self, row: Adapter) -> str:
        return ", ".join(row.targets)

    @admin.display(description="Size of the file")
    def size(self, row: Adapter) -> str:
        return f"{row.size_bytes / 1e6:,.1f} MB"

    @admin.display(description="Effect in its trial")
    def effect(self, row: Adapter) -> str:
        effect = row.metadata.get("trial", {}).get("effect")
        return "unknown" if effect is None else f"moves scores by up to {effect:.3g}"

    @admin.display(description="Checked against")
    def checked(self, row: Adapter) -> str:
        same = row.metadata.get("base_digest") == row.base_model.digest
        return "the base model's file of now" if same else "an earlier file of the base model: check it again"

    def save_model(self, request: HttpRequest, obj: Adapter, form: Any, change: bool) -> None:
        with transaction.atomic():
            super().save_model(request, obj, form, change)
            adapters.saved(obj)

    def save_formset(self, request: HttpRequest, form: Any, formset: Any, change: bool) -> None:
        """Positions are given by adapters.grant, not by the form."""
        made = formset.save(commit=False)
        for row in formset.deleted_objects:
            adapters.revoke(row.adapter, row.tenant)
        for row in made:
            adapters.grant(form.instance, row.tenant)

    def delete_model(self, request: HttpRequest, obj: Adapter) -> None:
        adapters.remove([obj.pk])

    def delete_queryset(self, request: HttpRequest, queryset: QuerySet[Adapter]) -> None:
        adapters.remove(queryset.values_list("pk", flat=True))

    @admin.action(description="Switch on", permissions=["change"])
    def switch_on(self, request: HttpRequest, queryset: QuerySet[Adapter]) -> None:
        self._set_enabled(request, queryset, True)

    @admin.action(description="Switch off", permissions=["change"])
    def switch_off(self, request: HttpRequest, queryset: QuerySet[Adapter]) -> None:
        self._set_enabled(request, queryset, False)

    def _set_enabled(self, request: HttpRequest, queryset: QuerySet[Adapter], enabled: bool) -> None:
        count = adapters.set_enabled(queryset.values_list("pk", flat=True), enabled)
        self.message_user(request, f"{count} switched {'on' if enabled else 'off'}.", messages.SUCCESS)


@admin.register(DefaultVector)
class DefaultVectorAdmin(ReadOnlyAdmin):
    """What tenants have set for themselves."""

    list_display = ("tenant", "base_model", "adapters_and_scales", "updated_at")
    list_select_related = ("tenant", "base_model")
    list_filter = (("tenant", AutocompleteSelectFilter),)
    fields = ("tenant", "base_model", "adapters_and_scales", "updated_at")

    def get_changelist_instance(self, request: HttpRequest) -> ChangeList:
        """The names of all adapters on the page in one query."""
        page: ChangeList = super().get_changelist_instance(request)
        wanted = {pk for row in page.result_list for pk, _ in row.scales}
        names = dict(Adapter.objects.filter(pk__in=wanted).values_list("pk", "name"))
        for row in page.result_list:
            row.adapter_names = names
        return page

    @admin.display(description="Adapters")
    def adapters_and_scales(self, row: DefaultVector) -> str:
        names: dict[int, str] | None = getattr(row, "adapter_names", None)
        if names is None:
            names = dict(Adapter.objects.filter(pk__in=[pk for pk, _ in row.scales]).values_list("pk", "name"))
        return ", ".join(f"{names.get(pk, '(gone)')} × {scale:g}" for pk, scale in row.scales)


# Receipts


class ModelNameFilter(admin.SimpleListFilter):
    """By registered name: the distinct names of all receipts would be a scan of them all."""

    title = "model"
    parameter_name = "model"

    def lookups(self, request: HttpRequest, model_admin: admin.ModelAdmin[Any]) -> list[tuple[str, str]]:
        return [(name, name) for name in ServedModel.objects.order_by("name").values_list("name", flat=True)]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Receipt]) -> QuerySet[Receipt]:
        return queryset.filter(model=self.value()) if self.value() else queryset


@admin.register(Receipt)
class ReceiptAdmin(ReadOnlyAdmin):
    """Nothing here is ever changed or added by hand."""

    list_display = (
        "created",
        "customer",
        "of_key",
        "of_model",
        "outcome",
        "tokens",
        "first_token",
        "total",
        "batch",
        "request_code",
    )
    list_select_related = ("tenant", "key")
    list_filter = ("status", ModelNameFilter, ("tenant", AutocompleteSelectFilter), ("key", AutocompleteSelectFilter))
    search_fields = ("request_id__exact",)
    search_help_text = "The whole id of a request"
    list_per_page = 50
    ordering = ("-created_at",)
    readonly_fields = ("ending", "waited", "prefill", "decoding", "total", "batch", "ledger")
    fieldsets = (
        (None, {"fields": ("request_id", "tenant", "key", "model", "route", "ending", "ledger")}),
        (
            "Tokens",
            {
                "fields": (
                    ("prompt_tokens", "completion_tokens"),
                    ("cached_tokens", "charged_tokens"),
                    ("drafted_tokens", "accepted_tokens"),
                    "cached",
                )
            },
        ),
        (
            "Time",
            {
                "fields": (
                    ("created_at", "finished_at"),
                    ("waited", "prefill"),
                    ("decoding", "total"),
                    ("num_steps", "batch"),
                )
            },
        ),
        ("Made by", {"fields": ("worker", "seed", "model_digest", "parent_id")}),
    )

    @admin.display(description="Admitted (UTC)")
    def created(self, row: Receipt) -> SafeString:
        return console.clock(row.created_at)

    @admin.display(description="Tenant")
    def customer(self, row: Receipt) -> str:
        return row.tenant.name

    @admin.display(description="Key")
    def of_key(self, row: Receipt) -> str:
        return row.key.name

    @admin.display(description="Model")
    def of_model(self, row: Receipt) -> SafeString:
        return format_html('<span class="console-nowrap">{}</span>', row.model)

    @display(description="Outcome", label={"completed": "success", "cancelled": "warning", "failed": "danger"})
    def outcome(self, row: Receipt) -> tuple[str, str]:
        return row.status, row.error_code or row.finish_reason or row.get_status_display()

    @admin.display(description="Outcome")
    def ending(self, row: Receipt) -> str:
        reason = row.error_code or row.finish_reason
        return f"{row.get_status_display()}: {reason}" if reason else row.get_status_display()

    @admin.display(description="Tokens in + out")
    def tokens(self, row: Receipt) -> SafeString:
        text = f"{row.prompt_tokens:,} + {row.completion_tokens:,}"
        return format_html('<span class="console-nowrap">{}</span>', text)

    @admin.display(description="First token")
    def first_token(self, row: Receipt) -> str:
        return "from cache" if row.cached else console.seconds(row.queue_seconds + row.prefill_seconds)

    @admin.display(description="Waited for a slot")
    def waited(self, row: Receipt) -> str:
        return console.seconds(row.queue_seconds)

    @admin.display(description="Prompt")
    def prefill(self, row: Receipt) -> str:
        return console.seconds(row.prefill_seconds)

    @admin.display(description="Output")
    def decoding(self, row: Receipt) -> str:
        return console.seconds(row.decode_seconds)

    @admin.display(description="Total")
    def total(self, row: Receipt) -> str:
        return console.seconds(row.total_seconds)

    @admin.display(description="Batch")
    def batch(self, row: Receipt) -> str:
        return f"{row.mean_batch_size:.1f}"

    @admin.display(description="Request")
    def request_code(self, row: Receipt) -> SafeString:
        return console.short_id(row.request_id)

    @admin.display(description="Ledger")
    def ledger(self, row: Receipt) -> SafeString:
        return console.link(console.listing("accounts_ledgerentry", q=row.request_id), "Entries of this request")

    def get_queryset(self, request: HttpRequest) -> QuerySet[Receipt]:
        rows: QuerySet[Receipt] = super().get_queryset(request)
        return rows.select_related("tenant", "key")

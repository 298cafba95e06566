"""Pages of served models. Writes go through catalog/model_rows.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import redis
from django.contrib import admin, messages
from django.contrib.admin.views.main import ChangeList
from django.db import transaction
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect
from django.urls import reverse
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from unfold.admin import ModelAdmin
from unfold.decorators import display

from accounts.pages import console
from accounts.trail.refusals import Refusal
from inference.admin.live_states import live_state, states_or_reason
from inference.admin.model_form import ServedModelForm
from inference.catalog import model_rows, registry
from inference.catalog.model_memory import MemoryEstimate, memory_of
from inference.catalog.served import Served
from inference.models import ServedModel
from inference.transport import model_orders

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
    "waiting": "info",
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

LOADED = {
    ServedModel.LoadMode.EAGER: "At start",
    ServedModel.LoadMode.LAZY: "On request",
    ServedModel.LoadMode.OFF: "Never",
}


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
    actions = (
        "load_now",
        "unload_now",
        "pin",
        "unpin",
        "make_default",
        "load_eagerly",
        "load_on_request",
        "switch_off",
        "optimize",
    )
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
                    ("load_mode", "is_pinned"),
                    "keep_alive_seconds",
                    ("capabilities", "embedding_pooling"),
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
        if first == "loading":
            return first, state.partition(" on ")[0]
        if first == "failed":
            return first, f"{first}: {state.partition(': ')[2]}"[:MOST_SHOWN]
        return first, state if len(state) <= MOST_SHOWN else first

    @admin.display(description="Loaded", ordering="load_mode")
    def loading(self, row: ServedModel) -> str:
        """In few words: the list is wide."""
        return LOADED[ServedModel.LoadMode(row.load_mode)] + (", stays" if row.is_pinned else "")

    @admin.display(description="Look at")
    def see(self, row: ServedModel) -> SafeString:
        return console.links(
            (console.listing("inference_receipt", model=row.name), "Receipts"),
            (reverse("console-model", args=[row.pk]), "Memory and template"),
        )

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
        return console.megabytes(row.size_bytes)

    @admin.display(description="Memory")
    def memory(self, row: ServedModel) -> str:
        return console.megabytes(_estimate(row).total_bytes)

    @admin.display(description="Memory in the worker, about")
    def memory_in_detail(self, row: ServedModel) -> str:
        need = _estimate(row)
        return (
            f"{console.megabytes(need.total_bytes)}: weights {console.megabytes(need.weights_bytes)}, "
            f"key-value cache {console.megabytes(need.kv_bytes)}, computing {console.megabytes(need.compute_bytes)}, "
            f"states of slots {console.megabytes(need.states_bytes)}"
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

    def running_now(self, rows: Sequence[ServedModel]) -> Mapping[Any, str]:
        states, reason = states_or_reason()
        return {row.pk: reason or live_state(row, states) for row in rows}

    def save_model(self, request: HttpRequest, obj: ServedModel, form: Any, change: bool) -> None:
        with transaction.atomic():
            super().save_model(request, obj, form, change)
            model_rows.settle_default()
            registry.changed()

    def save_related(self, request: HttpRequest, form: Any, formsets: Any, change: bool) -> None:
        super().save_related(request, form, formsets, change)
        registry.changed()  # the grants come after the row

    def delete_model(self, request: HttpRequest, obj: ServedModel) -> None:
        model_rows.remove([obj.pk])

    def delete_queryset(self, request: HttpRequest, queryset: QuerySet[ServedModel]) -> None:
        model_rows.remove(queryset.values_list("pk", flat=True))

    @admin.action(description="Load now", permissions=["change"])
    def load_now(self, request: HttpRequest, queryset: QuerySet[ServedModel]) -> None:
        for served in self._served(queryset):
            try:
                is_new = model_orders.load(served)
            except Refusal as refusal:
                self.message_user(request, refusal.message, messages.ERROR)
            except redis.RedisError:
                self.message_user(request, "Redis does not answer: no worker can be told.", messages.ERROR)
            else:
                words = "is being loaded" if is_new else "is loaded already"
                self.message_user(request, f"{served.name} {words}.", messages.SUCCESS)

    @admin.action(description="Unload when idle", permissions=["change"])
    def unload_now(self, request: HttpRequest, queryset: QuerySet[ServedModel]) -> None:
        for served in self._served(queryset):
            try:
                number = model_orders.unload(served)
            except redis.RedisError:
                self.message_user(request, "Redis does not answer: no worker can be told.", messages.ERROR)
            else:
                words = "is unloaded as soon as it is idle" if number else "is not loaded"
                self.message_user(request, f"{served.name} {words}.", messages.SUCCESS)

    def _served(self, queryset: QuerySet[ServedModel]) -> list[Served]:
        chosen = set(queryset.values_list("pk", flat=True))
        return [served for served in registry.every() if served.id in chosen]

    @admin.action(description="Keep in memory", permissions=["change"])
    def pin(self, request: HttpRequest, queryset: QuerySet[ServedModel]) -> None:
        count = model_rows.pin(queryset.values_list("pk", flat=True), True)
        self.message_user(request, f"{count} changed: once loaded, they stay.", messages.SUCCESS)

    @admin.action(description="Let it be unloaded again", permissions=["change"])
    def unpin(self, request: HttpRequest, queryset: QuerySet[ServedModel]) -> None:
        count = model_rows.pin(queryset.values_list("pk", flat=True), False)
        self.message_user(request, f"{count} changed: they may be unloaded.", messages.SUCCESS)

    @admin.action(description="Make it the default model", permissions=["change"])
    def make_default(self, request: HttpRequest, queryset: QuerySet[ServedModel]) -> None:
        chosen = list(queryset[:2])
        if len(chosen) != 1:
            self.message_user(request, "Choose exactly one model.", messages.ERROR)
            return
        model_rows.make_default(chosen[0].pk)
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

    def has_optimize_permission(self, request: HttpRequest) -> bool:
        return bool(request.user.has_perm("inference.add_optimization"))

    @admin.action(description="Find its fastest file", permissions=["optimize"])
    def optimize(self, request: HttpRequest, queryset: QuerySet[ServedModel]) -> HttpResponse | None:
        """To the form of a search, with the model chosen."""
        chosen = list(queryset[:2])
        if len(chosen) != 1:
            self.message_user(request, "Choose exactly one model.", messages.ERROR)
            return None
        return redirect(f"{reverse('admin:inference_optimization_add')}?base_model={chosen[0].pk}")

    def _set_load_mode(self, request: HttpRequest, queryset: QuerySet[ServedModel], mode: ServedModel.LoadMode) -> None:
        count = model_rows.set_load_mode(queryset.values_list("pk", flat=True), mode)
        self.message_user(request, f"{count} changed: {mode.label.lower()}.", messages.SUCCESS)


def _estimate(row: ServedModel) -> MemoryEstimate:
    return memory_of(row, row.active_variant)


def _chat_facts(facts: Mapping[str, Any]) -> str:
    """In words, with the beginning of the template's digest."""
    if error := facts.get("error"):
        return f"cannot be used: {error}"
    shown = [words for name, words in CHAT_FACTS if facts.get(name)]
    return f"{', '.join(shown) or 'users and answers alone'} (SHA-256 {facts.get('digest', '')[:12]}…)"


def _fact(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)

"""Pages of receipts: read-only, and listed without ever counting the table."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.db.models import QuerySet
from django.http import HttpRequest
from django.urls import reverse
from django.utils.html import format_html
from django.utils.safestring import SafeString
from unfold.contrib.filters.admin import AutocompleteSelectFilter
from unfold.decorators import display

from accounts.pages import console
from accounts.pages.kept_rows import ReadOnlyAdmin
from inference.models import Receipt, ServedModel


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
    readonly_fields = ("ending", "waited", "prefill", "decoding", "total", "batch", "ledger", "adapters_and_scales")
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
        ("Made by", {"fields": ("adapters_and_scales", "worker", "seed", "model_digest", "parent_id")}),
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

    @admin.display(description="Adapters")
    def adapters_and_scales(self, row: Receipt) -> str:
        """Which version answered, and the alias that it was asked for by."""
        asked = {version: f" (as {alias})" for alias, version in row.aliases}
        return ", ".join(f"{name}{asked.get(name, '')} × {scale:g}" for name, scale in row.adapters) or "none"

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
        return console.link(reverse("console-request", args=[row.request_id]), console.short_id(row.request_id))

    @admin.display(description="Ledger")
    def ledger(self, row: Receipt) -> SafeString:
        return console.links(
            (console.listing("accounts_ledgerentry", q=row.request_id), "Entries of this request"),
            (reverse("console-request", args=[row.request_id]), "All that is known of it, replay"),
        )

    def get_queryset(self, request: HttpRequest) -> QuerySet[Receipt]:
        rows: QuerySet[Receipt] = super().get_queryset(request)
        return rows.select_related("tenant", "key")

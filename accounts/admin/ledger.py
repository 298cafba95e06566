"""Pages of quota periods, reservations and the ledger: accounts/ledger/quotas.py alone writes them."""

from __future__ import annotations

from typing import Any, cast

from django.contrib import admin
from django.core.exceptions import PermissionDenied
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect
from django.urls import URLPattern, path, reverse
from django.utils.html import format_html
from django.utils.safestring import SafeString
from unfold.contrib.filters.admin import AutocompleteSelectFilter
from unfold.decorators import action, display

from accounts.identity import key_rows, roles
from accounts.ledger import statements
from accounts.models import LedgerEntry, LedgerRows, QuotaPeriod, Reservation
from accounts.pages import console
from accounts.pages.downloads import csv_file
from accounts.pages.kept_rows import FoundByTenant, LimitsNow, ReadOnlyAdmin


class WholeTenantFilter(admin.SimpleListFilter):
    title = "whose"
    parameter_name = "whose"
    for_tenants = True

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [("tenants", "Tenants"), ("keys", "Single keys")]

    def queryset(self, request: HttpRequest, queryset: QuerySet[QuotaPeriod]) -> QuerySet[QuotaPeriod]:
        return queryset.filter(key__isnull=self.value() == "tenants") if self.value() else queryset


@admin.register(QuotaPeriod)
class QuotaPeriodAdmin(LimitsNow, FoundByTenant, ReadOnlyAdmin):
    limits_of = staticmethod(key_rows.limits_of_periods)
    list_display = ("whose", "of_key", "span", "usage", "held", "num_requests", "see")
    list_select_related = ("tenant__plan", "key")
    list_filter = (WholeTenantFilter, ("tenant", AutocompleteSelectFilter), ("key", AutocompleteSelectFilter))
    search_fields = ("key__public_id__exact",)
    search_help_text = "Tenant, or public part of a key"
    ordering = ("-starts_at", "-pk")
    readonly_fields = ("usage", "see")
    actions_detail = ("correct",)
    fieldsets = (
        (None, {"fields": ("tenant", "key", ("starts_at", "ends_at"), "see")}),
        ("Tokens", {"fields": ("usage", "reserved_tokens", ("prompt_tokens", "completion_tokens"))}),
        ("Requests", {"fields": (("used_requests", "reserved_requests"),)}),
    )

    @admin.display(description="Tenant")
    def whose(self, row: QuotaPeriod) -> str:
        return row.tenant.name

    @admin.display(description="Key")
    def of_key(self, row: QuotaPeriod) -> SafeString | str:
        return row.key.name if row.key else format_html("<em>{}</em>", "all together")

    @admin.display(description="Period")
    def span(self, row: QuotaPeriod) -> SafeString:
        days = f"{row.starts_at:%Y-%m-%d} to {row.ends_at:%Y-%m-%d}"
        return format_html('<span class="console-nowrap">{}</span>', days)

    @admin.display(description="Tokens used")
    def usage(self, row: QuotaPeriod) -> SafeString:
        if row.key:
            return console.quota_bar(row.used_tokens, self.limits_now(row).monthly_tokens, "no limit of its own")
        return console.quota_bar(row.used_tokens, self.limits_now(row).monthly_tokens)

    @admin.display(description="Held")
    def held(self, row: QuotaPeriod) -> str:
        return console.whole(row.reserved_tokens)

    @admin.display(description="Requests")
    def num_requests(self, row: QuotaPeriod) -> str:
        return console.whole(row.used_requests)

    def get_urls(self) -> list[URLPattern]:
        file = path("<int:pk>/csv/", self.admin_site.admin_view(self.as_csv), name="accounts_quotaperiod_csv")
        return [file, *super().get_urls()]

    def as_csv(self, request: HttpRequest, pk: int) -> HttpResponse:
        row = self.get_object(request, str(pk))
        if row is None or not self.has_view_permission(request, row):
            raise PermissionDenied
        name = f"period-{row.tenant_id}-{row.starts_at:%Y-%m-%d}.csv"
        return csv_file(name, statements.as_csv(statements.of_period(row)))

    def has_correct_permission(self, request: HttpRequest, object_id: Any = None) -> bool:
        return roles.reach(request.user, "accounts.tenant", "change") is None

    @action(description="Correct what was used", permissions=["correct"], icon="edit_note")
    def correct(self, request: HttpRequest, object_id: Any) -> HttpResponse:
        """A button of the period's page."""
        return redirect("console-correction", period_id=object_id)

    @admin.display(description="Look at")
    def see(self, row: QuotaPeriod) -> SafeString:
        side = "key_period" if row.key_id else "tenant_period"
        owner = {"key__id__exact": row.key_id} if row.key_id else {"tenant__id__exact": row.tenant_id}
        return console.links(
            (reverse("admin:accounts_quotaperiod_csv", args=[row.pk]), "CSV"),
            (console.listing("accounts_ledgerentry", **{f"{side}__id__exact": row.pk}), "Ledger"),
            (console.listing("inference_receipt", **owner), "Receipts"),
        )


@admin.register(Reservation)
class ReservationAdmin(ReadOnlyAdmin):
    list_display = ("request_code", "tenant", "held", "standing", "created", "expires")
    list_select_related = ("tenant_period__tenant",)
    list_filter = ("state",)
    search_fields = ("request_id__exact",)
    search_help_text = "The whole id of a request"
    ordering = ("-expires_at",)

    @admin.display(description="Request")
    def request_code(self, row: Reservation) -> SafeString:
        return console.code(row.request_id)

    @admin.display(description="Tenant")
    def tenant(self, row: Reservation) -> str:
        return row.tenant_period.tenant.name

    @admin.display(description="Tokens")
    def held(self, row: Reservation) -> str:
        return console.whole(row.tokens)

    @display(description="State", label={"open": "info", "settled": "success", "released": "warning"})
    def standing(self, row: Reservation) -> tuple[str, str]:
        return row.state, row.get_state_display()

    @admin.display(description="Made")
    def created(self, row: Reservation) -> SafeString:
        return console.clock(row.created_at)

    @admin.display(description="Runs out")
    def expires(self, row: Reservation) -> SafeString:
        return console.clock(row.expires_at)


@admin.register(LedgerEntry)
class LedgerEntryAdmin(ReadOnlyAdmin):
    list_display = ("created", "movement", "tenant", "key", "used", "held", "model", "reason", "request_code")
    list_filter = ("kind",)
    search_fields = ("request_id__exact",)
    search_help_text = "The whole id of a request"
    readonly_fields = ("receipt",)
    fieldsets = (
        (None, {"fields": ("created_at", "kind", "request_id", "receipt", "reason")}),
        ("What it moved", {"fields": (("used_tokens", "reserved_tokens"), ("used_requests", "reserved_requests"))}),
        (
            "What the request used",
            {"fields": ("model", "adapters", ("prompt_tokens", "cached_tokens", "completion_tokens"), "cost_nanos")},
        ),
        (
            "The tenant's period",
            {
                "fields": (
                    "tenant_period",
                    ("tenant_committed_after", "tenant_limit"),
                    ("tenant_requests_after", "tenant_request_limit"),
                )
            },
        ),
        (
            "The key's period",
            {
                "fields": (
                    "key_period",
                    ("key_committed_after", "key_limit"),
                    ("key_requests_after", "key_request_limit"),
                )
            },
        ),
    )

    list_select_related = ("tenant_period__tenant", "key_period__key")

    def get_search_results(self, request: HttpRequest, queryset: QuerySet[LedgerEntry], search_term: str) -> Any:
        """The two indexes of requests have a part of the ledger each."""
        rows = cast(LedgerRows, queryset)
        return (rows.of_requests([search_term.strip()]) if search_term else rows), False

    @admin.display(description="Time (UTC)")
    def created(self, row: LedgerEntry) -> SafeString:
        return console.clock(row.created_at)

    @display(
        description="Kind", label={"reserve": "info", "settle": "success", "release": "warning", "adjust": "primary"}
    )
    def movement(self, row: LedgerEntry) -> tuple[str, str]:
        return row.kind, row.get_kind_display()

    @admin.display(description="Tenant")
    def tenant(self, row: LedgerEntry) -> str:
        return row.tenant_period.tenant.name

    @admin.display(description="Key")
    def key(self, row: LedgerEntry) -> str:
        return row.key_period.key.name if row.key_period and row.key_period.key else "-"

    @admin.display(description="Used")
    def used(self, row: LedgerEntry) -> str:
        return f"{row.used_tokens:+,}" if row.used_tokens else "0"

    @admin.display(description="Held")
    def held(self, row: LedgerEntry) -> str:
        return f"{row.reserved_tokens:+,}" if row.reserved_tokens else "0"

    @admin.display(description="Request")
    def request_code(self, row: LedgerEntry) -> SafeString:
        return console.short_id(row.request_id)

    @admin.display(description="Receipt")
    def receipt(self, row: LedgerEntry) -> SafeString:
        return console.link(console.listing("inference_receipt", q=row.request_id), "Receipt of this request")

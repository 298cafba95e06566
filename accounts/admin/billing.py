"""Pages of prices, and of what is read from the ledger: days of usage, statements, alerts."""

from __future__ import annotations

from django.conf import settings
from django.contrib import admin
from django.core.exceptions import PermissionDenied
from django.db import transaction
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.urls import URLPattern, path, reverse
from django.utils import timezone
from django.utils.safestring import SafeString
from unfold.admin import ModelAdmin
from unfold.contrib.filters.admin import AutocompleteSelectFilter

from accounts.ledger import prices, statements
from accounts.models import DayUsage, Price, QuotaAlert, Statement
from accounts.pages import console
from accounts.pages.downloads import csv_file
from accounts.pages.kept_rows import ReadOnlyAdmin


@admin.register(Price)
class PriceAdmin(ModelAdmin):
    list_display = ("shown", "valid_from", "input_per_million", "cached_input_per_million", "output_per_million")
    search_fields = ("model",)

    @admin.display(description="Model", ordering="model")
    def shown(self, row: Price) -> str:
        return row.model or "every other model"

    def delete_queryset(self, request: HttpRequest, queryset: QuerySet[Price]) -> None:
        with transaction.atomic():
            for price in queryset:
                price.delete()  # each announces itself


@admin.register(DayUsage)
class DayUsageAdmin(ReadOnlyAdmin):
    list_display = ("day", "tenant", "key", "model", "adapters", "num_requests", "tokens", "cost")
    list_select_related = ("tenant", "key")
    list_filter = (("tenant", AutocompleteSelectFilter),)
    ordering = ("-day", "-pk")

    @admin.display(description="Requests")
    def num_requests(self, row: DayUsage) -> str:
        return console.whole(row.requests)

    @admin.display(description="Tokens")
    def tokens(self, row: DayUsage) -> str:
        return console.whole(row.used_tokens)

    @admin.display(description="Cost")
    def cost(self, row: DayUsage) -> str:
        return f"{prices.money(row.cost_nanos)} {settings.CONFIG.currency}"


@admin.register(Statement)
class StatementAdmin(ReadOnlyAdmin):
    list_display = ("month", "tenant", "num_requests", "tokens", "cost", "created_at", "csv")
    list_select_related = ("tenant",)
    list_filter = (("tenant", AutocompleteSelectFilter),)
    ordering = ("-month", "-pk")

    def get_queryset(self, request: HttpRequest) -> QuerySet[Statement]:
        """Without the lines, which are thousands: a row's own page reads them."""
        rows: QuerySet[Statement] = super().get_queryset(request)
        return rows.defer("lines")

    @admin.display(description="File")
    def csv(self, row: Statement) -> SafeString:
        return console.link(reverse("admin:accounts_statement_csv", args=[row.pk]), "CSV")

    def get_urls(self) -> list[URLPattern]:
        file = path("<int:pk>/csv/", self.admin_site.admin_view(self.as_csv), name="accounts_statement_csv")
        return [file, *super().get_urls()]

    def as_csv(self, request: HttpRequest, pk: int) -> HttpResponse:
        row = self.get_object(request, str(pk))
        if row is None or not self.has_view_permission(request, row):
            raise PermissionDenied
        facts = statements.statement(row.tenant, row.month, timezone.now())
        name = f"statement-{row.tenant_id}-{row.month:%Y-%m}.csv"
        return csv_file(name, statements.as_csv(facts))

    @admin.display(description="Requests")
    def num_requests(self, row: Statement) -> str:
        return console.whole(row.requests)

    @admin.display(description="Tokens")
    def tokens(self, row: Statement) -> str:
        return console.whole(row.used_tokens)

    @admin.display(description="Cost")
    def cost(self, row: Statement) -> str:
        return f"{prices.money(row.cost_nanos)} {row.currency}"


@admin.register(QuotaAlert)
class QuotaAlertAdmin(ReadOnlyAdmin):
    list_display = ("created_at", "period", "counts", "reached", "used", "quota", "mailed_at")
    list_select_related = ("period__tenant", "period__key")
    list_filter = ("percent", "counts")

    @admin.display(description="Reached", ordering="percent")
    def reached(self, row: QuotaAlert) -> str:
        return f"{row.percent} %"

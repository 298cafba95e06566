"""Pages of refusals and of the audit log: read-only."""

from __future__ import annotations

from textwrap import shorten
from typing import Any

from django.contrib import admin
from django.db.models import QuerySet
from django.http import HttpRequest
from django.urls import reverse
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from unfold.contrib.filters.admin import AutocompleteSelectFilter

from accounts.models import AuditEntry, RefusedRequest
from accounts.pages import console
from accounts.pages.kept_rows import ReadOnlyAdmin

NEWEST_REFUSALS = 1000
MOST_FIELD_CHARACTERS = 120
"""Of names of fields, in a row of the audit log."""


OF_THE_SITE = ("MAX_BODY_BYTES", "BODY_TIMEOUT_SECONDS")
"""Settings that bound what is refused before a key is read."""


class CodeFilter(admin.SimpleListFilter):
    """By codes that the newest refusals have: those of all refusals would be a scan of them all."""

    title = parameter_name = "code"
    for_tenants = True

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        newest = model_admin.get_queryset(request).order_by("-pk").values_list("code", flat=True)[:NEWEST_REFUSALS]
        return [(code, code) for code in sorted(set(newest))]

    def queryset(self, request: HttpRequest, queryset: QuerySet[RefusedRequest]) -> QuerySet[RefusedRequest]:
        return queryset.filter(code=self.value()) if self.value() else queryset


@admin.register(RefusedRequest)
class RefusedRequestAdmin(ReadOnlyAdmin):
    """Why was this refused?"""

    list_display = ("created", "request_code", "customer", "code", "limit", "bound_to", "bound", "frees", "route")
    list_filter = (CodeFilter, ("tenant", AutocompleteSelectFilter))
    search_fields = ("request_id__exact",)
    search_help_text = "The whole id of a request"
    list_select_related = ("tenant", "key")
    readonly_fields = ("why", "owner_of_limit", "whole")
    fieldsets = (
        (None, {"fields": ("why", "owner_of_limit", "frees_at")}),
        ("The request", {"fields": ("request_id", "whole", "created_at", "route", "tenant", "key")}),
        ("For programs", {"fields": ("code", "limit", "bound_to", "value", "num_more")}),
    )

    @admin.display(description="Look at")
    def whole(self, row: RefusedRequest) -> SafeString:
        return console.link(reverse("console-request", args=[row.request_id]), "All that is known of it")

    @admin.display(description="Why")
    def why(self, row: RefusedRequest) -> str:
        return row.message or f"The code {row.code} says it: docs/errors.md has a row for each."

    @admin.display(description="What would let it pass")
    def owner_of_limit(self, row: RefusedRequest) -> SafeString | str:
        """Where the limit that bound can be changed."""
        if row.bound_to == "key" and row.key_id:
            return console.link(console.change_page("accounts_apikey", row.key_id), "A higher limit of its key")
        if row.bound_to and row.tenant_id:
            rule = f"{reverse('admin:accounts_limitrule_add')}?tenant={row.tenant_id}&limit={row.limit}"
            return console.links(
                (rule, "A higher limit for a time"),
                (console.change_page("accounts_tenant", row.tenant_id), "A higher limit of the tenant"),
            )
        if row.limit.upper() in OF_THE_SITE:
            return f"A smaller or quicker request, or another {row.limit.upper()} in the settings of the site."
        return "Another request: no limit bound it."

    @admin.display(description="Time (UTC)")
    def created(self, row: RefusedRequest) -> SafeString:
        return console.clock(row.created_at)

    @admin.display(description="Request")
    def request_code(self, row: RefusedRequest) -> SafeString:
        return console.link(reverse("console-request", args=[row.request_id]), console.short_id(row.request_id))

    @admin.display(description="Tenant")
    def customer(self, row: RefusedRequest) -> str:
        return row.tenant.name if row.tenant else "-"

    @admin.display(description="Value")
    def bound(self, row: RefusedRequest) -> str:
        return "-" if row.value is None else f"{row.value:,}"

    @admin.display(description="Frees")
    def frees(self, row: RefusedRequest) -> SafeString | str:
        return console.clock(row.frees_at) if row.frees_at else "-"


@admin.register(AuditEntry)
class AuditEntryAdmin(ReadOnlyAdmin):
    """Who changed what: written by accounts/trail/audit_log.py, never by hand."""

    list_display = ("created", "actor_kind", "actor", "action", "model", "name", "fields_changed")
    list_filter = ("action", "actor_kind")
    search_fields = ("actor__exact", "row__exact", "name__startswith")
    search_help_text = "Actor, a row's number, or the beginning of its name"
    fields = ("created", "actor_kind", "actor", "action", "model", "row", "name", "differences")
    readonly_fields = ("created", "differences")

    @admin.display(description="Time (UTC)")
    def created(self, row: AuditEntry) -> SafeString:
        return console.clock(row.created_at)

    @admin.display(description="Fields")
    def fields_changed(self, row: AuditEntry) -> str:
        return shorten(", ".join(row.diff), MOST_FIELD_CHARACTERS, placeholder=" …")

    @admin.display(description="What it was, and what it is")
    def differences(self, row: AuditEntry) -> SafeString:
        moved = [(name, str(was), str(now)) for name, (was, now) in row.diff.items()]
        listed = format_html_join("", "<dt>{}</dt><dd>{} → {}</dd>", moved)
        return format_html('<dl class="console-facts">{}</dl>', listed)

"""Lists of rows that are kept: what has a ledger is never deleted, and what it is made of is never changed by hand.

Bases of admin classes here and in inference.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, ClassVar

from django.contrib.admin.views.main import ChangeList
from django.db.models import Model, QuerySet
from django.http import HttpRequest
from django.utils import timezone
from unfold.admin import ModelAdmin

from accounts.limits.precedence import Limits
from accounts.models import Tenant


class KeptAdmin(ModelAdmin):
    """Rows that a ledger refers to: never deleted."""

    list_filter_submit = True

    def has_delete_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False


class ReadOnlyAdmin(KeptAdmin):
    """Rows that only accounts/ledger/quotas.py writes. Nothing sorts the whole table."""

    sortable_by = ()
    ordering: tuple[str, ...] = ("-pk",)

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False


class FoundByTenant(ModelAdmin):
    """Rows of a tenant are found by its name: among the tenants first, not along with each row."""

    def get_search_results(self, request: HttpRequest, queryset: QuerySet[Any], search_term: str) -> Any:
        found, repeats = super().get_search_results(request, queryset, search_term)
        tenants = Tenant.objects.filter(name__icontains=search_term).values("pk")
        return (found | queryset.filter(tenant__in=tenants) if search_term else found), repeats


class LimitsNow(ModelAdmin):
    """Rows of a page with their limits of this moment, which are read for all of them together."""

    limits_of: ClassVar[staticmethod[[Any, datetime], dict[int, Limits]]]
    """By the id of the row; of key_rows.py."""

    def limits_now(self, row: Any) -> Limits:
        found: Limits | None = getattr(row, "limits_of_now", None)
        return self.limits_of([row], timezone.now())[row.pk] if found is None else found

    def get_changelist_instance(self, request: HttpRequest) -> ChangeList:
        page: ChangeList = super().get_changelist_instance(request)
        limits = self.limits_of(page.result_list, timezone.now())
        for row in page.result_list:
            row.limits_of_now = limits[row.pk]
        return page

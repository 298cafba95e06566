"""The operator's pages for plans, tenants, members, keys, quotas and the ledger.

What has a ledger is never deleted: tenants are suspended, keys revoked. A key's text is in the answer to the POST that
made it and nowhere else: not in a message, a session or a log. Every change is announced to all processes.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from django.contrib import admin, messages
from django.contrib.auth.admin import GroupAdmin as StockGroupAdmin
from django.contrib.auth.admin import UserAdmin as StockUserAdmin
from django.contrib.auth.models import Group, User
from django.core.paginator import Paginator
from django.db import transaction
from django.db.models import Model, QuerySet
from django.forms import ModelForm
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.utils import timezone
from unfold.admin import ModelAdmin, TabularInline
from unfold.forms import AdminPasswordChangeForm, UserChangeForm, UserCreationForm

from accounts import issuing
from accounts.admin_forms import LIMIT_FIELDS, KeyForm, TenantForm
from accounts.limits import LIMIT_NAMES
from accounts.models import APIKey, LedgerEntry, Membership, Plan, QuotaPeriod, Reservation, Tenant
from accounts.principals import EVERYTHING, announce_change, announce_tenant

if TYPE_CHECKING:
    PaginatorBase = Paginator[Any]
    UserAdminBase = StockUserAdmin[User]
else:
    PaginatorBase, UserAdminBase = Paginator, StockUserAdmin

MOST_COUNTED = 10_000
DAY_SECONDS = 86400


class UncountedPaginator(PaginatorBase):
    """Counts to MOST_COUNTED and no further, so that a list of a million rows opens like a short one."""

    @cached_property
    def count(self) -> int:
        rows = self.object_list
        return rows.order_by()[:MOST_COUNTED].count() if isinstance(rows, QuerySet) else len(rows)


class KeptAdmin(ModelAdmin):
    """Rows that a ledger refers to: never deleted."""

    list_filter_submit = True

    def has_delete_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False


class ReadOnlyAdmin(KeptAdmin):
    """Rows that only accounts/quotas.py writes. Nothing counts or sorts the whole table."""

    show_full_result_count = False
    paginator = UncountedPaginator
    sortable_by = ()
    ordering = ("-pk",)

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False


# Plans and tenants


@admin.register(Plan)
class PlanAdmin(ModelAdmin):
    list_display = ("name", "role", "requests_per_minute", "tokens_per_minute", "monthly_tokens", "concurrent_requests")
    list_filter = ("role",)
    search_fields = ("name",)
    fieldsets = ((None, {"fields": ("name", "role")}), ("Limits", {"fields": LIMIT_NAMES}))

    def save_model(self, request: HttpRequest, obj: Plan, form: ModelForm[Plan], change: bool) -> None:
        with transaction.atomic():
            super().save_model(request, obj, form, change)
            announce_change(EVERYTHING)


class MembershipInline(TabularInline):
    model = Membership
    fields = ("user", "role")
    autocomplete_fields = ("user",)
    extra = 0
    tab = True


@admin.register(Tenant)
class TenantAdmin(KeptAdmin):
    form = TenantForm
    list_display = ("name", "status", "plan", "quota_anchor_day", "created_at")
    list_select_related = ("plan",)
    list_filter = ("status", "plan")
    search_fields = ("name",)
    autocomplete_fields = ("plan",)
    readonly_fields = ("created_at",)
    fieldsets = (
        (None, {"fields": ("name", "status", "plan", "quota_anchor_day", "created_at")}),
        ("Limits of this tenant", {"fields": LIMIT_FIELDS}),
    )
    inlines = (MembershipInline,)
    actions = ("suspend", "activate")

    def get_form(self, request: HttpRequest, obj: Tenant | None = None, change: bool = False, **kwargs: Any) -> Any:
        """The limits are fields of the form alone, and the factory only knows those of the row."""
        kwargs["fields"] = ("name", "status", "plan", "quota_anchor_day")
        return super().get_form(request, obj, change, **kwargs)

    def save_model(self, request: HttpRequest, obj: Tenant, form: ModelForm[Tenant], change: bool) -> None:
        with transaction.atomic():
            super().save_model(request, obj, form, change)
            announce_tenant(obj.pk)

    @admin.action(description="Suspend: refuse all keys of the tenant", permissions=["change"])
    def suspend(self, request: HttpRequest, queryset: QuerySet[Tenant]) -> None:
        self._set_status(request, queryset, Tenant.Status.SUSPENDED)

    @admin.action(description="Activate", permissions=["change"])
    def activate(self, request: HttpRequest, queryset: QuerySet[Tenant]) -> None:
        self._set_status(request, queryset, Tenant.Status.ACTIVE)

    def _set_status(self, request: HttpRequest, queryset: QuerySet[Tenant], status: Tenant.Status) -> None:
        with transaction.atomic():
            tenants = list(queryset.exclude(status=status))
            for tenant in tenants:
                tenant.status = status
                tenant.save(update_fields=["status"])
                self.log_change(request, tenant, f"Status: {status.label}")
                announce_tenant(tenant.pk)
        self.message_user(request, f"{len(tenants)} changed: {status.label.lower()}.", messages.SUCCESS)


# Keys


class ActiveFilter(admin.SimpleListFilter):
    title = "state"
    parameter_name = "state"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [("usable", "Not revoked"), ("revoked", "Revoked")]

    def queryset(self, request: HttpRequest, queryset: QuerySet[APIKey]) -> QuerySet[APIKey]:
        if self.value() is None:
            return queryset
        return queryset.filter(revoked_at__isnull=self.value() == "usable")


@admin.register(APIKey)
class APIKeyAdmin(KeptAdmin):
    form = KeyForm
    list_display = ("display", "name", "tenant", "state", "expires_at", "last_used_at", "created_at")
    list_select_related = ("tenant",)
    list_filter = (ActiveFilter,)
    search_fields = ("name", "public_id", "tenant__name")
    autocomplete_fields = ("tenant",)
    date_hierarchy = None
    actions = ("revoke", "rotate_now", "rotate_with_overlap")
    fieldsets = (
        (None, {"fields": ("tenant", "name", "scopes", "expires_at")}),
        ("Limits of this key", {"fields": LIMIT_FIELDS}),
    )
    history_fields = ("display", "state", "last_used_at", "created_at", "rotated_from")

    def get_form(self, request: HttpRequest, obj: APIKey | None = None, change: bool = False, **kwargs: Any) -> Any:
        """As for tenants; the tenant of a key never changes, its usage is booked there."""
        kwargs["fields"] = ("name", "scopes", "expires_at") if obj else ("tenant", "name", "scopes", "expires_at")
        return super().get_form(request, obj, change, **kwargs)

    def get_fieldsets(self, request: HttpRequest, obj: APIKey | None = None) -> Any:
        return (*self.fieldsets, ("History", {"fields": self.history_fields})) if obj else self.fieldsets

    def get_readonly_fields(self, request: HttpRequest, obj: APIKey | None = None) -> tuple[str, ...]:
        return ("tenant", *self.history_fields) if obj else ()

    @admin.display(description="State")
    def state(self, key: APIKey) -> str:
        if key.revoked_at is not None:
            return "revoked"
        return "active" if key.is_active(timezone.now()) else "expired"

    def save_model(self, request: HttpRequest, obj: APIKey, form: ModelForm[APIKey], change: bool) -> None:
        if not change:
            request.issued_key = issuing.save_new(obj)  # type: ignore[attr-defined]
            return
        with transaction.atomic():
            super().save_model(request, obj, form, change)
            announce_change(obj.public_id)

    def response_add(self, request: HttpRequest, obj: APIKey, post_url_continue: str | None = None) -> HttpResponse:
        """The next page, without a redirect: what it shows cannot be asked for again."""
        return self._show_once(request, obj, request.issued_key)  # type: ignore[attr-defined]

    @admin.action(description="Revoke", permissions=["change"])
    def revoke(self, request: HttpRequest, queryset: QuerySet[APIKey]) -> None:
        revoked = [key for key in queryset if issuing.revoke(key)]
        for key in revoked:
            self.log_change(request, key, "Revoked")
        self.message_user(request, f"{len(revoked)} revoked.", messages.SUCCESS)

    @admin.action(description="Rotate: a new key, the old one ends now", permissions=["change"])
    def rotate_now(self, request: HttpRequest, queryset: QuerySet[APIKey]) -> HttpResponse | None:
        return self._rotate(request, queryset, 0)

    @admin.action(description="Rotate: a new key, the old one ends in a day", permissions=["change"])
    def rotate_with_overlap(self, request: HttpRequest, queryset: QuerySet[APIKey]) -> HttpResponse | None:
        return self._rotate(request, queryset, DAY_SECONDS)

    def _rotate(self, request: HttpRequest, queryset: QuerySet[APIKey], overlap_seconds: int) -> HttpResponse | None:
        chosen = list(queryset.select_related("tenant")[:2])
        if len(chosen) != 1:
            self.message_user(request, "Choose exactly one key.", messages.ERROR)
            return None
        try:
            successor, text = issuing.rotate(chosen[0], overlap_seconds)
        except issuing.IssuingError as error:
            self.message_user(request, str(error), messages.ERROR)
            return None
        self.log_change(request, chosen[0], f"Rotated: {successor.display} follows")
        return self._show_once(request, successor, text)

    def _show_once(self, request: HttpRequest, key: APIKey, text: str) -> HttpResponse:
        context = {**self.admin_site.each_context(request), "title": "API key issued", "key": key, "text": text}
        headers = {"Cache-Control": "no-store"}
        return TemplateResponse(request, "accounts/key_issued.html", context, headers=headers)


# Usage


@admin.register(QuotaPeriod)
class QuotaPeriodAdmin(ReadOnlyAdmin):
    list_display = ("tenant", "key", "starts_at", "ends_at", "used_tokens", "reserved_tokens", "used_requests")
    list_select_related = ("tenant", "key")
    search_fields = ("tenant__name", "key__public_id__exact")


@admin.register(Reservation)
class ReservationAdmin(ReadOnlyAdmin):
    list_display = ("request_id", "tenant", "tokens", "state", "created_at", "expires_at")
    list_select_related = ("tenant_period__tenant",)
    list_filter = ("state",)
    search_fields = ("request_id__exact",)
    search_help_text = "The whole id of a request."
    ordering = ("-expires_at",)

    @admin.display(description="Tenant")
    def tenant(self, row: Reservation) -> str:
        return row.tenant_period.tenant.name


@admin.register(LedgerEntry)
class LedgerEntryAdmin(ReadOnlyAdmin):
    list_display = (
        "created_at",
        "kind",
        "request_id",
        "tenant",
        "key",
        "used_tokens",
        "reserved_tokens",
        "model",
        "reason",
    )
    list_filter = ("kind",)
    search_fields = ("request_id__exact",)
    search_help_text = "The whole id of a request."

    list_select_related = ("tenant_period__tenant", "key_period__key")

    @admin.display(description="Tenant")
    def tenant(self, row: LedgerEntry) -> str:
        return row.tenant_period.tenant.name

    @admin.display(description="Key")
    def key(self, row: LedgerEntry) -> str:
        return row.key_period.key.name if row.key_period and row.key_period.key else "-"


# Users, in the clothes of the other pages


admin.site.unregister(User)
admin.site.unregister(Group)


@admin.register(User)
class UserAdmin(UserAdminBase, ModelAdmin):
    form = UserChangeForm
    add_form = UserCreationForm
    change_password_form = AdminPasswordChangeForm


@admin.register(Group)
class GroupAdmin(StockGroupAdmin, ModelAdmin):
    pass

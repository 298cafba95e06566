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
from django.db.models import Model, OuterRef, QuerySet, Subquery
from django.forms import ModelForm
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.utils import timezone
from django.utils.html import format_html
from django.utils.safestring import SafeString
from unfold.admin import ModelAdmin, TabularInline
from unfold.contrib.filters.admin import AutocompleteSelectFilter, RelatedDropdownFilter
from unfold.decorators import action, display
from unfold.forms import AdminPasswordChangeForm, UserChangeForm, UserCreationForm

from accounts import console, issuing
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
    ordering: tuple[str, ...] = ("-pk",)

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False


# Plans and tenants


@admin.register(Plan)
class PlanAdmin(ModelAdmin):
    list_display = ("name", "role", "per_minute", "per_minute_tokens", "per_month_tokens", "at_once", "tenants")
    list_filter = ("role",)
    list_filter_submit = True
    search_fields = ("name",)
    fieldsets = ((None, {"fields": ("name", "role")}), ("Limits of each tenant on this plan", {"fields": LIMIT_NAMES}))

    @admin.display(description="Requests / min", ordering="requests_per_minute")
    def per_minute(self, plan: Plan) -> str:
        return console.whole(plan.requests_per_minute)

    @admin.display(description="Tokens / min", ordering="tokens_per_minute")
    def per_minute_tokens(self, plan: Plan) -> str:
        return console.whole(plan.tokens_per_minute)

    @admin.display(description="Tokens / month", ordering="monthly_tokens")
    def per_month_tokens(self, plan: Plan) -> str:
        return console.whole(plan.monthly_tokens)

    @admin.display(description="At once", ordering="concurrent_requests")
    def at_once(self, plan: Plan) -> str:
        return console.whole(plan.concurrent_requests)

    @admin.display(description="")
    def tenants(self, plan: Plan) -> SafeString:
        return console.link(console.listing("accounts_tenant", plan__id__exact=plan.pk), "Tenants")

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
    list_display = ("name", "standing", "plan", "usage", "see", "created")
    list_select_related = ("plan",)
    list_filter = ("status", ("plan", RelatedDropdownFilter))
    search_fields = ("name",)
    autocomplete_fields = ("plan",)
    readonly_fields = ("usage", "see", "created_at")
    fieldsets = (
        (None, {"fields": ("name", "status", "plan", "quota_anchor_day")}),
        ("Limits of this tenant", {"fields": LIMIT_FIELDS}),
    )
    fields_of_now = ("Now", {"fields": ("usage", "see", "created_at")})
    inlines = (MembershipInline,)
    actions = ("suspend", "activate")

    def get_form(self, request: HttpRequest, obj: Tenant | None = None, change: bool = False, **kwargs: Any) -> Any:
        """The limits are fields of the form alone, and the factory only knows those of the row."""
        kwargs["fields"] = ("name", "status", "plan", "quota_anchor_day")
        return super().get_form(request, obj, change, **kwargs)

    def get_fieldsets(self, request: HttpRequest, obj: Tenant | None = None) -> Any:
        return (self.fieldsets[0], self.fields_of_now, self.fieldsets[1]) if obj else self.fieldsets

    def get_queryset(self, request: HttpRequest) -> QuerySet[Tenant]:
        """With the tokens used in the period of this moment."""
        now = timezone.now()
        period = QuotaPeriod.objects.filter(tenant=OuterRef("pk"), key=None, starts_at__lte=now, ends_at__gt=now)
        rows: QuerySet[Tenant] = super().get_queryset(request)
        return rows.select_related("plan").annotate(tokens_now=Subquery(period.values("used_tokens")[:1]))

    @display(description="Status", ordering="status", label={"active": "success", "suspended": "danger"})
    def standing(self, tenant: Tenant) -> tuple[str, str]:
        return tenant.status, tenant.get_status_display()

    @admin.display(description="Tokens this month")
    def usage(self, tenant: Tenant) -> SafeString:
        return console.quota_bar(getattr(tenant, "tokens_now", None) or 0, tenant.limits.monthly_tokens)

    @admin.display(description="Look at")
    def see(self, tenant: Tenant) -> SafeString:
        of_it = {"tenant__id__exact": tenant.pk}
        return console.links(
            (console.listing("accounts_apikey", **of_it), "Keys"),
            (console.listing("accounts_quotaperiod", **of_it), "Periods"),
            (console.listing("inference_receipt", **of_it), "Receipts"),
        )

    @admin.display(description="Created", ordering="created_at")
    def created(self, tenant: Tenant) -> SafeString | str:
        return console.moment(tenant.created_at)

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
    list_display = ("name", "shown", "customer", "state", "last_used", "expires", "see", "created")
    list_select_related = ("tenant",)
    list_filter = (ActiveFilter, ("tenant", AutocompleteSelectFilter))
    search_fields = ("name", "public_id", "tenant__name")
    search_help_text = "Name, public part of the key, or tenant"
    autocomplete_fields = ("tenant",)
    actions = ("revoke", "rotate_now", "rotate_with_overlap")
    actions_submit_line = ("rotate_this", "revoke_this")
    fieldsets = (
        (None, {"fields": ("tenant", "name", "scopes", "expires_at")}),
        ("Limits of this key", {"fields": LIMIT_FIELDS}),
    )
    history_fields = ("shown", "state", "see", "last_used_at", "created_at", "rotated_from")

    def get_form(self, request: HttpRequest, obj: APIKey | None = None, change: bool = False, **kwargs: Any) -> Any:
        """As for tenants; the tenant of a key never changes, its usage is booked there."""
        kwargs["fields"] = ("name", "scopes", "expires_at") if obj else ("tenant", "name", "scopes", "expires_at")
        return super().get_form(request, obj, change, **kwargs)

    def get_fieldsets(self, request: HttpRequest, obj: APIKey | None = None) -> Any:
        return (*self.fieldsets, ("Now", {"fields": self.history_fields})) if obj else self.fieldsets

    def get_readonly_fields(self, request: HttpRequest, obj: APIKey | None = None) -> tuple[str, ...]:
        return ("tenant", *self.history_fields) if obj else ()

    @display(description="State", label={"active": "success", "revoked": "danger", "expired": "warning"})
    def state(self, key: APIKey) -> str:
        if key.revoked_at is not None:
            return "revoked"
        return "active" if key.is_active(timezone.now()) else "expired"

    @admin.display(description="Key", ordering="public_id")
    def shown(self, key: APIKey) -> SafeString:
        return console.code(key.display)

    @admin.display(description="Tenant", ordering="tenant__name")
    def customer(self, key: APIKey) -> SafeString:
        return console.link(console.change_page("accounts_tenant", key.tenant_id), key.tenant)

    @admin.display(description="Last used", ordering="last_used_at")
    def last_used(self, key: APIKey) -> SafeString | str:
        return console.moment(key.last_used_at, "never")

    @admin.display(description="Expires", ordering="expires_at")
    def expires(self, key: APIKey) -> SafeString | str:
        return console.moment(key.expires_at, "never")

    @admin.display(description="Created", ordering="created_at")
    def created(self, key: APIKey) -> SafeString | str:
        return console.moment(key.created_at)

    @admin.display(description="Look at")
    def see(self, key: APIKey) -> SafeString:
        """Periods are those of the first key of a rotation; receipts are each key's own."""
        return console.links(
            (console.listing("accounts_quotaperiod", key__id__exact=key.quota_key_id or key.pk), "Periods"),
            (console.listing("inference_receipt", key__id__exact=key.pk), "Receipts"),
        )

    def get_actions_submit_line(self, request: HttpRequest, object_id: Any) -> Any:
        """Nothing is left to rotate or revoke once a key has ended; ask on the pages of others only."""
        actions = super().get_actions_submit_line(request, object_id)
        key = APIKey.objects.filter(pk=object_id).first() if actions and object_id else None
        return actions if key is not None and key.is_active(timezone.now()) else []

    def changeform_view(
        self,
        request: HttpRequest,
        object_id: str | None = None,
        form_url: str = "",
        extra_context: dict[str, Any] | None = None,
    ) -> Any:
        """A new key has one way on, the page that shows it."""
        context = {**(extra_context or {}), "show_save_and_add_another": False}
        if object_id is None:
            context["show_save_and_continue"] = False
        return super().changeform_view(request, object_id, form_url, context)

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

    def response_change(self, request: HttpRequest, obj: APIKey) -> HttpResponse:
        issued: tuple[APIKey, str] | None = getattr(request, "issued_successor", None)
        return self._show_once(request, *issued) if issued else super().response_change(request, obj)

    @action(
        description="Rotate",
        permissions=["change"],
        icon="autorenew",
        attrs={"onclick": "return confirm('Issue a new key? This one ends now.')"},
    )
    def rotate_this(self, request: HttpRequest, obj: APIKey) -> None:
        """A button of the key's page; runs within its save."""
        try:
            request.issued_successor = issuing.rotate(obj)  # type: ignore[attr-defined]
        except issuing.IssuingError as error:
            self.message_user(request, str(error), messages.ERROR)
            return
        self.log_change(request, obj, f"Rotated: {request.issued_successor[0].display} follows")  # type: ignore[attr-defined]

    @action(
        description="Revoke",
        permissions=["change"],
        icon="block",
        attrs={"onclick": "return confirm('Revoke this key for good? Programs that use it are refused at once.')"},
    )
    def revoke_this(self, request: HttpRequest, obj: APIKey) -> None:
        """A button of the key's page; runs within its save."""
        if issuing.revoke(obj):
            self.log_change(request, obj, "Revoked")
            self.message_user(request, f"{obj} is revoked.", messages.SUCCESS)

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
        context = {**self.admin_site.each_context(request), "title": "New API key", "key": key, "text": text}
        headers = {"Cache-Control": "no-store"}
        return TemplateResponse(request, "accounts/key_issued.html", context, headers=headers)


# Usage


class WholeTenantFilter(admin.SimpleListFilter):
    title = "whose"
    parameter_name = "whose"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [("tenants", "Tenants"), ("keys", "Single keys")]

    def queryset(self, request: HttpRequest, queryset: QuerySet[QuotaPeriod]) -> QuerySet[QuotaPeriod]:
        return queryset.filter(key__isnull=self.value() == "tenants") if self.value() else queryset


@admin.register(QuotaPeriod)
class QuotaPeriodAdmin(ReadOnlyAdmin):
    list_display = ("whose", "of_key", "span", "usage", "held", "num_requests", "see")
    list_select_related = ("tenant__plan", "key")
    list_filter = (WholeTenantFilter, ("tenant", AutocompleteSelectFilter), ("key", AutocompleteSelectFilter))
    search_fields = ("tenant__name", "key__public_id__exact")
    search_help_text = "Tenant, or public part of a key"
    ordering = ("-starts_at", "-pk")
    readonly_fields = ("usage", "see")
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
            return console.quota_bar(row.used_tokens, row.key.limits.monthly_tokens, "no limit of its own")
        return console.quota_bar(row.used_tokens, row.tenant.limits.monthly_tokens)

    @admin.display(description="Held")
    def held(self, row: QuotaPeriod) -> str:
        return console.whole(row.reserved_tokens)

    @admin.display(description="Requests")
    def num_requests(self, row: QuotaPeriod) -> str:
        return console.whole(row.used_requests)

    @admin.display(description="Look at")
    def see(self, row: QuotaPeriod) -> SafeString:
        side = "key_period" if row.key_id else "tenant_period"
        owner = {"key__id__exact": row.key_id} if row.key_id else {"tenant__id__exact": row.tenant_id}
        return console.links(
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
            {"fields": ("model", ("prompt_tokens", "cached_tokens", "completion_tokens"))},
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

"""Pages of plans, tenants and their members. Tenants are suspended, never deleted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from django.contrib import admin, messages
from django.db.models import OuterRef, QuerySet, Subquery
from django.http import HttpRequest
from django.urls import reverse
from django.utils import timezone
from django.utils.safestring import SafeString
from unfold.admin import ModelAdmin, TabularInline
from unfold.contrib.filters.admin import AutocompleteSelectFilter, RelatedDropdownFilter
from unfold.decorators import display

from accounts.identity import key_rows, tenants
from accounts.limits.precedence import LIMIT_NAMES
from accounts.models import Membership, Plan, QuotaPeriod, Tenant
from accounts.pages import console, running_now
from accounts.pages.admin_forms import LIMIT_FIELDS, AllowedFields, TenantForm
from accounts.pages.kept_rows import KeptAdmin, LimitsNow


@admin.register(Plan)
class PlanAdmin(AllowedFields, ModelAdmin):
    list_display = ("name", "role", "per_minute", "per_minute_tokens", "per_month_tokens", "at_once", "see")
    list_filter = ("role",)
    list_filter_submit = True
    search_fields = ("name",)
    fieldsets = (
        (None, {"fields": ("name", "role", "redis_outage_policy")}),
        ("Limits of each tenant on this plan", {"fields": (*LIMIT_NAMES, "allowed_models", "allowed_adapters")}),
        ("Share of the slots", {"fields": ("weight", "max_slots")}),
    )

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
    def see(self, plan: Plan) -> SafeString:
        return console.link(console.listing("accounts_tenant", plan__id__exact=plan.pk), "Tenants")


class MembershipInline(TabularInline):
    model = Membership
    fields = ("user", "role")
    autocomplete_fields = ("user",)
    extra = 0
    tab = True


@admin.register(Tenant)
class TenantAdmin(LimitsNow, AllowedFields, KeptAdmin):
    limits_of = staticmethod(key_rows.limits_of_tenants)
    form = TenantForm
    list_display = ("name", "standing", "plan", "usage", "see", "created")
    list_select_related = ("plan",)
    list_filter = ("status", ("plan", RelatedDropdownFilter))
    search_fields = ("name",)
    autocomplete_fields = ("plan",)
    readonly_fields = ("usage", "see", "created_at")
    fieldsets = (
        (None, {"fields": ("name", "status", "plan", "quota_anchor_day")}),
        ("Limits of this tenant", {"fields": (*LIMIT_FIELDS, "allowed_models", "allowed_adapters")}),
        ("What is stored of its requests", {"fields": ("response_days",)}),
        ("Web pages that may ask with its keys", {"fields": ("allowed_origins",)}),
    )
    fields_of_now = ("Now", {"fields": ("usage", "see", "created_at")})
    inlines = (MembershipInline,)
    actions = ("suspend", "activate")

    def get_form(self, request: HttpRequest, obj: Tenant | None = None, change: bool = False, **kwargs: Any) -> Any:
        """The limits are fields of the form alone, and the factory only knows those of the row."""
        own = ("name", "status", "plan", "quota_anchor_day", "response_days", "allowed_origins")
        kwargs["fields"] = (*own, "allowed_models", "allowed_adapters")
        return super().get_form(request, obj, change, **kwargs)

    def get_fieldsets(self, request: HttpRequest, obj: Tenant | None = None) -> Any:
        return (self.fieldsets[0], self.fields_of_now, *self.fieldsets[1:]) if obj else self.fieldsets

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
        return console.quota_bar(getattr(tenant, "tokens_now", None) or 0, self.limits_now(tenant).monthly_tokens)

    @admin.display(description="Look at")
    def see(self, tenant: Tenant) -> SafeString:
        of_it = {"tenant__id__exact": tenant.pk}
        return console.links(
            (console.listing("accounts_apikey", **of_it), "Keys"),
            (console.listing("accounts_quotaperiod", **of_it), "Periods"),
            (console.listing("inference_receipt", **of_it), "Receipts"),
            (console.listing("accounts_refusedrequest", **of_it), "Refusals"),
            (f"{reverse('admin:accounts_limitrule_add')}?tenant={tenant.pk}&limit=monthly_tokens", "Raise for a time"),
            (f"{reverse('console-playground')}?tenant={tenant.pk}", "Playground"),
        )

    @admin.display(description="Created", ordering="created_at")
    def created(self, tenant: Tenant) -> SafeString | str:
        return console.moment(tenant.created_at)

    def running_now(self, rows: Sequence[Tenant]) -> Mapping[Any, str]:
        return running_now.in_words("tenant", {tenant.pk: tenant.pk for tenant in rows})

    @admin.action(description="Suspend: refuse all keys of the tenant", permissions=["change"])
    def suspend(self, request: HttpRequest, queryset: QuerySet[Tenant]) -> None:
        self._set_status(request, queryset, Tenant.Status.SUSPENDED)

    @admin.action(description="Activate", permissions=["change"])
    def activate(self, request: HttpRequest, queryset: QuerySet[Tenant]) -> None:
        self._set_status(request, queryset, Tenant.Status.ACTIVE)

    def _set_status(self, request: HttpRequest, queryset: QuerySet[Tenant], status: Tenant.Status) -> None:
        changed = tenants.set_status(queryset, status)
        for tenant in changed:
            self.log_change(request, tenant, f"Status: {status.label}")
        self.message_user(request, f"{len(changed)} changed: {status.label.lower()}.", messages.SUCCESS)


@admin.register(Membership)
class MembershipAdmin(ModelAdmin):
    """Who belongs to which tenant. Operators add people; owners change their roles, and let them go."""

    list_display = ("user", "tenant", "role", "created_at")
    list_select_related = ("user", "tenant")
    list_filter = ("role", ("tenant", AutocompleteSelectFilter))
    search_fields = ("user__username", "tenant__name")
    autocomplete_fields = ("user", "tenant")
    fields = ("tenant", "user", "role")

    def get_readonly_fields(self, request: HttpRequest, obj: Membership | None = None) -> tuple[str, ...]:
        return ("tenant", "user") if obj else ()

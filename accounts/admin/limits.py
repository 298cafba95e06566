"""Pages of limits for a time, and of raises of quotas, which one person asks for and another approves."""

from __future__ import annotations

from django.contrib import admin, messages
from django.db import transaction
from django.db.models import QuerySet
from django.forms import ModelForm
from django.http import HttpRequest
from unfold.admin import ModelAdmin
from unfold.contrib.filters.admin import AutocompleteSelectFilter
from unfold.decorators import display

from accounts.limits import raises
from accounts.limits.approval import RaiseError
from accounts.models import LimitRule, QuotaRaise
from accounts.pages import console
from accounts.pages.kept_rows import KeptAdmin
from accounts.trail import audit_log


@admin.register(QuotaRaise)
class QuotaRaiseAdmin(KeptAdmin):
    """Asked for here, or by command or API; approved by somebody else. What was asked is never changed."""

    list_display = (
        "tenant",
        "shown",
        "ends_at",
        "standing",
        "reason",
        "asked_by",
        "asked_at",
        "decided_by",
        "decided_at",
    )
    list_select_related = ("tenant",)
    list_filter = ("state", ("tenant", AutocompleteSelectFilter))
    autocomplete_fields = ("tenant",)
    actions = ("approve", "refuse")
    decided = ("standing", "asked_by", "asked_at", "decided_by", "decided_at")

    def get_fields(self, request: HttpRequest, obj: QuotaRaise | None = None) -> tuple[str, ...]:
        return ("tenant", "monthly_tokens", "ends_at", "reason", *(self.decided if obj else ()))

    def get_readonly_fields(self, request: HttpRequest, obj: QuotaRaise | None = None) -> tuple[str, ...]:
        return ("tenant", "monthly_tokens", "ends_at", "reason", *self.decided) if obj else ()

    @admin.display(description="Tokens a month", ordering="monthly_tokens")
    def shown(self, row: QuotaRaise) -> str:
        return console.whole(row.monthly_tokens)

    @display(description="State", label={"asked": "info", "approved": "success", "refused": "warning"})
    def standing(self, row: QuotaRaise) -> tuple[str, str]:
        return row.state, row.get_state_display()

    def save_model(self, request: HttpRequest, obj: QuotaRaise, form: ModelForm[QuotaRaise], change: bool) -> None:
        if not change:
            obj.asked_by = str(audit_log.actor())
        super().save_model(request, obj, form, change)

    @admin.action(description="Approve: in force at once", permissions=["change"])
    def approve(self, request: HttpRequest, queryset: QuerySet[QuotaRaise]) -> None:
        self._decide(request, queryset, approve=True)

    @admin.action(description="Refuse", permissions=["change"])
    def refuse(self, request: HttpRequest, queryset: QuerySet[QuotaRaise]) -> None:
        self._decide(request, queryset, approve=False)

    def _decide(self, request: HttpRequest, queryset: QuerySet[QuotaRaise], *, approve: bool) -> None:
        for row in queryset.select_related("tenant"):
            try:
                decided = raises.decide(row.pk, approve=approve)
            except RaiseError as error:
                self.message_user(request, f"{row}: {error.message}", messages.ERROR)
            else:
                self.log_change(request, decided, decided.get_state_display())
                self.message_user(request, f"{decided}: {decided.get_state_display().lower()}.", messages.SUCCESS)


@admin.register(LimitRule)
class LimitRuleAdmin(ModelAdmin):
    list_display = ("limit", "owner", "shown", "starts_at", "ends_at", "recurrence", "reason")
    list_filter = ("limit", "recurrence")
    list_select_related = ("plan", "tenant", "key")
    autocomplete_fields = ("plan", "tenant", "key")
    fieldsets = (
        ("Whose limit: one of the three", {"fields": ("plan", "tenant", "key")}),
        (None, {"fields": ("limit", "value", "reason")}),
        ("When (UTC)", {"fields": ("starts_at", "ends_at", "recurrence", "daily_from", "daily_until", "last_days")}),
    )

    @admin.display(description="Of")
    def owner(self, rule: LimitRule) -> str:
        return str(rule.plan or rule.tenant or rule.key)

    @admin.display(description="Value", ordering="value")
    def shown(self, rule: LimitRule) -> str:
        return console.whole(rule.value)

    def delete_queryset(self, request: HttpRequest, queryset: QuerySet[LimitRule]) -> None:
        with transaction.atomic():
            for rule in queryset:
                rule.delete()  # each announces itself

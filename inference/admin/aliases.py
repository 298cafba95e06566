"""The operator's pages for aliases of adapters: point, try a version out, promote, roll back, and how the versions do.

Writes go through inference/catalog/aliases.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from django import forms
from django.contrib import admin, messages
from django.db import transaction
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils import timezone
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from unfold.admin import ModelAdmin
from unfold.widgets import UnfoldBooleanWidget

from accounts.pages import console
from inference.catalog import aliases, version_figures
from inference.models import AdapterAlias
from inference.vetting.inspection import RegistrationError

if TYPE_CHECKING:  # Django's own classes take no type arguments at run time
    AliasFormBase = forms.ModelForm[AdapterAlias]
else:
    AliasFormBase = forms.ModelForm


SHOWN = "_figures_shown"


class AliasForm(AliasFormBase):
    """What is wrong with a version is an error of its field; a tenant that would lose the name is one, too."""

    force = forms.BooleanField(
        required=False,
        label="Even if a tenant loses the name",
        help_text="Tenants that may use the version of now and not the new one.",
        widget=UnfoldBooleanWidget,
    )

    def clean(self) -> dict[str, Any] | None:
        cleaned = super().clean()
        if self.errors or "target" not in self.cleaned_data:
            return cleaned
        before = self.instance.target if self.instance.pk else None
        target = self.cleaned_data["target"]
        values = {name: self.cleaned_data[name] for name in ("target", "canary", "share")}
        name = self.cleaned_data.get("name", self.instance.name)
        base = self.cleaned_data.get("base_model") or self.instance.base_model
        aliases.check(AdapterAlias(pk=self.instance.pk, name=name, base_model=base, **values))
        if before is not None and not self.cleaned_data["force"] and (lost := aliases.loses(before, target)):
            self.add_error("target", f"It is not granted to {', '.join(lost)}: grant it first, or tick the box below.")
        return cleaned


@admin.register(AdapterAlias)
class AdapterAliasAdmin(ModelAdmin):
    form = AliasForm
    list_display = ("name", "base_model", "target", "trial", "previous", "updated_at")
    list_select_related = ("base_model", "target__base_model", "canary__base_model", "previous__base_model")
    list_filter = ("base_model",)
    search_fields = ("name",)
    autocomplete_fields = ("base_model", "target", "canary")
    actions = ("promote", "end_trial", "roll_back")
    fieldsets = (
        (None, {"fields": ("name", "base_model", "target", "force")}),
        ("On trial", {"fields": ("canary", "share")}),
        ("How the versions do, of requests by this name", {"fields": ("previous", "figures", "history")}),
    )

    def get_fieldsets(self, request: HttpRequest, obj: AdapterAlias | None = None) -> Any:
        if obj is None:
            return ((None, {"fields": ("name", "base_model", "target")}), self.fieldsets[1])
        return self.fieldsets

    def get_readonly_fields(self, request: HttpRequest, obj: AdapterAlias | None = None) -> tuple[str, ...]:
        return ("name", "base_model", "previous", "figures", "history") if obj else ()

    @admin.display(description="On trial")
    def trial(self, row: AdapterAlias) -> str:
        return f"{row.canary.name}: {row.share} %" if row.canary else "-"

    @admin.display(description="The last 24 hours")
    def figures(self, row: AdapterAlias) -> SafeString:
        """Compared once for a row that is shown, though the page's template asks several times."""
        found: SafeString | None = row.__dict__.get(SHOWN)
        if found is None:
            listed = ((each["version"], _in_words(each)) for each in version_figures.compare(row, timezone.now()))
            body = format_html_join("", "<dt>{}</dt><dd>{}</dd>", listed)
            row.__dict__[SHOWN] = found = format_html('<dl class="console-facts">{}</dl>', body)
        return found

    @admin.display(description="History")
    def history(self, row: AdapterAlias) -> SafeString:
        where = console.listing("accounts_auditentry", model="inference.adapteralias", row=row.pk)
        return console.link(where, "Changes in the audit log")

    def save_model(self, request: HttpRequest, obj: AdapterAlias, form: Any, change: bool) -> None:
        canary, share = obj.canary, obj.share
        with transaction.atomic():
            present = aliases.find(obj.base_model, obj.name)
            if present is None or present.target_id != obj.target_id:
                aliases.point(obj.base_model, obj.name, obj.target, force=True)  # the form has asked
            saved = aliases.find(obj.base_model, obj.name)
            assert saved is not None
            saved = aliases.try_out(saved, canary, share) if canary else aliases.end_trial(saved)
        obj.pk = saved.pk

    def delete_model(self, request: HttpRequest, obj: AdapterAlias) -> None:
        aliases.remove([obj.pk])

    def delete_queryset(self, request: HttpRequest, queryset: QuerySet[AdapterAlias]) -> None:
        aliases.remove(queryset.values_list("pk", flat=True))

    @admin.action(description="Promote what is on trial", permissions=["change"])
    def promote(self, request: HttpRequest, queryset: QuerySet[AdapterAlias]) -> None:
        self._do(request, queryset, aliases.promote)

    @admin.action(description="End the trial", permissions=["change"])
    def end_trial(self, request: HttpRequest, queryset: QuerySet[AdapterAlias]) -> None:
        self._do(request, queryset, aliases.end_trial)

    @admin.action(description="Roll back", permissions=["change"])
    def roll_back(self, request: HttpRequest, queryset: QuerySet[AdapterAlias]) -> None:
        self._do(request, queryset, aliases.roll_back)

    def _do(
        self, request: HttpRequest, queryset: QuerySet[AdapterAlias], step: Callable[[AdapterAlias], AdapterAlias]
    ) -> None:
        """Each for itself: one that cannot does not keep the others from it."""
        for alias in queryset.select_related("base_model"):
            try:
                row = step(alias)
            except RegistrationError as error:
                self.message_user(request, error.message, messages.ERROR)
            else:
                self.message_user(request, f"{row} is answered by {row.target.name} now.", messages.SUCCESS)


def _in_words(figures: dict[str, Any]) -> str:
    if not figures["requests"]:
        return "no request yet"
    words = f"{figures['requests']:,} requests, {figures['failed_percent']:g} % failed"
    if figures["first_token_p50_seconds"] is not None:
        median, late = figures["first_token_p50_seconds"], figures["first_token_p95_seconds"]
        words += f", first token after {console.seconds(median)} (95 % within {console.seconds(late)})"
    if figures["tokens_per_second"] is not None:
        words += f", {figures['tokens_per_second']:g} tokens a second"
    return words

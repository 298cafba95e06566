"""Pages of adapters, their grants, and what tenants have set for themselves.

Writes go through catalog/adapter_rows.py and granting.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django import forms
from django.contrib import admin, messages
from django.contrib.admin.views.main import ChangeList
from django.db import transaction
from django.db.models import QuerySet
from django.http import HttpRequest
from unfold.admin import ModelAdmin, TabularInline
from unfold.contrib.filters.admin import AutocompleteSelectFilter

from accounts.pages.kept_rows import ReadOnlyAdmin
from inference.catalog import adapter_rows, granting
from inference.models import Adapter, AdapterGrant, DefaultVector, ServedModel
from inference.vetting.inspection import RegistrationError

if TYPE_CHECKING:  # Django's own classes take no type arguments at run time
    AdapterFormBase = forms.ModelForm[Adapter]
else:
    AdapterFormBase = forms.ModelForm


class AdapterForm(AdapterFormBase):
    """Checks the file against its base model when its path is new; what is wrong with it is an error of `path`."""

    inspect_again = forms.BooleanField(
        required=False, label="Check the file again", help_text="After it or its base model's was replaced."
    )

    def clean(self) -> dict[str, Any] | None:
        cleaned = super().clean()
        if not self.errors and "name" in self.fields:
            adapter_rows.check_name(self._base(), self.cleaned_data["name"])
        if not self.errors and "path" in self.fields and self._is_due():
            self._examine(self.cleaned_data["path"], self._base())
        return cleaned

    def _base(self) -> ServedModel:
        found: ServedModel = self.cleaned_data.get("base_model") or self.instance.base_model
        return found

    def _is_due(self) -> bool:
        return not self.instance.digest or "path" in self.changed_data or bool(self.cleaned_data.get("inspect_again"))

    def _examine(self, path: str, base: ServedModel) -> None:
        try:
            examined = adapter_rows.examine(path, adapter_rows.base_of(base))
        except RegistrationError as error:
            self.add_error("path", error.message)
            return
        if examined is not None:
            self.cleaned_data["path"] = str(examined.path)
            adapter_rows.fill(self.instance, examined)


class AdapterGrantInline(TabularInline):
    """Grants come and go and are never changed: a position stands for one adapter."""

    model = AdapterGrant
    fields = ("tenant", "position", "created_at")
    readonly_fields = ("position", "created_at")
    autocomplete_fields = ("tenant",)
    extra = 0

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


@admin.register(Adapter)
class AdapterAdmin(ModelAdmin):
    form = AdapterForm
    list_display = ("name", "base_model", "rank", "changes", "size", "default_scale", "visibility", "enabled")
    list_select_related = ("base_model",)
    list_filter = ("base_model", "visibility", "enabled")
    search_fields = ("name",)
    autocomplete_fields = ("base_model", "owner")
    inlines = (AdapterGrantInline,)
    actions = ("switch_on", "switch_off")
    facts = (
        "digest",
        "size",
        "rank",
        "alpha",
        "changes",
        "effect",
        "task_name",
        "prompt_prefix",
        "checked",
        "created_at",
    )
    fieldsets = (
        (None, {"fields": ("name", "base_model", "path", "inspect_again", "default_scale", "enabled")}),
        ("Who may use it", {"fields": ("visibility", "owner")}),
        ("The file", {"fields": facts}),
    )
    fields_for_registration = (
        (None, {"fields": ("name", "base_model", "path", "default_scale")}),
        fieldsets[1],
    )

    def get_queryset(self, request: HttpRequest) -> QuerySet[Adapter]:
        """With its model, which is part of its name wherever adapters are chosen from."""
        rows: QuerySet[Adapter] = super().get_queryset(request)
        return rows.select_related("base_model")

    def get_fieldsets(self, request: HttpRequest, obj: Adapter | None = None) -> Any:
        return self.fieldsets if obj else self.fields_for_registration

    def get_readonly_fields(self, request: HttpRequest, obj: Adapter | None = None) -> tuple[str, ...]:
        return ("base_model", *self.facts) if obj else ()

    @admin.display(description="Changes")
    def changes(self, row: Adapter) -> str:
        return ", ".join(row.targets)

    @admin.display(description="Size of the file")
    def size(self, row: Adapter) -> str:
        return f"{row.size_bytes / 1e6:,.1f} MB"

    @admin.display(description="Effect in its trial")
    def effect(self, row: Adapter) -> str:
        effect = row.metadata.get("trial", {}).get("effect")
        return "unknown" if effect is None else f"moves scores by up to {effect:.3g}"

    @admin.display(description="Checked against")
    def checked(self, row: Adapter) -> str:
        same = row.metadata.get("base_digest") == row.base_model.digest
        return "the base model's file of now" if same else "an earlier file of the base model: check it again"

    def save_model(self, request: HttpRequest, obj: Adapter, form: Any, change: bool) -> None:
        with transaction.atomic():
            super().save_model(request, obj, form, change)
            adapter_rows.saved(obj)

    def save_formset(self, request: HttpRequest, form: Any, formset: Any, change: bool) -> None:
        """Positions are given by granting.grant, not by the form."""
        made = formset.save(commit=False)
        for row in formset.deleted_objects:
            granting.revoke(row.adapter, row.tenant)
        for row in made:
            granting.grant(form.instance, row.tenant)

    def delete_model(self, request: HttpRequest, obj: Adapter) -> None:
        adapter_rows.remove([obj.pk])

    def delete_queryset(self, request: HttpRequest, queryset: QuerySet[Adapter]) -> None:
        adapter_rows.remove(queryset.values_list("pk", flat=True))

    @admin.action(description="Switch on", permissions=["change"])
    def switch_on(self, request: HttpRequest, queryset: QuerySet[Adapter]) -> None:
        self._set_enabled(request, queryset, True)

    @admin.action(description="Switch off", permissions=["change"])
    def switch_off(self, request: HttpRequest, queryset: QuerySet[Adapter]) -> None:
        self._set_enabled(request, queryset, False)

    def _set_enabled(self, request: HttpRequest, queryset: QuerySet[Adapter], enabled: bool) -> None:
        count = adapter_rows.set_enabled(queryset.values_list("pk", flat=True), enabled)
        self.message_user(request, f"{count} switched {'on' if enabled else 'off'}.", messages.SUCCESS)


@admin.register(DefaultVector)
class DefaultVectorAdmin(ReadOnlyAdmin):
    """What tenants have set for themselves."""

    list_display = ("tenant", "base_model", "adapters_and_scales", "updated_at")
    list_select_related = ("tenant", "base_model")
    list_filter = (("tenant", AutocompleteSelectFilter),)
    fields = ("tenant", "base_model", "adapters_and_scales", "updated_at")

    def get_changelist_instance(self, request: HttpRequest) -> ChangeList:
        """The names of all adapters on the page in one query."""
        page: ChangeList = super().get_changelist_instance(request)
        wanted = {pk for row in page.result_list for pk, _ in row.scales}
        names = dict(Adapter.objects.filter(pk__in=wanted).values_list("pk", "name"))
        for row in page.result_list:
            row.adapter_names = names
        return page

    @admin.display(description="Adapters")
    def adapters_and_scales(self, row: DefaultVector) -> str:
        names: dict[int, str] | None = getattr(row, "adapter_names", None)
        if names is None:
            names = dict(Adapter.objects.filter(pk__in=[pk for pk, _ in row.scales]).values_list("pk", "name"))
        return ", ".join(f"{names.get(pk, '(gone)')} × {scale:g}" for pk, scale in row.scales)

"""Pages of keys: issued, rotated and revoked, never deleted.

A key's text is in the answer to the POST that made it and nowhere else: not in a message, a session or a log.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from django.contrib import admin, messages
from django.db.models import QuerySet
from django.forms import ModelForm
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.utils import timezone
from django.utils.safestring import SafeString
from unfold.contrib.filters.admin import AutocompleteSelectFilter
from unfold.decorators import action, display

from accounts.identity import issuing
from accounts.models import APIKey
from accounts.pages import console, running_now
from accounts.pages.admin_forms import LIMIT_FIELDS, AllowedFields, KeyForm
from accounts.pages.kept_rows import FoundByTenant, KeptAdmin

DAY_SECONDS = 86400


class ActiveFilter(admin.SimpleListFilter):
    title = "state"
    parameter_name = "state"
    for_tenants = True

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [("usable", "Not revoked"), ("revoked", "Revoked")]

    def queryset(self, request: HttpRequest, queryset: QuerySet[APIKey]) -> QuerySet[APIKey]:
        if self.value() is None:
            return queryset
        return queryset.filter(revoked_at__isnull=self.value() == "usable")


@admin.register(APIKey)
class APIKeyAdmin(FoundByTenant, AllowedFields, KeptAdmin):
    form = KeyForm
    list_display = ("name", "shown", "customer", "state", "last_used", "expires", "see", "created")
    list_select_related = ("tenant",)
    list_filter = (ActiveFilter, ("tenant", AutocompleteSelectFilter))
    search_fields = ("name", "public_id__startswith")
    search_help_text = "Name, beginning of the key's public part, or tenant"
    autocomplete_fields = ("tenant",)
    actions = ("revoke", "rotate_now", "rotate_with_overlap")
    actions_submit_line = ("rotate_this", "revoke_this")
    fieldsets = (
        (None, {"fields": ("tenant", "name", "scopes", "expires_at")}),
        ("Limits of this key", {"fields": (*LIMIT_FIELDS, "allowed_models", "allowed_adapters")}),
    )
    history_fields = ("shown", "state", "see", "last_used_at", "created_at", "rotated_from")

    def get_form(self, request: HttpRequest, obj: APIKey | None = None, change: bool = False, **kwargs: Any) -> Any:
        """As for tenants; the tenant of a key never changes, its usage is booked there."""
        fields = ("name", "scopes", "expires_at", "allowed_models", "allowed_adapters")
        kwargs["fields"] = fields if obj else ("tenant", *fields)
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
        super().save_model(request, obj, form, change)

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
        attrs={"data-confirm": "Issue a new key? This one ends now."},
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
        attrs={"data-confirm": "Revoke this key for good? Programs that use it are refused at once."},
    )
    def revoke_this(self, request: HttpRequest, obj: APIKey) -> None:
        """A button of the key's page; runs within its save."""
        if issuing.revoke(obj):
            self.log_change(request, obj, "Revoked")
            self.message_user(request, f"{obj} is revoked.", messages.SUCCESS)

    def running_now(self, rows: Sequence[APIKey]) -> Mapping[Any, str]:
        return running_now.in_words("key", {key.pk: key.first_id for key in rows})

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

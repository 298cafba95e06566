"""Form fields of the accounts pages: one limit as a choice and a number instead of a line of JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from django import forms
from django.core.exceptions import ValidationError
from unfold.widgets import (
    UnfoldAdminBigIntegerFieldWidget,
    UnfoldAdminCheckboxSelectMultipleWidget,
    UnfoldAdminSelectWidget,
    UnfoldAdminSplitDateTimeWidget,
    UnfoldAdminTextInputWidget,
)

from accounts.identity import roles
from accounts.identity.origins import MAX_ORIGIN_LENGTH, MAX_ORIGINS
from accounts.limits.precedence import LIMIT_NAMES, MAX_LIMIT, Limits
from accounts.models import APIKey, Scope, Tenant
from accounts.pages.console import whole

if TYPE_CHECKING:  # Django's forms take no type arguments at run time
    TenantFormBase = forms.ModelForm[Tenant]
    KeyFormBase = forms.ModelForm[APIKey]
else:
    TenantFormBase = KeyFormBase = forms.ModelForm

INHERIT, UNLIMITED, NUMBER = "inherit", "unlimited", "number"
TENANT_CHOICES = ((INHERIT, "As in the plan"), (UNLIMITED, "Unlimited"), (NUMBER, "Number:"))
KEY_CHOICES = ((INHERIT, "None of its own"), (NUMBER, "Number:"))
"""A key's limits bind beside its tenant's, so an unlimited key and one without a limit are the same."""

Choices = tuple[tuple[str, str], ...]
LIMIT_TEXTS = {
    "requests_per_minute": ("Requests a minute", "Refused ones included."),
    "tokens_per_minute": ("Tokens a minute", "Prompt and output, reserved at admission."),
    "concurrent_requests": ("Requests at once", "Running or waiting."),
    "concurrent_streams": ("Streams at once", "Running or waiting."),
    "queue_length": ("Requests waiting", "For a slot, at once."),
    "monthly_tokens": ("Tokens a month", "Prompt and output."),
    "monthly_requests": ("Requests a month", ""),
    "max_context": ("Tokens of one request", "Prompt and output together."),
    "max_output": ("Output tokens of one request", ""),
}
"""Label and explanation of each limit."""

Override = tuple[str, int | None]
"""(inherit, unlimited or number; the number)"""


class LimitWidget(forms.MultiWidget):
    """A choice and a number in one line; the stylesheet hides the number where it does not count and is empty."""

    template_name = "accounts/limit_widget.html"

    def __init__(self, choices: Choices) -> None:
        number = UnfoldAdminBigIntegerFieldWidget(attrs={"placeholder": "a whole number", "min": 0, "max": MAX_LIMIT})
        super().__init__([UnfoldAdminSelectWidget(choices=choices), number])

    def decompress(self, value: Override | None) -> list[Any]:
        return list(value or (INHERIT, None))


class LimitOverrideField(forms.MultiValueField):
    """Cleans to an Override. Choosing nothing and typing a number means the number."""

    def __init__(self, choices: Choices, **options: Any) -> None:
        fields = (
            forms.ChoiceField(choices=choices, required=False),
            forms.IntegerField(min_value=0, max_value=MAX_LIMIT, required=False),
        )
        super().__init__(fields, require_all_fields=False, required=False, widget=LimitWidget(choices), **options)

    def compress(self, data_list: list[Any]) -> Override:
        choice, number = data_list or (INHERIT, None)
        if choice == NUMBER and number is None:
            raise ValidationError("Give a number, or choose what stands above Number:.")
        if choice != NUMBER and number is not None:
            raise ValidationError("Choose Number: for a number to count, or empty it.")
        return choice or INHERIT, number


def _field_name(limit: str) -> str:
    return f"limit_{limit}"


LIMIT_FIELDS = tuple(_field_name(name) for name in LIMIT_NAMES)


class LimitsMixin(forms.Form):
    """Shows `limit_overrides` as one field per limit; the row's own JSON field is not in the form."""

    def show_limits(self, overrides: dict[str, int | None], choices: Choices, outer: Limits | None, hint: str) -> None:
        """`outer` are the limits behind these, `hint` says what they do: both are told beside each field."""
        for name in LIMIT_NAMES:
            label, text = LIMIT_TEXTS[name]
            told = [text] if text else []
            if outer is not None:
                told.append(hint.format(whole(getattr(outer, name))))
            field = LimitOverrideField(choices, label=label, help_text=" ".join(told))
            if name in overrides:
                number = overrides[name]
                field.initial = (NUMBER, number) if number is not None else (choices[-2][0], None)
            self.fields[_field_name(name)] = field

    def chosen_limits(self) -> dict[str, int | None]:
        chosen = {name: self.cleaned_data.get(_field_name(name)) or (INHERIT, None) for name in LIMIT_NAMES}
        return {name: number for name, (choice, number) in chosen.items() if choice != INHERIT}


class AllowedField(forms.CharField):
    """Names with commas between them; nothing is None, which allows all. A JSON list is understood, too."""

    widget = UnfoldAdminTextInputWidget
    example = "small, large"

    def prepare_value(self, value: Any) -> Any:
        return ", ".join(map(str, value)) if isinstance(value, list) else value or ""

    def to_python(self, value: Any) -> Any:
        text = str(super().to_python(value) or "")
        if not text.startswith("["):
            return [name for name in (part.strip() for part in text.split(",")) if name] or None
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
            raise forms.ValidationError(f"Write names with commas between them, such as {self.example}.")
        return found

    def has_changed(self, initial: Any, data: Any) -> bool:
        return bool(initial != self.to_python(data))


class OriginsField(AllowedField):
    """The same of origins, of which there is always a list."""

    example = "https://app.example.org, https://other.example.org"

    def to_python(self, value: Any) -> Any:
        return super().to_python(value) or []


class AllowedFields:
    """Of an admin: its fields of allowed names are such lists."""

    def formfield_for_dbfield(self, db_field: Any, request: Any, **kwargs: Any) -> Any:
        if db_field.name not in ("allowed_models", "allowed_adapters"):
            return super().formfield_for_dbfield(db_field, request, **kwargs)  # type: ignore[misc]
        things = db_field.name.removeprefix("allowed_")
        example = {"models": "small, large", "adapters": "formal, small:verse"}[things]
        words = f"Of the {things} that are granted those that may be used, such as {example}. Empty: all of them."
        return AllowedField(required=False, max_length=10_000, help_text=words)


class TenantForm(LimitsMixin, TenantFormBase):
    allowed_origins = OriginsField(
        required=False,
        max_length=MAX_ORIGINS * (MAX_ORIGIN_LENGTH + 4),
        help_text=f"Such as {OriginsField.example}; * alone: all pages. Empty: none, so its keys are used by programs "
        "and servers alone.",
    )

    class Meta:
        model = Tenant
        fields = ("name", "status", "plan", "quota_anchor_day", "allowed_models", "allowed_adapters")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        plan = self.instance.plan.limits if self.instance.pk else None
        self.show_limits(self.instance.limit_overrides, TENANT_CHOICES, plan, "In the plan: {}.")

    def clean(self) -> Any:
        """The row has its limits before it is checked as a whole."""
        cleaned = super().clean()
        self.instance.limit_overrides = self.chosen_limits()
        return cleaned


class KeyForm(LimitsMixin, KeyFormBase):
    user: Any = None
    """Who fills it in (role_admin.py); nobody in particular: an operator."""

    scopes = forms.MultipleChoiceField(
        choices=Scope.choices,
        widget=UnfoldAdminCheckboxSelectMultipleWidget,
        initial=[Scope.GENERATE, Scope.USAGE],
        help_text="A key that operates the installation cannot generate.",
    )
    expires_at = forms.SplitDateTimeField(
        required=False, widget=UnfoldAdminSplitDateTimeWidget, help_text="UTC. Empty: never."
    )

    class Meta:
        model = APIKey
        fields = ("tenant", "name", "scopes", "expires_at", "allowed_models", "allowed_adapters")
        help_texts = {"name": "What it is for, such as the program that uses it."}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self._may_operate():
            field = self.fields.get("scopes")
            if isinstance(field, forms.MultipleChoiceField):
                field.choices = [each for each in Scope.choices if each[0] != Scope.OPERATOR]
        tenant = self.instance.tenant.limits if self.instance.pk else None
        self.show_limits(self.instance.limit_overrides, KEY_CHOICES, tenant, "Of the tenant: {}.")

    def save(self, commit: bool = True) -> Any:
        self.instance.limit_overrides = self.chosen_limits()
        return super().save(commit)

    def _may_operate(self) -> bool:
        """Whether whoever fills it in may give a key what their own role does not have: those who write every tenant's
        keys. To see them all, as auditors do, is not enough."""
        verb = "change" if self.instance.pk else "add"
        return self.user is None or roles.reach(self.user, "accounts.apikey", verb) is None

    def clean(self) -> Any:
        """What people of a tenant give a key is never more than their tenant has."""
        cleaned: dict[str, Any] = super().clean() or self.cleaned_data
        tenant = self.instance.tenant if self.instance.pk else cleaned.get("tenant")
        if tenant is None or self._may_operate():
            return cleaned
        for name, value in self.chosen_limits().items():
            bound = getattr(tenant.limits, name)
            if bound is not None and (value is None or value > bound):
                self.add_error(_field_name(name), f"The tenant itself has {bound:,}.")
        for name in ("allowed_models", "allowed_adapters"):
            own = getattr(tenant, name)
            outer = getattr(tenant.plan, name) if own is None else own
            beyond = set(cleaned.get(name) or ()) - set(outer or ()) if outer is not None else set()
            if beyond:
                self.add_error(name, f"The tenant itself may not use {', '.join(sorted(beyond))}.")
        return cleaned

"""Form fields of the accounts pages: one limit as a choice and a number instead of a line of JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django import forms
from django.core.exceptions import ValidationError
from unfold.widgets import (
    UnfoldAdminBigIntegerFieldWidget,
    UnfoldAdminCheckboxSelectMultipleWidget,
    UnfoldAdminSelectWidget,
    UnfoldAdminSplitDateTimeWidget,
)

from accounts.console import whole
from accounts.limits import LIMIT_NAMES, MAX_LIMIT, Limits
from accounts.models import APIKey, Scope, Tenant

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
            raise ValidationError("Give a number, or choose what stands above `Number:`.")
        if choice != NUMBER and number is not None:
            raise ValidationError("Choose `Number:` for a number to count, or empty it.")
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


class TenantForm(LimitsMixin, TenantFormBase):
    class Meta:
        model = Tenant
        fields = ("name", "status", "plan", "quota_anchor_day")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        plan = self.instance.plan.limits if self.instance.pk else None
        self.show_limits(self.instance.limit_overrides, TENANT_CHOICES, plan, "In the plan: {}.")

    def save(self, commit: bool = True) -> Any:
        self.instance.limit_overrides = self.chosen_limits()
        return super().save(commit)


class KeyForm(LimitsMixin, KeyFormBase):
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
        fields = ("tenant", "name", "scopes", "expires_at")
        help_texts = {"name": "What it is for, such as the program that uses it."}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        tenant = self.instance.tenant.limits if self.instance.pk else None
        self.show_limits(self.instance.limit_overrides, KEY_CHOICES, tenant, "Of the tenant: {}.")

    def save(self, commit: bool = True) -> Any:
        self.instance.limit_overrides = self.chosen_limits()
        return super().save(commit)

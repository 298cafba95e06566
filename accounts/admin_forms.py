"""Form fields of the accounts pages: one limit as a choice and a number instead of a line of JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django import forms
from django.core.exceptions import ValidationError
from unfold.widgets import UnfoldAdminBigIntegerFieldWidget, UnfoldAdminSelectWidget, UnfoldAdminSplitDateTimeWidget

from accounts.limits import LIMIT_NAMES, MAX_LIMIT, Limits
from accounts.models import APIKey, Scope, Tenant

if TYPE_CHECKING:  # Django's forms take no type arguments at run time
    TenantFormBase = forms.ModelForm[Tenant]
    KeyFormBase = forms.ModelForm[APIKey]
else:
    TenantFormBase = KeyFormBase = forms.ModelForm

INHERIT, UNLIMITED, NUMBER = "inherit", "unlimited", "number"
CHOICES = ((INHERIT, "Inherit"), (UNLIMITED, "Unlimited"), (NUMBER, "Number:"))

Override = tuple[str, int | None]
"""(inherit, unlimited or number; the number)"""


class LimitWidget(forms.MultiWidget):
    def __init__(self) -> None:
        super().__init__([UnfoldAdminSelectWidget(choices=CHOICES), UnfoldAdminBigIntegerFieldWidget()])

    def decompress(self, value: Override | None) -> list[Any]:
        return list(value or (INHERIT, None))


class LimitOverrideField(forms.MultiValueField):
    """Cleans to an Override. Choosing nothing and typing a number means the number."""

    def __init__(self, **options: Any) -> None:
        fields = (
            forms.ChoiceField(choices=CHOICES, required=False),
            forms.IntegerField(min_value=0, max_value=MAX_LIMIT, required=False),
        )
        super().__init__(fields, require_all_fields=False, required=False, widget=LimitWidget(), **options)

    def compress(self, data_list: list[Any]) -> Override:
        choice, number = data_list or (INHERIT, None)
        if choice == NUMBER and number is None:
            raise ValidationError("Give a number, or choose Inherit or Unlimited.")
        if choice != NUMBER and number is not None:
            raise ValidationError("Choose `Number:` for a number to count, or empty it.")
        return choice or INHERIT, number


def _field_name(limit: str) -> str:
    return f"limit_{limit}"


LIMIT_FIELDS = tuple(_field_name(name) for name in LIMIT_NAMES)


class LimitsMixin(forms.Form):
    """Shows `limit_overrides` as one field per limit; the row's own JSON field is not in the form."""

    def show_limits(self, overrides: dict[str, int | None], inherited: Limits | None) -> None:
        for name in LIMIT_NAMES:
            field = LimitOverrideField(label=name.replace("_", " ").capitalize())
            if inherited is not None:
                value = getattr(inherited, name)
                field.help_text = f"Inherits {'unlimited' if value is None else f'{value:,}'}."
            if name in overrides:
                number = overrides[name]
                field.initial = (UNLIMITED, None) if number is None else (NUMBER, number)
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
        is_saved = self.instance.pk is not None
        self.show_limits(self.instance.limit_overrides, self.instance.plan.limits if is_saved else None)

    def save(self, commit: bool = True) -> Any:
        self.instance.limit_overrides = self.chosen_limits()
        return super().save(commit)


class KeyForm(LimitsMixin, KeyFormBase):
    scopes = forms.MultipleChoiceField(
        choices=Scope.choices, widget=forms.CheckboxSelectMultiple, initial=[Scope.GENERATE, Scope.USAGE]
    )
    expires_at = forms.SplitDateTimeField(
        required=False, widget=UnfoldAdminSplitDateTimeWidget, help_text="Empty: never. UTC."
    )

    class Meta:
        model = APIKey
        fields = ("tenant", "name", "scopes", "expires_at")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.show_limits(self.instance.limit_overrides, self.instance.tenant.limits if self.instance.pk else None)

    def save(self, commit: bool = True) -> Any:
        self.instance.limit_overrides = self.chosen_limits()
        return super().save(commit)

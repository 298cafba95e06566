"""The console's sign-in form: after some wrong passwords in a minute an address, and a name, have to wait.

UNFOLD["LOGIN"]["form"]; runs in the thread of a console view.
"""

from __future__ import annotations

from typing import Any

from django.core.exceptions import ValidationError
from unfold.forms import AuthenticationForm

from accounts.identity import roles
from accounts.limits import throttling
from accounts.trail import sign_ins


class ConsoleLoginForm(AuthenticationForm):
    """The password of a name that must wait is not looked at, so a right one is not told from a wrong one."""

    def confirm_login_allowed(self, user: Any) -> None:
        """Everyone with a role comes in, staff or not. Raises ValidationError."""
        if not roles.may_enter(user):
            raise ValidationError(
                self.error_messages["invalid_login"],
                code="invalid_login",
                params={"username": self.username_field.verbose_name},
            )

    def clean(self) -> dict[str, Any]:
        address = sign_ins.address_of(self.request)
        name = str(self.cleaned_data.get("username") or "")
        wait = throttling.login_wait(address, name)
        if wait:
            raise ValidationError(f"Too many wrong passwords. Try again in {wait} s.", code="too_many")
        try:
            found: dict[str, Any] = super().clean()
        except ValidationError:
            throttling.count_failed_login(address, name)
            knew_password = self.get_user() is not None
            sign_ins.refused(name, address, "no access" if knew_password else "wrong password")
            if wait := throttling.login_wait(address, name):
                sign_ins.locked(name, address, wait)
            raise
        return found

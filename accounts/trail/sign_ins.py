"""Who signed in to the console and out of it, and who was refused, in the audit log.

No password comes here, and no name that nobody has: people type passwords into the field for names. In the thread of a
console view; login.py calls for refusals, Django's signals for the rest.
"""

from __future__ import annotations

from typing import Any

from django.contrib.auth import get_user_model
from django.contrib.auth.signals import user_logged_in, user_logged_out
from django.http import HttpRequest

from accounts.limits import throttling
from accounts.models import AuditEntry
from accounts.trail import audit_log

MODEL = "auth.user"
MAX_ADDRESS = 45
"""Characters of an IPv6 address that ends in an IPv4 one."""


def connect() -> None:
    """Once. AppConfig.ready calls it."""
    user_logged_in.connect(_signed_in, dispatch_uid="audit-signed-in")
    user_logged_out.connect(_signed_out, dispatch_uid="audit-signed-out")


def address_of(request: HttpRequest | None) -> str:
    """Of the browser; behind a proxy of TRUSTED_PROXIES the one that it names. Empty where there is none."""
    return str(request.META.get("REMOTE_ADDR", ""))[:MAX_ADDRESS] if request is not None else ""


def refused(name: str, address: str, reason: str) -> None:
    """A wrong password, or a right one of somebody without a role. At most NOTED_LOGINS_PER_MINUTE are written."""
    if throttling.may_note_login():
        _note(AuditEntry.Action.REFUSED, name, address, reason=reason)


def locked(name: str, address: str, seconds: int) -> None:
    """From this moment an address, or everybody with a name, has to wait. What is tried meanwhile is not written."""
    if throttling.may_note_login():
        _note(AuditEntry.Action.LOCKED, name, address, seconds=seconds)


def _note(action: str, name: str, address: str, **facts: Any) -> None:
    user = get_user_model()._default_manager.filter(username=name).first()
    diff = {"address": [None, address], **{fact: [None, value] for fact, value in facts.items()}}
    audit_log.note(action, audit_log.Actor("unknown", address), user, diff, model=MODEL)


def _signed_in(sender: Any, request: HttpRequest | None, user: Any, **kwargs: Any) -> None:
    _by_person(AuditEntry.Action.SIGN_IN, request, user)


def _signed_out(sender: Any, request: HttpRequest | None, user: Any, **kwargs: Any) -> None:
    if user is not None and user.pk is not None:
        _by_person(AuditEntry.Action.SIGN_OUT, request, user)


def _by_person(action: str, request: HttpRequest | None, user: Any) -> None:
    actor = audit_log.Actor("person", user.get_username())
    audit_log.note(action, actor, user, {"address": [None, address_of(request)]})

"""Words that the accounts commands share on the command line: tenants, keys, limits, moments."""

from __future__ import annotations

from argparse import ArgumentTypeError
from datetime import UTC, datetime, timedelta
from typing import Any

from django.core.exceptions import ValidationError
from django.core.management.base import CommandParser
from django.utils.dateparse import parse_datetime

from accounts import issuing
from accounts.limits import LIMIT_NAMES, MAX_LIMIT
from accounts.management.base import HouseCommand
from accounts.models import APIKey, Tenant

INHERIT = "inherit"
UNLIMITED = "unlimited"
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def limit_value(text: str) -> int | str:
    """A whole number, `unlimited` or `inherit`."""
    if text in (INHERIT, UNLIMITED):
        return text
    if not text.isdecimal() or int(text) > MAX_LIMIT:
        raise ArgumentTypeError(f"{text!r} is not a whole number from 0, `{UNLIMITED}` or `{INHERIT}`")
    return int(text)


def duration(text: str) -> timedelta:
    """90s, 30m, 12h or 7d."""
    number, unit = text[:-1], text[-1:]
    if not number.isdecimal() or unit not in UNITS or len(number) > 6:
        raise ArgumentTypeError(f"{text!r} is not a duration such as 90s, 30m, 12h or 7d")
    return timedelta(seconds=int(number) * UNITS[unit])


def moment(text: str) -> datetime:
    """An ISO 8601 date and time; UTC where it names no zone."""
    try:
        found = parse_datetime(text) or datetime.fromisoformat(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not a time such as 2027-01-31T12:00:00Z") from None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def add_limits(parser: CommandParser) -> None:
    for name in LIMIT_NAMES:
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=limit_value,
            metavar="N",
            help=f"a number, `{UNLIMITED}`, or `{INHERIT}` to remove the override",
        )


def overrides(options: dict[str, Any], present: dict[str, int | None]) -> dict[str, int | None]:
    """`present` with what the options replace or remove."""
    result = dict(present)
    for name in LIMIT_NAMES:
        value = options.get(name)
        if value == INHERIT:
            result.pop(name, None)
        elif value is not None:
            result[name] = None if value == UNLIMITED else value
    return result


def tenant_named(command: HouseCommand, name: str) -> Tenant:
    tenant = Tenant.objects.select_related("plan").filter(name=name).first()
    if tenant is None:
        command.fail("tenant_not_found", f"There is no tenant {name!r}.")
    return tenant


def key_meant(command: HouseCommand, text: str) -> APIKey:
    """By its text, its public id or its row number. The text itself is never repeated."""
    try:
        return issuing.find(text)
    except APIKey.DoesNotExist:
        command.fail("key_not_found", "There is no such key: give its public id, as in `llms_<public id>_…`.")


def sentence(error: ValidationError) -> str:
    return " ".join(error.messages)


def as_row(key: APIKey) -> dict[str, Any]:
    """JSON about a key; never its text."""
    return {
        "id": key.pk,
        "public_id": key.public_id,
        "key": key.display,
        "name": key.name,
        "tenant": key.tenant.name,
        "scopes": key.scopes,
        "limits": key.limit_overrides,
        "expires_at": key.expires_at.isoformat() if key.expires_at else None,
        "revoked_at": key.revoked_at.isoformat() if key.revoked_at else None,
    }

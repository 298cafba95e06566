"""Words that the accounts commands share on the command line: tenants, keys, limits, moments."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from django.contrib.auth.models import User
from django.core.exceptions import ValidationError
from django.core.management.base import CommandParser
from django.utils.dateparse import parse_datetime

from accounts.identity import issuing
from accounts.limits.precedence import LIMIT_NAMES, MAX_LIMIT
from accounts.management.base import HouseCommand
from accounts.models import APIKey, Plan, Tenant

INHERIT = "inherit"
UNLIMITED = "unlimited"
ALL = "all"
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
MAX_DURATION_SECONDS = 3660 * 86400


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
    is_one = number.isascii() and number.isdecimal() and unit in UNITS and len(number) <= 9
    seconds = int(number) * UNITS[unit] if is_one else None
    if seconds is None or seconds > MAX_DURATION_SECONDS:
        raise ArgumentTypeError(f"{text!r} is not a duration such as 90s, 30m, 12h or 7d, of ten years at most")
    return timedelta(seconds=seconds)


def moment(text: str) -> datetime:
    """An ISO 8601 date and time; UTC where it names no zone."""
    try:
        found = parse_datetime(text) or datetime.fromisoformat(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not a time such as 2027-01-31T12:00:00Z") from None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def number(most: int) -> Callable[[str], int]:
    """For `type=`: a whole number from 1 to `most`."""

    def parsed(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and len(text) < 12 and 1 <= int(text) <= most):
            raise ArgumentTypeError(f"{text!r} is not a whole number from 1 to {most}")
        return int(text)

    return parsed


def add_limits(parser: CommandParser, *, inherit: bool = True) -> None:
    words = (
        f"a number, `{UNLIMITED}`, or `{INHERIT}` to remove the override" if inherit else f"a number or `{UNLIMITED}`"
    )
    for name in LIMIT_NAMES:
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=limit_value,
            metavar="N",
            help=words,
        )


def add_allowed(parser: CommandParser, when: str = "") -> None:
    for things, example in (("models", "small,large"), ("adapters", "formal,small:verse")):
        parser.add_argument(
            f"--allowed-{things}",
            metavar="NAMES",
            help=f"{when}of the {things} that are granted those that may be used, such as {example}; `{ALL}`: all",
        )


def allowed(options: dict[str, Any]) -> dict[str, list[str] | None]:
    """Fields of a plan, tenant or key that the options of `add_allowed` set."""
    found: dict[str, list[str] | None] = {}
    for name in ("allowed_models", "allowed_adapters"):
        text = options[name]
        if text is not None:
            found[name] = None if text == ALL else [each for each in map(str.strip, text.split(",")) if each]
    return found


def add_origins(parser: CommandParser) -> None:
    parser.add_argument(
        "--allow-origin",
        action="append",
        metavar="ORIGIN",
        help="web pages of this origin, such as https://app.example.org, may ask with the tenant's keys; may be "
        "repeated; '*': all pages",
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


def plan_meant(command: HouseCommand, name: str) -> Plan:
    plan = Plan.objects.filter(name=name).first()
    if plan is None:
        command.fail("plan_not_found", f"There is no plan {name!r}: `manage.py plan` lists them.")
    return plan


def person_named(command: HouseCommand, name: str) -> User:
    user = User.objects.select_related("staff_role").filter(username=name).first()
    if user is None:
        command.fail("person_not_found", f"There is no account {name!r}: `manage.py person` lists them.")
    return user


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
        "allowed_models": key.allowed_models,
        "allowed_adapters": key.allowed_adapters,
        "expires_at": key.expires_at.isoformat() if key.expires_at else None,
        "revoked_at": key.revoked_at.isoformat() if key.revoked_at else None,
    }

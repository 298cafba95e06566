"""Prices and limits for a time in a configuration file: their form, what would change, and the file of what there is.

A price is known by its model and its moment; a rule by whose limit it is, which one, and when it is in force. Called by
inference/site_file/site_yaml.py. Nothing is deleted: what the file does not name stays.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, time
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from accounts.limits.precedence import LIMIT_NAMES, MAX_LIMIT
from accounts.limits.schedules import MAX_LAST_DAYS
from accounts.models import APIKey, LimitRule, Price
from inference.site_file.plan import Change, SitePlan, compare_row, refuse_twice

MAX_PRICES = 100_000
MAX_RULES = 100_000


def _in_utc(moment: datetime) -> datetime:
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


Moment = Annotated[datetime, Field(strict=False), AfterValidator(_in_utc)]
"""ISO 8601; UTC where it names no zone."""


def _is_quoted(value: object) -> object:
    """YAML takes 22:00 for the number 1320."""
    if not isinstance(value, (str, time)):
        raise ValueError("put the hour in quotes, such as '22:00'")
    return value


Hour = Annotated[
    time,
    BeforeValidator(_is_quoted),
    Field(strict=False),
    AfterValidator(lambda value: value.replace(tzinfo=None)),
]
Money = Annotated[Decimal, Field(strict=False, ge=0, le=100_000, max_digits=12, decimal_places=6)]


class PriceEntry(BaseModel):
    """Of a million tokens, from a moment on. `model` is empty for every model that has no price of its own."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = Field("", max_length=100)
    valid_from: Moment
    input_per_million: Money
    cached_input_per_million: Money | None = None
    output_per_million: Money


class LimitRuleEntry(BaseModel):
    """Another value of a limit for a time, of a plan, a tenant or a key (by its prefix): one of them."""

    model_config = ConfigDict(extra="forbid", strict=True)

    plan: str | None = Field(None, max_length=64)
    tenant: str | None = Field(None, max_length=100)
    key: str | None = Field(None, max_length=12)
    limit: Literal[LIMIT_NAMES]  # type: ignore[valid-type]  # the names are data
    value: int | None = Field(None, ge=0, le=MAX_LIMIT)
    starts_at: Moment
    ends_at: Moment | None = None
    recurrence: Literal["always", "daily", "month_end"] = "always"
    daily_from: Hour | None = None
    daily_until: Hour | None = None
    last_days: int | None = Field(None, ge=1, le=MAX_LAST_DAYS)
    reason: str = Field("", max_length=200)


PRICE_VALUES = ("input_per_million", "cached_input_per_million", "output_per_million")
RULE_TIMES = ("limit", "starts_at", "recurrence", "daily_from", "daily_until", "last_days")
RULE_VALUES = ("value", "ends_at", "reason")
OWNERS = ("plan", "tenant", "key")


# What would change


def compare_prices(plan: SitePlan, entries: list[PriceEntry]) -> None:
    refuse_twice(plan, "prices", [(entry.model, entry.valid_from) for entry in entries])
    rows = {(row.model, row.valid_from): row for row in Price.objects.all()}
    for number, entry in enumerate(entries):
        known = rows.pop((entry.model, entry.valid_from), None)
        row = known or Price(model=entry.model, valid_from=entry.valid_from)
        compare_row(plan, "price", f"prices.{number}", row, {name: getattr(entry, name) for name in PRICE_VALUES})
    plan.changes += [Change(kind="price", name=str(row), action="left") for row in rows.values()]


def compare_rules(plan: SitePlan, entries: list[LimitRuleEntry]) -> None:
    """Of several that are alike the first in the file is the oldest. New ones are made in the file's order, after those
    that are there."""
    rows: defaultdict[tuple[Any, ...], list[LimitRule]] = defaultdict(list)
    for row in LimitRule.objects.select_related(*OWNERS).order_by("pk"):
        rows[_identity(row)].append(row)
    keys = _keys({entry.key for entry in entries if entry.key})
    for number, entry in enumerate(entries):
        where = f"limit_rules.{number}"
        owner = _owner(plan, where, entry, keys)
        if owner is None:
            continue
        fresh = LimitRule(**owner, **{name: getattr(entry, name) for name in RULE_TIMES})
        alike = rows[_identity(fresh)]
        row = alike.pop(0) if alike else fresh
        compare_row(plan, "limit_rule", where, row, {name: getattr(entry, name) for name in RULE_VALUES})
    left = (row for alike in rows.values() for row in alike)
    plan.changes += [Change(kind="limit_rule", name=str(row), action="left") for row in left]


def _keys(prefixes: set[str]) -> dict[str, APIKey]:
    return {key.public_id: key for key in APIKey.objects.filter(public_id__in=prefixes, revoked_at=None)}


def _identity(row: LimitRule) -> tuple[Any, ...]:
    """Owners that are saved only with this file have no rule yet."""
    owners = tuple((name, getattr(row, f"{name}_id")) for name in OWNERS if getattr(row, name) is not None)
    return owners, *(getattr(row, name) for name in RULE_TIMES)


def _owner(plan: SitePlan, place: str, entry: LimitRuleEntry, keys: Mapping[str, APIKey]) -> dict[str, Any] | None:
    named = [name for name in OWNERS if getattr(entry, name) is not None]
    if len(named) != 1:
        plan.problems.append(f"{place}: name a plan, a tenant or a key: one of them")
        return None
    [kind] = named
    name = getattr(entry, kind)
    known: dict[str, Mapping[str, Any]] = {"plan": plan.plans, "tenant": plan.tenants, "key": keys}
    found = known[kind].get(name)
    if found is not None:
        return {kind: found}
    if kind == "key":
        plan.warnings.append(f"{place}: the key {name!r} is not there: this rule is left out.")
    else:
        plan.problems.append(f"{place}.{kind}: there is no {kind} {name!r}, here or in the database")
    return None


# The file of what there is


def prices() -> list[dict[str, Any]]:
    rows = Price.objects.order_by("valid_from", "pk")
    return [_written(row, ("model", "valid_from", *PRICE_VALUES)) for row in rows]


def rules() -> list[dict[str, Any]]:
    rows = LimitRule.objects.select_related(*OWNERS).order_by("pk")
    return [{**dict(_owner_of(row)), **_written(row, (*RULE_TIMES, *RULE_VALUES))} for row in rows]


def _owner_of(row: LimitRule) -> Iterator[tuple[str, str]]:
    for name in OWNERS:
        owner = getattr(row, name)
        if owner is not None:
            yield name, owner.public_id if isinstance(owner, APIKey) else owner.name


def _written(row: Price | LimitRule, names: tuple[str, ...]) -> dict[str, Any]:
    """As JSON has it; what is empty is left out."""
    values = {name: getattr(row, name) for name in names}
    return {name: _word(value) for name, value in values.items() if value is not None or name == "value"}


def _word(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    if isinstance(value, time):
        return value.isoformat()
    return f"{value.normalize():f}" if isinstance(value, Decimal) else value

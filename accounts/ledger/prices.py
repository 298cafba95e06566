"""What tokens cost: prices by model and moment, kept in memory for ten seconds. Called by quotas.py at settlement.

A cost is a whole number of billionths of the currency, rounded once, per ledger entry: sums of it are exact in every
database. A new price announces itself like a change of a plan.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import ROUND_HALF_EVEN, Decimal

from accounts.identity import known_keys
from accounts.models import Price

NANOS = 10**9
CACHE_SECONDS = 10.0
MILLION = 1_000_000
EVERY_MODEL = ""


@dataclass(frozen=True, slots=True)
class Rates:
    """Prices of a million tokens, in the currency."""

    input: Decimal
    cached_input: Decimal
    output: Decimal

    def cost_nanos(self, *, prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> int:
        """cached_tokens are a part of prompt_tokens."""
        cached = min(max(0, cached_tokens), prompt_tokens)
        millionths = (
            (prompt_tokens - cached) * self.input + cached * self.cached_input + completion_tokens * self.output
        )
        return int((millionths * NANOS / MILLION).to_integral_value(ROUND_HALF_EVEN))


@dataclass(frozen=True, slots=True)
class _Table:
    """Moments in order, and the rates from each of them on, by model. `read_at` is monotonic seconds."""

    moments: Mapping[str, list[datetime]]
    rates: Mapping[str, list[Rates]]
    read_at: float
    version: int

    def at(self, model: str, now: datetime) -> Rates | None:
        for name in (model, EVERY_MODEL):
            place = bisect_right(self.moments.get(name, []), now) - 1
            if place >= 0:
                return self.rates[name][place]
        return None


_lock = threading.Lock()
_table: _Table | None = None


def rates(model: str, now: datetime) -> Rates | None:
    """The model's price at this moment, else that of every model; None where there is none yet."""
    return _current().at(model, now)


def cost_nanos(model: str, now: datetime, *, prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> int:
    """Billionths of the currency; 0 for what has no price."""
    found = rates(model, now)
    if found is None:
        return 0
    return found.cost_nanos(
        prompt_tokens=prompt_tokens, cached_tokens=cached_tokens, completion_tokens=completion_tokens
    )


def money(nanos: int) -> str:
    """As a decimal number with as many places as it needs, two at least: 0.000123, 12.50."""
    text = f"{Decimal(nanos) / NANOS:.9f}"
    whole, _, part = text.partition(".")
    return f"{whole}.{part.rstrip('0').ljust(2, '0')}"


def nanos(amount: Decimal) -> int:
    """Raises ValueError for more than nine places."""
    exact = amount * NANOS
    if exact != exact.to_integral_value():
        raise ValueError("An amount of money has nine places at most.")
    return int(exact)


def _current() -> _Table:
    global _table
    cached, version = _table, known_keys.CACHE.generation
    if cached is not None and cached.version == version and time.monotonic() - cached.read_at < CACHE_SECONDS:
        return cached
    fresh = _read(version)
    with _lock:
        _table = fresh
    return fresh


def _read(version: int) -> _Table:
    """One query."""
    read_at = time.monotonic()
    moments: defaultdict[str, list[datetime]] = defaultdict(list)
    found: defaultdict[str, list[Rates]] = defaultdict(list)
    for row in Price.objects.order_by("valid_from"):
        cached = row.input_per_million if row.cached_input_per_million is None else row.cached_input_per_million
        moments[row.model].append(row.valid_from)
        found[row.model].append(Rates(row.input_per_million, cached, row.output_per_million))
    return _Table(moments, found, read_at, version)

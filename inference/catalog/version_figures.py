"""How the versions behind an alias do, side by side: outcomes, times and speed of the requests that came by it lately.

Reads receipts: a bounded number of the newest, in two queries. The command, the console and operators call it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from django.db.models import QuerySet

from inference.models import AdapterAlias, Receipt

MAX_RECEIPTS = 20_000
"""Of all models; older ones are not looked at."""
MAX_HOURS = 24 * 30
COLUMNS = ("aliases", "status", "cached", "queue_seconds", "prefill_seconds", "decode_seconds", "completion_tokens")


@dataclass(slots=True)
class _Seen:
    outcomes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(Receipt.Status.values, 0))
    first_token_seconds: list[float] = field(default_factory=list)
    decode_seconds: float = 0.0
    completion_tokens: int = 0


def compare(alias: AdapterAlias, now: datetime, hours: int = 24) -> list[dict[str, Any]]:
    """A row for each version that answered, target and canary first. hours: 1 to MAX_HOURS."""
    since = now - timedelta(hours=min(max(hours, 1), MAX_HOURS))
    rows = _newest(since).filter(model=alias.base_model.name).exclude(aliases=[])
    seen: defaultdict[str, _Seen] = defaultdict(_Seen)
    for version in (alias.target, alias.canary):
        if version is not None:
            seen[version.name] = _Seen()
    for row in rows.values(*COLUMNS).iterator(chunk_size=2000):
        for name, version in row["aliases"]:
            if name == alias.name:
                _note(seen[version], row)
    return [_figures(version, found) for version, found in seen.items()]


def _newest(since: datetime) -> QuerySet[Receipt]:
    """Of a stretch of time, the newest MAX_RECEIPTS: a step along the index finds where they begin. One query."""
    rows = Receipt.objects.filter(created_at__gte=since).order_by("-created_at")
    beyond = rows.values_list("created_at", flat=True)[MAX_RECEIPTS : MAX_RECEIPTS + 1].first()
    return rows.order_by() if beyond is None else rows.order_by().filter(created_at__gt=beyond)


def _note(seen: _Seen, row: dict[str, Any]) -> None:
    seen.outcomes[row["status"]] += 1
    if row["cached"]:
        return
    seen.first_token_seconds.append(row["queue_seconds"] + row["prefill_seconds"])
    seen.decode_seconds += row["decode_seconds"]
    seen.completion_tokens += row["completion_tokens"]


def _figures(version: str, seen: _Seen) -> dict[str, Any]:
    number = sum(seen.outcomes.values())
    failed = seen.outcomes[Receipt.Status.FAILED]
    return {
        "version": version,
        "requests": number,
        **seen.outcomes,
        "failed_percent": round(100 * failed / number, 2) if number else None,
        "first_token_p50_seconds": _quantile(seen.first_token_seconds, 0.5),
        "first_token_p95_seconds": _quantile(seen.first_token_seconds, 0.95),
        "tokens_per_second": round(seen.completion_tokens / seen.decode_seconds, 2) if seen.decode_seconds else None,
    }


def _quantile(values: Sequence[float], part: float) -> float | None:
    """The smallest value that so many are not above."""
    if not values:
        return None
    return round(sorted(values)[max(0, math.ceil(part * len(values)) - 1)], 4)

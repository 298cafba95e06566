"""The dashboard's charts: usage by day (of days that are over, from their totals), outcomes of the last day by hour,
refusals by their code.

Reads only, a fixed number of queries, none of which looks at more than a day's newest MOST_COUNTED rows or at the sums
of a choice of days. Called by dashboard.py; times are UTC.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Any

from django.conf import settings
from django.db.models import Case, Count, F, IntegerField, QuerySet, Sum, Value, When
from django.utils.safestring import SafeString

from accounts.ledger.prices import NANOS, money
from accounts.models import DayTotal, DayUsage, RefusedRequest, Tenant
from accounts.pages import console
from inference.models import Receipt
from llmsite.console.charts import Series, stacked_bars
from llmsite.console.reach import Tenants, within

MOST_COUNTED = 20_000
"""Receipts, or refusals, of a day that are counted; beyond it the page says `more than`."""
NUM_GROUPS = 6
HOURS = 24
METRICS = {"tokens": "used_tokens", "requests": "requests", "cost": "cost_nanos"}
GROUPS = {"tenant": "tenant_id", "model": "model", "adapter": "adapters"}
TOTALS = {"tenant": DayTotal.By.TENANT, "model": DayTotal.By.MODEL, "adapter": DayTotal.By.ADAPTERS}
NAMELESS = {"tenant": "-", "model": "no model", "adapter": "no adapter"}
DAYS = (7, 30, 90)


@dataclass(frozen=True, slots=True)
class Choice:
    """What the viewer wants to see; anything unknown in the address is the default."""

    show: str = "tokens"
    by: str = "tenant"
    days: int = 30

    @classmethod
    def of(cls, query: Mapping[str, str]) -> Choice:
        show, by, days = query.get("show", ""), query.get("by", ""), query.get("days", "")
        usual = cls()
        return cls(
            show=show if show in METRICS else usual.show,
            by=by if by in GROUPS else usual.by,
            days=int(days) if days in map(str, DAYS) else usual.days,
        )

    def links(self) -> list[list[tuple[str, str, bool]]]:
        """For each question its answers: (address, word, whether it is the one)."""
        return [
            [(self._with(show=name), name.capitalize(), name == self.show) for name in METRICS],
            [(self._with(by=name), f"by {name}", name == self.by) for name in GROUPS],
            [(self._with(days=number), f"{number} days", number == self.days) for number in DAYS],
        ]

    def _with(self, **changed: Any) -> str:
        chosen = {"show": self.show, "by": self.by, "days": self.days, **changed}
        return "?" + "&".join(f"{name}={value}" for name, value in chosen.items())


@dataclass(frozen=True, slots=True)
class UsageChart:
    svg: SafeString
    choices: list[list[tuple[str, str, bool]]]
    is_empty: bool


def usage_chart(choice: Choice, now: datetime, tenants: Tenants = None) -> UsageChart:
    """Four queries, and one for names of tenants: days that are over from their totals, as far as they are kept, the
    other days from the days of usage."""
    first = now.date() - timedelta(days=choice.days - 1)
    days = [first + timedelta(days=number) for number in range(choice.days)]
    used = _used(choice, days, tenants)
    groups = used.largest(NUM_GROUPS)
    sums = used.by_day(groups)
    scale = NANOS if choice.show == "cost" else 1
    names = dict(Tenant.objects.filter(pk__in=groups).values_list("pk", "name")) if choice.by == "tenant" else {}
    series = [
        Series(names.get(name, name) or NAMELESS[choice.by], [sums[name, day] / scale for day in days], str(number))
        for number, name in enumerate(groups)
    ]
    rest = [used.of_day[day] - sum(sums[name, day] for name in groups) for day in days]
    series.append(Series("others", [number / scale for number in rest], "others"))
    title = f"{choice.show.capitalize()} by {choice.by}, {choice.days} days"
    svg = stacked_bars([f"{day:%b %d}" for day in days], series, title=title, shown=_worded(choice.show))
    return UsageChart(svg, choice.links(), is_empty=not groups)


@dataclass(frozen=True, slots=True)
class Used:
    """What was used in some days: of each group in all of them, of each day, and of each group on days not kept."""

    of_group: Counter[Any]
    of_day: Counter[date]
    fresh: Counter[tuple[Any, date]]
    kept: QuerySet[DayTotal]
    metric: str

    def largest(self, most: int) -> list[Any]:
        """Those that used most, of the same by their names."""
        used = [(group, total) for group, total in self.of_group.items() if total > 0]
        return [group for group, _ in sorted(used, key=lambda each: (-each[1], each[0]))[:most]]

    def by_day(self, groups: Sequence[Any]) -> Counter[tuple[Any, date]]:
        """One query."""
        found = Counter({place: total for place, total in self.fresh.items() if place[0] in groups})
        named = {str(group): group for group in groups}
        for name, day, total in self.kept.filter(name__in=named).values_list("name", "day", self.metric):
            found[named[name], day] = total
        return found


def _used(choice: Choice, days: Sequence[date], tenants: Tenants) -> Used:
    """Three queries."""
    column, metric = GROUPS[choice.by], METRICS[choice.show]
    whole, kept = _kept(choice, days, tenants)
    of_day: Counter[date] = Counter(dict(whole.values_list("day").annotate(total=Sum(metric)).order_by()))
    kept = kept.filter(day__in=list(of_day))
    of_group: Counter[Any] = Counter()
    for name, total in kept.values_list("name").annotate(total=Sum(metric)):
        of_group[int(name) if choice.by == "tenant" else name] = total
    rows = within(tenants, DayUsage.objects.filter(day__in=[day for day in days if day not in of_day])).order_by()
    fresh: Counter[tuple[Any, date]] = Counter()
    for group, day, total in rows.values_list(column, "day").annotate(total=Sum(metric)):
        fresh[group, day] = total
        of_group[group] += total
        of_day[day] += total
    return Used(of_group, of_day, fresh, kept, metric)


def _kept(choice: Choice, days: Sequence[date], tenants: Tenants) -> tuple[QuerySet[DayTotal], QuerySet[DayTotal]]:
    """Totals of the whole, and of its groups. Those who see some tenants alone have them by tenant: nobody kept which
    models each of them used."""
    rows = DayTotal.objects.filter(day__in=days)
    if tenants is None:
        return rows.filter(by=DayTotal.By.DAY), rows.filter(by=TOTALS[choice.by])
    own = (
        rows.filter(by=DayTotal.By.TENANT, name__in=[str(each) for each in tenants])
        if choice.by == "tenant"
        else rows.none()
    )
    return own, own


def _worded(show: str) -> Any:
    if show != "cost":
        return console.short
    return lambda amount: f"{money(round(amount * NANOS))} {settings.CONFIG.currency}" if amount else "0"


# The last day, by hour


def bounded(rows: QuerySet[Any], since: datetime) -> QuerySet[Any]:
    """Those since a moment, of them the newest MOST_COUNTED: one step along the index finds where they begin."""
    beyond = rows.order_by("-created_at").values_list("created_at", flat=True)[MOST_COUNTED : MOST_COUNTED + 1]
    cut = next(iter(beyond), None)
    rows = rows.filter(created_at__gte=since).order_by()
    return rows.filter(created_at__gt=cut) if cut is not None and cut >= since else rows


def hour_of(now: datetime) -> Case:
    """0 for this hour, 23 for the first of the day."""
    this = now.replace(minute=0, second=0, microsecond=0)
    whens = [When(created_at__gte=this - timedelta(hours=ago), then=Value(ago)) for ago in range(HOURS - 1)]
    return Case(*whens, default=Value(HOURS - 1), output_field=IntegerField())


def outcomes(receipts: QuerySet[Receipt] | None, refused: QuerySet[RefusedRequest] | None, now: datetime) -> SafeString:
    """Completed, cancelled, failed and refused requests by hour; None for what the viewer may not see. Two queries."""
    counts: Counter[tuple[str, int]] = Counter()
    if receipts is not None:
        for row in receipts.annotate(ago=hour_of(now)).values("ago", "status").annotate(number=Count("pk")):
            counts[row["status"], row["ago"]] += row["number"]
    if refused is not None:
        number = Count("pk") + Sum("num_more")
        for each in refused.annotate(ago=hour_of(now)).values("ago").annotate(number=number):
            counts["refused", each["ago"]] += each["number"]
    hours = list(range(HOURS - 1, -1, -1))
    tones = {"completed": "good", "cancelled": "quiet", "failed": "bad", "refused": "refused"}
    series = [Series(name, [counts[name, ago] for ago in hours], tone) for name, tone in tones.items()]
    labels = [f"{now - timedelta(hours=ago):%H}:00" for ago in hours]
    return stacked_bars(labels, series, title="Outcomes of the last 24 hours", shown=console.short)


def codes(refused: QuerySet[RefusedRequest], most: int = 8) -> Sequence[tuple[str, str, str]]:
    """(code, how many, address of its list), the most frequent first. One query."""
    rows = refused.values(name=F("code")).annotate(number=Count("pk") + Sum("num_more")).order_by("-number", "name")
    return [
        (row["name"], f"{row['number']:,}", console.listing("accounts_refusedrequest", code=row["name"]))
        for row in rows[:most]
    ]

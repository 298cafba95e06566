"""From a Study to the figures that are shown: added latency, rates, ratios, work per request, memory, targets.

Pure. A figure of an arm with errors is void: it is None, and the reason is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from inference.bench.figures import Spread, added, percentile, ratio
from inference.bench.footprint import ProcessCost, total_pss_mb
from inference.bench.gateway import Memory, Point, Study

LABELS = {
    "direct": "upstream, directly",
    "direct_stream": "upstream, directly, streaming",
    "llmsite": "llmsite",
    "llmsite_cached": "llmsite, from the completion cache",
    "llmsite_stream": "llmsite, streaming",
    "litellm": "LiteLLM",
    "litellm_stream": "LiteLLM, streaming",
}
BASELINES = {
    "llmsite": "direct",
    "litellm": "direct",
    "llmsite_cached": "direct",
    "llmsite_stream": "direct_stream",
    "litellm_stream": "direct_stream",
}

MAX_ERROR_CHARACTERS = 120
MOST_ADDED_MS = 6.0
LEAST_RATE, STRETCH_RATE = 150.0, 250.0
LEAST_RATIO, STRETCH_RATIO = 1.5, 2.5
LEAST_CACHED_RATE = 400.0
MOST_WEB_MB = 200.0
MOST_ALL_MB = 800.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One arm at one number of clients. Durations in milliseconds; None where it was not measured or is void."""

    arm: str
    clients: int
    rate: Spread | None
    p50: Spread | None
    p99: Spread | None
    added_p50: Spread | None
    added_p99: Spread | None
    added_first_p50: Spread | None
    cpu_ms: Spread | None
    queries: Spread | None
    round_trips: Spread | None
    void: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A promise and what was measured. met is None where it could not be measured."""

    text: str
    measured: str
    met: bool | None
    stretch_met: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Digest:
    """Everything that is shown of a study."""

    rows: list[Row]
    ratios: dict[int, Spread | None]
    """Requests a second of llmsite by LiteLLM's, by number of clients."""
    best_ratio: Spread | None
    targets: list[Target]

    def row(self, arm: str, clients: int) -> Row | None:
        return next((row for row in self.rows if (row.arm, row.clients) == (arm, clients)), None)


class Rounds:
    """The points of a study, looked up by arm and clients; each list has one entry a round, None where it is void."""

    def __init__(self, study: Study) -> None:
        self.num_rounds = study.options.rounds
        self._points = {(point.arm, point.clients, point.round): point for point in study.points}

    def of(self, arm: str, clients: int) -> list[Point | None]:
        return [self._points.get((arm, clients, number)) for number in range(self.num_rounds)]

    def void(self, arm: str, clients: int) -> str | None:
        """Why this arm does not count at this number of clients."""
        points = [point for point in self.of(arm, clients) if point]
        num_errors = sum(point.num_errors for point in points)
        if num_errors:
            first = next(error for point in points for error in point.errors)
            num_sent = sum(point.num_sent for point in points)
            return f"void: {num_errors} errors in {num_sent} requests; {first[:MAX_ERROR_CHARACTERS]}"
        if any(not point.latencies for point in points):
            return "void: a round without an answer"
        return None if points else "not measured"

    def values(self, arm: str, clients: int, figure: Callable[[Point], float | None]) -> list[float | None]:
        if self.void(arm, clients):
            return [None] * self.num_rounds
        return [figure(point) if point else None for point in self.of(arm, clients)]


def digest(study: Study) -> Digest:
    rounds = Rounds(study)
    arms = [arm for arm in LABELS if any(point.arm == arm for point in study.points)]
    rows = [_row(rounds, arm, clients) for arm in arms for clients in study.options.clients]
    ratios = {
        clients: ratio(rounds.values("llmsite", clients, _rate), rounds.values("litellm", clients, _rate))
        for clients in study.options.clients
    }
    best_ratio = ratio(_best_rates(rounds, study, "llmsite"), _best_rates(rounds, study, "litellm"))
    unjudged = Digest(rows=rows, ratios=ratios, best_ratio=best_ratio, targets=[])
    return Digest(rows=rows, ratios=ratios, best_ratio=best_ratio, targets=_targets(study, rounds, unjudged))


def _rate(point: Point) -> float:
    return point.rate


def _p50(point: Point) -> float:
    return percentile(point.latencies, 0.5) * 1000


def _p99(point: Point) -> float:
    return percentile(point.latencies, 0.99) * 1000


def _first(point: Point) -> float | None:
    return percentile(point.firsts, 0.5) * 1000 if point.firsts else None


def _queries(point: Point) -> float | None:
    return point.work.queries if point.work else None


def _round_trips(point: Point) -> float | None:
    return point.work.redis_round_trips if point.work else None


def _cpu(point: Point) -> float | None:
    return sum(point.cpu_seconds.values()) * 1000 if point.cpu_seconds else None


def _spread(values: Sequence[float | None]) -> Spread | None:
    return Spread.of([value for value in values if value is not None])


def _row(rounds: Rounds, arm: str, clients: int) -> Row:
    def own(figure: Callable[[Point], float | None]) -> list[float | None]:
        return rounds.values(arm, clients, figure)

    def beyond_direct(figure: Callable[[Point], float | None]) -> Spread | None:
        baseline = BASELINES.get(arm)
        return added(own(figure), rounds.values(baseline, clients, figure)) if baseline else None

    return Row(
        arm=arm,
        clients=clients,
        rate=_spread(own(_rate)),
        p50=_spread(own(_p50)),
        p99=_spread(own(_p99)),
        added_p50=beyond_direct(_p50),
        added_p99=beyond_direct(_p99),
        added_first_p50=beyond_direct(_first),
        cpu_ms=_spread(own(_cpu)),
        queries=_spread(own(_queries)),
        round_trips=_spread(own(_round_trips)),
        void=rounds.void(arm, clients),
    )


def _best_rates(rounds: Rounds, study: Study, arm: str) -> list[float | None]:
    """Per round, the highest rate over all numbers of clients."""
    columns = [rounds.values(arm, clients, _rate) for clients in study.options.clients]
    best = []
    for values in zip(*columns, strict=True):
        known = [value for value in values if value is not None]
        best.append(max(known) if known else None)
    return best


def _targets(study: Study, rounds: Rounds, found: Digest) -> list[Target]:
    fewest, most = min(study.options.clients), max(study.options.clients)
    alone = found.row("llmsite", fewest)
    best = _spread(_best_rates(rounds, study, "llmsite"))
    cached = _spread(_best_rates(rounds, study, "llmsite_cached"))
    return [
        _at_most(
            f"added latency, {fewest} client, p50: at most {MOST_ADDED_MS:.0f} ms",
            alone.added_p50 if alone else None,
            MOST_ADDED_MS,
            "ms",
        ),
        _at_least(
            f"requests a second, at most clients' best: {LEAST_RATE:.0f} (stretch {STRETCH_RATE:.0f})",
            best,
            LEAST_RATE,
            "a second",
            STRETCH_RATE,
        ),
        _at_least(
            f"requests a second by LiteLLM's: {LEAST_RATIO} (stretch {STRETCH_RATIO})",
            found.best_ratio,
            LEAST_RATIO,
            "times",
            STRETCH_RATIO,
        ),
        _at_least(f"cached completions a second: {LEAST_CACHED_RATE:.0f}", cached, LEAST_CACHED_RATE, "a second"),
        _constant("database queries", alone, found.row("llmsite", most), lambda row: row.queries),
        _constant("Redis round trips", alone, found.row("llmsite", most), lambda row: row.round_trips),
        *_memory_targets(study.memory.get("llmsite")),
    ]


def _at_most(text: str, measured: Spread | None, bound: float, unit: str) -> Target:
    if measured is None:
        return Target(text=text, measured="not measured", met=None)
    return Target(text=text, measured=f"{measured.show()} {unit}", met=measured.median <= bound)


def _at_least(text: str, measured: Spread | None, bound: float, unit: str, stretch: float | None = None) -> Target:
    if measured is None:
        return Target(text=text, measured="not measured", met=None)
    return Target(
        text=text,
        measured=f"{measured.show(2 if unit == 'times' else 0)} {unit}",
        met=measured.median >= bound,
        stretch_met=None if stretch is None else measured.median >= stretch,
    )


def _constant(what: str, few: Row | None, many: Row | None, figure: Callable[[Row], Spread | None]) -> Target:
    """No more work per request at many clients than at few (a twentieth and half a unit are noise)."""
    text = f"{what} per request do not grow with the clients"
    start, end = (figure(row) if row else None for row in (few, many))
    if few is None or many is None or start is None or end is None:
        return Target(text=text, measured="not measured", met=None)
    measured = f"{start.median:.1f} at {few.clients}, {end.median:.1f} at {many.clients}"
    return Target(text=text, measured=measured, met=end.median <= start.median * 1.05 + 0.5)


def _memory_targets(memory: Memory | None) -> list[Target]:
    if memory is None or not memory.idle:
        return []
    return [
        _at_most_mb(f"web, idle: at most {MOST_WEB_MB:.0f} MB", pss_of(memory.idle, "web"), MOST_WEB_MB),
        _at_most_mb(
            f"all processes, idle, without a model: at most {MOST_ALL_MB:.0f} MB",
            total_pss_mb(memory.idle),
            MOST_ALL_MB,
        ),
    ]


def _at_most_mb(text: str, measured: float, bound: float) -> Target:
    return Target(text=text, measured=f"{measured:.0f} MB", met=measured <= bound)


def pss_of(processes: list[ProcessCost], name: str) -> float:
    return sum(process.pss_mb for process in processes if process.name == name)


def cpu_by_process(study: Study, arm: str, clients: int) -> dict[str, float]:
    """Milliseconds of processor time per request, by process, median over the rounds."""
    points = [point for point in study.points if (point.arm, point.clients) == (arm, clients) and point.cpu_seconds]
    names = {name for point in points for name in point.cpu_seconds}
    medians = {name: median(point.cpu_seconds.get(name, 0.0) for point in points) * 1000 for name in names}
    return dict(sorted(medians.items(), key=lambda item: -item[1]))

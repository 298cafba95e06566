"""The gateway benchmark for readers: a Markdown page and its chart. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from inference.bench import chart
from inference.bench.digest import Digest, cpu_by_process
from inference.bench.gateway import Study
from inference.bench.tables import HEADINGS, WORK_HEADINGS, figures, measured_work, memory_rows, verdict, work


def draw(digest: Digest) -> str:
    arms = ("llmsite", "litellm", "llmsite_cached")
    labels = {"llmsite": "llmsite", "litellm": "LiteLLM", "llmsite_cached": "llmsite, cached"}

    def panel(title: str, figure: str) -> chart.Panel:
        series = []
        for arm in arms:
            found = [(row.clients, getattr(row, figure)) for row in digest.rows if row.arm == arm]
            points = [(float(clients), spread.median) for clients, spread in found if spread and spread.median > 0]
            if points:
                series.append(chart.Series(labels[arm], points))
        return chart.Panel(title, series)

    panels = [panel("Requests a second", "rate"), panel("Added latency, p50, ms", "added_p50")]
    return chart.draw([drawn for drawn in panels if drawn.series], "clients at once")


def markdown(study: Study, digest: Digest, described: dict[str, object], measured_at: datetime) -> str:
    fewest = min(study.options.clients)
    peer = study.versions.get("litellm")
    parts = [
        "# The path around the model",
        "",
        f"What llmsite adds to a model's own time{f' beside LiteLLM {peer}' if peer else ''}, measured by `make bench`",
        f"on {measured_at:%Y-%m-%d}: {described['processor']}, {described['cores']} cores shared by servers and load",
        f"generator, {described['memory_gb']} GB, {described['system']}, Python {described['python']}; load average",
        f"before: {described['load_average_before']}.",
        "",
        "![Requests a second and added latency](gateway.svg)",
        "",
        "## Targets",
        "",
        *grid(("target", "measured", "verdict"), ((t.text, t.measured, verdict(t)) for t in digest.targets)),
        "",
        "## Latency and throughput",
        "",
        "Median over the rounds (lowest to highest). Added = latency through the server less latency of the same",
        "client calling the instant upstream directly, round by round.",
        "",
        *grid(HEADINGS, map(figures, digest.rows)),
        "",
        *_ratio_lines(digest),
        "## Work per request",
        "",
        "Processor time is that of all the server's processes; the load generator's is not in it.",
        "",
        *grid(WORK_HEADINGS, map(work, measured_work(digest))),
        "",
        *_cpu_lines(study, fewest),
        *_command_lines(study, fewest),
        "## Memory",
        "",
        "PSS in MB: shared pages are divided among those that share them.",
        "",
        *grid(("process", "idle", "after the load"), memory_rows(study)),
        "",
        *_method_lines(study),
        *study.notes,
    ]
    return "\n".join(parts).rstrip() + "\n"


def _method_lines(study: Study) -> list[str]:
    options = study.options
    return [
        "## How it was measured",
        "",
        f"- {options.rounds} rounds; in each, {_listed(options.clients)} clients; for each number of clients every",
        f"  arm in turn, forwards in odd rounds and backwards in even ones; {options.seconds:g} s an arm after",
        f"  {options.warmup_seconds:g} s of warm-up.",
        "- Clients are closed loops on kept-alive HTTP/1.1 connections, in a process of their own.",
        "- llmsite runs as delivered, with all accounting on (keys, requests and tokens per minute, places, monthly",
        "  quota with reservation, ledger, receipts, logs, metrics), on SQLite and the embedded Valkey; only the",
        "  engine is the fake one, which answers at once. Limits are finite and too high to bind.",
        "- LiteLLM runs with a master key, without database and accounting, in front of the instant upstream, which",
        "  answers with a text of the same length as the fake engine's.",
        "- An arm with a single error is void. Database queries are django-prometheus's counters, Redis round trips",
        "  the server's own count of reads from its clients; what an idle installation does is taken off.",
        "",
        *(f"- `{command}`" for command in study.commands.values()),
        "",
        "Raw samples, versions and options: [gateway.json](gateway.json).",
        "",
    ]


def grid(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(headings)
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return lines + [f"| {' | '.join(item.replace('|', '/') for item in row)} |" for row in rows]


def _ratio_lines(digest: Digest) -> list[str]:
    known = {clients: spread for clients, spread in digest.ratios.items() if spread}
    if not known:
        return []
    rows = [(str(clients), spread.show(2)) for clients, spread in known.items()]
    if digest.best_ratio:
        rows.append(("each at its best", digest.best_ratio.show(2)))
    return [*grid(("clients", "llmsite's requests a second by LiteLLM's"), rows), ""]


def _cpu_lines(study: Study, clients: int) -> list[str]:
    used = cpu_by_process(study, "llmsite", clients)
    shown = [f"{name} {milliseconds:.2f}" for name, milliseconds in used.items() if milliseconds >= 0.01]
    return [f"llmsite's processor time by process at {clients} client, ms: {', '.join(shown)}.", ""] if shown else []


def _command_lines(study: Study, clients: int) -> list[str]:
    works = [point.work for point in study.points if (point.arm, point.clients) == ("llmsite", clients) and point.work]
    if not works:
        return []
    commands = sorted(works[-1].redis_commands.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{name.replace('|', ' ')} {calls:.2f}" for name, calls in commands if calls >= 0.05)
    return [f"Redis commands per request at {clients} client, those of scripts included: {shown}.", ""]


def _listed(numbers: Iterable[int]) -> str:
    *first, last = [str(number) for number in numbers]
    return f"{', '.join(first)} and {last}" if first else last

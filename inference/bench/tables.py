"""What is shown of a study as rows of text, and the tables of them at a terminal (rich)."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from inference.bench.digest import LABELS, Digest, Row, Target, pss_of
from inference.bench.figures import Spread
from inference.bench.footprint import ProcessCost, total_pss_mb
from inference.bench.gateway import Study

HEADINGS = (
    "arm",
    "clients",
    "a second",
    "p50 ms",
    "p99 ms",
    "added p50 ms",
    "added p99 ms",
    "first token added p50 ms",
)
WORK_HEADINGS = ("arm", "clients", "database queries", "Redis round trips", "processor ms")


def cell(spread: Spread | None, digits: int = 1) -> str:
    return spread.show(digits) if spread else "-"


def figures(row: Row) -> list[str]:
    """The cells of HEADINGS."""
    head = [LABELS[row.arm], str(row.clients)]
    if row.void:
        return [*head, row.void, "-", "-", "-", "-", "-"]
    first = cell(row.added_first_p50) if row.arm.endswith("_stream") else "-"
    return [
        *head,
        cell(row.rate, 0),
        cell(row.p50, 2),
        cell(row.p99, 2),
        cell(row.added_p50, 2),
        cell(row.added_p99, 2),
        first,
    ]


def work(row: Row) -> list[str]:
    """The cells of WORK_HEADINGS."""
    return [LABELS[row.arm], str(row.clients), cell(row.queries), cell(row.round_trips), cell(row.cpu_ms, 2)]


def verdict(target: Target) -> str:
    if target.met is None:
        return "not measured"
    if not target.met:
        return "missed"
    return {None: "met", True: "met, stretch too", False: "met"}[target.stretch_met]


def print_tables(console: Console, study: Study, digest: Digest) -> None:
    console.print(
        table("Latency and throughput: median over the rounds (lowest to highest)", HEADINGS, map(figures, digest.rows))
    )
    console.print(table("Work per request", WORK_HEADINGS, map(work, measured_work(digest))))
    console.print(table("Memory, PSS in MB", ("process", "idle", "after the load"), memory_rows(study)))
    rows = ((target.text, target.measured, verdict(target)) for target in digest.targets)
    console.print(table("Targets", ("target", "measured", ""), rows))
    for note in study.notes:
        console.print(note, markup=False)


def table(title: str, headings: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    drawn = Table(title=title, title_justify="left")
    for heading in headings:
        drawn.add_column(heading, overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    return drawn


def measured_work(digest: Digest) -> list[Row]:
    return [row for row in digest.rows if row.cpu_ms]


def memory_rows(study: Study) -> list[tuple[str, str, str]]:
    rows = []
    for server, memory in study.memory.items():
        for name in _names(memory.idle + memory.after):
            count = sum(process.name == name for process in memory.after)
            label = f"{server}: {name}" + (f" ({count} processes)" if count > 1 else "")
            rows.append((label, f"{pss_of(memory.idle, name):.0f}", f"{pss_of(memory.after, name):.0f}"))
        rows.append((f"{server}: all", f"{total_pss_mb(memory.idle):.0f}", f"{total_pss_mb(memory.after):.0f}"))
    return rows


def _names(processes: list[ProcessCost]) -> list[str]:
    return sorted({process.name for process in processes}, key=lambda name: -pss_of(processes, name))

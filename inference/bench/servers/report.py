"""How the results of `manage.py bench_engine` are written: tables at a terminal, JSON, Markdown, SVG."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from inference.bench import bars, chart
from inference.bench.figures import PACK_UNIT_SECONDS, Spread, pack, thin
from inference.bench.page import grid
from inference.bench.report import FORMAT, rounded
from inference.bench.servers import verdicts
from inference.bench.servers.sides import CONTEXT, LOOKUP, SLOTS
from inference.bench.servers.study import Cell, Study
from inference.bench.servers.workloads import PEER, PYTHON, SIDE
from inference.bench.tables import table, verdict
from inference.tuning import machine

HEADINGS = (
    "workload",
    "arm",
    "tokens a second",
    "of one stream, decoding",
    "first token p50, ms",
    "p95, ms",
    "longest, ms",
    "longest gap, ms",
    "prompt reused",
)
RATIO_HEADINGS = ("workload", "", "tokens a second", "first token p50", "longest wait", "longest gap", "same texts")
STREAMS = {"one": 1, "four": 4, "eight": 8}


def row_cells(row: verdicts.Row) -> list[str]:
    reused = "-" if row.cached_share is None else f"{row.cached_share:.0%}"
    waits = (row.wait_p50, row.wait_p95, row.wait_max, row.gap_max)
    return [row.title, row.arm, _shown(row.speed), _shown(row.stream_speed), *map(_shown, waits), reused]


def ratio_cells(row: verdicts.Ratio) -> list[str]:
    spreads = (row.speed, row.wait_p50, row.wait_max, row.gap_max)
    return [row.title, f"{row.ours} by {row.theirs}", *(_shown(each, 2) for each in spreads), row.same_texts]


def _shown(spread: Spread | None, digits: int = 0) -> str:
    return spread.show(digits) if spread else "-"


def print_tables(console: Console, study: Study) -> None:
    title = "Median over the rounds (lowest to highest)"
    console.print(table(title, HEADINGS, map(row_cells, verdicts.rows(study))))
    console.print(table("Ratios, round by round", RATIO_HEADINGS, map(ratio_cells, verdicts.ratios(study))))
    judged = ((target.text, target.measured, verdict(target)) for target in verdicts.targets(study))
    console.print(table("Targets", ("target", "measured", ""), judged))
    for note in study.notes:
        console.print(note, markup=False)


def to_json(study: Study, described: dict[str, object], measured_at: datetime) -> dict[str, Any]:
    shown: dict[str, Any] = rounded(
        {
            "format": FORMAT,
            "measured_at": measured_at.isoformat(timespec="seconds"),
            "machine": described,
            "versions": machine.versions(),
            "builds": study.builds,
            "commands": study.commands,
            "options": asdict(study.options),
            "model": study.model,
            "slots": SLOTS,
            "context": CONTEXT,
            "threads": study.threads,
            "lookup": asdict(LOOKUP),
            "idle_cpu": study.idle_cpu,
            "seconds": study.seconds,
            "notes": study.notes,
            "targets": [{**asdict(target), "verdict": verdict(target)} for target in verdicts.targets(study)],
            "rows": [asdict(row) for row in verdicts.rows(study)],
            "ratios": [asdict(row) for row in verdicts.ratios(study)],
            "gaps_encoding": f"base64(zlib(varints)): differences of sorted samples in units of {PACK_UNIT_SECONDS} s",
            "cells": [_cell(cell) for cell in study.cells],
        }
    )
    return shown


def _cell(cell: Cell) -> dict[str, Any]:
    return {**asdict(cell), "gaps": pack(thin(cell.gaps))}


def draw_streams(study: Study) -> str | None:
    """Tokens a second and waits over the number of streams; None where these were not measured."""

    def panel(title: str, figure: verdicts.Figure) -> chart.Panel:
        series = []
        for arm in (SIDE, PEER, PYTHON):
            found = [(num, Spread.of([figure(cell) for cell in study.of(name, arm)])) for name, num in STREAMS.items()]
            points = [(float(num), spread.median) for num, spread in found if spread]
            if points:
                series.append(chart.Series(arm, points))
        return chart.Panel(title, series)

    panels = [
        panel("Tokens a second", verdicts.tokens_a_second),
        panel("First token, p95, ms", lambda cell: verdicts.late_wait(cell) * 1000),
    ]
    drawn = [each for each in panels if each.series]
    return chart.draw(drawn, "streams at once") if drawn else None


def draw_workloads(study: Study) -> str:
    arms = (SIDE, PEER, PYTHON)
    groups = []
    for workload in study.workloads:
        found = [Spread.of([verdicts.tokens_a_second(cell) for cell in study.of(workload.name, arm)]) for arm in arms]
        groups.append(bars.Group(workload.title, [spread.median if spread else None for spread in found]))
    return bars.draw("Tokens a second, median over the rounds, prompts included", arms, groups)


def write(folder: Path, study: Study, described: dict[str, object], measured_at: datetime) -> list[Path]:
    """engine.json, engine.md, engine.svg, and engine-streams.svg where numbers of streams were compared."""
    folder.mkdir(parents=True, exist_ok=True)
    streams = draw_streams(study)
    written = {
        folder / "engine.json": json.dumps(to_json(study, described, measured_at), separators=(",", ":")) + "\n",
        folder / "engine.svg": draw_workloads(study),
        folder / "engine.md": markdown(study, described, measured_at, has_streams=streams is not None),
    }
    if streams:
        written[folder / "engine-streams.svg"] = streams
    for path, text in written.items():
        path.write_text(text)
    return list(written)


def markdown(study: Study, described: dict[str, object], measured_at: datetime, *, has_streams: bool) -> str:
    parts = [
        "# The engine beside llama-server",
        "",
        f"{study.model} behind llmsite, llama.cpp's own server (package xllamacpp "
        f"{_version(study, PEER)}) and llama-cpp-python's",
        "(`llama_cpp.server`), the same requests to each in turn, measured by `make bench-engine` on",
        f"{measured_at:%Y-%m-%d}: {described['processor']}, {described['cores']} cores shared by server and clients,",
        f"{described['memory_gb']} GB, {described['system']}, Python {described['python']}; load average before:",
        f"{described['load_average_before']}.",
        "",
        "![Tokens a second in each workload](engine.svg)",
        *(["![Tokens a second and first tokens by number of streams](engine-streams.svg)"] if has_streams else []),
        "",
        "## Targets",
        "",
        "Ratios within each round, then the median over the rounds (lowest to highest).",
        "",
        *grid(("target", "measured", "verdict"), ((t.text, t.measured, verdict(t)) for t in verdicts.targets(study))),
        "",
        "## Ratios",
        "",
        "Below 1 is better for waits and gaps. For text with and without repeats, tokens a second are those of one",
        "stream from its first token on. Same texts: answers that are equal, word for word.",
        "",
        *grid(RATIO_HEADINGS, map(ratio_cells, verdicts.ratios(study))),
        "",
        "## Figures",
        "",
        *grid(HEADINGS, map(row_cells, verdicts.rows(study))),
        "",
        *_method_lines(study),
        *study.notes,
    ]
    return "\n".join(parts).rstrip() + "\n"


def _version(study: Study, server: str) -> str:
    return str(study.builds.get(server, {}).get("version", "not measured"))


def _method_lines(study: Study) -> list[str]:
    options = study.options
    return [
        "## How it was measured",
        "",
        f"- {options.rounds} rounds over all workloads, {study.seconds / 60:.0f} minutes; within a workload the sides",
        "  take turns, forwards in odd rounds, backwards in even ones. All servers run, one at a time is asked; that",
        "  idle ones use no processor is checked.",
        f"- Both have {SLOTS} slots of {CONTEXT} tokens and {study.threads} threads; llama-server's other options are",
        "  its defaults. `llama_cpp.server` has one sequence, and answers one request after another.",
        "- llmsite runs as delivered, all accounting on, on SQLite and the embedded Valkey; its key has limits that",
        "  are finite and too high to bind. Both answer `POST /completion` as a stream.",
        "- Clients are one process, the same code for every server. Prompts are the same for each side of a round and",
        "  other ones in the next, temperature 0, `ignore_eos`, a fixed number of tokens. A wrong status, a wrong",
        "  number of tokens, or prompts of different lengths end the run.",
        "- First token: from sending the request to its arrival. Gap: between two arrivals of tokens in one stream.",
        f"- Prompt lookup, on both sides: {LOOKUP.match_tokens} tokens that stood before, drafts of up to",
        f"  {LOOKUP.draft_tokens}. llama-server's is `ngram-simple`, and measured as it comes, too.",
        "- Tokens a second: of all clients, from the first request to the end of the last answer, prompts included.",
        "",
        "Builds differ: llmsite's llama.cpp is compiled on the machine that runs it, xllamacpp's for all processors of",
        "a kind. What each says of itself:",
        "",
        *(f"- {server}: `{json.dumps(build)}`" for server, build in study.builds.items()),
        "",
        *(f"- {server}: `{command}`" for server, command in study.commands.items()),
        "",
        "Every cell, with the gaps between all tokens: [engine.json](engine.json).",
        "",
    ]

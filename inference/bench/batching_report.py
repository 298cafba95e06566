"""How the results of the batching benchmark are written: a rich table, JSON, Markdown."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from inference.bench.batching import LEAST_BATCH, MOST_RATIO, BatchRun, BatchStudy
from inference.bench.digest import Target
from inference.bench.figures import Spread
from inference.bench.footprint import total_pss_mb
from inference.bench.page import grid
from inference.bench.report import FORMAT, rounded
from inference.bench.tables import table, verdict
from inference.tuning import machine

HEADINGS = (
    "",
    "seconds for all",
    "tokens a second",
    "slowest request, s",
    "mean batch, receipts",
    "mean batch, metrics",
)


def targets(study: BatchStudy) -> list[Target]:
    ratio, size = study.time_ratio, study.batch_size
    return [
        Target(
            text=f"time of {study.options.clients} at once by time one after another: below {MOST_RATIO}",
            measured=ratio.show(2) if ratio else study.void or "not measured",
            met=ratio.median < MOST_RATIO if ratio else None,
        ),
        Target(
            text=f"mean decode batch of each request at once, by its receipt: at least {LEAST_BATCH:.0f}",
            measured=f"{size:.1f} for the smallest" if size is not None else study.void or "not measured",
            met=size >= LEAST_BATCH if size is not None else None,
        ),
    ]


def rows(study: BatchStudy) -> list[list[str]]:
    return [_row("at once", study.of(at_once=True)), _row("one after another", study.of(at_once=False))]


def _row(label: str, runs: list[BatchRun]) -> list[str]:
    whole = [run for run in runs if not run.errors]
    columns = [
        ([run.seconds for run in whole], 2),
        ([run.tokens_a_second for run in whole], 0),
        ([max(run.latencies) for run in whole], 2),
        ([size for run in whole for size in run.batch_sizes], 1),
        ([run.metrics_batch_size for run in whole if run.metrics_batch_size is not None], 1),
    ]
    spreads = [(Spread.of(values), digits) for values, digits in columns]
    return [label, *(spread.show(digits) if spread else "-" for spread, digits in spreads)]


def print_tables(console: Console, study: BatchStudy) -> None:
    if study.void:
        console.print(study.void, markup=False)
    console.print(table("One batch: median over the rounds (lowest to highest)", HEADINGS, rows(study)))
    judged = ((target.text, target.measured, verdict(target)) for target in targets(study))
    console.print(table("Targets", ("target", "measured", ""), judged))


def to_json(study: BatchStudy, described: dict[str, object], measured_at: datetime) -> dict[str, Any]:
    shown: dict[str, Any] = rounded(
        {
            "format": FORMAT,
            "measured_at": measured_at.isoformat(timespec="seconds"),
            "machine": described,
            "versions": machine.versions(),
            "commands": {"llmsite": study.command},
            "options": asdict(study.options),
            "model": study.model,
            "void": study.void,
            "targets": [{**asdict(target), "verdict": verdict(target)} for target in targets(study)],
            "time_ratio": asdict(study.time_ratio) if study.time_ratio else None,
            "batch_size": study.batch_size,
            "metrics_batch_size": study.metrics_batch_size,
            "memory": {"idle": [asdict(p) for p in study.idle], "after": [asdict(p) for p in study.after]},
            "runs": [asdict(run) for run in study.runs],
        }
    )
    return shown


def write(folder: Path, study: BatchStudy, described: dict[str, object], measured_at: datetime) -> list[Path]:
    """batching.json and batching.md."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {
        folder / "batching.json": json.dumps(to_json(study, described, measured_at), indent=1) + "\n",
        folder / "batching.md": markdown(study, described, measured_at),
    }
    for path, text in written.items():
        path.write_text(text)
    return list(written)


def markdown(study: BatchStudy, described: dict[str, object], measured_at: datetime) -> str:
    options = study.options
    parts = [
        "# One batch",
        "",
        f"{options.clients} requests of {options.max_tokens} tokens for {study.model}, at once and one after another,",
        f"measured by `manage.py bench --engine` on {measured_at:%Y-%m-%d}: {described['processor']},",
        f"{described['cores']} cores, {described['memory_gb']} GB, {described['system']}, Python",
        f"{described['python']}; load average before: {described['load_average_before']}.",
        "",
        *grid(("target", "measured", "verdict"), ((t.text, t.measured, verdict(t)) for t in targets(study))),
        "",
        *grid(HEADINGS, rows(study)),
        "",
        f"{options.rounds} rounds, the two ways in turn; prompts are unique, caches off, times compared per token. The",
        "batch is the number of sequences in the executed decode steps, averaged over the steps of a request (its",
        "receipt, `GET /v1/requests/{id}`) or over all steps of the run (`/metrics`).",
        "",
        f"Memory with the model, PSS of all processes: {total_pss_mb(study.idle):.0f} MB idle, "
        f"{total_pss_mb(study.after):.0f} MB after.",
        "",
        f"Command: `{study.command}`. Raw figures: [batching.json](batching.json).",
    ]
    return "\n".join(parts) + "\n"

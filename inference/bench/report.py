"""How the results of the gateway benchmark are written: JSON with the raw samples, Markdown, SVG."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from inference.bench import page
from inference.bench.digest import Digest
from inference.bench.figures import PACK_UNIT_SECONDS, pack
from inference.bench.gateway import Point, Study
from inference.bench.tables import verdict
from inference.tuning import machine

FORMAT = 1


def to_json(study: Study, digest: Digest, described: dict[str, object], measured_at: datetime) -> dict[str, Any]:
    """The whole study; samples are packed (figures.pack)."""
    return {
        "format": FORMAT,
        "measured_at": measured_at.isoformat(timespec="seconds"),
        "machine": described,
        "versions": {**machine.versions(), **study.versions},
        "commands": study.commands,
        "options": asdict(study.options),
        "notes": study.notes,
        "targets": [{**asdict(target), "verdict": verdict(target)} for target in digest.targets],
        "rows": [rounded(asdict(row)) for row in digest.rows],
        "rate_ratios": rounded({str(clients): spread and asdict(spread) for clients, spread in digest.ratios.items()}),
        "best_rate_ratio": rounded(asdict(digest.best_ratio)) if digest.best_ratio else None,
        "idle_work_a_second": rounded(asdict(study.idle_work)) if study.idle_work else None,
        "memory": {server: rounded(asdict(memory)) for server, memory in study.memory.items()},
        "samples": {
            "encoding": f"base64(zlib(varints)): differences of the sorted samples in units of {PACK_UNIT_SECONDS} s",
            "points": [_point(point) for point in study.points],
        },
    }


def _point(point: Point) -> dict[str, Any]:
    fields = asdict(point)
    fields["latencies"] = pack(point.latencies)
    fields["firsts"] = pack(point.firsts) if point.firsts else None
    shown: dict[str, Any] = rounded(fields)
    return shown


def rounded(value: Any) -> Any:
    """The same with floats to six significant digits: the noise beyond them is only bytes."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value


def write(
    folder: Path, study: Study, digest: Digest, described: dict[str, object], measured_at: datetime
) -> list[Path]:
    """gateway.json, gateway.md and gateway.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = to_json(study, digest, described, measured_at)
    written = {
        folder / "gateway.json": json.dumps(whole, separators=(",", ":")) + "\n",
        folder / "gateway.svg": page.draw(digest),
        folder / "gateway.md": page.markdown(study, digest, described, measured_at),
    }
    for path, text in written.items():
        path.write_text(text)
    return list(written)

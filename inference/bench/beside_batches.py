"""What a batch costs those who wait: time to first token of interactive requests, with and without a batch beside them.

A script: `python -m inference.bench.beside_batches`. One site with the demo's model; rounds with and without a batch
take turns, so that a machine that is busy for a while is so for both. The result is docs/benchmarks/beside-batches.md.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from inference.bench import calls, site
from inference.bench.figures import percentile
from inference.bench.load import NUMBER, LoadJob, run_load
from inference.tuning import machine
from llmsite.config import BASE_DIR

MODEL = "smollm2-135m"
COMPLETIONS, FILES, BATCHES = "/v1/completions", "/v1/files", "/v1/batches"
MARKER = '"text":"'
BOUNDARY = "the-end-of-this-part"
MOST_RATIO_P95 = 1.5
NUM_LINES = 5_000
"""More than are answered in one round."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each half of a round")
    parser.add_argument("--clients", type=int, default=2, help="interactive requests at once")
    parser.add_argument("--max-tokens", type=int, default=16, help="of an interactive request")
    parser.add_argument("--line-tokens", type=int, default=32, help="of a line of the batch")
    parser.add_argument("--out", type=Path, default=BASE_DIR / "docs" / "benchmarks", help="folder for the result")
    options = parser.parse_args()
    described, now = machine.describe(), datetime.now(UTC)
    with (
        tempfile.TemporaryDirectory(prefix="llmsite-bench-") as scratch,
        site.running(Path(scratch), engine="llama") as running,
    ):
        found = measure(running, options)
    for path in write(options.out, found, described, now):
        print(f"written: {path}")
    print(json.dumps(found, indent=2))


def measure(running: site.Site, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds; lines a second of the batch while requests ran beside it."""
    _ask(running, options, seconds=3.0, first_number=900_000)
    firsts: dict[str, list[float]] = {"without": [], "with": []}
    num_lines, lines_seconds = 0, 0.0
    for number in range(options.rounds):
        firsts["without"] += _ask(running, options, seconds=options.seconds, first_number=number * 20_000)
        batch_id = _begin(running, options, number)
        _wait(running, batch_id, lambda batch: batch["request_counts"]["completed"] >= 8)
        before, began_at = _get(running, batch_id), time.perf_counter()
        firsts["with"] += _ask(running, options, seconds=options.seconds, first_number=number * 20_000 + 10_000)
        after = _get(running, batch_id)
        lines_seconds += time.perf_counter() - began_at
        num_lines += after["request_counts"]["completed"] - before["request_counts"]["completed"]
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
        assert after["status"] == "in_progress", after
        calls.call(running.port, "POST", f"{BATCHES}/{batch_id}/cancel", key=running.key)
        _wait(running, batch_id, lambda batch: batch["status"] == "cancelled")
    found = {
        name: {"p50": percentile(each, 0.5), "p95": percentile(each, 0.95), "n": len(each)}
        for name, each in firsts.items()
    }
    return {
        **found,
        "ratio_p50": found["with"]["p50"] / found["without"]["p50"],
        "ratio_p95": found["with"]["p95"] / found["without"]["p95"],
        "lines_per_second": num_lines / lines_seconds,
        "clients": options.clients,
        "rounds": options.rounds,
        "max_tokens": options.max_tokens,
        "line_tokens": options.line_tokens,
    }


def write(folder: Path, found: dict[str, Any], described: dict[str, object], measured_at: datetime) -> list[Path]:
    """What was measured as JSON and as a page; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {"measured_at": measured_at.isoformat(timespec="seconds"), "machine": described, "figures": found}
    written = {
        folder / "beside-batches.json": json.dumps(whole, indent=1) + "\n",
        folder / "beside-batches.md": page(found, described, measured_at),
    }
    for path, text in written.items():
        path.write_text(text, encoding="utf-8")
    return list(written)


def page(found: dict[str, Any], described: dict[str, object], measured_at: datetime) -> str:
    verdict = "met" if found["ratio_p95"] <= MOST_RATIO_P95 else "missed"
    rows = [
        f"| {name} a batch | {each['n']} | {each['p50'] * 1000:.0f} | {each['p95'] * 1000:.0f} |"
        for name in ("without", "with")
        for each in (found[name],)
    ]
    tokens, line_tokens, rounds = found["max_tokens"], found["line_tokens"], found["rounds"]
    p50, p95, speed = found["ratio_p50"], found["ratio_p95"], found["lines_per_second"]
    lines = [
        "# Beside a batch",
        "",
        f"Time to the first token of {found['clients']} clients that ask one request after the other (SmolLM2-135M,",
        f"{tokens} tokens each), with and without a batch of {line_tokens}-token lines beside them; {rounds} rounds in",
        f"turn. Measured {measured_at:%Y-%m-%d} on {described['cores']} cores ({described['processor']}), load average",
        f"before: {described['load_average_before']}.",
        "",
        *(line for sentence in machine.busyness(described) for line in (sentence, "")),
        "| | requests | p50, ms | p95, ms |",
        "|---|---|---|---|",
        *rows,
        "",
        f"At the 95th percentile {p95:.2f} times as long as without (at most {MOST_RATIO_P95}: {verdict}), at the",
        f"median {p50:.2f} times; meanwhile {speed:.1f} lines of the batch a second.",
        "",
    ]
    return "\n".join(lines)


def _ask(running: site.Site, options: argparse.Namespace, *, seconds: float, first_number: int) -> list[float]:
    body = {
        "model": MODEL,
        "prompt": f"Tell me about number {NUMBER} and what is so special about it, in a few words.",
        "max_tokens": options.max_tokens,
        "stream": True,
    }
    result = run_load(
        LoadJob(
            port=running.port,
            path=COMPLETIONS,
            bodies=[json.dumps(body)],
            clients=options.clients,
            seconds=seconds,
            headers={"Authorization": f"Bearer {running.key}", "Content-Type": "application/json"},
            marker=MARKER,
            first_number=first_number,
        )
    )
    assert not result.num_errors, result.errors
    return result.firsts


def _begin(running: site.Site, options: argparse.Namespace, number: int) -> str:
    lines = [
        json.dumps(
            {
                "custom_id": str(each),
                "method": "POST",
                "url": COMPLETIONS,
                "body": {
                    "model": MODEL,
                    "prompt": f"Line {each} of night {number}:",
                    "max_tokens": options.line_tokens,
                },
            }
        )
        for each in range(NUM_LINES)
    ]
    body = {"input_file_id": _upload(running, "\n".join(lines)), "endpoint": COMPLETIONS, "completion_window": "24h"}
    return str(calls.call(running.port, "POST", BATCHES, key=running.key, body=body).json()["id"])


def _upload(running: site.Site, text: str) -> str:
    """The file's id."""
    form = "Content-Disposition: form-data; name="
    body = (
        f'--{BOUNDARY}\r\n{form}"purpose"\r\n\r\nbatch\r\n'
        f'--{BOUNDARY}\r\n{form}"file"; filename="bench.jsonl"\r\n\r\n{text}\r\n--{BOUNDARY}--\r\n'
    )
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)
    try:
        headers = {
            "Authorization": f"Bearer {running.key}",
            "Content-Type": f"multipart/form-data; boundary={BOUNDARY}",
        }
        connection.request("POST", FILES, body.encode(), headers)
        return str(json.loads(connection.getresponse().read())["id"])
    finally:
        connection.close()


def _get(running: site.Site, batch_id: str) -> dict[str, Any]:
    found: dict[str, Any] = calls.call(running.port, "GET", f"{BATCHES}/{batch_id}", key=running.key).json()
    return found


def _wait(running: site.Site, batch_id: str, until: Callable[[dict[str, Any]], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not until(batch := _get(running, batch_id)):
        assert time.monotonic() < deadline, batch
        time.sleep(0.1)


if __name__ == "__main__":
    main()

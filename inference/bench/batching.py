"""`manage.py bench --engine`: what one batch gains, with the real model, over HTTP.

The same requests at once and one after another, in turn over rounds; prompts are unique, no cache answers. What was
decoded together is read from the receipts and from /metrics. Clients are threads that wait.
"""

from __future__ import annotations

import http.client
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from inference.bench import calls
from inference.bench.figures import Spread, ratio
from inference.bench.footprint import ProcessCost
from inference.bench.site import GENERATE, Site, running

ROUNDS = 5
RECEIPT_SECONDS = 10.0
METRICS_SECONDS = 0.8
"""The worker publishes its engine's counters with its heartbeat, every half second."""
STEPS_METRIC = "llm_engine_decode_steps_total"
SEQUENCES_METRIC = "llm_engine_decode_sequences_total"
MOST_RATIO = 0.88
LEAST_BATCH = 4.0
SUBJECTS = ("rivers", "clocks", "bread", "bridges", "winter", "maps", "glass", "salt")

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOptions:
    """What to measure."""

    rounds: int = ROUNDS
    clients: int = 8
    max_tokens: int = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRun:
    """One way of sending the requests in one round. num_tokens were generated in all of them."""

    round: int
    at_once: bool
    seconds: float
    latencies: list[float]
    num_tokens: int
    batch_sizes: list[float]
    """Mean number of sequences in the executed decode steps of each request, from its receipt."""
    metrics_batch_size: float | None
    """The same over the whole run, from /metrics."""
    errors: list[str]

    @property
    def tokens_a_second(self) -> float:
        return self.num_tokens / self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchStudy:
    """Everything that one run measured."""

    options: BatchOptions
    model: str
    runs: list[BatchRun]
    idle: list[ProcessCost]
    after: list[ProcessCost]
    command: str

    def of(self, *, at_once: bool) -> list[BatchRun]:
        return [run for run in self.runs if run.at_once is at_once]

    @property
    def void(self) -> str | None:
        errors = [error for run in self.runs for error in run.errors]
        return f"void: {len(errors)} errors; {errors[0]}" if errors else None

    @property
    def time_ratio(self) -> Spread | None:
        """Time at once by time one after another for the same number of tokens, round by round."""
        if self.void:
            return None
        together = [run.seconds / run.num_tokens for run in self.of(at_once=True)]
        apart = [run.seconds / run.num_tokens for run in self.of(at_once=False)]
        return ratio(together, apart)

    @property
    def batch_size(self) -> float | None:
        """The smallest mean decode batch of any request sent at once, median over the rounds."""
        smallest = [min(run.batch_sizes) for run in self.of(at_once=True) if run.batch_sizes]
        return median(smallest) if smallest and not self.void else None

    @property
    def metrics_batch_size(self) -> float | None:
        sizes = [run.metrics_batch_size for run in self.of(at_once=True) if run.metrics_batch_size is not None]
        return fmean(sizes) if sizes else None


def run(options: BatchOptions, scratch: Path, say: Say) -> BatchStudy:
    """Start llmsite with the demo model, measure all rounds, stop it. Raises children.NotStarted, calls.CallRefused."""
    say("starting llmsite with the demo model")
    with running(scratch, engine="llama") as site:
        _one(site, "Hello", 8)
        idle = site.costs()
        runs = []
        for number in range(options.rounds):
            for at_once in (True, False) if number % 2 == 0 else (False, True):
                say(f"round {number + 1} of {options.rounds}: {'at once' if at_once else 'one after another'}")
                runs.append(_run(site, options, number, at_once))
        return BatchStudy(
            options=options, model=_model(site), runs=runs, idle=idle, after=site.costs(), command=site.command
        )


def prompts(options: BatchOptions, number: int, at_once: bool) -> list[str]:
    """As many prompts as clients, of one length, and the two ways of a round differ in a word only."""
    way = "today" if at_once else "again"
    subjects = [SUBJECTS[index % len(SUBJECTS)] for index in range(options.clients)]
    return [
        f"Write, {way}, chapter {number + 1} part {index + 1} of a long story about {subject}."
        for index, subject in enumerate(subjects)
    ]


def _run(site: Site, options: BatchOptions, number: int, at_once: bool) -> BatchRun:
    texts = prompts(options, number, at_once)
    errors: list[str] = []

    def ask(text: str) -> calls.Reply | None:
        try:
            return _one(site, text, options.max_tokens)
        except (OSError, http.client.HTTPException, calls.CallRefused) as error:
            errors.append(str(error))
            return None

    steps_before = decode_totals(site.metrics())
    started = time.perf_counter()
    with ThreadPoolExecutor(options.clients if at_once else 1) as clients:
        replies = [reply for reply in clients.map(ask, texts) if reply]
    seconds = time.perf_counter() - started
    receipts = [_receipt(site, reply.headers["x-request-id"]) for reply in replies]
    time.sleep(METRICS_SECONDS)
    return BatchRun(
        round=number,
        at_once=at_once,
        seconds=seconds,
        latencies=[reply.seconds for reply in replies],
        num_tokens=sum(int(receipt["usage"]["completion_tokens"]) for receipt in receipts),
        batch_sizes=[float(receipt["receipt"]["mean_decode_batch_size"]) for receipt in receipts],
        metrics_batch_size=mean_step(steps_before, decode_totals(site.metrics())),
        errors=errors,
    )


def _one(site: Site, prompt: str, max_tokens: int) -> calls.Reply:
    body = {"prompt": prompt, "max_new_tokens": max_tokens, "cache": False, "ignore_eos": True, "temperature": 0.7}
    return calls.call(site.port, "POST", GENERATE, key=site.key, body=body)


def _receipt(site: Site, request_id: str) -> Any:
    """The receipt of a request that has just ended: it may take a moment until it can be read. Raises CallRefused."""
    deadline = time.monotonic() + RECEIPT_SECONDS
    while time.monotonic() < deadline:
        found = calls.call(site.port, "GET", f"/v1/requests/{request_id}", key=site.key).json()
        if "receipt" in found:
            return found
        time.sleep(0.05)
    raise calls.CallRefused(f"request {request_id} has no receipt after {RECEIPT_SECONDS:.0f} s")


def _model(site: Site) -> str:
    return str(calls.call(site.port, "GET", "/v1/models", key=site.key).json()["default_model"])


def decode_totals(metrics: str) -> tuple[float, float]:
    """Executed decode steps, and sequences in them, since the worker started."""
    totals = {STEPS_METRIC: 0.0, SEQUENCES_METRIC: 0.0}
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if sample.name in totals:
                totals[sample.name] += sample.value
    return totals[STEPS_METRIC], totals[SEQUENCES_METRIC]


def mean_step(before: tuple[float, float], after: tuple[float, float]) -> float | None:
    steps = after[0] - before[0]
    return (after[1] - before[1]) / steps if steps > 0 else None

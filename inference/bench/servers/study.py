"""One run of `manage.py bench_engine`: rounds over the workloads, the sides in turn, one busy at a time.

Runs on the command's main thread; `Study` is all that comes out. A wrong answer of any side ends the run.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from inference.bench import footprint
from inference.bench.environments import Say
from inference.bench.load import LoadFailed
from inference.bench.servers import sides, texts, workloads
from inference.bench.servers.streams import Answer, Client, StreamResult, Turn, run_streams
from inference.bench.servers.workloads import PYTHON, Arm, Workload

ROUNDS = 3
QUICK_DIVISOR = 2
WARM_UP_CLIENTS = 8
NOT_AVAILABLE = "not available: this llmsite has no drafts by prompt lookup"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to measure. quick: one round with shorter answers, to see that all works."""

    rounds: int = ROUNDS
    only: tuple[str, ...] = ()
    quick: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One workload on one arm in one round. Seconds are the clients'; waits are times to the first token.

    gaps: between tokens, of all streams but the role `long`. decode_seconds: from the first to the last token of each
    stream, summed. cpu_seconds: by process of the server's tree. same_text: short digests of the answers, to compare.
    """

    workload: str
    arm: str
    round: int
    num_tokens: int
    seconds: float
    waits: list[float]
    long_waits: list[float]
    gaps: list[float]
    num_decoded: int
    decode_seconds: float
    prompt_tokens: list[int]
    cached_tokens: list[int]
    cpu_seconds: dict[str, float]
    client_cpu_seconds: float
    digests: list[str]
    timings: dict[str, float]
    repeated: float | None = None

    @property
    def tokens_a_second(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def decoded_a_second(self) -> float:
        """Of one stream, prompts not counted."""
        return self.num_decoded / self.decode_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """Everything that one run measured."""

    options: Options
    workloads: list[Workload]
    cells: list[Cell]
    model: str
    threads: int
    builds: Mapping[str, Any]
    commands: Mapping[str, str]
    idle_cpu: Mapping[str, float]
    seconds: float
    notes: list[str] = field(default_factory=list)

    def of(self, workload: str, arm: str) -> list[Cell]:
        return [cell for cell in self.cells if (cell.workload, cell.arm) == (workload, arm)]


class Pace:
    """How long what is left will take: by the last time of each cell, else its guess."""

    def __init__(self, plan: Sequence[tuple[int, Workload, Arm]]) -> None:
        self._left = list(plan)
        self._known: dict[tuple[str, str], float] = {}

    def done(self, workload: Workload, arm: Arm, seconds: float) -> None:
        self._left.pop(0)
        self._known[workload.name, arm.name] = seconds

    @property
    def left_seconds(self) -> float:
        return sum(self._known.get((work.name, arm.name), work.guess_seconds) for _, work, arm in self._left)


def run(options: Options, scratch: Path, threads: int, say: Say) -> Study:
    """Start everything, measure all rounds, stop everything.

    Raises children.NotStarted, calls.CallRefused, environments.PeerUnavailable, and load.LoadFailed for wrong answers.
    """
    started = time.monotonic()
    chosen = workloads.chosen(options.only)
    with sides.running(scratch, chosen, threads, say) as servers:
        _warm_up(servers, say)
        plan = [step for step in _order(options, chosen) if servers.of(step[2])]
        pace = Pace(plan)
        cells: list[Cell] = []
        for number, workload, arm in plan:
            left = f"about {max(1, round(pace.left_seconds / 60))} min left"
            say(f"round {number + 1} of {options.rounds}, {workload.title}: {arm.name} ({left})")
            began = time.monotonic()
            cells.append(_measure(servers, options, number, workload, arm))
            pace.done(workload, arm, time.monotonic() - began)
            _check_prompts(cells)
        return Study(
            options=options,
            workloads=chosen,
            cells=cells,
            model=servers.model,
            threads=threads,
            builds=servers.builds,
            commands=servers.commands,
            idle_cpu=servers.idle_cpu,
            seconds=time.monotonic() - started,
            notes=_missing(chosen, servers),
        )


def _missing(chosen: Sequence[Workload], servers: sides.Sides) -> list[str]:
    lacking = [workload.title for workload in chosen for arm in workload.arms if servers.of(arm) is None]
    return [f"{title}: {NOT_AVAILABLE}." for title in dict.fromkeys(lacking)]


def _order(options: Options, chosen: Sequence[Workload]) -> Iterator[tuple[int, Workload, Arm]]:
    """Every second round takes the arms backwards, so that drift hits them alike."""
    for number in range(options.rounds):
        for workload in chosen:
            for arm in workload.arms if number % 2 == 0 else reversed(workload.arms):
                yield number, workload, arm


def _warm_up(servers: sides.Sides, say: Say) -> None:
    """Every server and every model answers eight at once: what is made at the first requests is made."""
    say("warming up")
    client = Client(role="stream", turns=[Turn(prompt="The first morning of the year was", num_tokens=8)] * 2)
    for side in servers.by_arm.values():
        _ask(side, [client] * WARM_UP_CLIENTS, "warming up", side.arm.server)


def _measure(servers: sides.Sides, options: Options, number: int, workload: Workload, arm: Arm) -> Cell:
    side = servers.of(arm)
    assert side is not None
    clients = workload.build(number, QUICK_DIVISOR if options.quick else 1)
    before = footprint.costs(side.pid)
    result = _ask(side, clients, workload.title, arm.name)
    used = footprint.cpu_seconds_by_name(before, footprint.costs(side.pid))
    return cell_of(result, workload, arm.name, number, used)


def _ask(side: sides.Side, clients: Sequence[Client], what: str, who: str) -> StreamResult:
    """Raises LoadFailed with what was asked of whom."""
    try:
        return run_streams(side.job(clients))
    except LoadFailed as error:
        raise LoadFailed(f"{what}, {who}: {error}") from error


def cell_of(result: StreamResult, workload: Workload, arm: str, number: int, used: dict[str, float]) -> Cell:
    answers = sorted(result.answers, key=lambda answer: (answer.client, answer.turn))
    streams = [answer for answer in answers if answer.role != "long"]
    return Cell(
        workload=workload.name,
        arm=arm,
        round=number,
        num_tokens=result.num_tokens,
        seconds=result.seconds,
        waits=[answer.first_seconds for answer in streams],
        long_waits=[answer.first_seconds for answer in answers if answer.role == "long"],
        gaps=[gap for answer in streams for gap in answer.gaps],
        num_decoded=sum(answer.num_tokens - 1 for answer in streams),
        decode_seconds=sum(sum(answer.gaps) for answer in streams),
        prompt_tokens=[answer.prompt_tokens for answer in answers if answer.prompt_tokens is not None],
        cached_tokens=[answer.cached_tokens for answer in answers if answer.cached_tokens is not None],
        cpu_seconds=used,
        client_cpu_seconds=result.cpu_seconds,
        digests=[hashlib.sha256(answer.text.encode()).hexdigest()[:12] for answer in answers],
        timings=_mean_timings(answers),
        repeated=_repeated(answers, workload),
    )


def _mean_timings(answers: Sequence[Answer]) -> dict[str, float]:
    """What the servers themselves say of a request, averaged."""
    names = ("prompt_n", "prompt_ms", "predicted_ms", "draft_n", "draft_n_accepted")
    told = {name: [answer.timings[name] for answer in answers if name in answer.timings] for name in names}
    return {name: fmean(values) for name, values in told.items() if values}


def _repeated(answers: Sequence[Answer], workload: Workload) -> float | None:
    """The least share of an answer that is the passage it ought to repeat."""
    if not workload.repeats:
        return None
    return min(
        texts.repeated_share(answer.text, passage) for answer, passage in zip(answers, workload.repeats, strict=True)
    )


def _check_prompts(cells: Sequence[Cell]) -> None:
    """The sides of a round computed the same prompts. Raises LoadFailed where their lengths differ.

    In chats the later prompts hold each side's own answers, of one length in tokens, which may be other ones as text.
    """
    last = cells[-1]
    for cell in cells:
        if (cell.workload, cell.round) != (last.workload, last.round) or PYTHON in (cell.arm, last.arm):
            continue
        ours, theirs = (each.prompt_tokens[:: 4 if last.workload == "chats" else 1] for each in (cell, last))
        if ours != theirs:
            raise LoadFailed(f"{last.workload}: {cell.arm} counts {ours} prompt tokens, {last.arm} {theirs}")

"""The side by side benchmark of the path around the model: llmsite and LiteLLM, in turn, under the same load.

Added latency is lat(client -> server) - lat(client -> the instant upstream), round by round. llmsite generates with its
fake engine; LiteLLM forwards to the upstream. Runs on the command's main thread; `Study` is all that comes out.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from inference.bench import calls, children, counters, footprint, peer
from inference.bench.environments import PeerUnavailable
from inference.bench.figures import thin
from inference.bench.load import NUMBER, LoadJob, run_load
from inference.bench.site import GENERATE, Site, body
from inference.bench.site import running as site_running

ROUNDS = 4
IDLE_SECONDS = 3.0
DIRECT_SECONDS = 0.6
"""The upstream answers tens of thousands of requests a second: a short look is enough."""
NUMBERS_A_POINT = 10_000_000
CACHED = '"cached":true'
COMPUTED = '"cached":false'
DELTA = '"text"'
CHUNK = '"content"'
PRIMED = "0"

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to measure. seconds is one measurement, after warmup_seconds."""

    rounds: int = ROUNDS
    seconds: float = 2.0
    warmup_seconds: float = 0.4
    clients: tuple[int, ...] = (1, 4, 16, 64)
    with_peer: bool = True
    peer_workers: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One measurement: one arm, one number of clients, one round. Latencies in seconds."""

    arm: str
    round: int
    clients: int
    rate: float
    latencies: list[float]
    firsts: list[float]
    num_sent: int
    num_errors: int
    errors: list[str]
    cpu_seconds: dict[str, float]
    """Processor time per request, by process."""
    load_cpu_seconds: float
    work: counters.Work | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Processes of one server, idle and after the load."""

    idle: list[footprint.ProcessCost]
    after: list[footprint.ProcessCost]


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """Everything that one run of the benchmark measured."""

    options: Options
    points: list[Point]
    memory: dict[str, Memory]
    idle_work: counters.Work | None
    commands: dict[str, str]
    versions: dict[str, str]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One thing to measure: the load on it, and whose work to count meanwhile."""

    name: str
    job: LoadJob
    pid: int | None = None
    """Root of the processes whose processor time is counted."""
    site: Site | None = None


def run(options: Options, scratch: Path, say: Say) -> Study:
    """Start everything, measure all rounds, stop everything. Raises children.NotStarted, calls.CallRefused."""
    notes: list[str] = []
    environment = _peer_environment(options, notes, say)
    say("starting llmsite with its fake engine")
    with site_running(scratch, engine="fake") as site:
        sample = _sample_answer(site)
        with children.upstream(scratch / "upstream.log", text_bytes=max(1, len(sample)), chunks=16) as upstream_port:
            if environment is None:
                return _measure(options, site, None, upstream_port, notes, say)
            say("starting LiteLLM")
            try:
                with peer.running(environment, scratch, upstream_port, num_workers=options.peer_workers) as litellm:
                    return _measure(options, site, litellm, upstream_port, notes, say)
            except PeerUnavailable as error:
                notes.append(f"LiteLLM was not measured: {error}")
            return _measure(options, site, None, upstream_port, notes, say)


def _peer_environment(options: Options, notes: list[str], say: Say) -> Path | None:
    if not options.with_peer:
        notes.append("LiteLLM was not measured: --no-peer.")
        return None
    try:
        return peer.install(say)
    except PeerUnavailable as error:
        notes.append(f"LiteLLM was not measured: {error}")
        return None


def _sample_answer(site: Site) -> str:
    """One answer of the fake engine: the upstream's has the same length. It fills caches of keys and models, too."""
    reply = calls.call(site.port, "POST", GENERATE, key=site.key, body={"prompt": "Hello", "max_new_tokens": 16})
    return str(reply.json()["output"])


def _measure(
    options: Options, site: Site, litellm: peer.Peer | None, upstream_port: int, notes: list[str], say: Say
) -> Study:
    say("measuring idle memory and idle work")
    idle_site = site.costs()
    idle_peer = footprint.costs(litellm.pid) if litellm else []
    idle_work = _idle_work(site)
    _prime_cache(site)
    arms = [*_direct_arms(upstream_port), *_site_arms(options, site)]
    if litellm:
        arms += _peer_arms(options, litellm)
    points: list[Point] = []
    for number, clients, arm in _order(options, arms):
        say(f"round {number + 1} of {options.rounds}, {clients} {'client' if clients == 1 else 'clients'}: {arm.name}")
        points.append(_point(arm, number, clients, idle_work, first_number=len(points) * NUMBERS_A_POINT))
    memory = {"llmsite": Memory(idle=idle_site, after=site.costs())}
    commands = {"llmsite": site.command, "upstream": "python -m inference.bench.upstream"}
    versions: dict[str, str] = {}
    if litellm:
        memory["litellm"] = Memory(idle=idle_peer, after=footprint.costs(litellm.pid))
        commands["litellm"] = litellm.command
        versions["litellm"] = litellm.version
    return Study(
        options=options,
        points=points,
        memory=memory,
        idle_work=idle_work,
        commands=commands,
        versions=versions,
        notes=notes,
    )


def _idle_work(site: Site) -> counters.Work:
    before = site.counters()
    time.sleep(IDLE_SECONDS)
    return counters.work_a_second(before, site.counters())


def _order(options: Options, arms: list[Arm]) -> Iterator[tuple[int, int, Arm]]:
    """Rounds of all numbers of clients; every second round takes the arms backwards, so that drift hits both alike."""
    for number in range(options.rounds):
        for clients in options.clients:
            for arm in arms if number % 2 == 0 else reversed(arms):
                yield number, clients, arm


def _direct_arms(upstream_port: int) -> list[Arm]:
    whole = LoadJob(
        port=upstream_port,
        path=peer.PATH,
        bodies=[peer.body(stream=False, number=NUMBER)],
        clients=1,
        seconds=DIRECT_SECONDS,
        warmup_seconds=0.1,
    )
    stream = replace(whole, bodies=[peer.body(stream=True, number=NUMBER)], marker=CHUNK)
    return [Arm(name="direct", job=whole), Arm(name="direct_stream", job=stream)]


def _site_arms(options: Options, site: Site) -> list[Arm]:
    computed = LoadJob(
        port=site.port,
        path=GENERATE,
        headers={"X-API-Key": site.key},
        bodies=[body(number=NUMBER, cache=False)],
        expect=COMPUTED,
        clients=1,
        seconds=options.seconds,
        warmup_seconds=options.warmup_seconds,
    )
    cached = replace(computed, bodies=[body(number=PRIMED, cache=True)], expect=CACHED)
    stream = replace(computed, bodies=[body(number=NUMBER, cache=False, stream=True)], expect="", marker=DELTA)
    jobs = {"llmsite": computed, "llmsite_cached": cached, "llmsite_stream": stream}
    return [Arm(name=name, job=job, pid=site.pid, site=site) for name, job in jobs.items()]


def _peer_arms(options: Options, litellm: peer.Peer) -> list[Arm]:
    whole = LoadJob(
        port=litellm.port,
        path=peer.PATH,
        headers={"Authorization": f"Bearer {litellm.master_key}"},
        bodies=[peer.body(stream=False, number=NUMBER)],
        expect=CHUNK,
        clients=1,
        seconds=options.seconds,
        warmup_seconds=options.warmup_seconds,
    )
    stream = replace(whole, bodies=[peer.body(stream=True, number=NUMBER)], expect="", marker=CHUNK)
    jobs = {"litellm": whole, "litellm_stream": stream}
    return [Arm(name=name, job=job, pid=litellm.pid) for name, job in jobs.items()]


def _prime_cache(site: Site) -> None:
    calls.call(site.port, "POST", GENERATE, key=site.key, body=json.loads(body(number=PRIMED, cache=True)))


def _point(arm: Arm, number: int, clients: int, idle_work: counters.Work, *, first_number: int) -> Point:
    """Measure one arm once, with its counters read before and after."""
    counted = arm.site.counters() if arm.site else None
    cost = footprint.costs(arm.pid) if arm.pid else []
    result = run_load(replace(arm.job, clients=clients, first_number=first_number))
    used = footprint.cpu_seconds_by_name(cost, footprint.costs(arm.pid)) if arm.pid else {}
    work = None
    if arm.site and counted:
        work = counters.work_per_request(counted, arm.site.counters(), result.num_sent, idle_work)
    return Point(
        arm=arm.name,
        round=number,
        clients=clients,
        rate=result.rate,
        latencies=thin(result.latencies),
        firsts=thin(result.firsts),
        num_sent=result.num_sent,
        num_errors=result.num_errors,
        errors=result.errors,
        cpu_seconds={name: seconds / max(1, result.num_sent) for name, seconds in used.items()},
        load_cpu_seconds=result.cpu_seconds / max(1, result.num_sent),
        work=work,
    )

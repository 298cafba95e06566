"""The servers of one run, started and stopped together, and how each is asked: port, dialect, key, its own words.

All of them hold their models; one at a time is busy. Called on the command's main thread.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from inference import demo_adapters
from inference.bench import calls, footprint, site
from inference.bench.children import NotStarted
from inference.bench.environments import Say
from inference.bench.servers import llama_server, python_server, variants
from inference.bench.servers.llama_server import Lookup, Setup
from inference.bench.servers.streams import Client, StreamJob, Turn
from inference.bench.servers.workloads import (
    ADAPTERS,
    ALIKE,
    AS_IT_COMES,
    NONE,
    PEER,
    PYTHON,
    Q4_0,
    Q8_0,
    SHIPPED,
    SIDE,
    Arm,
    Workload,
)
from inference.site_file.models_form import Options
from llmsite.demo import ADAPTERS as DEMO_ADAPTERS
from llmsite.demo import MODEL_NAME, demo_model_path

CONTEXT = 2048
SLOTS = 8
LOOKUP = Lookup(match_tokens=3, draft_tokens=16)
"""llmsite's own settings; llama-server is told them where both are to be alike."""
NO_END = {"logit_bias": {"0": -100.0, "2": -100.0}}
"""The demo model's tokens that end a text, for a server without `ignore_eos`."""
IDLE_SECONDS = 2.0
MOST_IDLE_SHARE = 0.02
"""Of one processor, used by a peer that nobody asks anything."""
LOOKUP_FIELD = "draft_kind"
LANES = 2
"""Of the shipped model, which has adapters: as many as this machine's cores could want, for key-value memory twice."""
WITH_LOOKUP = "-lookup"
"""A model of its own for each variant: the one without drafts is what it would be without them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """A running server, or one of its models. adapters: its ids of the demo adapters, in the order of their files."""

    arm: Arm
    port: int
    pid: int
    dialect: str = "llama.cpp"
    headers: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    adapters: Sequence[int] = ()

    def job(self, clients: Sequence[Client]) -> StreamJob:
        """The clients' requests in this server's words."""
        return StreamJob(
            port=self.port,
            dialect=self.dialect,
            headers=dict(self.headers),
            clients=[replace(client, turns=[self._turn(turn) for turn in client.turns]) for client in clients],
        )

    def _turn(self, turn: Turn) -> Turn:
        fields = {**turn.fields, **self.fields}
        wanted = fields.pop(ADAPTERS, None)
        if wanted is not None:
            fields["lora"] = [{"id": self.adapters[position], "scale": 1.0} for position in wanted]
        return replace(turn, fields=fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sides:
    """All servers of a run. idle_cpu: share of a processor that each used while nobody asked anything."""

    by_arm: Mapping[Arm, Side]
    builds: Mapping[str, Any]
    commands: Mapping[str, str]
    idle_cpu: Mapping[str, float]
    model: str
    metrics_of: site.Site

    def of(self, arm: Arm) -> Side | None:
        """None where this llmsite cannot do what the arm is about."""
        return self.by_arm.get(replace(arm, name=""))


def adapter_files() -> tuple[Path, ...]:
    folder = Path(demo_adapters.__file__).parent
    return tuple(folder / file for file, _tenants in DEMO_ADAPTERS.values())


def can_look_up() -> bool:
    """Whether this llmsite has drafts by prompt lookup."""
    return LOOKUP_FIELD in Options.model_fields


@contextmanager
def running(scratch: Path, workloads: Sequence[Workload], threads: int, say: Say) -> Iterator[Sides]:
    """Start what the workloads need, check that idle servers are idle, stop all in the end.

    Raises children.NotStarted, calls.CallRefused and environments.PeerUnavailable.
    """
    arms = {replace(arm, name="") for workload in workloads for arm in workload.arms}
    files = {SHIPPED: demo_model_path()}
    files |= {kind: variants.make(files[SHIPPED], kind, say) for kind in (Q4_0, Q8_0) if _needs(arms, kind)}
    environment = llama_server.install(say)
    with ExitStack() as stack:
        say("starting llmsite with the demo model")
        (folder := scratch / "llmsite").mkdir()
        models = folder / "models.yaml"
        asked = {arm for arm in arms if arm.server == SIDE and (can_look_up() or not arm.drafts)}
        registry = models_yaml(files, asked, threads)
        models.write_text(json.dumps(registry))
        ours = stack.enter_context(
            site.running(folder, engine="llama", models_yaml=models, num_models=len(registry["models"]))
        )
        by_arm = {arm: _our_side(arm, ours) for arm in asked}
        builds: dict[str, Any] = {SIDE: variants.build()}
        roots = {SIDE: ours.pid}
        for arm in sorted((arm for arm in arms if arm.server != SIDE), key=str):
            name = f"{arm.server} {arm.variant} {arm.drafts}".strip()
            say(f"starting {name}")
            setup = _setup(arm, files, threads)
            if arm.server == PEER:
                peer = stack.enter_context(llama_server.running(environment, scratch, setup, name))
                by_arm[arm] = Side(arm=arm, port=peer.port, pid=peer.pid, adapters=range(len(setup.adapters)))
            else:
                peer = stack.enter_context(python_server.running(environment, scratch, setup))
                by_arm[arm] = Side(arm=arm, port=peer.port, pid=peer.pid, dialect="openai", fields=NO_END)
            builds[arm.server] = peer.build
            roots[name] = peer.pid
        yield Sides(
            by_arm=by_arm,
            builds=builds,
            commands={SIDE: f"manage.py up --demo, n_lanes {LANES} for the model with adapters", **_commands(threads)},
            idle_cpu=_idle(roots, say),
            model=MODEL_NAME,
            metrics_of=ours,
        )


def _needs(arms: set[Arm], variant: str) -> bool:
    return any(arm.variant == variant for arm in arms)


def _setup(arm: Arm, files: Mapping[str, Path], threads: int) -> Setup:
    return Setup(
        model=files[arm.variant],
        slots=SLOTS,
        context=CONTEXT,
        threads=threads,
        adapters=adapter_files() if arm.variant == SHIPPED else (),
        lookup={NONE: None, ALIKE: LOOKUP, AS_IT_COMES: Lookup()}[arm.drafts],
    )


def models_yaml(files: Mapping[str, Path], asked: Iterable[Arm], threads: int) -> dict[str, Any]:
    """The registry of the benchmark's llmsite: the demo model with its adapters for everybody, and its variants."""
    names = list(DEMO_ADAPTERS)
    adapters = [
        {"name": name, "path": str(path), "visibility": "shared"}
        for name, path in zip(names, adapter_files(), strict=True)
    ]
    lookup = {LOOKUP_FIELD: "prompt_lookup", "draft_n_max": LOOKUP.draft_tokens}
    shipped = {"id": MODEL_NAME, "path": str(files[SHIPPED]), "adapters": adapters, "n_lanes": LANES}
    models: list[dict[str, Any]] = [shipped]
    models += [
        {"id": _model_of(arm), "path": str(files[arm.variant]), **(lookup if arm.drafts else {})}
        for arm in sorted(asked, key=str)
        if arm.variant != SHIPPED
    ]
    options = {"n_ctx": CONTEXT, "n_slots": SLOTS, "n_threads": threads, "load_mode": "eager"}
    return {"default_model": MODEL_NAME, "defaults": options, "models": models}


def _model_of(arm: Arm) -> str:
    return MODEL_NAME if arm.variant == SHIPPED else arm.variant + (WITH_LOOKUP if arm.drafts else "")


def _our_side(arm: Arm, ours: site.Site) -> Side:
    known = calls.call(ours.port, "GET", "/lora-adapters", key=ours.key).json()
    ids = {Path(adapter["path"]).stem: int(adapter["id"]) for adapter in known}
    return Side(
        arm=arm,
        port=ours.port,
        pid=ours.pid,
        headers={"Authorization": f"Bearer {ours.key}"},
        fields={"model": _model_of(arm)},
        adapters=[ids[name] for name in DEMO_ADAPTERS],
    )


def _idle(roots: Mapping[str, int], say: Say) -> dict[str, float]:
    """Share of a processor that each server uses by itself. Raises NotStarted where a peer is not idle."""
    say("checking that idle servers are idle")
    before = {name: footprint.costs(pid) for name, pid in roots.items()}
    started = time.monotonic()
    time.sleep(IDLE_SECONDS)
    seconds = time.monotonic() - started
    shares = {
        name: sum(footprint.cpu_seconds_by_name(before[name], footprint.costs(pid)).values()) / seconds
        for name, pid in roots.items()
    }
    busy = [name for name, share in shares.items() if name != SIDE and share > MOST_IDLE_SHARE]
    if busy:
        raise NotStarted(
            f"{busy[0]} uses {shares[busy[0]]:.0%} of a processor while idle: nothing else can be measured"
        )
    return shares


def _commands(threads: int) -> dict[str, str]:
    return {
        PEER: f"xllamacpp.Server: n_parallel {SLOTS}, n_ctx {SLOTS * CONTEXT}, kv_unified off, n_threads {threads}",
        PYTHON: " ".join(
            ["python -m llama_cpp.server", f"--n_ctx {CONTEXT} --n_threads {threads}", *python_server.OPTIONS]
        ),
    }

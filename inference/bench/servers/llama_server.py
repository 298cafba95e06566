"""llama.cpp's own server, as the package xllamacpp carries it: compiled C++, started in an environment of its own.

Its options are llama-server's defaults, but for what makes both sides alike: model, slots, context of a slot, threads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from inference.bench import children, environments
from inference.bench.environments import PeerUnavailable, Say
from inference.bench.servers import llama_server_main

REQUIREMENTS = environments.ROOT / "requirements" / "bench-engine.txt"
ENVIRONMENT = environments.HOME / "servers"
MAIN = Path(llama_server_main.__file__)
START_SECONDS = 90


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookup:
    """Prompt lookup: how many of the last tokens must have stood before, and tokens of a draft. None: the default."""

    match_tokens: int | None = None
    draft_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What both sides have in common. context: tokens of one slot."""

    model: Path
    slots: int
    context: int
    threads: int
    adapters: tuple[Path, ...] = ()
    lookup: Lookup | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A running server of a peer. build: what it says of how it was compiled."""

    port: int
    pid: int
    build: dict[str, Any]


def install(say: Say) -> Path:
    """The environment of both peers, made on first use. Raises PeerUnavailable."""
    return environments.make(ENVIRONMENT, REQUIREMENTS, "xllamacpp and the parts of llama_cpp.server", say)


def arguments(setup: Setup, port: int) -> dict[str, Any]:
    """What llama_server_main.py is told."""
    return {
        "model": str(setup.model),
        "port": port,
        "n_parallel": setup.slots,
        "n_ctx": setup.slots * setup.context,
        "n_threads": setup.threads,
        "adapters": [str(path) for path in setup.adapters],
        "lookup": setup.lookup and asdict(setup.lookup),
    }


@contextmanager
def running(environment: Path, scratch: Path, setup: Setup, name: str) -> Iterator[Running]:
    """llama-server for as long as the block lasts. Raises PeerUnavailable."""
    port = children.free_port()
    log = scratch / f"{name.replace(' ', '-')}.log"
    command = [str(environment / "bin" / "python"), "-I", str(MAIN), json.dumps(arguments(setup, port))]
    with children.child(command, log, env={}, cwd=scratch) as process:
        try:
            children.wait_until(
                lambda: children.answers_200(port, "/health"), process, log, seconds=START_SECONDS, what=name
            )
        except children.NotStarted as error:
            raise PeerUnavailable(str(error)) from error
        yield Running(port=port, pid=process.pid, build=_build(log))


def _build(log: Path) -> dict[str, Any]:
    """The line of JSON that the server's script has written before the server began to log."""
    lines = log.read_text(errors="replace").splitlines()
    found = next((line for line in lines if line.startswith(llama_server_main.BUILD)), None)
    if found is None:
        raise PeerUnavailable(f"the server said nothing of its build:\n{children.tail(log)}")
    build: dict[str, Any] = json.loads(found.removeprefix(llama_server_main.BUILD))
    return build

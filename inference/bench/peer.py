"""The LiteLLM proxy, set up and started as its documentation says: one worker, a master key, no database.

It lives in an environment of its own under build/, made from requirements/bench.txt on first use.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from inference.bench import children, upstream

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ROOT / "requirements" / "bench.txt"
ENVIRONMENT = ROOT / "build" / "bench" / "litellm"
INSTALL_SECONDS = 900
START_SECONDS = 120
PATH = "/v1/chat/completions"
MARK = "installed.txt"

Say = Callable[[str], None]


class PeerUnavailable(Exception):
    """LiteLLM cannot be installed or started here; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A running LiteLLM proxy."""

    port: int
    pid: int
    master_key: str = field(repr=False)
    version: str
    command: str
    start_seconds: float


def install(say: Say, environment: Path = ENVIRONMENT, requirements: Path = REQUIREMENTS) -> Path:
    """The environment's folder, made or renewed if the lock file or the interpreter changed. Raises PeerUnavailable."""
    mark = environment / MARK
    if mark.exists() and mark.read_text() == _wanted(requirements):
        return environment
    if environment.exists():
        shutil.rmtree(environment)
    say("installing LiteLLM into an environment of its own (once, about a minute, 750 MB)")
    venv.create(environment, with_pip=True)
    command = [str(environment / "bin" / "python"), "-m", "pip", "install", "--require-hashes", "--no-input"]
    _pip([*command, "--progress-bar", "off", "-r", str(requirements)], environment / "install.log", say)
    mark_installed(environment, requirements)
    return environment


def mark_installed(environment: Path, requirements: Path) -> None:
    """Note what the environment holds: the next run compares it with the lock file."""
    (environment / MARK).write_text(_wanted(requirements))


def _wanted(requirements: Path) -> str:
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    return f"{hashlib.sha256(requirements.read_bytes()).hexdigest()} {python}"


def _pip(command: list[str], log: Path, say: Say) -> None:
    """Run pip, saying each package it takes on."""
    with log.open("w") as record:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        num_packages = 0
        for line in process.stdout:
            record.write(line)
            if line.startswith("Collecting "):
                num_packages += 1
                if num_packages % 20 == 0:
                    say(f"{num_packages} packages, at {line.split()[1]}")
        status = process.wait(INSTALL_SECONDS)
    if status != 0:
        raise PeerUnavailable(f"pip ended with {status}:\n{children.tail(log)}")


def config(upstream_port: int) -> str:
    """LiteLLM's configuration file: one model at the instant upstream. JSON is YAML."""
    model = {
        "model_name": upstream.MODEL,
        "litellm_params": {
            "model": f"openai/{upstream.MODEL}",
            "api_base": f"http://127.0.0.1:{upstream_port}/v1",
            "api_key": "unused",
        },
    }
    return json.dumps({"model_list": [model], "litellm_settings": {"telemetry": False}}, indent=1)


def version(environment: Path) -> str:
    """The installed version, read from its metadata."""
    found = sorted(environment.glob("lib/python*/site-packages/litellm-*.dist-info"))
    if not found:
        raise PeerUnavailable(f"LiteLLM is not in {environment.name}")
    return found[0].name.removeprefix("litellm-").removesuffix(".dist-info")


@contextmanager
def running(environment: Path, scratch: Path, upstream_port: int, *, num_workers: int) -> Iterator[Peer]:
    """LiteLLM's proxy for as long as the block lasts. Raises PeerUnavailable."""
    settings = scratch / "litellm.yaml"
    settings.write_text(config(upstream_port))
    port = children.free_port()
    options = ["--config", str(settings), "--host", "127.0.0.1", "--port", str(port), "--num_workers", str(num_workers)]
    command = [str(environment / "bin" / "litellm"), *options]
    # Without network its price list comes from the package, at once instead of after three tries.
    env = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    master_key = f"sk-{secrets.token_hex(32)}"  # it refuses to start without one
    env["LITELLM_MASTER_KEY"] = master_key
    log = scratch / "litellm.log"
    with children.child(command, log, env=env, cwd=scratch) as process:
        try:
            seconds = children.wait_until(
                lambda: children.answers_200(port, "/health/liveliness"),
                process,
                log,
                seconds=START_SECONDS,
                what="LiteLLM",
            )
        except children.NotStarted as error:
            raise PeerUnavailable(str(error)) from error
        settings_shown = "LITELLM_LOCAL_MODEL_COST_MAP=True LITELLM_MASTER_KEY=..."
        shown = f"{settings_shown} litellm --config litellm.yaml --num_workers {num_workers}"
        yield Peer(
            port=port,
            pid=process.pid,
            master_key=master_key,
            version=version(environment),
            command=shown,
            start_seconds=seconds,
        )


def body(*, stream: bool, number: str) -> str:
    """A chat completion request that no cache has seen."""
    message = {"role": "user", "content": f"Tell me about number {number}."}
    return json.dumps({"model": upstream.MODEL, "messages": [message], "max_tokens": 16, "stream": stream})

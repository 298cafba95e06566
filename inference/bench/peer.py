"""The LiteLLM proxy, set up and started as its documentation says: one worker, a master key, no database.

It lives in an environment of its own under build/, made from requirements/bench.txt on first use.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from inference.bench import children, environments, upstream
from inference.bench.environments import PeerUnavailable

REQUIREMENTS = environments.ROOT / "requirements" / "bench.txt"
ENVIRONMENT = environments.HOME / "litellm"
START_SECONDS = 120
PATH = "/v1/chat/completions"

Say = Callable[[str], None]


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
    """The environment's folder, made on first use (about a minute, 750 MB). Raises PeerUnavailable."""
    return environments.make(environment, requirements, "LiteLLM (about a minute, 750 MB)", say)


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
            version=environments.version(environment, "litellm"),
            command=shown,
            start_seconds=seconds,
        )


def body(*, stream: bool, number: str) -> str:
    """A chat completion request that no cache has seen."""
    message = {"role": "user", "content": f"Tell me about number {number}."}
    return json.dumps({"model": upstream.MODEL, "messages": [message], "max_tokens": 16, "stream": stream})

"""An llmsite of its own for the benchmark: `manage.py up --demo` on a free port, in a scratch state folder.

Everything is on as delivered: embedded Valkey, SQLite, keys, limits, quota, ledger, receipts, logs, metrics. The tenant
of the benchmark has limits that are finite, so that every check is made, and too high to bind.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import redis

from inference.bench import calls, children, counters, footprint
from llmsite.config import Config

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 120
START_SECONDS_A_MODEL = 60
"""A model of the file is inspected, tried in a child and loaded."""
GENERATE = "/v1/generate"
LIMITS = {
    "requests_per_minute": 10_000_000,
    "tokens_per_minute": 10**12,
    "concurrent_requests": 10_000,
    "queue_length": 10_000,
    "monthly_tokens": 10**12,
    "monthly_requests": 10**12,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A running llmsite."""

    port: int
    pid: int
    key: str = field(repr=False)
    operator_key: str = field(repr=False)
    redis_url: str
    command: str
    start_seconds: float

    def metrics(self) -> str:
        return calls.call(self.port, "GET", "/metrics", key=self.operator_key).body.decode()

    def counters(self) -> counters.Counters:
        with redis.Redis.from_url(self.redis_url) as client:
            return counters.read(self.metrics(), client)

    def costs(self) -> list[footprint.ProcessCost]:
        return footprint.costs(self.pid)


@contextmanager
def running(scratch: Path, *, engine: str, models_yaml: Path | None = None, num_models: int = 0) -> Iterator[Site]:
    """llmsite for as long as the block lasts, with the models of a file if one is named.

    Raises children.NotStarted and calls.CallRefused.
    """
    port = children.free_port()
    state = scratch / "state"
    env = {
        "STATE_DIR": str(state),
        "HOST": "127.0.0.1",
        "PORT": str(port),
        "ENGINE": engine,
        "DATABASE_URL": "",
        "REDIS_URL": "",
    }
    if models_yaml:
        env["MODELS_YAML"] = str(models_yaml)
    log = scratch / "llmsite.log"
    with children.child([sys.executable, "manage.py", "up", "--demo"], log, env=env, cwd=ROOT) as process:
        seconds = children.wait_until(
            lambda: (state / "demo.json").exists() and children.answers_200(port, "/readyz"),
            process,
            log,
            seconds=START_SECONDS + num_models * START_SECONDS_A_MODEL,
            what="llmsite",
        )
        demo = json.loads((state / "demo.json").read_text())
        operator_key = demo["operator_key"]
        yield Site(
            port=port,
            pid=process.pid,
            key=_key_that_nothing_binds(port, operator_key),
            operator_key=operator_key,
            redis_url=f"unix://{Config(state_dir=state).embedded_valkey_socket}?db=0",
            command=f"ENGINE={engine} manage.py up --demo",
            start_seconds=seconds,
        )


def _key_that_nothing_binds(port: int, operator_key: str) -> str:
    """A tenant of the benchmark's own, through the operator's API; its key."""
    plan = calls.call(port, "POST", "/v1/admin/plans", key=operator_key, body={"name": "bench", **LIMITS}).json()
    tenant = calls.call(
        port, "POST", "/v1/admin/tenants", key=operator_key, body={"name": "bench", "plan": plan["name"]}
    ).json()
    issued = calls.call(
        port, "POST", "/v1/admin/keys", key=operator_key, body={"tenant": tenant["name"], "name": "bench"}
    ).json()
    return str(issued["key"])


def body(*, number: str, cache: bool, max_new_tokens: int = 16, stream: bool = False) -> str:
    """A native request; `number` makes the prompt one that no cache has seen."""
    request: dict[str, object] = {
        "prompt": f"Tell me about number {number}.",
        "max_new_tokens": max_new_tokens,
        "cache": cache,
    }
    if stream:
        request["stream"] = True
    return json.dumps(request)

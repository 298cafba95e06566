"""A real worker process behind Celery: doorbells, garbage on the queue, TERM, -9, STOP and CONT."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from django.conf import settings
from django.db import connection

from accounts.models import QuotaPeriod
from inference.models import Receipt
from inference.transport.queue import ticket_queue
from inference.transport.stream import stream_key
from inference.upkeep import reaper
from llmsite.config import BASE_DIR
from tests.inference.flow import admitted, events, finish, principal_of, register, text_of, wait_for
from tests.timing import Stopwatch

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.django_db(transaction=True)]

CHILD = Path(__file__).parent / "children" / "worker.py"
Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start(valkey: Any, tmp_path: Path) -> Iterator[Start]:
    """Starts workers that are ready when it returns; ends those that are left."""
    started: list[subprocess.Popen[bytes]] = []

    def run(seconds_per_step: float = 0.01) -> subprocess.Popen[bytes]:
        before = {worker.worker_id for worker in ticket_queue().workers()}
        environment = {**os.environ, "PYTHONPATH": str(BASE_DIR), "LOG_LEVEL": "INFO"}
        command = [sys.executable, str(CHILD), str(connection.settings_dict["NAME"]), str(seconds_per_step)]
        with (tmp_path / "worker.log").open("ab") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        started.append(process)

        def is_ready() -> bool:
            assert process.poll() is None, (tmp_path / "worker.log").read_text()
            fresh = [worker for worker in ticket_queue().workers() if worker.worker_id not in before]
            return any(model["state"] == "ready" for worker in fresh for model in worker.info["models"])

        wait_for(is_ready, 30)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()


@pytest.fixture
def sweeping(valkey: Any) -> Iterator[None]:
    """The reaper as the web process runs it."""
    made = reaper.Reaper(ticket_queue())
    made.start()
    yield
    made.stop()


@pytest.fixture
def alice(cast: Any) -> Any:
    register()
    return principal_of(cast.alice, concurrent_requests=10)


def counters(tenant_id: int) -> tuple[int, int, int, int]:
    row = QuotaPeriod.objects.get(tenant_id=tenant_id, key=None)
    return row.used_tokens, row.reserved_tokens, row.used_requests, row.reserved_requests


def test_a_doorbell_brings_a_worker_that_answers_settles_and_survives_garbage(
    alice: Any, start: Start, valkey: Any
) -> None:
    start()
    queue = f"{settings.CELERY_BROKER_TRANSPORT_OPTIONS['global_keyprefix']}default"
    sent = admitted(alice).ticket
    assert finish(valkey, sent.request_id)["reason"] == "length"
    wait_for(lambda: Receipt.objects.exists())
    assert counters(alice.tenant_id) == (26, 0, 1, 0)
    for message in garbage():
        valkey.lpush(queue, message)
    wait_for(lambda: valkey.llen(queue) == 0)
    for _ in range(3):
        assert finish(valkey, admitted(alice).ticket.request_id)["reason"] == "length"


def garbage() -> list[bytes]:
    """Messages of a neighbour who may write to the broker: none is run, none ends the worker."""
    import base64

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os._exit, (99,)

    def envelope(body: bytes, task: str = "inference.serve", kind: str = "application/json") -> bytes:
        headers = {"lang": "py", "task": task, "id": "x", "root_id": "x", "parent_id": None, "group": None}
        properties = {
            "correlation_id": "x",
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": "default"},
            "priority": 0,
            "body_encoding": "base64",
            "delivery_tag": os.urandom(8).hex(),
        }
        return orjson.dumps(
            {
                "body": base64.b64encode(body).decode(),
                "content-encoding": "utf-8",
                "content-type": kind,
                "headers": headers,
                "properties": properties,
            }
        )

    empty = b"{}, {}]"
    return [
        envelope(pickle.dumps(Bomb()), kind="application/x-python-serialize"),
        envelope(b"[[" + b'"default"' + b"], " + empty, task="os.system"),
        envelope(b"[[], " + empty),
        envelope(b'[["no-such-pool"], ' + empty),
        envelope(b"[[7], " + empty),
        envelope(b'[[{"a": 1}, 2, 3], ' + empty),
        envelope(b'[["' + b"x" * 10_000_000 + b'"], ' + empty),
        envelope(b"not json at all"),
        envelope(b'"a string"'),
        b"\x80\x04raw",
        b"not json",
        b"7",
        b"null",
        b"{}",
        b'{"body": "e30=", "properties": {}}',
        envelope(b"[]", task=["a", "list"]),  # type: ignore[arg-type]
        envelope(b"[1, 2, 3, 4]"),
    ]


def test_a_killed_worker_is_noticed_within_three_seconds_and_costs_nothing(
    alice: Any, start: Start, sweeping: None, valkey: Any
) -> None:
    process = start(0.02)
    running = [admitted(alice, max_tokens=240, stream=True).ticket for _ in range(4)]
    waiting = [admitted(alice, max_tokens=5).ticket for _ in range(3)]
    for sent in running:
        wait_for(lambda sent=sent: text_of(events(valkey, sent.request_id)))
    process.kill()
    watch = Stopwatch()
    for sent in running:
        assert finish(valkey, sent.request_id)["error"] == "worker_lost"
    assert watch.seconds() < 3
    wait_for(lambda: Receipt.objects.count() == 4)
    assert counters(alice.tenant_id)[:3] == (0, 3 * 15, 0)
    start()
    for sent in waiting:
        assert finish(valkey, sent.request_id)["reason"] == "length"
    wait_for(lambda: counters(alice.tenant_id) == (3 * 15, 0, 3, 0))
    assert valkey.zcard(f"accounts:places:tenant:{alice.tenant_id}") == 0


def test_a_worker_that_was_stopped_and_wakes_up_changes_nothing(
    alice: Any, start: Start, sweeping: None, valkey: Any
) -> None:
    process = start(0.02)
    sent = admitted(alice, max_tokens=240, stream=True).ticket
    wait_for(lambda: text_of(events(valkey, sent.request_id)))
    process.send_signal(signal.SIGSTOP)
    assert finish(valkey, sent.request_id)["error"] == "worker_lost"
    length = valkey.xlen(stream_key(sent.request_id))
    wait_for(lambda: Receipt.objects.exists())
    process.send_signal(signal.SIGCONT)
    wait_for(lambda: ticket_queue().workers())
    again = admitted(alice).ticket
    assert finish(valkey, again.request_id)["reason"] == "length"
    time.sleep(0.5)
    assert valkey.xlen(stream_key(sent.request_id)) == length
    assert Receipt.objects.get(request_id=sent.request_id).error_code == "worker_lost"
    wait_for(lambda: counters(alice.tenant_id) == (26, 0, 1, 0))


DRAIN_SECONDS = 1.0
"""Of the child; two more are promised."""


def test_term_lets_short_requests_end_and_exits_in_time(alice: Any, start: Start, valkey: Any) -> None:
    process = start(0.02)
    long = admitted(alice, max_tokens=240, stream=True).ticket
    short = admitted(alice, max_tokens=10).ticket
    wait_for(lambda: text_of(events(valkey, long.request_id)))
    wait_for(lambda: ticket_queue().state(short.request_id).state != "waiting")  # type: ignore[union-attr]
    assert seconds_to_end(process) < DRAIN_SECONDS + 2.0
    assert process.poll() == 0
    assert finish(valkey, short.request_id)["reason"] == "length"
    assert finish(valkey, long.request_id)["error"] == "worker_stopping"
    assert counters(alice.tenant_id) == (20, 0, 1, 0)
    assert ticket_queue().workers() == []
    late = admitted(alice).ticket
    start()
    assert finish(valkey, late.request_id)["reason"] == "length"


def test_term_ends_a_worker_whose_engine_does_not_come_back(
    alice: Any, start: Start, sweeping: None, valkey: Any
) -> None:
    process = start(30.0)
    sent = admitted(alice, max_tokens=5, stream=True).ticket
    wait_for(lambda: ticket_queue().state(sent.request_id).state == "running")  # type: ignore[union-attr]
    assert seconds_to_end(process) < DRAIN_SECONDS + 2.0
    assert process.poll() == 75
    assert finish(valkey, sent.request_id)["error"] == "worker_lost"
    wait_for(lambda: counters(alice.tenant_id) == (0, 0, 0, 0))


def seconds_to_end(process: subprocess.Popen[bytes]) -> float:
    """After TERM."""
    watch = Stopwatch()
    process.terminate()
    wait_for(lambda: process.poll() is not None)
    seconds = watch.seconds()
    print(f"{seconds:.2f} s from TERM to the end")
    return seconds

"""A Redis that goes away in the middle: nothing admitted vanishes, and everybody finds back (promise R8)."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from accounts import redis_client
from accounts.models import QuotaPeriod
from accounts.refusals import Refusal
from inference import completion_cache, doorbell
from inference import queue as queue_module
from inference.admission import admit
from inference.queue import ticket_queue
from inference.reaper import Reaper
from inference.stream import StreamReader
from llmsite.processes import valkey as embedded
from tests.inference.flow import admitted, fake_load, new_id, order, principal_of, register, wait_for, worker

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.django_db(transaction=True)]


class Server:
    """A Valkey of the test's own, that can be stopped and started."""

    def __init__(self, folder: Path) -> None:
        self.plan = embedded.ValkeyPlan(folder, folder / "valkey.sock", max_memory_mb=64)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        process = self.process = embedded.start(self.plan, output=subprocess.DEVNULL)
        embedded.wait_until_it_answers(self.plan, lambda: process.poll() is None)

    def stop(self) -> None:
        assert self.process is not None
        self.process.terminate()
        self.process.wait(10)


@pytest.fixture
def server(settings: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    folder = Path(tempfile.mkdtemp(prefix="llmsite-r8-"))
    made = Server(folder)
    made.start()
    settings.REDIS_URL = f"unix://{made.plan.socket}"
    monkeypatch.setattr(doorbell, "ring", lambda _: True)
    for cached in (queue_module.ticket_queue, completion_cache.completion_cache):
        cached.cache_clear()
    _forget_scripts()
    yield made
    for cached in (queue_module.ticket_queue, completion_cache.completion_cache):
        cached.cache_clear()
    _forget_scripts()
    made.stop()
    shutil.rmtree(folder, ignore_errors=True)


def _forget_scripts() -> None:
    from accounts import throttling

    clear: Callable[[], None] | None = getattr(getattr(throttling, "_script", None), "cache_clear", None)
    if clear is not None:
        clear()


async def text_and_end(request_id: str, url: str) -> tuple[str, dict[str, Any]]:
    reader = StreamReader(url)
    text, last = "", {}
    async with reader.follow(request_id) as found:
        async for event in found:
            text += event.data.get("text", "")
            last = event.data
    await reader.stop()
    return text, last


def test_a_stream_goes_on_and_a_ticket_waits_through_a_restart(cast: Any, server: Server, settings: Any) -> None:
    register(n_slots=1)
    principal = principal_of(cast.alice, tokens_per_minute=100_000)
    client = redis_client.client()
    with worker(client, threads=2, load=fake_load(0.02)):
        running = admitted(principal, max_tokens=200, stream=True).ticket
        waiting = admitted(principal, max_tokens=5).ticket
        following = asyncio.new_event_loop()
        task = following.create_task(text_and_end(running.request_id, settings.REDIS_URL))
        following.run_until_complete(asyncio.sleep(0.3))
        server.stop()
        refusal = _refused_while_away(principal)
        following.run_until_complete(asyncio.sleep(0.5))
        server.start()
        restarted = time.monotonic()
        text, last = following.run_until_complete(asyncio.wait_for(task, 20))
        following.close()
        assert (last["reason"], last["receipt"]["completion_tokens"]) == ("length", 200)
        assert len(text.split()) > 100
        wait_for(lambda: ticket_queue().state(waiting.request_id).state == "done", 10)  # type: ignore[union-attr]
        assert isinstance(admitted(principal, max_tokens=1).ticket.max_tokens, int)
        assert time.monotonic() - restarted < 15
        wait_for(lambda: counters(principal.tenant_id)[1] == 0)
    assert (refusal.code, refusal.retryable) == ("service_unavailable", True)
    assert counters(principal.tenant_id)[0] in (210 + 15, 210 + 15 + 11)


def _refused_while_away(principal: Any) -> Refusal:
    with pytest.raises(Refusal) as caught:
        admit(principal, order(), request_id=new_id(), route="/v1/generate")
    return caught.value


def counters(tenant_id: int) -> tuple[int, int]:
    row = QuotaPeriod.objects.get(tenant_id=tenant_id, key=None)
    return row.used_tokens, row.reserved_tokens


def test_a_restart_condemns_no_worker_that_lives(cast: Any, server: Server) -> None:
    register()
    principal = principal_of(cast.alice)
    client = redis_client.client()
    reaper = Reaper(ticket_queue(), every_seconds=0.1)
    reaper._answers_since = time.monotonic() - 60
    with worker(client, threads=1, load=fake_load(0.02)):
        sent = admitted(principal, max_tokens=240).ticket
        wait_for(lambda: ticket_queue().state(sent.request_id).state == "running")  # type: ignore[union-attr]
        reaper.start()
        server.stop()
        time.sleep(2.5)  # longer than a heartbeat lives
        server.start()
        state = wait_for(lambda: _end_of(client, sent.request_id), 15)
        reaper.stop()
    assert b'"length"' in state


def _end_of(client: redis.Redis, request_id: str) -> Any:
    try:
        entries: Any = client.xrevrange(f"gen:{request_id}", count=1)
    except redis.RedisError:
        return None
    return entries[0][1][b"e"] if entries and b"finished" in entries[0][1][b"e"] else None

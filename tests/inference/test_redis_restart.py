"""A Redis that goes away in the middle: nothing admitted vanishes, and everybody finds back (promise R8)."""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from accounts import redis_client
from accounts.limits.throttling import peek_tokens
from accounts.models import QuotaPeriod
from accounts.trail.refusals import Refusal
from inference.engine.types import SamplingParams
from inference.intake.admission import admit
from inference.transport import completion_cache, doorbell
from inference.transport import queue as queue_module
from inference.transport.holding import Hold
from inference.transport.queue import TicketQueue, ticket_key, ticket_queue
from inference.transport.stream import StreamReader
from inference.upkeep.reaper import Reaper
from llmsite.processes import valkey as embedded
from tests.inference.flow import (
    admitted,
    events,
    fake_load,
    finish,
    new_id,
    order,
    principal_of,
    register,
    text_of,
    ticket,
    wait_for,
    worker,
)
from tests.timing import Stopwatch

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
        self.process.send_signal(signal.SIGCONT)  # a test may have failed while it stood still
        self.process.wait(10)

    def stand_still(self, seconds: float) -> threading.Timer:
        """Returns at once; the server hears nothing until then."""
        self.send(signal.SIGSTOP)
        waking = threading.Timer(seconds, self.send, [signal.SIGCONT])
        waking.start()
        return waking

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)


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
    from accounts.limits import throttling

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
        wait_for(lambda: limits_are_back(principal), 30)
        back_after = time.monotonic() - restarted
        text, last = following.run_until_complete(asyncio.wait_for(task, 20))
        following.close()
        assert (last["reason"], last["receipt"]["completion_tokens"]) == ("length", 200)
        assert len(text.split()) > 100
        wait_for(lambda: ticket_queue().state(waiting.request_id).state == "done")  # type: ignore[union-attr]
        assert isinstance(admitted(principal, max_tokens=1).ticket.max_tokens, int)
        assert back_after < 5
        wait_for(lambda: counters(principal.tenant_id)[1] == 0)
    assert (refusal.code, refusal.retryable) == ("service_unavailable", True)
    assert counters(principal.tenant_id)[0] in (210 + 15, 210 + 15 + 11)


def limits_are_back(principal: Any) -> bool:
    """Whether the minute's tokens are known again."""
    try:
        peek_tokens(principal)
    except Refusal:
        return False
    return True


def test_a_redis_that_is_full_refuses_admits_again_and_loses_nothing(cast: Any, server: Server) -> None:
    register(n_slots=1)
    principal = principal_of(cast.alice, tokens_per_minute=100_000)
    client, greedy = redis_client.client(), SamplingParams(temperature=0.0)
    with worker(client, threads=2, load=fake_load(0.02)):
        running = admitted(principal, max_tokens=100, stream=True, sampling=greedy).ticket
        wait_for(lambda: text_of(events(client, running.request_id)))
        client.config_set("maxmemory", 1)
        refusals = [_refused_while_away(principal) for _ in range(20)]
        reserved = counters(principal.tenant_id)
        time.sleep(0.5)
        client.config_set("maxmemory", 64 << 20)
        assert {(each.code, each.retryable) for each in refusals} == {("service_unavailable", True)}
        assert all(each.retry_after for each in refusals)
        assert reserved == (0, 110)
        last = finish(client, running.request_id, 20)
        assert (last["reason"], last["receipt"]["completion_tokens"]) == ("length", 100)
        again = admitted(principal, max_tokens=100, stream=True, sampling=greedy).ticket
        assert finish(client, again.request_id, 20)["reason"] == "length"
        assert text_of(events(client, running.request_id)) == text_of(events(client, again.request_id)) != ""
        wait_for(lambda: counters(principal.tenant_id) == (220, 0), 20)


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
    with worker(client, threads=1, load=fake_load(0.02)):
        sent = admitted(principal, max_tokens=240).ticket
        wait_for(lambda: ticket_queue().state(sent.request_id).state == "running")  # type: ignore[union-attr]
        reaper.start()
        server.stop()
        time.sleep(2.5)  # longer than a heartbeat lives
        server.start()
        state = wait_for(lambda: _end_of(client, sent.request_id))
        reaper.stop()
    assert b'"length"' in state


def test_a_redis_that_stood_still_condemns_nobody_until_all_could_beat_again(server: Server, settings: Any) -> None:
    queue = TicketQueue(redis_client.connect(settings.REDIS_URL, socket_timeout=10))
    queue.put(ticket())
    queue.beat("w1", "default", 4, {})
    queue.take("default", "w1", [1])
    assert queue.sweep().claims == ()
    queue.beat("w1", "default", 4, {}, ttl_seconds=0.5)
    server.stand_still(1.5)
    assert queue.sweep().claims == ()  # the server hears it before the worker
    assert queue.sweep().claims == ()
    (claim,) = wait_for(lambda: queue.sweep().claims)  # it says nothing for so long: it has died
    assert claim.why == "worker_lost"


def test_a_full_server_condemns_nobody_and_ends_what_waited_too_long(server: Server) -> None:
    client, queue = redis_client.client(), ticket_queue()
    queue.put(ticket())
    queue.beat("w1", "default", 4, {}, ttl_seconds=0.01)
    queue.take("default", "w1", [1])
    client.zadd("waiting:default", {"forgotten": 1})
    client.set("heard", time.time() - 0.9)
    client.config_set("maxmemory", 1)
    time.sleep(0.2)
    assert queue.sweep().claims == ()
    client.config_set("maxmemory", 64 << 20)
    assert queue.num_waiting("default") == 0
    assert queue.sweep().claims == ()  # while it was full, nobody could be heard
    client.delete("doubted")
    assert len(queue.sweep().claims) == 1


def test_a_command_that_is_late_runs_once(server: Server, settings: Any) -> None:
    queue = TicketQueue(redis_client.connect(settings.REDIS_URL, socket_timeout=0.5))
    sent = ticket()
    queue.put(sent, hold=Hold(web="one"))
    queue.join("unknown", "two")  # the server knows the script
    server.send(signal.SIGSTOP)
    watch = Stopwatch()
    with pytest.raises(redis.TimeoutError):
        queue.join(sent.request_id, "two")
    assert watch.seconds() < 0.9, "a second attempt would have waited as long again"
    server.send(signal.SIGCONT)  # it reads all that was sent, also of who has hung up
    wait_for(lambda: queue.client.hget("held:two", sent.request_id))
    time.sleep(0.2)
    assert queue.client.hget(ticket_key(sent.request_id), "readers") == b"2"


def _end_of(client: redis.Redis, request_id: str) -> Any:
    try:
        entries: Any = client.xrevrange(f"gen:{request_id}", count=1)
    except redis.RedisError:
        return None
    return entries[0][1][b"e"] if entries and b"finished" in entries[0][1][b"e"] else None

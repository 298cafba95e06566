"""Events through Redis Streams: merged, fenced, in order, to any number of readers."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import orjson
import pytest
import redis
from django.conf import settings

from accounts import redis_client
from inference.engine.types import Delta, Finished, FinishReason, Receipt, SamplingParams, Started, TokenProbs
from inference.transport import stream
from inference.transport.queue import Lease, TicketQueue, ticket_key
from inference.transport.stream import (
    End,
    SlowFollower,
    StreamEvent,
    StreamReader,
    StreamWriter,
    encode_delta,
    encode_finished,
    end_claimed,
    stream_key,
)
from tests.inference.flow import events, new_id, text_of, ticket, wait_for
from tests.timing import PATIENCE_SECONDS, Stopwatch

pytestmark = pytest.mark.integration


class Desk:
    """A writer whose publisher has not started yet, so that a test decides what one flush carries."""

    def __init__(self, client: redis.Redis) -> None:
        self.client = client
        self.queue = TicketQueue(client)
        self.ends: list[tuple[str, bool]] = []
        self.fenced: list[str] = []
        self.flushes: list[int] = []
        self.writer = StreamWriter(
            client,
            on_end=lambda request_id, held: self.ends.append((request_id, held)),
            on_fenced=self.fenced.append,
            on_flush=self.flushes.append,
        )

    def lease(self, **changes: Any) -> Lease:
        self.queue.put(ticket(**{"stream": True, **changes}))
        lease = self.queue.take("default", "w1", [1])
        assert lease is not None
        self.writer.open(lease)
        return lease


@pytest.fixture
def desk(valkey: Any) -> Any:
    made = Desk(valkey)
    yield made
    if made.writer._thread.ident is None:
        made.writer.start()
    made.writer.stop(2)


def end_of(lease: Lease, before: Sequence[Any] = ()) -> End:
    request_id = lease.ticket.request_id
    finished = Finished(request_id, FinishReason.LENGTH, Receipt(prompt_tokens=10, completion_tokens=2))
    return End(encode_finished(finished, "w1"), b'{"status":"completed"}', before)


def delta(lease: Lease, text: str) -> Delta:
    return Delta(lease.ticket.request_id, text, (1,))


# Writing


def test_what_was_not_sent_yet_is_merged(desk: Desk) -> None:
    lease = desk.lease()
    for text in "abc":
        desk.writer.publish([delta(lease, text)])
    desk.writer.start()
    found = wait_for(lambda: events(desk.client, lease.ticket.request_id))
    assert found == [{"t": "delta", "text": "abc", "n": 3}]


def test_tokens_of_fast_steps_travel_together_but_the_first_and_the_end_at_once(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "GATHER_STEPS_SECONDS", (60.0, 60.0))
    lease = desk.lease()
    request_id = lease.ticket.request_id
    desk.writer.start()
    desk.writer.publish([delta(lease, "a")])
    wait_for(lambda: events(desk.client, request_id))
    for text in "bcd":
        desk.writer.publish([delta(lease, text)])
        time.sleep(0.01)
    assert text_of(events(desk.client, request_id)) == "a"
    desk.writer.finish(request_id, end_of(lease))
    wait_for(lambda: desk.ends)
    assert [event.get("text") for event in events(desk.client, request_id)] == ["a", "bcd", None]
    assert len(desk.flushes) == 2


def test_what_waits_for_its_pace_is_sent_without_another_event(desk: Desk) -> None:
    lease = desk.lease()
    desk.writer.start()
    for text in "ab":
        desk.writer.publish([delta(lease, text)])
        time.sleep(0.005)
    assert wait_for(lambda: text_of(events(desk.client, lease.ticket.request_id)) == "ab")


def test_probabilities_travel_with_their_tokens_whatever_bytes_they_have(desk: Desk) -> None:
    lease = desk.lease(sampling=SamplingParams(num_probs=2))
    request_id = lease.ticket.request_id
    likely = (TokenProbs(7, -0.25, b" \xe2\x82"), TokenProbs(2, -math.inf, b""))
    probs = [TokenProbs(7, -0.25, b" \xe2\x82", likely), TokenProbs(8, -1.5, b'\xac\n"')]
    desk.writer.publish([Delta(request_id, "", (7,), (probs[0],)), Delta(request_id, "€", (8,), (probs[1],))])
    desk.writer.start()
    (found,) = wait_for(lambda: events(desk.client, request_id))
    assert found["n"] == 2
    assert StreamEvent("1-1", found).probs() == probs


def test_nobody_gets_probabilities_that_nobody_asked_for(desk: Desk) -> None:
    lease = desk.lease()
    request_id = lease.ticket.request_id
    desk.writer.publish([Delta(request_id, "x", (7,), (TokenProbs(7, -0.25, b"x"),))])
    desk.writer.start()
    (found,) = wait_for(lambda: events(desk.client, request_id))
    assert "probs" not in found
    assert StreamEvent("1-1", found).probs() == []


def test_one_flush_carries_what_all_sequences_have_to_say(desk: Desk) -> None:
    leases = [desk.lease() for _ in range(20)]
    desk.writer.publish([Started(lease.ticket.request_id, 0) for lease in leases])
    desk.writer.publish([delta(lease, "x") for lease in leases])
    desk.writer.start()
    wait_for(lambda: desk.flushes)
    assert desk.flushes == [20]
    assert all(text_of(events(desk.client, lease.ticket.request_id)) == "x" for lease in leases)


def test_started_comes_first_and_finished_last(desk: Desk) -> None:
    lease = desk.lease()
    request_id = lease.ticket.request_id
    desk.writer.start()
    desk.writer.publish([Started(request_id, 0)])
    for text in "hello":
        desk.writer.publish([delta(lease, text)])
        time.sleep(0.002)
    desk.writer.finish(request_id, end_of(lease))
    wait_for(lambda: desk.ends)
    found = events(desk.client, request_id)
    assert [found[0]["t"], found[-1]["t"]] == ["started", "finished"]
    assert text_of(found) == "hello"
    assert found[-1]["receipt"]["completion_tokens"] == 2
    assert found[-1]["worker"] == "w1"
    assert desk.ends == [(request_id, True)]


def test_a_request_that_does_not_stream_is_written_once(desk: Desk) -> None:
    lease = desk.lease(stream=False)
    request_id = lease.ticket.request_id
    desk.writer.start()
    for text in "hello":
        desk.writer.publish([delta(lease, text)])
        time.sleep(0.01)
    assert events(desk.client, request_id) == []
    desk.writer.finish(request_id, end_of(lease))
    wait_for(lambda: desk.ends)
    assert [event["t"] for event in events(desk.client, request_id)] == ["delta", "finished"]


def test_a_long_request_that_does_not_stream_can_be_watched(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "LINGER_SECONDS", 0.05)
    lease = desk.lease(stream=False)
    desk.writer.start()
    desk.writer.publish([delta(lease, "slow")])
    assert text_of(wait_for(lambda: events(desk.client, lease.ticket.request_id))) == "slow"


def test_the_end_files_the_outcome_and_frees_the_lease(desk: Desk) -> None:
    lease = desk.lease()
    request_id = lease.ticket.request_id
    desk.writer.start()
    desk.writer.finish(request_id, end_of(lease))
    wait_for(lambda: desk.ends)
    header, _, outcome = desk.client.hget("settlements", request_id).partition(b"\n")  # type: ignore[union-attr]
    assert header == lease.ticket.header()
    assert outcome == b'{"status":"completed"}'
    assert desk.client.hlen("leases:w1") == 0
    assert desk.client.hget(ticket_key(request_id), "state") == b"done"


def test_a_command_before_the_end_goes_in_the_same_round_trip(desk: Desk) -> None:
    lease = desk.lease()
    desk.writer.finish(lease.ticket.request_id, end_of(lease, [["SET", "before", "1"]]))
    desk.writer.start()
    wait_for(lambda: desk.ends)
    assert desk.client.get("before") == b"1"
    assert desk.flushes == [1]


def test_whoever_lost_the_lease_writes_nothing(desk: Desk) -> None:
    lease = desk.lease()
    request_id = lease.ticket.request_id
    desk.client.hincrby(ticket_key(request_id), "token", 1)
    desk.writer.start()
    desk.writer.publish([delta(lease, "stale")])
    wait_for(lambda: desk.fenced)
    desk.writer.publish([delta(lease, "still")])
    desk.writer.finish(request_id, end_of(lease))
    wait_for(lambda: desk.ends)
    assert desk.fenced == [request_id]
    assert desk.ends == [(request_id, False)]
    assert events(desk.client, request_id) == []
    assert desk.client.hget("settlements", request_id) is None


def test_a_request_that_redis_forgot_is_fenced(desk: Desk) -> None:
    lease = desk.lease()
    desk.client.flushdb()
    desk.writer.start()
    desk.writer.publish([delta(lease, "x")])
    wait_for(lambda: desk.fenced)


def test_events_of_unknown_requests_are_dropped(desk: Desk) -> None:
    desk.writer.start()
    desk.writer.publish([Delta("nobody", "x", (1,))])
    lease = desk.lease()
    desk.writer.publish([delta(lease, "y")])
    assert text_of(wait_for(lambda: events(desk.client, lease.ticket.request_id))) == "y"


def test_a_claim_ends_what_a_worker_began(desk: Desk) -> None:
    lease = desk.lease()
    request_id = lease.ticket.request_id
    desk.writer.start()
    desk.writer.publish([delta(lease, "begun")])
    wait_for(lambda: events(desk.client, request_id))
    token = desk.client.hincrby(ticket_key(request_id), "token", 1)
    assert end_claimed(desk.client, Lease(lease.ticket, token), b'{"t":"finished"}', b"{}")
    assert [event["t"] for event in events(desk.client, request_id)] == ["delta", "finished"]


class Failing:
    """A client whose replies are lost after the server has done the work, a number of times."""

    def __init__(self, client: redis.Redis, failures: int, *, before: bool) -> None:
        self.client, self.failures, self.before = client, failures, before

    def pipeline(self, **options: Any) -> Any:
        pipe = self.client.pipeline(**options)
        execute: Callable[..., Any] = pipe.execute

        def lossy(**arguments: Any) -> Any:
            if self.failures > 0:
                self.failures -= 1
                if not self.before:
                    execute(**arguments)
                raise redis.ConnectionError("the cable was cut")
            return execute(**arguments)

        pipe.execute = lossy  # type: ignore[method-assign]
        return pipe

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)


@pytest.mark.parametrize("before", [True, False])
def test_lost_replies_and_lost_commands_lose_and_double_nothing(valkey: Any, before: bool) -> None:
    desk = Desk(Failing(valkey, 3, before=before))  # type: ignore[arg-type]
    lease = desk.lease()
    request_id = lease.ticket.request_id
    desk.writer.start()
    for text in "abcdef":
        desk.writer.publish([delta(lease, text)])
        time.sleep(0.03)
    desk.writer.finish(request_id, end_of(lease))
    wait_for(lambda: desk.ends)
    assert text_of(events(valkey, request_id)) == "abcdef"
    assert desk.ends == [(request_id, True)]
    assert desk.fenced == []
    assert desk.writer.stop(2)


def test_a_script_that_the_server_lost_is_loaded_again(desk: Desk) -> None:
    lease = desk.lease()
    desk.client.script_flush()
    desk.writer.start()
    desk.writer.publish([delta(lease, "x")])
    assert text_of(wait_for(lambda: events(desk.client, lease.ticket.request_id))) == "x"


def test_stopping_sends_what_is_left(desk: Desk) -> None:
    lease = desk.lease(stream=False)
    desk.writer.publish([delta(lease, "rest")])
    desk.writer.start()
    assert not desk.writer.stop(2)  # its end never came
    assert text_of(events(desk.client, lease.ticket.request_id)) == "rest"


# Reading


def put_events(client: redis.Redis, request_id: str, texts: str, *, end: bool = True) -> None:
    key = stream_key(request_id)
    for text in texts:
        client.xadd(key, {b"e": encode_delta(text, 1)})
    if end:
        client.xadd(key, {b"e": b'{"t":"finished","reason":"eos"}'})


@pytest.fixture
async def reader(valkey: Any) -> Any:
    made = StreamReader(settings.REDIS_URL)
    yield made
    await made.stop()


async def read(reader: StreamReader, request_id: str, last_id: str = "0") -> list[stream.StreamEvent]:
    async with reader.follow(request_id, last_id) as found:
        return [event async for event in found]


async def in_thread(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    return await asyncio.to_thread(function, *arguments, **options)


async def test_a_follower_gets_everything_that_was_there_before_it(reader: StreamReader, valkey: Any) -> None:
    request_id = new_id()
    await in_thread(put_events, valkey, request_id, "abc")
    found = await read(reader, request_id)
    assert [event.kind for event in found] == ["delta"] * 3 + ["finished"]
    assert [event.data.get("text") for event in found[:3]] == ["a", "b", "c"]
    assert reader.num_followed == 0


async def test_a_follower_gets_what_comes_while_it_waits(reader: StreamReader, valkey: Any) -> None:
    request_id = new_id()
    reading = asyncio.create_task(read(reader, request_id))
    await asyncio.sleep(0.05)
    watch = Stopwatch()
    await in_thread(put_events, valkey, request_id, "x")
    found = await asyncio.wait_for(reading, PATIENCE_SECONDS)
    assert len(found) == 2
    assert watch.seconds() < 1


async def test_a_second_request_wakes_a_reader_that_waits(reader: StreamReader, valkey: Any) -> None:
    first, second = new_id(), new_id()
    waiting = asyncio.create_task(read(reader, first))
    await asyncio.sleep(0.05)
    await in_thread(put_events, valkey, second, "x")
    watch = Stopwatch()
    assert len(await asyncio.wait_for(read(reader, second), PATIENCE_SECONDS)) == 2
    assert watch.seconds() < 1
    await in_thread(put_events, valkey, first, "y")
    assert len(await asyncio.wait_for(waiting, PATIENCE_SECONDS)) == 2


async def test_two_hundred_followers_share_one_connection(reader: StreamReader, valkey: Any) -> None:
    requests = [new_id() for _ in range(100)]
    before = len(valkey.client_list())
    reading = [asyncio.create_task(read(reader, request_id)) for request_id in requests * 2]
    async with asyncio.timeout(PATIENCE_SECONDS):
        while reader.num_followed < 100:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    connections = len(valkey.client_list()) - before
    for request_id in requests:
        await in_thread(put_events, valkey, request_id, request_id[:5])
    found = await asyncio.wait_for(asyncio.gather(*reading), PATIENCE_SECONDS)
    assert connections <= 2  # one to read, one to wake the reader
    for request_id, list_of_events in zip(requests * 2, found, strict=True):
        assert "".join(event.data.get("text", "") for event in list_of_events) == request_id[:5]


async def test_a_stream_is_resumed_after_the_last_event_that_was_seen(reader: StreamReader, valkey: Any) -> None:
    request_id = new_id()
    await in_thread(put_events, valkey, request_id, "abc")
    all_events = await read(reader, request_id)
    rest = await read(reader, request_id, all_events[1].id)
    assert rest == all_events[2:]


async def test_a_late_follower_of_a_live_stream_gets_the_beginning_too(reader: StreamReader, valkey: Any) -> None:
    request_id = new_id()
    first = asyncio.create_task(read(reader, request_id))
    await in_thread(put_events, valkey, request_id, "ab", end=False)
    await asyncio.sleep(0.05)
    second = asyncio.create_task(read(reader, request_id))
    await asyncio.sleep(0.05)
    await in_thread(put_events, valkey, request_id, "c")
    assert await asyncio.wait_for(first, PATIENCE_SECONDS) == await asyncio.wait_for(second, PATIENCE_SECONDS)


async def test_a_follower_that_leaves_early_is_forgotten(reader: StreamReader, valkey: Any) -> None:
    request_id = new_id()
    await in_thread(put_events, valkey, request_id, "abc", end=False)
    async with reader.follow(request_id) as found:
        async for event in found:
            assert event.data["text"] == "a"
            break
    assert reader.num_followed == 0


async def test_a_follower_that_does_not_read_is_dropped_alone(
    reader: StreamReader, valkey: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "QUEUE_SIZE", 3)
    request_id = new_id()
    async with reader.follow(request_id) as slow:
        monkeypatch.setattr(stream, "QUEUE_SIZE", 100)
        quick = asyncio.create_task(read(reader, request_id))
        await asyncio.sleep(0.05)
        await in_thread(put_events, valkey, request_id, "abcdef")
        assert len(await asyncio.wait_for(quick, PATIENCE_SECONDS)) == 7
        with pytest.raises(SlowFollower):
            async for _ in slow:
                pass


async def test_a_broken_connection_loses_no_event(reader: StreamReader, valkey: Any) -> None:
    request_id = new_id()
    reading = asyncio.create_task(read(reader, request_id))
    for text in "abcde":
        await in_thread(put_events, valkey, request_id, text, end=False)
        await asyncio.sleep(0.02)
        await in_thread(_drop_other_clients, valkey)
    await in_thread(put_events, valkey, request_id, "f")
    found = await asyncio.wait_for(reading, PATIENCE_SECONDS)
    assert "".join(event.data.get("text", "") for event in found) == "abcdef"


def _drop_other_clients(client: redis.Redis) -> None:
    other = redis_client.connect(settings.REDIS_URL)
    other.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")  # type: ignore[no-untyped-call]
    other.close()


async def test_a_request_that_redis_lost_ends_with_an_error(
    reader: StreamReader, valkey: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "WATCH_SECONDS", 0.05)
    (lost,) = await asyncio.wait_for(read(reader, new_id()), PATIENCE_SECONDS)
    assert (lost.data["reason"], lost.data["error"]) == ("error", "request_lost")


async def test_following_after_the_end_ends_at_once(
    reader: StreamReader, valkey: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "WATCH_SECONDS", 0.05)
    request_id = new_id()
    valkey.hset(ticket_key(request_id), "state", "done")
    await in_thread(put_events, valkey, request_id, "a")
    last = (await read(reader, request_id))[-1]
    assert await asyncio.wait_for(read(reader, request_id, last.id), PATIENCE_SECONDS) == []


async def test_a_request_that_waits_long_is_not_taken_for_lost(
    reader: StreamReader, valkey: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "WATCH_SECONDS", 0.02)
    sent = ticket()
    TicketQueue(valkey).put(sent)
    reading = asyncio.create_task(read(reader, sent.request_id))
    await asyncio.sleep(0.3)
    assert not reading.done()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading


def test_writer_and_reader_agree(desk: Desk) -> None:
    lease = desk.lease()
    request_id = lease.ticket.request_id
    found: list[stream.StreamEvent] = []

    async def follow() -> None:
        reader = StreamReader(settings.REDIS_URL)
        found.extend(await read(reader, request_id))
        await reader.stop()

    following = threading.Thread(target=lambda: asyncio.run(follow()))
    following.start()
    desk.writer.start()
    for text in ["Grüße", " ", "\u2028", '"quoted"']:
        desk.writer.publish([delta(lease, text)])
    desk.writer.finish(request_id, end_of(lease))
    following.join(PATIENCE_SECONDS)
    assert "".join(event.data.get("text", "") for event in found) == 'Grüße \u2028"quoted"'
    assert found[-1].data == orjson.loads(end_of(lease).final)

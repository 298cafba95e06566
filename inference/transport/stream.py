"""Events of running requests through Redis Streams, one stream `gen:<id>` per request.

Writer: the worker's one publisher thread; a round trip carries what all sequences have to say, merged per sequence.
Reader: the web's event loop; one task per process reads every live stream and fans out. Neither settles or decides.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import math
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
import redis
import redis.asyncio
from redis.exceptions import NoScriptError

from inference.engine.types import Delta, Embedded, Finished, Started, TokenEvent, TokenProbs
from inference.transport.holding import KEPT_SECONDS
from inference.transport.lua import script
from inference.transport.queue import MARGIN_SECONDS, Lease, ticket_key
from inference.transport.ticket import Ticket

logger = logging.getLogger(__name__)

GATHER_SECONDS_A_STREAM = 0.01
GATHER_STEPS_SECONDS = (0.02, 0.1)
"""Tokens of steps that follow each other faster travel together: each event costs the web, Redis and this thread some
0.9 ms of processor time, which a small model's own threads would need. So a worker sends about a hundred events a
second, however many streams share them, and each stream between 10 and 50, which reads as steady."""
LINGER_SECONDS = 0.5
"""Text of a request that does not stream is sent this late at most, so that somebody may attach to it."""
SPARE_EVENTS = 64
MAX_BACKOFF_SECONDS = 1.0


def stream_key(request_id: str) -> str:
    return f"gen:{request_id}"


# The form of events. `t` names the kind; readers ignore fields that they do not know.


def encode_started(started: Started) -> bytes:
    return orjson.dumps({"t": "started", "slot": started.slot_id, "cached": started.num_cached})


def encode_delta(
    text: str, num_tokens: int, tokens: Sequence[int] | None = None, probs: Sequence[TokenProbs] | None = None
) -> bytes:
    """tokens: the ids, probs: one for each token; None for all who did not ask for them."""
    event: dict[str, Any] = {"t": "delta", "text": text, "n": num_tokens}
    if tokens is not None:
        event["tokens"] = tokens
    if probs is not None:
        event["probs"] = [[*_pack(each), [_pack(likely) for likely in each.top]] for each in probs]
    return orjson.dumps(event)


def encode_vectors(vectors: Sequence[Embedded]) -> bytes:
    """Those of several inputs; the numbers as they are in memory."""
    inputs = [[each.index, each.num_vectors, base64.b64encode(each.data).decode()] for each in vectors]
    return orjson.dumps({"t": "vectors", "inputs": inputs})


def _pack(probs: TokenProbs) -> list[Any]:
    """The bytes of a token are no text yet, so each travels as the character of its number; JSON makes null of -inf."""
    return [probs.token, probs.logprob, probs.piece.decode("latin-1")]


def _unpack(token: int, logprob: float | None, piece: str, top: Iterable[Any] = ()) -> TokenProbs:
    likely = tuple(_unpack(*each) for each in top)
    return TokenProbs(token, -math.inf if logprob is None else logprob, piece.encode("latin-1"), likely)


def encode_finished(finished: Finished, worker_id: str) -> bytes:
    return orjson.dumps(
        {
            "t": "finished",
            "reason": finished.reason.value,
            "stop_word": finished.stop_word,
            "error": finished.error,
            "receipt": finished.receipt,
            "worker": worker_id,
        }
    )


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """One event as the web sees it. `id` resumes after it; data is as encoded above: t, and text, n or reason, ..."""

    id: str
    data: dict[str, Any]

    @property
    def kind(self) -> str:
        return str(self.data.get("t"))

    def probs(self) -> list[TokenProbs]:
        """Of a delta: one for each of its tokens where the ticket asks for probabilities, else none."""
        return [_unpack(*each) for each in self.data.get("probs", ())]

    def vectors(self) -> dict[int, tuple[int, bytes]]:
        """By the place of the input: (num_vectors, data) as in engine.types.Embedded."""
        return {index: (number, base64.b64decode(data)) for index, number, data in self.data.get("inputs", ())}


# Writing


@dataclass(frozen=True, slots=True)
class End:
    """The last event of a sequence, what settlement needs, and Redis commands that must be done before both.

    The commands may be sent more than once.
    """

    final: bytes
    outcome: bytes
    before: Sequence[Sequence[Any]] = ()
    num_computed: int = 0
    """Prompt tokens that were computed, and all that were generated: what the tenant has had of its fair share."""
    num_generated: int = 0


@dataclass(slots=True)
class _Outgoing:
    """One sequence's unsent events. Touched by the publisher thread alone, but for its creation."""

    lease: Lease
    hold: bool
    key: str
    ticket_key: str
    number: int = 0
    started: Started | None = None
    texts: list[str] = field(default_factory=list)
    num_tokens: int = 0
    tokens: list[int] | None = None
    """The ids of num_tokens, where the ticket asks for them."""
    probs: list[TokenProbs] | None = None
    """Those of num_tokens, where the ticket asks for them."""
    vectors: list[Embedded] = field(default_factory=list)
    waiting_since: float | None = None
    has_text: bool = False
    """Some of it has been sent."""
    end: End | None = None
    in_flight: list[Any] | None = None
    """Arguments of an attempt whose outcome is unknown: it is repeated unchanged, its number tells the server."""
    ends_in_flight: bool = False
    fenced: bool = False

    def has_news(self) -> bool:
        return (
            self.started is not None or self.num_tokens > 0 or bool(self.texts or self.vectors) or self.end is not None
        )

    def is_urgent(self) -> bool:
        """A start, the first text or an end: somebody waits for it."""
        if self.in_flight is not None or self.end is not None:
            return True
        return not self.hold and self.has_news() and (self.started is not None or not self.has_text)

    def is_due(self, now: float) -> bool:
        """Of what is not urgent, when the pace allows it."""
        if not self.has_news():
            return False
        return not self.hold or (self.waiting_since is not None and now - self.waiting_since >= LINGER_SECONDS)

    def pack(self) -> list[Any]:
        """Everything unsent as the arguments of one call of append.lua."""
        if self.in_flight is not None:
            return self.in_flight
        events: list[bytes] = []
        if self.started is not None:
            events.append(encode_started(self.started))
        if self.texts or self.num_tokens:
            self.has_text = True
            events.append(encode_delta("".join(self.texts), self.num_tokens, self.tokens, self.probs))
        if self.vectors:
            events.append(encode_vectors(self.vectors))
        outcome = b""
        if self.end is not None:
            outcome = self.end.outcome
            events.append(self.end.final)
        self.number += 1
        ticket = self.lease.ticket
        ttl = KEPT_SECONDS if outcome else int(ticket.deadline_at - ticket.created_at + MARGIN_SECONDS)
        head = [ticket.request_id, self.lease.token, self.number, ttl, _most_events(ticket), outcome]
        head += [self.end.num_computed, self.end.num_generated] if self.end else [0, 0]
        self.started, self.texts, self.num_tokens, self.waiting_since = None, [], 0, None
        self.vectors = []
        if self.tokens is not None:
            self.tokens = []
        if self.probs is not None:
            self.probs = []
        self.in_flight, self.ends_in_flight = [*head, *events], self.end is not None
        return self.in_flight


def _pace(items: Sequence[_Outgoing]) -> float:
    """Seconds between two round trips that nobody waits for."""
    shortest, longest = GATHER_STEPS_SECONDS
    return min(max(shortest, GATHER_SECONDS_A_STREAM * sum(not item.hold for item in items)), longest)


def _most_events(ticket: Ticket) -> int:
    """One for each token or input at most, and those that say how it went."""
    return ticket.max_tokens + (len(ticket.embedding.lengths) if ticket.embedding else 0) + SPARE_EVENTS


class StreamWriter:
    """Publishes for one worker. `publish` and `finish` only append to a list; they never block or raise.

    on_end(request_id, held): the last event is in the stream (held), or somebody else ended the request (not held).
    on_fenced(request_id): the lease is lost; called once, before the end.
    """

    def __init__(
        self,
        client: redis.Redis,
        *,
        on_end: Callable[[str, bool], None],
        on_fenced: Callable[[str], None],
        on_flush: Callable[[int], None] | None = None,
    ) -> None:
        self._client = client
        self._script = script(client, "append")
        self._on_end, self._on_fenced, self._on_flush = on_end, on_fenced, on_flush
        self._open: dict[str, _Outgoing] = {}
        self._news = threading.Condition()
        self._inbox: list[tuple[str, TokenEvent | End]] = []
        self._stopping = False
        self._sends_soon = False
        """The thread waits until the pace allows the next round trip, not for news."""
        self._flushed_at = 0.0
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def open(self, lease: Lease) -> None:
        """Before the first event of a lease."""
        request_id = lease.ticket.request_id
        self._open[request_id] = _Outgoing(
            lease,
            not lease.ticket.stream,
            stream_key(request_id),
            ticket_key(request_id),
            tokens=[] if lease.ticket.return_tokens else None,
            probs=[] if lease.ticket.sampling.num_probs else None,
        )

    def publish(self, events: Iterable[TokenEvent]) -> None:
        """The events of one engine step, Finished excepted. Called on the engine's thread."""
        with self._news:
            new = [(event.request_id, event) for event in events]
            self._inbox += new
            if not self._sends_soon or any(map(self._is_awaited, new)):
                self._news.notify()

    def _is_awaited(self, new: tuple[str, TokenEvent]) -> bool:
        """As `is_urgent` of what is not an end. Any thread."""
        item = self._open.get(new[0])
        return item is not None and not item.hold and not item.has_text

    def finish(self, request_id: str, end: End) -> None:
        """The last event; nothing may be published for this request afterwards."""
        with self._news:
            self._inbox.append((request_id, end))
            self._news.notify()

    def stop(self, timeout_seconds: float) -> bool:
        """Publish what is left, then end the thread. False if Redis did not take it in time."""
        with self._news:
            self._stopping = True
            self._news.notify()
        if self._thread.ident is not None:  # told to stop before it began
            self._thread.join(timeout_seconds)
        return not self._thread.is_alive() and not self._open

    def _run(self) -> None:
        backoff = 0.0
        while True:
            with self._news:
                if not self._inbox and not (self._stopping and backoff == 0.0):
                    patience = self._patience()
                    self._sends_soon = not backoff and patience is not None and patience <= GATHER_STEPS_SECONDS[1]
                    self._news.wait(backoff or patience)
                    self._sends_soon = False
                inbox, self._inbox = self._inbox, []
                if self._stopping and not inbox and not any(item.has_news() for item in self._all()):
                    return
            now = time.monotonic()
            for request_id, event in inbox:
                self._note(request_id, event, now)
            try:
                self._flush(self._due(now))
                backoff = 0.0
            except redis.RedisError as error:
                backoff = min(MAX_BACKOFF_SECONDS, backoff * 2 or 0.05)
                logger.warning("events wait for Redis: %s", error)
            except Exception:  # the thread must outlive a defect: without it nobody gets an answer
                backoff = MAX_BACKOFF_SECONDS
                logger.exception("publishing failed")

    def _all(self) -> list[_Outgoing]:
        """A copy in one step of the interpreter: task threads add to the original."""
        return list(self._open.values())

    def _due(self, now: float) -> list[_Outgoing]:
        """Everything that streams goes together: what is urgent takes the rest along."""
        items = self._all()
        is_paced = now - self._flushed_at < _pace(items) and not self._stopping
        if is_paced and not any(item.is_urgent() for item in items):
            return []
        return [item for item in items if self._stopping or item.is_urgent() or item.is_due(now)]

    def _patience(self) -> float | None:
        """How long nothing can become due by itself; None for ever."""
        everything = self._all()
        items = [item for item in everything if item.has_news()]
        if any(not item.hold for item in items):
            return max(0.001, self._flushed_at + _pace(everything) - time.monotonic())
        return LINGER_SECONDS / 2 if items else None

    def _note(self, request_id: str, event: TokenEvent | End, now: float) -> None:
        item = self._open.get(request_id)
        if item is None:
            return
        if isinstance(event, End):
            item.end = event
        elif isinstance(event, Delta):
            item.texts.append(event.text)
            item.num_tokens += len(event.tokens)
            if item.tokens is not None:
                item.tokens += event.tokens
            if item.probs is not None:
                item.probs += event.probs
        elif isinstance(event, Embedded):
            item.vectors.append(event)
        elif isinstance(event, Started):
            item.started = event
        if item.waiting_since is None:
            item.waiting_since = now

    def _flush(self, due: list[_Outgoing]) -> None:
        """One round trip for all that is due."""
        due = [item for item in due if item.in_flight is not None or item.has_news()]
        if not due:
            return
        self._flushed_at = time.monotonic()
        pipe = self._client.pipeline(transaction=False)
        places = []
        for item in due:
            arguments = item.pack()
            if item.ends_in_flight and item.end is not None:
                for command in item.end.before:
                    pipe.execute_command(*command)  # type: ignore[no-untyped-call]
            places.append(len(pipe))
            pipe.evalsha(self._script.sha, 2, item.ticket_key, item.key, *arguments)
        all_replies = pipe.execute(raise_on_error=False)
        replies = [all_replies[place] for place in places]
        failed = next((reply for reply in replies if isinstance(reply, Exception)), None)
        for item, reply in zip(due, replies, strict=True):
            if not isinstance(reply, Exception):
                self._sent(item, reply != 0)
        if self._on_flush is not None:
            self._on_flush(len(due))
        if isinstance(failed, NoScriptError):
            self._client.script_load(self._script.script)
            self._flush(due)
        elif failed is not None:
            raise failed

    def _sent(self, item: _Outgoing, held: bool) -> None:
        request_id = item.lease.ticket.request_id
        item.in_flight = None
        if not held and not item.fenced:
            item.fenced = True
            self._on_fenced(request_id)
        if item.ends_in_flight:
            self._open.pop(request_id, None)
            self._on_end(request_id, held)


def end_claimed(client: redis.Redis, lease: Lease, final: bytes, outcome: bytes) -> bool:
    """The last event of a ticket that was claimed, by whoever claimed it. False if another has claimed it since."""
    ticket = lease.ticket
    head: list[Any] = [
        ticket.request_id,
        lease.token,
        0,
        KEPT_SECONDS,
        _most_events(ticket),
        outcome,
        0,
        0,
        final,
    ]
    reply = script(client, "append")(keys=[ticket_key(ticket.request_id), stream_key(ticket.request_id)], args=head)
    return bool(reply)


# Reading

QUEUE_SIZE = 1024
PAGE_SIZE = 500
BLOCK_SECONDS = 5.0
WATCH_SECONDS = 2.0
MANY_STREAMS = 8
GATHER_SECONDS = 0.003
"""Where many streams are read, one read brings what came in so long, and nobody has to wake the reader meanwhile."""


class SlowFollower(Exception):
    """A follower did not take its events in time; its request goes on without it."""


@dataclass(slots=True, eq=False)
class _Follower:
    queue: asyncio.Queue[StreamEvent | None]
    after: tuple[int, int] = (0, 0)
    overflowed: bool = False

    def offer(self, event: StreamEvent | None) -> None:
        try:
            self.queue.put_nowait(event)
        except asyncio.QueueFull:
            self.overflowed = True


@dataclass(slots=True)
class _Followed:
    """A live stream: where the reader is in it, and who follows."""

    cursor: str
    followers: set[_Follower] = field(default_factory=set)
    last_news: float = 0.0
    strikes: int = 0


def _position(event_id: str) -> tuple[int, int]:
    milliseconds, _, number = event_id.partition("-")
    return int(milliseconds), int(number or 0)


class StreamReader:
    """Follows any number of requests over one connection. Belongs to one event loop."""

    def __init__(self, url: str) -> None:
        self._client = redis.asyncio.Redis.from_url(url, socket_timeout=5.0, socket_connect_timeout=1.0)
        self._url = url
        self._wake_key = f"wake:{uuid.uuid4().hex}"
        self._wake_cursor = "0"
        self._streams: dict[str, _Followed] = {}
        self._blocked = False
        self._tasks: list[asyncio.Task[None]] = []
        self._wakes: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()

    async def start(self) -> None:
        """Idempotent; `follow` calls it."""
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._run()), asyncio.create_task(self._watch())]

    async def stop(self) -> None:
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with contextlib.suppress(redis.RedisError, OSError):
            await self._client.delete(self._wake_key)
        await self._client.aclose()

    @property
    def num_followed(self) -> int:
        return len(self._streams)

    @contextlib.asynccontextmanager
    async def follow(self, request_id: str, last_id: str = "0") -> AsyncIterator[AsyncIterator[StreamEvent]]:
        """Events after `last_id`, up to the last one. The iterator raises SlowFollower when it is not read in time.

        A request that vanished from Redis ends with a finished event of error `request_lost`.
        """
        await self.start()
        follower = _Follower(asyncio.Queue(QUEUE_SIZE), _position(last_id))
        followed = self._streams.get(request_id)
        if followed is None:
            followed = self._streams[request_id] = _Followed(last_id)
            self._wake()
        followed.last_news = time.monotonic()
        followed.followers.add(follower)
        try:
            backlog: Sequence[StreamEvent] = ()
            if _position(followed.cursor) > follower.after:
                backlog = await asyncio.shield(asyncio.ensure_future(self._range(request_id, last_id)))
            yield self._events(follower, backlog)
        finally:
            followed.followers.discard(follower)
            if not followed.followers and self._streams.get(request_id) is followed:
                del self._streams[request_id]

    async def _events(self, follower: _Follower, backlog: Sequence[StreamEvent]) -> AsyncIterator[StreamEvent]:
        for event in backlog:
            follower.after = _position(event.id)
            yield event
            if event.kind == "finished":
                return
        while True:
            if follower.overflowed:
                raise SlowFollower
            next_one = await follower.queue.get()
            if next_one is None:
                return
            position = _position(next_one.id)
            if position > follower.after:
                follower.after = position
                yield next_one
            if next_one.kind == "finished":
                return

    async def past(self, request_id: str) -> AsyncIterator[StreamEvent]:
        """What the stream holds already, in pages, as fast as it is read: a long one would overflow a follower."""
        last_id = "0"
        while True:
            page = await self._range(request_id, last_id, count=PAGE_SIZE)
            for event in page:
                yield event
            if len(page) < PAGE_SIZE:
                return
            last_id = page[-1].id

    async def _range(self, request_id: str, last_id: str, *, count: int | None = None) -> list[StreamEvent]:
        entries: Any = await self._client.xrange(stream_key(request_id), min=f"({last_id}", count=count)
        return [_event(entry_id, values[b"e"]) for entry_id, values in entries]

    def _wake(self) -> None:
        """The reader must take up a stream that its pending read does not name."""
        self._changed.set()
        if self._blocked:
            self._blocked = False
            task = asyncio.create_task(self._send_wake())
            self._wakes.add(task)
            task.add_done_callback(self._wakes.discard)

    async def _send_wake(self) -> None:
        try:
            async with self._client.pipeline(transaction=False) as pipe:
                pipe.xadd(self._wake_key, {b"e": b""}, maxlen=1, approximate=False)
                pipe.expire(self._wake_key, 3600)
                await pipe.execute()
        except (redis.RedisError, OSError) as error:
            logger.warning("the stream reader could not be woken, it looks again by itself: %s", error)

    async def _run(self) -> None:
        backoff = 0.05
        while True:
            connection = self._client.connection_pool.make_connection()  # type: ignore[no-untyped-call]
            try:
                await connection.connect()
                while True:
                    if not self._streams:
                        self._changed.clear()
                        await self._changed.wait()
                    await self._read(connection)
                    backoff = 0.05
                    if len(self._streams) >= MANY_STREAMS:
                        await asyncio.sleep(GATHER_SECONDS)
            except Exception as error:  # noqa: BLE001 - logged; this task must outlive whatever comes: all streams hang on it
                logger.warning("the stream reader connects again: %r", error)
                await asyncio.sleep(backoff)
                backoff = min(MAX_BACKOFF_SECONDS, backoff * 2)
            finally:
                self._blocked = False
                await connection.disconnect(nowait=True)

    async def _read(self, connection: Any) -> None:
        names = list(self._streams)
        cursors = [self._streams[name].cursor for name in names]
        keys = [f"gen:{name}" for name in names]
        command = ["XREAD", "COUNT", 1000, "BLOCK", int(BLOCK_SECONDS * 1000), "STREAMS"]
        self._blocked = True
        await connection.send_command(*command, *keys, self._wake_key, *cursors, self._wake_cursor)
        reply = await connection.read_response(timeout=BLOCK_SECONDS + 3)
        self._blocked = False
        pairs = reply.items() if isinstance(reply, dict) else reply or ()
        for key, entries in pairs:
            if key == self._wake_key.encode():
                self._wake_cursor = entries[-1][0].decode()
            else:
                self._deliver(key[4:].decode(), entries)

    def _deliver(self, request_id: str, entries: Sequence[Any]) -> None:
        followed = self._streams.get(request_id)
        if followed is None:
            return
        followed.cursor = entries[-1][0].decode()
        followed.last_news, followed.strikes = time.monotonic(), 0
        for entry_id, values in entries:
            event = _event(entry_id, values[1])
            for follower in followed.followers:
                follower.offer(event)
            if event.kind == "finished":
                self._streams.pop(request_id, None)

    async def _watch(self) -> None:
        """End the streams of requests that Redis no longer knows (it lost its memory) or that were over before."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            quiet_since = time.monotonic() - WATCH_SECONDS
            quiet = [name for name, followed in self._streams.items() if followed.last_news < quiet_since]
            if not quiet:
                continue
            try:
                states = await self._states(quiet)
            except (redis.RedisError, OSError) as error:
                logger.warning("live requests could not be checked: %s", error)
                continue
            for name, state in zip(quiet, states, strict=True):
                self._judge(name, state)

    async def _states(self, request_ids: Sequence[str]) -> list[bytes | None]:
        async with self._client.pipeline(transaction=False) as pipe:
            for request_id in request_ids:
                pipe.hget(ticket_key(request_id), "state")
            states: list[bytes | None] = await pipe.execute()
            return states

    def _judge(self, request_id: str, state: bytes | None) -> None:
        followed = self._streams.get(request_id)
        if followed is None:
            return
        followed.strikes = followed.strikes + 1 if state in (None, b"done") else 0
        if followed.strikes < 2:  # the last event may be under way
            return
        del self._streams[request_id]
        lost = {"t": "finished", "reason": "error", "stop_word": None, "error": "request_lost", "receipt": None}
        for follower in followed.followers:
            milliseconds, number = follower.after
            follower.offer(None if state else StreamEvent(f"{milliseconds}-{number + 1}", lost))


def _event(entry_id: bytes, body: bytes) -> StreamEvent:
    return StreamEvent(entry_id.decode(), orjson.loads(body))

"""Feeds lines of batches to their endpoints, and writes down what comes back. A task on the web's event loop.

A line goes the way of any request: through the view of its endpoint, into admission, behind interactive work. At most
`batch_lines_at_once` are on that way; the others wait in their files. One process feeds at a time: it holds a lease in
Redis. That is manners, not safety. A line's request ids follow from its number, so a second feeder would find what the
first began, and an answer counts once (redelivery.py, book.py): whatever dies, the next round goes on where it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from io import BytesIO
from itertools import islice
from typing import IO, Any, TypeVar

import orjson
import redis
from django.conf import settings
from django.core.handlers.asgi import ASGIRequest
from django.db import DatabaseError
from django.http import HttpResponse
from django.utils import timezone

from accounts import redis_client
from accounts.identity import key_rows
from accounts.identity.principals import Principal
from accounts.ledger import quotas
from accounts.trail.refusals import Refusal
from inference import metrics
from inference.api.hop import shared_hop
from inference.api.openai.batch_endpoints import ENDPOINTS
from inference.batches import book, files, lines
from inference.batches.book import Answer, Status
from inference.batches.lines import Problem
from inference.batches.models import Batch, BatchLine
from inference.batches.terms import BatchTerms
from inference.transport.holding import KEPT_SECONDS
from inference.transport.queue import ticket_key, ticket_queue
from inference.transport.stream import stream_key
from inference.upkeep import reaper

logger = logging.getLogger(__name__)
Found = TypeVar("Found")

LEASE_KEY = "batches:feeder"
LEASE_SECONDS = 6.0
ROUND_SECONDS = 1.0
"""A round at least so often, for batches that others created or cancelled, and to renew the lease."""
GATHER_SECONDS = 0.05
"""Answers that come in so long are written down in one transaction."""
PURGE_SECONDS = 3600.0
TRIES_AT_THE_END = 20
"""For a line that was begun and cannot be asked for, while its batch ends."""
FAILED = b'{"error":{"message":"The server had an error while processing the request.","type":"server_error",'
FAILED += b'"param":null,"code":null}}'
Ended = tuple[Answer, tuple[str, ...]]
"""An answer, and the tickets that it came of."""
MAX_WAIT_SECONDS = 30.0
"""Between two attempts at a line that cannot be taken just now."""
CURBED_SECONDS = 600.0
"""A batch that had to give places back gets no more than it kept for so long, or until it has an answer: a line that is
taken back is queued again under its next id, of which it has no more than redelivery.MAX_PLACES."""


@dataclass(frozen=True, slots=True)
class Order:
    """A line as it is sent: the body of its request."""

    batch_id: str
    number: int
    custom_id: str
    endpoint: str
    body: bytes

    @property
    def request_id(self) -> str:
        return f"{self.batch_id.removeprefix('batch_')}-{self.number}"


@dataclass(slots=True, eq=False)
class Fed:
    """A line in hand. ending: its batch ends, so it is only asked for what was begun."""

    order: Order
    terms: BatchTerms
    ending: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    def end(self) -> None:
        self.terms.only_begun = True
        self.ending.set()


@dataclass(slots=True)
class Plan:
    """What a round found: lines to begin, batches that end, and those that want a job of their own."""

    orders: list[tuple[Order, BatchTerms]] = field(default_factory=list)
    ending: set[str] = field(default_factory=set)
    jobs: list[tuple[str, Callable[[], None]]] = field(default_factory=list)
    withdrawn: list[Fed] = field(default_factory=list)
    is_leader: bool = True


class Feeder:
    """Belongs to one event loop. Everything that blocks is in the hop."""

    def __init__(self) -> None:
        self._me = secrets.token_hex(8)
        self._news = asyncio.Event()
        self._fed: dict[tuple[str, int], Fed] = {}
        self._jobs: dict[str, asyncio.Task[None]] = {}
        self._answers: list[Ended] = []
        self._asked_again: set[str] = set()
        """Batches that end, whose first lines have been asked for what another feeder had begun."""
        self._curbed: dict[str, tuple[int, float]] = {}
        """Batches that gave places back: how many they may have, and until when."""
        self._turn = 0
        self._purge_at = 0.0
        self._metrics_at = 0.0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="feeder")

    async def stop(self) -> None:
        """What is in hand goes on in its worker; whoever feeds next finds it."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._let_go()
        try:
            await asyncio.to_thread(self._give_back_lease)
        except redis.RedisError as error:
            logger.warning("the feeder's lease runs out by itself: %s", error)

    def wake(self) -> None:
        """On the event loop's thread."""
        self._news.set()

    async def _run(self) -> None:
        while True:
            try:
                await self._round()
            except (Refusal, DatabaseError, redis.RedisError) as error:
                logger.warning("batches wait: %s", error)
                await asyncio.sleep(ROUND_SECONDS)
            except Exception:
                logger.exception("a round of the batches failed")
                await asyncio.sleep(ROUND_SECONDS)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ROUND_SECONDS):
                    await self._news.wait()
                await asyncio.sleep(GATHER_SECONDS)
            self._news.clear()

    # A round

    async def _round(self) -> None:
        answers, self._answers = self._answers, []
        in_hand: defaultdict[str, list[Fed]] = defaultdict(list)
        for fed in self._fed.values():
            in_hand[fed.order.batch_id].append(fed)
        busy = set(self._jobs)
        try:
            plan = await _hop(partial(self._look, answers, dict(in_hand), busy))
        except BaseException:
            self._answers[:0] = answers
            raise
        for answer, _ in answers:
            self._fed.pop((answer.batch_id, answer.number), None)
        if not plan.is_leader:
            await self._let_go()
            return
        for fed in self._fed.values():
            if fed.order.batch_id in plan.ending:
                fed.end()
        for fed in plan.withdrawn:
            self._drop(fed)
        for order, terms in plan.orders:
            self._begin(order, terms)
        for batch_id, job in plan.jobs:
            self._jobs[batch_id] = asyncio.create_task(self._work(batch_id, job))
        if answers or plan.withdrawn:
            self._news.set()  # there is room

    def _begin(self, order: Order, terms: BatchTerms) -> None:
        fed = Fed(order, terms)
        if terms.only_begun:
            fed.end()
        self._fed[order.batch_id, order.number] = fed
        fed.task = asyncio.create_task(self._answer(fed))

    def _drop(self, fed: Fed) -> None:
        """It is begun again at its next turn, or closed with the others of its batch that nobody answered."""
        if fed.task is not None and fed.task is not asyncio.current_task():
            fed.task.cancel()
        self._fed.pop((fed.order.batch_id, fed.order.number), None)
        self._news.set()

    async def _let_go(self) -> None:
        tasks = [task for fed in self._fed.values() if (task := fed.task) is not None]
        tasks += self._jobs.values()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._fed.clear()
        self._jobs.clear()
        self._asked_again.clear()
        self._curbed.clear()

    async def _work(self, batch_id: str, job: Callable[[], None]) -> None:
        """Validation, or the writing of results."""
        try:
            await _hop(job)
        except (Refusal, DatabaseError, redis.RedisError, OSError) as error:
            logger.warning("batch %s waits: %s", batch_id, error)
            await asyncio.sleep(ROUND_SECONDS)
        except Exception:
            logger.exception("batch %s is tried again", batch_id)
            await asyncio.sleep(MAX_WAIT_SECONDS)
        finally:
            self._jobs.pop(batch_id, None)
            self._news.set()

    # One line

    async def _answer(self, fed: Fed) -> None:
        """Ask until there is an answer that stands, or the batch ends first."""
        pause, tries_left = 0.0, TRIES_AT_THE_END
        while True:
            try:
                response = await _ask(fed.order, fed.terms)
            except Exception:
                logger.exception("line %d of batch %s failed", fed.order.number, fed.order.batch_id)
                response = HttpResponse(FAILED, status=500)
            wait = response.headers.get("Retry-After")
            if fed.terms.only_begun:
                tries_left -= 1
                if response.status_code == 409 or not tries_left:
                    self._drop(fed)
                    return
            if wait is None:
                break
            pause = min(MAX_WAIT_SECONDS, max(float(wait), pause * 2))
            await _either(fed.ending, pause)
        self._answers.append((_written(fed, response), tuple(fed.terms.request_ids)))
        self._news.set()

    # In a thread

    def _look(self, answers: list[Ended], in_hand: dict[str, list[Fed]], busy: set[str]) -> Plan:
        now = timezone.now()
        if answers:
            book.record([answer for answer, _ in answers])
            _tidy(answers)
            done = {(answer.batch_id, answer.number) for answer, _ in answers}
            for batch_id, _ in done:
                self._curbed.pop(batch_id, None)
            in_hand = {
                batch_id: [fed for fed in held if (batch_id, fed.order.number) not in done]
                for batch_id, held in in_hand.items()
            }
        if not self._hold_lease():
            return Plan(is_leader=False)
        self._keep_house(now)
        plan = Plan()
        feeding: list[Batch] = []
        for batch in book.open_batches():
            if batch.id in busy:
                continue
            self._judge(batch, now, in_hand.get(batch.id, []), plan, feeding)
        self._share_out(feeding, in_hand, plan, now)
        return plan

    def _judge(self, batch: Batch, now: datetime, held: list[Fed], plan: Plan, feeding: list[Batch]) -> None:
        """What is next for one batch."""
        if batch.status == Status.VALIDATING:
            plan.jobs.append((batch.id, partial(book.validate, batch, now)))
            return
        if batch.status == Status.IN_PROGRESS:
            principal = _principal(batch, now)
            if principal is None:
                text = "The API key of this batch is no longer valid."
                book.end(batch.id, Status.FAILED, now, [Problem("invalid_api_key", text)])
            elif now >= batch.expires_at:
                book.end(batch.id, Status.EXPIRED, now)
            elif batch.num_completed + batch.num_failed >= batch.num_lines:
                book.end(batch.id, Status.COMPLETED, now)
            else:
                feeding.append(batch)
                return
            batch.refresh_from_db()
        if batch.status not in (Status.FINALIZING, Status.CANCELLING):
            return
        plan.ending.add(batch.id)
        plan.withdrawn += [fed for fed in held if _withdraw(fed, "batch ended")]
        if batch.id not in self._asked_again:
            self._asked_again.add(batch.id)
            self._ask_again(batch, held, plan)
        elif not held:
            self._asked_again.discard(batch.id)
            plan.jobs.append((batch.id, partial(book.finalize, batch, now)))

    def _ask_again(self, batch: Batch, held: list[Fed], plan: Plan) -> None:
        """Lines that a feeder before this one began may run, or have an answer that is paid for."""
        principal = _principal(batch, None)
        if batch.in_progress_at is None or principal is None:
            return
        rows = book.waiting(batch, settings.CONFIG.batch_lines_at_once, [fed.order.number for fed in held])
        try:
            orders = _orders(batch, rows)
        except Refusal as refusal:
            logger.warning("batch %s ends without a look at what was begun: %s", batch.id, refusal)
            return
        plan.orders += [(order, _terms(batch, principal, only_begun=True)) for order in orders]

    def _share_out(self, feeding: list[Batch], in_hand: dict[str, list[Fed]], plan: Plan, now: datetime) -> None:
        """The free places among the batches, each time beginning with another; those that have fewest come first."""
        free = settings.CONFIG.batch_lines_at_once - sum(map(len, in_hand.values())) - len(plan.orders)
        if free <= 0:
            self._make_places(feeding, in_hand, plan)
            return
        self._turn += 1
        moment = time.monotonic()
        self._curbed = {each: curb for each, curb in self._curbed.items() if moment < curb[1]}
        in_turn = [feeding[(place + self._turn) % len(feeding)] for place in range(len(feeding))]
        for place, batch in enumerate(sorted(in_turn, key=lambda each: len(in_hand.get(each.id, [])))):
            if free <= 0:
                return
            held = [fed.order.number for fed in in_hand.get(batch.id, [])]
            share = min(free, max(-(-free // (len(feeding) - place)), _share(feeding) - len(held)))
            if batch.id in self._curbed:
                share = min(share, self._curbed[batch.id][0] - len(held))
            principal = _principal(batch, now)
            if principal is None or share <= 0:
                continue
            rows = book.waiting(batch, share, held)
            try:
                orders = _orders(batch, rows)
            except Refusal as refusal:
                book.end(batch.id, Status.FAILED, now, [Problem(refusal.code, refusal.message, "input_file_id")])
                continue
            plan.orders += [(order, _terms(batch, principal)) for order in orders]
            free -= len(orders)

    def _make_places(self, feeding: list[Batch], in_hand: dict[str, list[Fed]], plan: Plan) -> None:
        """For batches that have nothing in hand, from those that hold more than their share: lines that no worker has
        seen. Where nobody serves their model they would keep everybody else waiting until their batch expires."""
        share = _share(feeding)
        too_many = sum(max(0, len(in_hand.get(batch.id, [])) - share) for batch in feeding)
        without = (batch for batch in feeding if not in_hand.get(batch.id) and book.waiting(batch, 1))
        missing = share * sum(1 for _ in islice(without, -(-too_many // share)))  # of no more than could get one
        for batch in sorted(feeding, key=lambda each: -len(in_hand.get(each.id, []))):
            held = sorted(in_hand.get(batch.id, []), key=lambda fed: -fed.order.number)
            idle = (fed for fed in held if _is_idle(fed) and _withdraw(fed, "another batch's turn"))
            withdrawn = list(islice(idle, min(missing, max(0, len(held) - share))))
            missing -= len(withdrawn)
            plan.withdrawn += withdrawn
            if withdrawn:
                self._curbed[batch.id] = len(held) - len(withdrawn), time.monotonic() + CURBED_SECONDS

    def _keep_house(self, now: datetime) -> None:
        moment = time.monotonic()
        if moment >= self._metrics_at:
            self._metrics_at = moment + 5.0
            by_status, num_lines = book.counts()
            for status, number in by_status.items():
                metrics.BATCHES.labels(status).set(number)
            metrics.BATCH_LINES.set(num_lines)
        if moment >= self._purge_at:
            self._purge_at = moment + PURGE_SECONDS
            files.purge(now)

    def _hold_lease(self) -> bool:
        client = redis_client.client()
        milliseconds = int(LEASE_SECONDS * 1000)
        if client.set(LEASE_KEY, self._me, nx=True, px=milliseconds):
            return True
        holder: Any = client.get(LEASE_KEY)
        if holder != self._me.encode():
            for status in files.OPEN_STATES:
                metrics.BATCHES.labels(str(status)).set(0)
            metrics.BATCH_LINES.set(0)
            return False
        client.pexpire(LEASE_KEY, milliseconds)
        return True

    def _give_back_lease(self) -> None:
        client = redis_client.client()
        holder: Any = client.get(LEASE_KEY)
        if holder == self._me.encode():
            client.delete(LEASE_KEY)


async def _hop(work: Callable[[], Found]) -> Found:
    return await shared_hop().run(work, abandon=lambda _: None)


async def _either(event: asyncio.Event, seconds: float) -> None:
    """Until the event is set, or so long; where it is set already, a moment."""
    if event.is_set():
        await asyncio.sleep(min(seconds, ROUND_SECONDS))
        return
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


async def _ask(order: Order, terms: BatchTerms) -> HttpResponse:
    """As the API's door does it, without a key: the terms have whom it stands for."""
    scope = {
        "type": "http",
        "method": "POST",
        "path": order.endpoint,
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(order.body)).encode())],
        "llmsite.request_id": order.request_id,
        "llmsite.log": {},
    }
    request = ASGIRequest(scope, BytesIO(order.body))
    request._body = order.body
    view: Any = ENDPOINTS[order.endpoint].as_view(batch=terms)
    response: HttpResponse = await view(request)
    return response


def _written(fed: Fed, response: HttpResponse) -> Answer:
    order = fed.order
    admitted_as = fed.terms.request_ids[-1:] or [order.request_id]
    content = {
        "status_code": response.status_code,
        "request_id": admitted_as[0].partition(".")[0],
        "body": orjson.Fragment(response.content),
    }
    line = book.answer_line(order.batch_id, order.number, order.custom_id, response=content)
    return Answer(order.batch_id, order.number, response.status_code == 200, orjson.dumps(line).decode())


# In a thread


def _principal(batch: Batch, now: datetime | None) -> Principal | None:
    """None where the key that created the batch is not valid any more. now: None leaves its expiry out."""
    credential = key_rows.find(batch.key.public_id)
    if credential is None or not credential.is_usable:
        return None
    if now is not None and credential.expires_at is not None and credential.expires_at <= now:
        return None
    return credential.principal


def _terms(batch: Batch, principal: Principal, *, only_begun: bool = False) -> BatchTerms:
    return BatchTerms(
        batch_id=batch.id, principal=principal, expires_at=batch.expires_at.timestamp(), only_begun=only_begun
    )


def _orders(batch: Batch, rows: Iterable[BatchLine]) -> list[Order]:
    """Raises Refusal file_not_found."""
    rows = list(rows)
    if not rows:
        return []
    with files.open_bytes(files.find(batch.tenant_id, batch.input_file_id)) as file:
        return [_order(batch, row, file) for row in rows]


def _order(batch: Batch, row: BatchLine, file: IO[bytes]) -> Order:
    file.seek(row.offset)
    body = lines.body_of(file.read(row.size_bytes))
    return Order(batch.id, row.number, row.custom_id, batch.endpoint, body)


def _share(feeding: Sequence[Batch]) -> int:
    """Of the places for lines, those of one batch among these."""
    return max(1, settings.CONFIG.batch_lines_at_once // max(1, len(feeding)))


def _is_idle(fed: Fed) -> bool:
    """All that it has begun waits; a line of several answers may be half done."""
    states = [ticket_queue().state(request_id) for request_id in fed.terms.request_ids]
    return bool(states) and all(found is not None and found.state == "waiting" for found in states)


def _withdraw(fed: Fed, why: str) -> bool:
    """Take back what no worker has seen; False where something of the line runs or has ended."""
    taken = [request_id for request_id in fed.terms.request_ids if ticket_queue().discard(request_id)]
    for request_id in taken:
        quotas.release(request_id, why, timezone.now())
    return bool(taken) and len(taken) == len(fed.terms.request_ids)


def _tidy(ended: Iterable[Ended]) -> None:
    """Answers that are written down need no place in Redis; what a failed line still has running is cancelled."""
    client = redis_client.client()
    with client.pipeline(transaction=False) as pipe:
        for answer, request_ids in ended:
            for request_id in request_ids:
                if not answer.is_completed:
                    reaper.cancel(request_id)
                pipe.expire(ticket_key(request_id), KEPT_SECONDS)
                pipe.expire(stream_key(request_id), KEPT_SECONDS)
        pipe.execute()


# The feeder of this process

_feeder: tuple[Feeder, asyncio.AbstractEventLoop] | None = None


def start() -> None:
    """On the event loop, when the web starts. Idempotent."""
    global _feeder
    if _feeder is None:
        _feeder = Feeder(), asyncio.get_running_loop()
        _feeder[0].start()


async def stop() -> None:
    global _feeder
    found, _feeder = _feeder, None
    if found is not None:
        await found[0].stop()


def wake() -> None:
    """From any thread: there is something new. Another process's feeder sees it within a second."""
    found = _feeder
    if found is not None:
        found[1].call_soon_threadsafe(found[0].wake)

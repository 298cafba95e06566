"""The worker: one process per replica of a pool, which holds the pool's models and serves its tickets.

Task threads (Celery's) take a ticket, hand it to the engine and wait; the engines' threads generate; one thread
publishes (stream.py), one settles (settlement.py), one beats, one listens for cancels and orders, one follows the
registry, and two see to it that models are in memory when they are wanted (model_keeper.py).
Nothing of the web is imported here, and the web imports nothing of this.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import Any

import redis
from celery import bootsteps
from celery.signals import worker_shutting_down
from django.conf import settings
from django.db import DatabaseError, connection

from accounts import redis_client
from accounts.limits import throttling
from inference import metrics
from inference.catalog import adapters, registry
from inference.catalog.served import Served
from inference.digests import TokenDigest, prompt_digest, settings_digest
from inference.engine.runner import CRASHED
from inference.engine.types import (
    Delta,
    Embedded,
    EngineError,
    Finished,
    FinishReason,
    GenerationRequest,
    Parked,
    Receipt,
    Resumed,
    Started,
    TokenEvent,
)
from inference.settlement import Outcome, Settler, completion_of, outcome_of
from inference.slots import actions as slot_actions
from inference.slots.files import scope_of
from inference.transport import doorbell, model_orders
from inference.transport.completion_cache import CompletionCache
from inference.transport.queue import HEARTBEAT_TTL_SECONDS, Lease, Mark, Offer, Pulse, TicketQueue, batch_queue
from inference.transport.stream import End, StreamWriter, encode_finished
from inference.transport.ticket import Ticket
from inference.upkeep import reaper
from inference.upkeep.entitlements import POLL_SECONDS, Entitlements
from inference.worker import worker_metrics
from inference.worker.hosted import (
    STOPPING,
    UNAVAILABLE,
    HostedModel,
    LoadBackend,
    LoadSpeed,
    ReadAdapters,
    State,
    fingerprint,
    slot_files,
)
from inference.worker.memory import release_memory, resident_bytes
from inference.worker.model_keeper import LOOK_SECONDS, ModelKeeper
from inference.worker.slot_desk import SlotDesk

logger = logging.getLogger(__name__)

DEFAULT_POOL = "default"
BEAT_SECONDS = 0.5
REGISTRY_SECONDS = 3.0
SWEEP_SECONDS = 3600.0
"""States of slots that are too old are removed this often."""
STUCK_SECONDS = 30.0
"""Tickets wait and slots are free for so long: Celery's consumer has stopped, the process must be replaced."""
MIN_RUN_SECONDS = 0.5
"""Who was asked to make room is not asked again for so long, whatever the engine made of it."""
MAX_PARKS = 16
"""A sequence that made room so often is left in peace."""
NET_SECONDS = 30.0
"""An engine that has not ended a request so long after its deadline never will."""
EVENTS_OF_STREAMS = (Started, Delta, Embedded)
END_SECONDS = 1.0
"""After the drain: what has ended is written and settled by then, or left to the sweep."""
LATE_SECONDS = 1.4
"""After the drain: a worker that is still here ends, whatever it waits for. Two seconds are promised."""
LOST_LEASE_BEATS = 3
"""A lease that Redis knows and this process does not, for so many beats: the reply to `take` was lost."""


@dataclass(slots=True)
class _Live:
    """A request in the hands of this worker. Written by the engine's thread until `done` is set."""

    lease: Lease
    model: HostedModel
    leased_at: float
    done: threading.Event = field(default_factory=threading.Event)
    finished: Finished | None = None
    first_text_at: float | None = None
    digest: TokenDigest = field(init=False)
    """Of the answer's tokens."""
    parks: _Live | None = None
    """The request that makes room for this one."""
    num_parks: int = 0
    is_parked: bool = False
    asked_to_park_at: float = 0.0
    why: str = ""
    """Why it was cancelled."""
    output: list[str] | None = None
    """Kept where the completion cache may want it."""

    def __post_init__(self) -> None:
        self.digest = TokenDigest(settings.SECRET_KEY, self.lease.ticket.request_id, "answer")


class WorkerHost:
    """Everything of a worker but Celery. Start, then `serve` from any number of threads, then stop."""

    def __init__(
        self,
        pool: str,
        *,
        client: redis.Redis,
        worker_id: str | None = None,
        load: LoadBackend | None = None,
        read_registry: Callable[[str], list[Served]] = registry.in_pool,
        read_adapters: ReadAdapters = adapters.files_of,
        cache: CompletionCache | None = None,
        heartbeat_ttl_seconds: float = HEARTBEAT_TTL_SECONDS,
        on_stuck: Callable[[], None] | None = None,
        budget_bytes: float | None = None,
        num_threads: int | None = None,
    ) -> None:
        """budget_bytes: memory for models; None is as the settings say. num_threads: how many call `serve`; None is
        enough for all slots."""
        self.pool = pool
        self.worker_id = worker_id or f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self.queue = TicketQueue(client, order=settings.CONFIG.queue_order)
        self._client = client
        self._load, self._read_registry, self._read_adapters = load, read_registry, read_adapters
        self._cache = cache or CompletionCache(client, settings.CONFIG.completion_cache_ttl_seconds)
        self._ttl_seconds = heartbeat_ttl_seconds
        self._on_stuck = on_stuck
        self._num_threads = num_threads
        self._started_at = time.time()
        self._lock = threading.Lock()
        self._comparing = threading.Lock()
        self._models: dict[int, HostedModel] = {}
        self._live: dict[str, _Live] = {}
        self._ended: dict[str, tuple[Ticket, Outcome]] = {}
        self._cancelled_early: dict[str, tuple[float, str]] = {}
        self._stopping = threading.Event()
        self._gone = threading.Event()
        self._is_asked_to_stop = threading.Lock()
        self._has_stopped = threading.Event()
        self._has_news = threading.Event()
        self._settler = Settler(client)
        self._speed = LoadSpeed()
        self._keeper = ModelKeeper(
            pool,
            self.worker_id,
            self.queue,
            models=self._all_models,
            lock=self._lock,
            on_loaded=self._on_loaded,
            refuse=self._refuse,
            budget_bytes=budget_bytes,
        )
        self._slot_desk = SlotDesk(client, lambda model_id: self._models.get(model_id), self._using, slot_files())
        self._writer = StreamWriter(client, on_end=self._on_end, on_fenced=self._cancel)
        self._engine_metrics = worker_metrics.EngineMetrics()
        self._never_loaded: Sequence[HostedModel] = ()
        self._unknown_leases: dict[str, int] = {}
        self._free_and_waiting_since: float | None = None
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for name, target in [
                ("beat", self._beat),
                ("cancels", self._listen),
                ("registry", self._follow_registry),
                ("entitlements", self._follow_entitlements),
            ]
        ]

    # Life

    def start(self, *, waits: bool = True) -> None:
        """Load the pool's models. A model that cannot be loaded is reported, and the others serve. waits: until all
        that can be are; else what is loaded may serve while the others still load."""
        self._writer.start()
        self._settler.start()
        for served in self._read_registry(self.pool):
            self._models[served.id] = self._host(served)
        beat, cancels, follow, entitlements = self._threads
        beat.start()
        cancels.start()
        self._keeper.start()
        for model in self._all_models():
            self._load_if_eager(model)
        if waits:
            self._keeper.wait_until_settled()
        follow.start()
        entitlements.start()
        waiting = self._num_waiting()
        logger.info("worker %s of pool %s has started, %d tickets wait", self.worker_id, self.pool, waiting)
        self._ring(waiting)

    def stop(self, drain_seconds: float, end_seconds: float = END_SECONDS) -> None:
        """Take nothing more, let what runs end, end the rest with worker_stopping, write and settle all of it.

        Everything but the engines' last steps is over end_seconds after the drain. Who calls it again waits for the
        end, as long at most.
        """
        deadline = time.monotonic() + drain_seconds
        if not self._is_asked_to_stop.acquire(blocking=False):
            self._has_stopped.wait(_left(deadline + end_seconds))
            return
        self._stopping.set()
        try:
            self._stop(deadline, deadline + end_seconds)
        finally:
            self._has_stopped.set()

    def _stop(self, deadline: float, end: float) -> None:
        logger.info("worker %s stops; %d requests run", self.worker_id, len(self._live))
        self._keeper.stop(_left(end))
        self._never_loaded = [each for each in self._all_models() if each.state not in (State.READY, State.RETIRING)]
        self._refuse_what_nobody_loads()  # and with each beat from now on
        for model in self._all_models():
            model.drain(_left(deadline))
        for model in self._all_models():
            self._unload_at_the_end(model)
        _wait(lambda: not self._live, _left(end))
        if not self._writer.stop(_left(end)):
            logger.error("not every event could be written before the end")
        self._settler.stop(_left(end))
        self._slot_desk.close()
        self._gone.set()
        self._has_news.set()
        try:
            self._client.publish(f"cancel:{self.worker_id}", "")  # its listener looks up, once a second else
            self.queue.sign_off(self.worker_id, self.pool)
        except redis.RedisError as error:
            logger.warning("the worker could not sign off: %s", error)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(_left(end))

    @property
    def num_slots(self) -> int:
        return sum(model.num_slots for model in self._all_models())

    def _all_models(self) -> list[HostedModel]:
        """A copy in one step of the interpreter. Without the lock: `_take` holds that while it waits for Redis, and the
        heartbeat must not wait behind it."""
        return list(self._models.values())

    def _host(self, served: Served) -> HostedModel:
        return HostedModel(
            served, load=self._load, sink=self._sink, read_adapters=self._read_adapters, speed=self._speed
        )

    def _load_if_eager(self, model: HostedModel) -> None:
        if model.served.load_mode == "eager":
            self._keeper.order(model, by_operator=False)

    def _on_loaded(self, model: HostedModel) -> None:
        """On the loading thread."""
        self._load_adapters(model)
        self._has_news.set()
        waiting = self._keeper.waiting.get(model.served.id)
        for _ in range(min(waiting.number if waiting else 0, model.num_slots)):
            doorbell.ring(self.pool)
        if self._num_threads is not None and self.num_slots > self._num_threads:
            logger.warning(
                "%d slots have %d task threads: a worker that is started anew, or with --concurrency, has more",
                self.num_slots,
                self._num_threads,
            )

    def _unload_at_the_end(self, model: HostedModel) -> None:
        try:
            model.unload()
        except EngineError as error:
            logger.warning("%s", error)

    def _load_adapters(self, model: HostedModel) -> None:
        try:
            model.follow_adapters()
        except DatabaseError as error:
            logger.warning("the adapters of %s are loaded when they are asked for: %s", model.served.name, error)

    # Serving, on task threads

    def serve(self) -> None:
        """Take tickets and serve them, until none is left that has a free slot. A bell that finds none may be for a
        model that is not loaded."""
        live = self._take()
        if live is None and any(model.num_slots == 0 for model in self._all_models()):
            self._keeper.look()
        while live is not None:
            self._serve(live)
            live = self._take()

    def _take(self) -> _Live | None:
        """One at a time, so that a ticket is only taken for a slot that is free."""
        with self._lock:
            if self._stopping.is_set():
                return None
            offer = self._offer()
            patient = [model_id for model_id in offer.free if self._models[model_id].takes_batch]
            try:
                lease = self.queue.take(self.pool, self.worker_id, offer)
                if lease is None:
                    lease = self.queue.take(batch_queue(self.pool), self.worker_id, patient)
            except redis.RedisError as error:
                logger.warning("no ticket could be taken: %s", error)
                return None
            if lease is None:
                self._free_and_waiting_since = None  # whoever waits may not go: the worker is not stuck
                return None
            model = self._models[lease.ticket.model_id]
            lease = _as_served(lease, model.served.digest)
            model.num_busy += 1
            live = _Live(lease, model, time.time(), output=[] if lease.ticket.cache_key else None)
            if lease.parks is not None:
                live.parks = self._to_be_parked(model, lease.parks)
            self._live[lease.ticket.request_id] = live
            if not lease.ticket.is_batch:  # these wait as long as they may
                worker_metrics.taken(self.pool, lease)
            return live

    def _offer(self) -> Offer:
        """What could be served now: by free slots, and where all are taken, in the place of what can be parked."""
        models = list(self._models.items())
        free = tuple(model_id for model_id, model in models if model.takes)
        live = list(self._live.values())
        full = {id(model) for model_id, model in models if model_id not in free and model.can_park()}
        return Offer(
            free=free,
            groups=frozenset(each.lease.ticket.group for each in live),
            parkable=frozenset(
                (each.lease.ticket.model_id, each.lease.ticket.tenant_id)
                for each in live
                if id(each.model) in full and _can_be_parked(each)
            ),
        )

    def _to_be_parked(self, model: HostedModel, tenant_id: int) -> _Live | None:
        """Of the tenant's sequences a batch's, then the one that was parked least often, then the youngest: that has
        least to move. None where all have ended since: then their slots are free."""
        found = [
            each
            for each in list(self._live.values())
            if each.model is model and each.lease.ticket.tenant_id == tenant_id and _can_be_parked(each)
        ]
        chosen = min(
            found, key=lambda each: (not each.lease.ticket.is_batch, each.num_parks, -each.leased_at), default=None
        )
        if chosen is not None:
            chosen.num_parks += 1
            chosen.asked_to_park_at = time.time()
        return chosen

    def _serve(self, live: _Live) -> None:
        ticket = live.lease.ticket
        self._writer.open(live.lease)
        try:
            finished = self._generate(live)
        except Exception:  # whatever it was, the request must end
            logger.exception("request %s could not be handed to the engine", ticket.request_id)
            finished = self._given_up(live)
        finally:
            with self._lock:
                live.model.num_busy -= 1
            self._let_go(live.model, ticket.keep_alive_seconds)
        try:
            self._end(live, finished)
        finally:
            self._live.pop(ticket.request_id, None)

    def _let_go(self, model: HostedModel, keep_alive_seconds: float | None = None) -> None:
        """Somebody has used it until now; whoever waits for its place may have it, if nobody else does."""
        model.use(keep_alive_seconds)
        is_over_soon = model.unload_at - time.monotonic() < LOOK_SECONDS
        if model.is_idle() and (is_over_soon or any(each.is_waiting for each in self._all_models())):
            self._keeper.look()

    @contextmanager
    def _using(self, model: HostedModel, seconds: float) -> Iterator[None]:
        """Keep it loaded inside, and load it first if it is not. Raises EngineError where that takes too long."""
        deadline = time.monotonic() + seconds
        while True:
            with self._lock:
                if model.state is State.READY:
                    model.num_visits += 1
                    break
            if self._stopping.is_set() or time.monotonic() > deadline:
                raise EngineError(UNAVAILABLE, f"{model.served.name} is not loaded yet")
            if model.state is State.FAILED and not model.may_retry():
                raise EngineError(UNAVAILABLE, model.error)
            if not model.is_in_memory:
                self._keeper.order(model)
            self._keeper.wait_until_settled(max(0.1, deadline - time.monotonic()))
            self._gone.wait(0.02)  # it may have to wait for others' work
        try:
            yield
        finally:
            with self._lock:
                model.num_visits -= 1
            self._let_go(model)

    def _refuse(self, model: HostedModel, error: str | None = None) -> None:
        """End all that waits for a model which no worker can load. On the keeper's thread; at the end, others'."""
        while True:
            try:
                lease = self.queue.take(self.pool, self.worker_id, [model.served.id], order="fifo")
            except redis.RedisError as problem:
                logger.warning("requests for %s wait on: %s", model.served.name, problem)
                return
            if lease is None:
                return
            live = _Live(lease, model, time.time())
            self._live[lease.ticket.request_id] = live
            try:
                self._writer.open(lease)
                self._end(live, _without_engine(lease.ticket, FinishReason.ERROR, error or model.error_code))
            finally:
                self._live.pop(lease.ticket.request_id, None)

    def _generate(self, live: _Live) -> Finished:
        ticket = live.lease.ticket
        # Its age is Redis' word, since the clock here need not be that of the host which wrote the deadlines.
        now = ticket.created_at + live.lease.waited_seconds
        if ticket.queue_deadline_at < now:
            return _without_engine(ticket, FinishReason.ERROR, "queue_timeout")
        if (early := self._cancelled_early.pop(ticket.request_id, None)) is not None:
            live.why = early[1]
            return _without_engine(ticket, FinishReason.CANCELLED)
        seconds = _seconds_left(ticket, now)
        request = GenerationRequest(
            request_id=ticket.request_id,
            prompt=ticket.prompt,
            max_tokens=ticket.max_tokens,
            sampling=ticket.sampling,
            decoding=ticket.decoding,
            stop=ticket.stop,
            deadline=time.monotonic() + seconds,
            adapters=ticket.adapters,
            cache_scope=scope_of(ticket.tenant_id),
            cache_prompt=ticket.prefix_cache,
            embedding=ticket.embedding,
            is_patient=ticket.is_batch,
        )
        try:
            live.model.submit(request)
            if live.parks is not None:
                live.model.park(live.parks.lease.ticket.request_id)
        except EngineError as error:
            logger.warning("request %s was not taken by the engine: %s", ticket.request_id, error)
            return _without_engine(ticket, FinishReason.ERROR, error.code)
        except DatabaseError as error:
            logger.error("adapters of request %s could not be looked up: %s", ticket.request_id, error)
            return _without_engine(ticket, FinishReason.ERROR, UNAVAILABLE)
        live.done.wait(max(0.0, seconds) + NET_SECONDS)
        if live.finished is None:
            logger.error("request %s was not ended by the engine", ticket.request_id)
            return self._given_up(live)
        return live.finished

    def _given_up(self, live: _Live) -> Finished:
        """The engine may have it, and is told that nobody waits for it any more."""
        live.model.cancel(live.lease.ticket.request_id)
        return _without_engine(live.lease.ticket, FinishReason.ERROR, CRASHED)

    def _end(self, live: _Live, finished: Finished) -> None:
        """The place goes back before the last event, so that a client may ask again as soon as it sees it."""
        ticket, now = live.lease.ticket, time.time()
        if finished.reason is FinishReason.CANCELLED and live.why not in ("", "cancelled"):
            finished = replace(finished, error=live.why)  # not its client has ended it
        outcome = outcome_of(
            ticket,
            finished,
            worker=self.worker_id,
            now=now,
            leased_at=live.leased_at,
            digests=_digests(live) if finished.receipt.num_steps else {},
        )
        unused = max(0, ticket.entered_tokens - outcome.charged_tokens)
        before = [throttling.leave_command(ticket.tenant_id, ticket.quota_key_id, ticket.request_id, unused)]
        if live.output is not None and (completion := completion_of(ticket, finished, "".join(live.output))):
            before += filter(None, [self._cache.put_command(ticket.cache_key or "", completion)])
        self._ended[ticket.request_id] = ticket, outcome
        receipt = finished.receipt
        num_computed = max(0, receipt.prompt_tokens - receipt.cached_tokens) if receipt.num_steps else 0
        final = encode_finished(finished, self.worker_id)
        self._writer.finish(
            ticket.request_id,
            End(final, outcome.to_bytes(), before, num_computed=num_computed, num_generated=receipt.completion_tokens),
        )
        worker_metrics.held(ticket.model_name, receipt.held_tokens)
        if live.first_text_at is not None and not ticket.is_batch:  # nobody waited for that
            worker_metrics.first_token(ticket.model_name, live.first_text_at - ticket.created_at)

    def _on_end(self, request_id: str, held: bool) -> None:
        """On the publisher's thread. Whoever was fenced off settles nothing: another has."""
        ticket, outcome = self._ended.pop(request_id)
        if held:
            self._settler.submit(ticket, outcome)
        else:
            logger.warning("request %s was ended by another, its work here is dropped", request_id)

    # Events, on the engines' threads

    def _sink(self, events: Sequence[TokenEvent]) -> None:
        """Nothing here blocks: text goes to the publisher, ends to the task thread that waits."""
        self._writer.publish([event for event in events if isinstance(event, EVENTS_OF_STREAMS)])
        for event in events:
            live = self._live.get(event.request_id)
            if live is None:
                continue
            if isinstance(event, Finished):
                live.finished = event
                live.done.set()
            elif isinstance(event, Parked | Resumed):
                live.is_parked = isinstance(event, Parked)
                if isinstance(event, Resumed):
                    metrics.PARKED_SECONDS.labels(live.lease.ticket.model_name).observe(event.seconds)
            elif isinstance(event, Delta):
                live.digest.update(event.tokens)
                if not event.text:
                    continue
                if live.first_text_at is None:
                    live.first_text_at = time.time()
                if live.output is not None:
                    live.output.append(event.text)

    # Cancels

    def _cancel(self, request_id: str, why: str = "cancelled") -> None:
        live = self._live.get(request_id)
        if live is None:
            self._cancelled_early[request_id] = time.monotonic(), why
        else:
            live.why = live.why or why
            live.model.cancel(request_id)

    def _listen(self) -> None:
        """Cancels come by publish within milliseconds; those lost on the way come with the next beat. Orders about
        slots come here, too; who sent one that was lost hears of it."""
        while not self._gone.is_set():
            try:
                with self._client.pubsub(ignore_subscribe_messages=True) as pubsub:  # type: ignore[no-untyped-call]
                    cancels, slots = f"cancel:{self.worker_id}", slot_actions.channel_of(self.worker_id)
                    models = model_orders.channel_of(self.worker_id)
                    pubsub.subscribe(cancels, slots, models)
                    while not self._gone.is_set():
                        message = pubsub.get_message(timeout=1.0)
                        if message is not None:
                            self._follow_word(message["channel"].decode(), message["data"])
            except redis.RedisError as error:
                logger.warning("cancels come by heartbeat until Redis is back: %s", error)
                self._gone.wait(BEAT_SECONDS)

    def _follow_word(self, channel: str, data: bytes) -> None:
        try:
            if channel == slot_actions.channel_of(self.worker_id):
                self._slot_desk.take(data)
            elif channel == model_orders.channel_of(self.worker_id):
                self._take_model_order(data)
            else:
                request_id, _, why = data.decode().partition(" ")
                self._cancel(request_id, why or "cancelled")
        except Exception:  # whatever was published, the next word must be heard
            logger.exception("a word to this worker could not be followed")

    def _take_model_order(self, data: bytes) -> None:
        try:
            order = model_orders.ModelOrder.parse(data)
        except (ValueError, TypeError) as error:
            logger.error("an order about a model cannot be read: %s", error)
            return
        model = self._models.get(order.model_id)
        if model is None:
            logger.warning("an order to %s a model that this worker does not hold is dropped", order.action)
        elif order.action == "load":
            self._keeper.order(model)
        else:
            self._keeper.dismiss(model)

    # Heartbeat

    def _beat(self) -> None:
        while not self._gone.is_set():
            try:
                self.beat()
            except redis.RedisError as error:
                logger.warning("the heartbeat waits for Redis: %s", error)
            except Exception:
                logger.exception("a heartbeat failed")
            self._has_news.wait(BEAT_SECONDS)
            self._has_news.clear()

    def beat(self) -> None:
        """One beat now, and what it brings. Raises redis.RedisError."""
        slots = {model.served.id: model.num_slots for model in self._all_models()}
        args = (self.worker_id, self.pool, self.num_slots, self._info(), self._ttl_seconds)
        self._note(self.queue.beat(*args, model_slots=slots))

    def _info(self) -> dict[str, Any]:
        return {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started_at": self._started_at,
            "stopping": self._stopping.is_set(),
            "models": [model.report() for model in self._all_models()],
            "budget_bytes": int(self._keeper.budget_bytes),
            "used_bytes": self._keeper.used_bytes,
            "resident_bytes": resident_bytes(),
            "disk": _disk(),
        }

    def _note(self, pulse: Pulse) -> None:
        for request_id, why in pulse.cancels.items():
            self._cancel(request_id, why)
        self._end_lost_leases(pulse.leases)
        self._forget_old_cancels()
        self._engine_metrics.update(self.pool, pulse, self._all_models())
        worker_metrics.memory(self.pool, self._all_models(), self._keeper.budget_bytes)
        if self._stopping.is_set():
            self._refuse_what_nobody_loads()
            return
        if pulse.num_waiting or pulse.num_batch_waiting:
            self._keeper.look()
        self._watch(pulse.num_waiting, pulse.num_batch_waiting)
        if pulse.num_batch_waiting and any(model.takes_batch for model in self._all_models()):
            self._ring(min(pulse.num_batch_waiting, self.num_slots))

    def _refuse_what_nobody_loads(self) -> None:
        """At the end: requests for models that are not loaded need not wait for the next worker."""
        models = {model.served.id: model for model in self._never_loaded}
        try:
            waiting = self.queue.waiting(self.pool, self.worker_id, dict.fromkeys(models, Mark.UNABLE))
        except redis.RedisError as error:
            logger.warning("requests for models that are not loaded wait for another worker: %s", error)
            return
        for model_id, found in waiting.items():
            if found.is_hopeless and found.number:
                self._refuse(models[model_id], STOPPING)

    def _end_lost_leases(self, leases: frozenset[str]) -> None:
        """Leases whose `take` was answered into a broken connection: nobody serves them, so they are given up."""
        unknown = leases - frozenset(self._live) - frozenset(self._ended)
        self._unknown_leases = {each: self._unknown_leases.get(each, 0) + 1 for each in unknown}
        lost = [each for each, beats in self._unknown_leases.items() if beats > LOST_LEASE_BEATS]
        if lost:
            logger.error("%d leases were lost on the way and are given up", len(lost))
            self.queue.give_up(self.worker_id, lost)

    def _forget_old_cancels(self) -> None:
        horizon = time.monotonic() - 60.0
        for request_id in [each for each, (at, _) in self._cancelled_early.items() if at < horizon]:
            self._cancelled_early.pop(request_id, None)

    def _watch(self, num_waiting: int, num_batch_waiting: int) -> None:
        """Slots are free while tickets of their models wait: a doorbell was lost, or Celery's consumer has stopped."""
        due = 0
        for model in self._all_models() if num_waiting or num_batch_waiting else ():
            waiting = self._keeper.waiting.get(model.served.id)
            if waiting is None:
                continue
            if num_waiting and model.takes:
                due += min(waiting.number, model.num_slots + model.num_held_back - model.num_busy)
            elif num_batch_waiting and model.takes_batch:
                due += min(waiting.number, 1)
        if self._num_threads is not None:  # one that serves cannot answer a bell
            due = min(due, self._num_threads - len(self._live))
        if due <= 0 or self._stopping.is_set():
            self._free_and_waiting_since = None
            return
        now = time.monotonic()
        if self._free_and_waiting_since is None:
            self._free_and_waiting_since = now
        self._ring(due)
        if now - self._free_and_waiting_since > STUCK_SECONDS and self._on_stuck is not None:
            logger.critical("tickets wait while slots are free for %d s: this worker ends", STUCK_SECONDS)
            self._on_stuck()

    def _ring(self, number: int) -> None:
        for _ in range(min(number, max(1, self.num_slots))):
            doorbell.ring(self.pool)

    def _num_waiting(self) -> int:
        try:
            return self.queue.num_waiting(self.pool)
        except redis.RedisError:
            return 0

    # Rights

    def _follow_entitlements(self) -> None:
        entitlements = Entitlements(self.queue, lambda id_, why: reaper.cancel(id_, queue=self.queue, why=why))
        entitlements.poll()
        while not self._gone.wait(POLL_SECONDS):
            entitlements.poll()
        connection.close()

    # The registry

    def _follow_registry(self) -> None:
        next_sweep = 0.0
        while not self._gone.wait(REGISTRY_SECONDS):
            try:
                if time.monotonic() >= next_sweep:
                    next_sweep = time.monotonic() + SWEEP_SECONDS
                    slot_files().sweep()
                self._compare_all()
            except DatabaseError as error:
                logger.warning("the registry could not be read: %s", error)
                connection.close()
            except Exception:
                logger.exception("the registry could not be followed")
        connection.close()

    def follow_registry(self) -> None:
        """Load what is new, replace what was changed and unload what is gone, as soon as it is idle; wait for it."""
        self._compare_all()
        self._keeper.wait_until_settled()

    def _compare_all(self) -> None:
        with self._comparing:  # two at once would each replace the same model
            if self._stopping.is_set():
                return
            wanted = {served.id: served for served in self._read_registry(self.pool)}
            for model in self._all_models():
                self._compare(model, wanted.pop(model.served.id, None))
            for served in wanted.values():
                model = self._host(served)
                with self._lock:
                    self._models[served.id] = model
                self._load_if_eager(model)
        self._keeper.look()

    def _compare(self, model: HostedModel, served: Served | None) -> None:
        if served is None or fingerprint(served) != fingerprint(model.served):
            self._replace(model, served)
            return
        is_due = served.load_mode != model.served.load_mode or (model.state is State.FAILED and model.may_retry())
        model.served = served
        model.follow_adapters()
        if is_due and not model.is_in_memory:
            self._load_if_eager(model)

    def _replace(self, model: HostedModel, served: Served | None) -> None:
        with self._lock:
            model.retire()
            if not model.is_idle():
                return
            model.is_replaced = True
        try:
            model.unload(to=State.RETIRING)
        except EngineError as error:
            logger.warning("%s", error)
        metrics.MODEL_UNLOADS.labels(model.served.name, "replaced").inc()
        release_memory()
        with self._lock:
            if served is None:
                del self._models[model.served.id]
                return
            successor = self._models[served.id] = self._host(served)
        self._load_if_eager(successor)


def _disk() -> dict[str, int]:
    """Bytes of the disk that holds states of slots and models; {} where it cannot be asked."""
    try:
        usage = shutil.disk_usage(settings.CONFIG.state)
    except OSError:
        return {}
    return {"free": usage.free, "total": usage.total}


def _digests(live: _Live) -> dict[str, str]:
    """What a replay is compared with; no content."""
    ticket, secret = live.lease.ticket, settings.SECRET_KEY
    return {
        "prompt": prompt_digest(secret, ticket.request_id, ticket.prompt),
        "settings": settings_digest(
            secret, ticket.request_id, ticket.sampling, ticket.decoding, ticket.stop, ticket.adapters
        ),
        "answer": live.digest.hexdigest(),
    }


def _as_served(lease: Lease, digest: str) -> Lease:
    """The file was swapped while the ticket waited: the receipt names what computes it, and the completion cache, whose
    key is of the file before, does not get it."""
    if lease.ticket.model_digest == digest:
        return lease
    return replace(lease, ticket=replace(lease.ticket, model_digest=digest, cache_key=None))


def _seconds_left(ticket: Ticket, now: float) -> float:
    """A line of a batch may wait for a day, and takes no longer than others once it runs."""
    left = ticket.deadline_at - now
    return min(left, settings.CONFIG.generation_timeout_seconds) if ticket.is_batch else left


def _can_be_parked(live: _Live) -> bool:
    """It generates, in no slot that its client named."""
    is_at_it = live.first_text_at is not None and not live.done.is_set() and not live.is_parked
    may = live.num_parks < MAX_PARKS and time.time() - live.asked_to_park_at >= MIN_RUN_SECONDS
    return is_at_it and may and live.lease.ticket.decoding.slot_id is None


def _without_engine(ticket: Ticket, reason: FinishReason, error: str | None = None) -> Finished:
    receipt = Receipt(prompt_tokens=ticket.num_prompt_tokens)
    return Finished(ticket.request_id, reason, receipt, error=error or (UNAVAILABLE if reason == "error" else None))


def _left(until: float) -> float:
    """Seconds, none where it has passed."""
    return max(0.0, until - time.monotonic())


def _wait(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


# Celery

_host: WorkerHost | None = None


def current_host() -> WorkerHost | None:
    """The host of this process, in workers."""
    return _host


class Stopper(threading.Thread):
    """Drains the host as soon as the process is told to stop. Celery's loop looks up once a second. What does not
    end by itself LATE_SECONDS after the drain is ended.

    A thread that waits for a word, since a signal's handler may interrupt what starts threads or holds a lock.
    """

    def __init__(self, host: WorkerHost, drain_seconds: float, end: Callable[[], None] | None = None) -> None:
        super().__init__(name="stopper", daemon=True)
        self._host, self._drain_seconds = host, drain_seconds
        self._end = end or _end_late
        self._asked: SimpleQueue[None] = SimpleQueue()

    def ask(self, **_: Any) -> None:
        """Celery's signal, in the handler of the process's."""
        self._asked.put(None)

    def run(self) -> None:
        self._asked.get()
        late = threading.Timer(self._drain_seconds + LATE_SECONDS, self._end)
        late.daemon = True
        late.start()
        self._host.stop(self._drain_seconds)


class HostStep(bootsteps.StartStopStep):
    """Models begin to load before the consumer takes anything, each serves once it is there, and all are drained before
    the pool waits for its threads."""

    requires = ("celery.worker.components:Pool",)

    def start(self, parent: Any) -> None:
        global _host
        pool = _pool_of(parent)
        _host = WorkerHost(pool, client=redis_client.client(), on_stuck=_exit, num_threads=parent.concurrency)
        stopper = Stopper(_host, settings.CONFIG.drain_seconds)
        stopper.start()
        worker_shutting_down.connect(stopper.ask, weak=False)
        _host.start(waits=False)

    def stop(self, parent: Any) -> None:
        if _host is not None:
            _host.stop(settings.CONFIG.drain_seconds)

    close = stop
    terminate = stop


def _pool_of(parent: Any) -> str:
    """The queue that the worker was started with is its pool."""
    others = {doorbell.HOUSEKEEPING, parent.app.conf.task_default_queue}
    queues = [name for name in parent.app.amqp.queues.consume_from if name not in others]
    return str(queues[0]) if queues else DEFAULT_POOL


def _exit() -> None:
    """The supervisor starts another."""
    os._exit(75)


def _end_late() -> None:
    logger.critical("the worker did not end %g s after its drain: it is ended", LATE_SECONDS)
    os._exit(75)

"""The worker: one process per replica of a pool, which holds the pool's models and serves its tickets.

Task threads (Celery's) take a ticket, hand it to the engine and wait; the engines' threads generate; one thread
publishes (stream.py), one settles (settlement.py), one beats, one listens for cancels, one follows the registry.
Nothing of the web is imported here, and the web imports nothing of this.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import redis
from celery import bootsteps
from django.conf import settings
from django.db import DatabaseError, connection

from accounts import redis_client, throttling
from inference import adapters, doorbell, registry, slot_actions, worker_metrics
from inference.completion_cache import CompletionCache
from inference.engine.types import (
    Delta,
    EngineError,
    Finished,
    FinishReason,
    GenerationRequest,
    Receipt,
    TokenEvent,
)
from inference.hosted import (
    UNAVAILABLE,
    HostedModel,
    LoadBackend,
    ReadAdapters,
    State,
    fingerprint,
    load_backend,
    slot_files,
)
from inference.queue import HEARTBEAT_TTL_SECONDS, Lease, Pulse, TicketQueue
from inference.registry import Served
from inference.settlement import Outcome, Settler, completion_of, outcome_of
from inference.slot_desk import SlotDesk
from inference.slot_files import scope_of
from inference.stream import End, StreamWriter, encode_finished
from inference.ticket import Ticket

logger = logging.getLogger(__name__)

DEFAULT_POOL = "default"
BEAT_SECONDS = 0.5
REGISTRY_SECONDS = 3.0
SWEEP_SECONDS = 3600.0
"""States of slots that are too old are removed this often."""
STUCK_SECONDS = 30.0
"""Tickets wait and slots are free for so long: Celery's consumer has stopped, the process must be replaced."""
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
    output: list[str] | None = None
    """Kept where the completion cache may want it."""


class WorkerHost:
    """Everything of a worker but Celery. Start, then `serve` from any number of threads, then stop."""

    def __init__(
        self,
        pool: str,
        *,
        client: redis.Redis,
        worker_id: str | None = None,
        load: LoadBackend = load_backend,
        read_registry: Callable[[str], list[Served]] = registry.in_pool,
        read_adapters: ReadAdapters = adapters.files_of,
        cache: CompletionCache | None = None,
        heartbeat_ttl_seconds: float = HEARTBEAT_TTL_SECONDS,
        on_stuck: Callable[[], None] | None = None,
    ) -> None:
        self.pool = pool
        self.worker_id = worker_id or f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self.queue = TicketQueue(client)
        self._client = client
        self._load, self._read_registry, self._read_adapters = load, read_registry, read_adapters
        self._cache = cache or CompletionCache(client, settings.CONFIG.completion_cache_ttl_seconds)
        self._ttl_seconds = heartbeat_ttl_seconds
        self._on_stuck = on_stuck
        self._started_at = time.time()
        self._lock = threading.Lock()
        self._models: dict[int, HostedModel] = {}
        self._live: dict[str, _Live] = {}
        self._ended: dict[str, tuple[Ticket, Outcome]] = {}
        self._cancelled_early: dict[str, float] = {}
        self._stopping = threading.Event()
        self._gone = threading.Event()
        self._has_news = threading.Event()
        self._settler = Settler(client)
        self._slot_desk = SlotDesk(client, lambda model_id: self._models.get(model_id))
        self._writer = StreamWriter(client, on_end=self._on_end, on_fenced=self._cancel)
        self._engine_metrics = worker_metrics.EngineMetrics()
        self._unknown_leases: dict[str, int] = {}
        self._free_and_waiting_since: float | None = None
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for name, target in [("beat", self._beat), ("cancels", self._listen), ("registry", self._follow_registry)]
        ]

    # Life

    def start(self) -> None:
        """Load the pool's models, then be ready. A model that cannot be loaded is reported, and the others serve."""
        self._writer.start()
        self._settler.start()
        for served in self._read_registry(self.pool):
            self._models[served.id] = self._host(served)
        beat, cancels, follow = self._threads
        beat.start()
        cancels.start()
        for model in self._all_models():
            if model.served.load_mode == "eager":
                self._try_load(model)
        follow.start()
        waiting = self._num_waiting()
        logger.info("worker %s of pool %s is ready, %d tickets wait", self.worker_id, self.pool, waiting)
        self._ring(waiting)

    def stop(self, drain_seconds: float) -> None:
        """Take nothing more, let what runs end, end the rest with worker_stopping, write and settle all of it."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        deadline = time.monotonic() + drain_seconds
        logger.info("worker %s stops; %d requests run", self.worker_id, len(self._live))
        for model in self._all_models():
            model.drain(max(0.0, deadline - time.monotonic()))
        for model in self._all_models():
            model.unload()
        _wait(lambda: not self._live, 2.0)
        if not self._writer.stop(2.0):
            logger.error("not every event could be written before the end")
        self._settler.stop(2.0)
        self._slot_desk.close()
        self._gone.set()
        self._has_news.set()
        try:
            self.queue.sign_off(self.worker_id, self.pool)
        except redis.RedisError as error:
            logger.warning("the worker could not sign off: %s", error)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(2.0)

    @property
    def num_slots(self) -> int:
        return sum(model.num_slots for model in self._all_models())

    def _all_models(self) -> list[HostedModel]:
        with self._lock:
            return list(self._models.values())

    def _host(self, served: Served) -> HostedModel:
        return HostedModel(served, load=self._load, sink=self._sink, read_adapters=self._read_adapters)

    def _try_load(self, model: HostedModel) -> None:
        try:
            model.load()
        except EngineError:
            logger.warning("the worker goes on without %s", model.served.name)
        else:
            self._load_adapters(model)
        self._has_news.set()

    def _load_adapters(self, model: HostedModel) -> None:
        try:
            model.follow_adapters()
        except DatabaseError as error:
            logger.warning("the adapters of %s are loaded when they are asked for: %s", model.served.name, error)

    # Serving, on task threads

    def serve(self) -> None:
        """Take tickets and serve them, until none is left that has a free slot."""
        while (live := self._take()) is not None:
            self._serve(live)

    def _take(self) -> _Live | None:
        """One at a time, so that a ticket is only taken for a slot that is free."""
        if not any(model.takes for model in list(self._models.values())):
            return None  # whoever frees a slot looks again
        with self._lock:
            if self._stopping.is_set():
                return None
            takers = [model_id for model_id, model in self._models.items() if model.takes]
            try:
                lease = self.queue.take(self.pool, self.worker_id, takers)
            except redis.RedisError as error:
                logger.warning("no ticket could be taken: %s", error)
                return None
            if lease is None:
                return None
            model = self._models[lease.ticket.model_id]
            lease = _as_served(lease, model.served.digest)
            model.num_busy += 1
            live = _Live(lease, model, time.time(), output=[] if lease.ticket.cache_key else None)
            self._live[lease.ticket.request_id] = live
            return live

    def _serve(self, live: _Live) -> None:
        ticket = live.lease.ticket
        self._writer.open(live.lease)
        try:
            finished = self._generate(live)
        finally:
            with self._lock:
                live.model.num_busy -= 1
        try:
            self._end(live, finished)
        finally:
            self._live.pop(ticket.request_id, None)

    def _generate(self, live: _Live) -> Finished:
        ticket = live.lease.ticket
        now = time.time()
        if ticket.queue_deadline_at < now:
            return _without_engine(ticket, FinishReason.ERROR, "queue_timeout")
        if self._cancelled_early.pop(ticket.request_id, None) is not None:
            return _without_engine(ticket, FinishReason.CANCELLED)
        request = GenerationRequest(
            request_id=ticket.request_id,
            prompt=ticket.prompt,
            max_tokens=ticket.max_tokens,
            sampling=ticket.sampling,
            decoding=ticket.decoding,
            stop=ticket.stop,
            deadline=time.monotonic() + ticket.deadline_at - now,
            adapters=ticket.adapters,
            cache_scope=scope_of(ticket.tenant_id),
            cache_prompt=ticket.prefix_cache,
        )
        try:
            live.model.submit(request)
        except EngineError as error:
            logger.warning("request %s was not taken by the engine: %s", ticket.request_id, error)
            return _without_engine(ticket, FinishReason.ERROR, error.code)
        except DatabaseError as error:
            logger.error("adapters of request %s could not be looked up: %s", ticket.request_id, error)
            return _without_engine(ticket, FinishReason.ERROR, UNAVAILABLE)
        live.done.wait()
        assert live.finished is not None
        return live.finished

    def _end(self, live: _Live, finished: Finished) -> None:
        """The place goes back before the last event, so that a client may ask again as soon as it sees it."""
        ticket, now = live.lease.ticket, time.time()
        outcome = outcome_of(ticket, finished, worker=self.worker_id, now=now, leased_at=live.leased_at)
        unused = max(0, ticket.entered_tokens - outcome.charged_tokens)
        before = [throttling.leave_command(ticket.tenant_id, ticket.quota_key_id, ticket.request_id, unused)]
        if live.output is not None and (completion := completion_of(ticket, finished, "".join(live.output))):
            before += filter(None, [self._cache.put_command(ticket.cache_key or "", completion)])
        self._ended[ticket.request_id] = ticket, outcome
        self._writer.finish(
            ticket.request_id, End(encode_finished(finished, self.worker_id), outcome.to_bytes(), before)
        )
        if live.first_text_at is not None:
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
        self._writer.publish([event for event in events if not isinstance(event, Finished)])
        for event in events:
            live = self._live.get(event.request_id)
            if live is None:
                continue
            if isinstance(event, Finished):
                live.finished = event
                live.done.set()
            elif isinstance(event, Delta) and event.text:
                if live.first_text_at is None:
                    live.first_text_at = time.time()
                if live.output is not None:
                    live.output.append(event.text)

    # Cancels

    def _cancel(self, request_id: str) -> None:
        live = self._live.get(request_id)
        if live is None:
            self._cancelled_early[request_id] = time.monotonic()
        else:
            live.model.cancel(request_id)

    def _listen(self) -> None:
        """Cancels come by publish within milliseconds; those lost on the way come with the next beat. Orders about
        slots come here, too; who sent one that was lost hears of it."""
        while not self._gone.is_set():
            try:
                with self._client.pubsub(ignore_subscribe_messages=True) as pubsub:  # type: ignore[no-untyped-call]
                    cancels, slots = f"cancel:{self.worker_id}", slot_actions.channel_of(self.worker_id)
                    pubsub.subscribe(cancels, slots)
                    while not self._gone.is_set():
                        message = pubsub.get_message(timeout=1.0)
                        if message is None:
                            continue
                        if message["channel"].decode() == slots:
                            self._slot_desk.take(message["data"])
                        else:
                            self._cancel(message["data"].decode())
            except redis.RedisError as error:
                logger.warning("cancels come by heartbeat until Redis is back: %s", error)
                self._gone.wait(BEAT_SECONDS)

    # Heartbeat

    def _beat(self) -> None:
        while not self._gone.is_set():
            try:
                self._note(self.queue.beat(self.worker_id, self.pool, self.num_slots, self._info(), self._ttl_seconds))
            except redis.RedisError as error:
                logger.warning("the heartbeat waits for Redis: %s", error)
            except Exception:
                logger.exception("a heartbeat failed")
            self._has_news.wait(BEAT_SECONDS)
            self._has_news.clear()

    def _info(self) -> dict[str, Any]:
        return {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started_at": self._started_at,
            "stopping": self._stopping.is_set(),
            "models": [model.report() for model in self._all_models()],
        }

    def _note(self, pulse: Pulse) -> None:
        for request_id in pulse.cancels:
            self._cancel(request_id)
        self._end_lost_leases(pulse.leases)
        self._forget_old_cancels()
        self._engine_metrics.update(self.pool, pulse.num_waiting, self._all_models())
        self._watch(pulse.num_waiting)

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
        for request_id in [each for each, at in self._cancelled_early.items() if at < horizon]:
            self._cancelled_early.pop(request_id, None)

    def _watch(self, num_waiting: int) -> None:
        """Slots are free while tickets wait: a doorbell was lost, or Celery's consumer has stopped."""
        free = self.num_slots + sum(model.num_held_back for model in self._all_models()) - len(self._live)
        if num_waiting == 0 or free <= 0 or self._stopping.is_set():
            self._free_and_waiting_since = None
            return
        now = time.monotonic()
        if self._free_and_waiting_since is None:
            self._free_and_waiting_since = now
        self._ring(min(num_waiting, free))
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

    # The registry

    def _follow_registry(self) -> None:
        next_sweep = 0.0
        while not self._gone.wait(REGISTRY_SECONDS):
            try:
                if time.monotonic() >= next_sweep:
                    next_sweep = time.monotonic() + SWEEP_SECONDS
                    slot_files().sweep()
                self.follow_registry()
            except DatabaseError as error:
                logger.warning("the registry could not be read: %s", error)
                connection.close()
            except Exception:
                logger.exception("the registry could not be followed")
        connection.close()

    def follow_registry(self) -> None:
        """Load what is new, replace what was changed and unload what is gone or long idle, as soon as it is idle."""
        if self._stopping.is_set():
            return
        wanted = {served.id: served for served in self._read_registry(self.pool)}
        for model in self._all_models():
            self._compare(model, wanted.pop(model.served.id, None))
        for served in wanted.values():
            model = self._host(served)
            with self._lock:
                self._models[served.id] = model
            if served.load_mode == "eager":
                self._try_load(model)

    def _compare(self, model: HostedModel, served: Served | None) -> None:
        if served is None or fingerprint(served) != fingerprint(model.served):
            self._replace(model, served)
            return
        model.served = served
        model.follow_adapters()
        keep = served.keep_alive_seconds
        if model.state is State.FAILED and model.may_retry() and model.is_idle():
            self._try_load(model)
        elif model.state is State.READY and keep is not None and time.monotonic() - model.used_at > keep:
            with self._lock:
                if not model.is_idle():
                    return
                model.retire()
            model.unload()

    def _replace(self, model: HostedModel, served: Served | None) -> None:
        with self._lock:
            model.retire()
            if not model.is_idle():
                return
        model.unload(to=State.RETIRING)
        with self._lock:
            if served is None:
                del self._models[model.served.id]
                return
            successor = self._models[served.id] = self._host(served)
        if served.load_mode == "eager":
            self._try_load(successor)


def _as_served(lease: Lease, digest: str) -> Lease:
    """The file was swapped while the ticket waited: the receipt names what computes it, and the completion cache, whose
    key is of the file before, does not get it."""
    if lease.ticket.model_digest == digest:
        return lease
    return replace(lease, ticket=replace(lease.ticket, model_digest=digest, cache_key=None))


def _without_engine(ticket: Ticket, reason: FinishReason, error: str | None = None) -> Finished:
    receipt = Receipt(prompt_tokens=ticket.num_prompt_tokens)
    return Finished(ticket.request_id, reason, receipt, error=error or (UNAVAILABLE if reason == "error" else None))


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


class HostStep(bootsteps.StartStopStep):
    """Models are loaded before the consumer takes anything, and drained before the pool waits for its threads."""

    requires = ("celery.worker.components:Pool",)

    def start(self, parent: Any) -> None:
        global _host
        pool = _pool_of(parent)
        _host = WorkerHost(pool, client=redis_client.client(), on_stuck=_exit)
        _host.start()

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

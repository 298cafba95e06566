"""The engine's thread, and the only door to it: requests and cancels come in from any thread, events go out to a sink.

The thread sleeps while nothing is live, and is woken by the inbox. Nothing slow belongs on it: no JSON, no network.
Used by the worker, one runner per loaded model.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Generic, TypeVar

from inference.engine.backend import Backend, EmbeddingBackend
from inference.engine.drafting import DraftSettings
from inference.engine.engine import Engine, draw_seed
from inference.engine.slot_keeper import SlotState
from inference.engine.slots import SlotName
from inference.engine.speculative import Proposer
from inference.engine.state_store import StoredState
from inference.engine.stats import EngineStats
from inference.engine.types import (
    EngineError,
    EventSink,
    Finished,
    FinishReason,
    GenerationRequest,
    Receipt,
    SlotReport,
    TokenEvent,
)

logger = logging.getLogger(__name__)

STOPPING = "worker_stopping"
CRASHED = "engine_crashed"


Outcome = TypeVar("Outcome")


class _Errand(Generic[Outcome]):
    """Something to do on the engine's thread between two steps, once it can be done, for a thread that waits."""

    def __init__(self, action: Callable[[], Outcome], can_run: Callable[[], bool] = lambda: True) -> None:
        self._action = action
        self._can_run = can_run
        self.result: Future[Outcome] = Future()

    def run(self) -> bool:
        """False: not yet. An EngineError is the caller's; anything else is a broken backend, for both."""
        if not self._can_run():
            return self.result.cancelled()
        if not self.result.set_running_or_notify_cancel():
            return True
        try:
            outcome = self._action()
        except BaseException as error:
            self.result.set_exception(error)
            if not isinstance(error, EngineError):
                raise
        else:
            self.result.set_result(outcome)
        return True


class EngineRunner:
    """Runs an engine on a thread of its own, from start() to stop().

    sink is called on that thread, once per step with all events of the step. on_crash is called there after an
    exception of the backend or the sink: by then every live sequence has got its Finished(ERROR), and no request is
    taken any more. max_waiting bounds the requests that have no slot yet. proposer, draft_settings, embedder: see
    Engine.
    state_bytes: room for states of slots that others took; states: of an earlier life, to begin with; keep_states: is
    given them all at an orderly end.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        sink: EventSink,
        clock: Callable[[], float] = time.monotonic,
        max_waiting: int = 4096,
        on_crash: Callable[[BaseException], None] | None = None,
        draw_seed: Callable[[], int] = draw_seed,
        proposer: Proposer | None = None,
        draft_settings: DraftSettings | None = None,
        state_bytes: int = 0,
        states: Iterable[StoredState] = (),
        keep_states: Callable[[Iterator[StoredState]], None] | None = None,
        embedder: EmbeddingBackend | None = None,
    ) -> None:
        self._engine = Engine(
            backend,
            clock=clock,
            draw_seed=draw_seed,
            proposer=proposer,
            draft_settings=draft_settings,
            state_bytes=state_bytes,
            embedder=embedder,
        )
        self._engine.put_back(states)
        self._keep_states = keep_states
        self._sink = sink
        self._clock = clock
        self._max_live = backend.n_slots + max_waiting
        self._on_crash = on_crash
        self._thread = threading.Thread(target=self._run, name="llmsite-engine", daemon=True)
        self._changed = threading.Condition()
        # Guarded by _changed:
        self._live: set[str] = set()
        self._inbox: list[tuple[GenerationRequest, float]] = []
        self._cancels: list[str] = []
        self._parks: list[str] = []
        self._errands: list[_Errand[Any]] = []
        self._is_taking = True
        self._end_with: str | None = None
        self._is_closed = False

    def start(self) -> None:
        """Start the thread. Once only."""
        self._thread.start()

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request; its events will go to the sink. Any thread.

        Raises EngineError "engine_stopped", "queue_full", "duplicate_request" or what Engine.check refuses.
        """
        self._engine.check(request)
        with self._changed:
            if not self._is_taking:
                raise EngineError("engine_stopped", "the engine takes no requests any more")
            if request.request_id in self._live:
                raise EngineError("duplicate_request", f"request {request.request_id} is already running")
            if len(self._live) >= self._max_live:
                raise EngineError("queue_full", "too many requests are waiting for a slot")
            self._live.add(request.request_id)
            self._inbox.append((request, self._clock()))
            self._changed.notify_all()

    def cancel(self, request_id: str) -> None:
        """End a request before the next step, waiting or running. Any thread; idempotent; unknown ids are ignored."""
        with self._changed:
            if request_id in self._live:
                self._cancels.append(request_id)
                self._changed.notify_all()

    def park(self, request_id: str) -> None:
        """Let a request make room before the next step for one that was submitted already (see Engine.park). Any
        thread; unknown ids are ignored."""
        with self._changed:
            if request_id in self._live:
                self._parks.append(request_id)
                self._changed.notify_all()

    def load_adapter(self, digest: str, path: str | Path) -> None:
        """Load an adapter between two steps, and wait for it. Any thread but the engine's.

        Raises EngineError "adapter_file_invalid", "adapters_not_supported" or "engine_stopped".
        """
        self._do(lambda: self._engine.load_adapter(digest, path))

    def unload_adapter(self, digest: str) -> None:
        """Free an adapter between two steps, and wait for it. Raises EngineError "adapter_in_use", "engine_stopped"."""
        self._do(lambda: self._engine.unload_adapter(digest))

    @property
    def adapters(self) -> frozenset[str]:
        """Digests of the loaded adapters. Any thread."""
        return self._engine.adapters

    def slots(self) -> list[SlotReport]:
        """Every slot that is busy or holds something. Raises EngineError "engine_stopped"."""
        return self._do(self._engine.slots)

    def save_slot(self, name: SlotName, seconds: float) -> SlotState:
        """What a scope's slot holds, once no request runs in it; seconds is how long to wait for that.

        Raises EngineError "slot_busy", "invalid_request", "not_supported" or "engine_stopped".
        """
        self._engine.check_saves()
        return self._do_with_slot(name, lambda: self._engine.save_slot(name), self._is_idle(name), seconds)

    def restore_slot(self, name: SlotName, saved: SlotState, seconds: float) -> None:
        """Let a scope's slot hold a saved state. Raises as save_slot, and "state_invalid"; the slot is empty then."""

        def can_restore() -> bool:
            return self._engine.can_restore_slot(name)

        self._engine.check_saves()
        self._do_with_slot(name, lambda: self._engine.restore_slot(name, saved), can_restore, seconds)

    def erase_slot(self, name: SlotName, seconds: float) -> int:
        """Forget what a scope's slot holds; how many tokens that were. Raises as save_slot, but "not_supported"."""
        return self._do_with_slot(name, lambda: self._engine.erase_slot(name), self._is_idle(name), seconds)

    def forget_states(self, scope: str) -> None:
        """Forget what had to leave the scope's slots and is stored. Raises EngineError "engine_stopped"."""
        self._do(lambda: self._engine.forget_states(scope))

    def _is_idle(self, name: SlotName) -> Callable[[], bool]:
        return lambda: not self._engine.is_slot_busy(name)

    def _do_with_slot(
        self, name: SlotName, action: Callable[[], Outcome], can_run: Callable[[], bool], seconds: float
    ) -> Outcome:
        self._engine.check_slot(name[1])
        return self._do(action, can_run, seconds)

    def _do(
        self, action: Callable[[], Outcome], can_run: Callable[[], bool] = lambda: True, seconds: float | None = None
    ) -> Outcome:
        errand = _Errand(action, can_run)
        with self._changed:
            if self._is_closed:
                raise EngineError("engine_stopped", "the engine has stopped")
            self._errands.append(errand)
            self._changed.notify_all()
        try:
            return errand.result.result(seconds)
        except TimeoutError:
            if errand.result.cancel():
                raise EngineError("slot_busy", "a request still runs in this slot") from None
            return errand.result.result()

    def stats(self) -> EngineStats:
        """A snapshot. Any thread."""
        return self._engine.stats()

    @property
    def num_held_back(self) -> int:
        """As in stats(), which takes longer. Any thread."""
        return self._engine.num_held_back

    @property
    def num_parked(self) -> int:
        """As in stats(). Any thread."""
        return self._engine.num_parked

    def drain(self, seconds: float) -> bool:
        """Take no more requests and wait until none is live, seconds at most. Returns whether none is."""
        with self._changed:
            self._is_taking = False
            return self._changed.wait_for(lambda: not self._live, timeout=max(0.0, seconds))

    def stop(self, error: str = STOPPING) -> None:
        """End what is live with Finished(ERROR, error), join the thread, free the backend. Idempotent."""
        with self._changed:
            self._is_taking = False
            self._end_with = self._end_with or error
            self._changed.notify_all()
        if self._thread.ident is None:
            self._close(error)
        elif self._thread is not threading.current_thread():
            self._thread.join()

    # on the engine's thread

    def _run(self) -> None:
        crash: BaseException | None = None
        try:
            while self._wait_for_work():
                self._advance()
                self._deliver()
        except BaseException as exception:  # the thread's border: whatever it was, every sequence must end
            logger.critical("the engine has crashed", exc_info=exception)
            crash = exception
        self._close(CRASHED if crash is not None else self._end_with or STOPPING)
        if crash is not None:
            self._report(crash)

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to do. False: stop."""
        with self._changed:
            while not (self._has_orders or self._engine.has_work or self._end_with):
                self._changed.wait()
            return not self._end_with

    @property
    def _has_orders(self) -> bool:
        return bool(self._inbox or self._cancels or self._parks or self._errands)

    def _advance(self) -> None:
        """What has come in goes to the engine, then it makes a step."""
        self._take_inbox()
        self._engine.step()

    def _take_inbox(self) -> None:
        """Hand new requests and cancels to the engine, and run errands."""
        with self._changed:
            inbox, self._inbox = self._inbox, []
            cancels, self._cancels = self._cancels, []
            parks, self._parks = self._parks, []
        for request, submitted_at in inbox:
            self._engine.add(request, submitted_at)
        for request_id in cancels:
            self._engine.cancel(request_id)
        for request_id in parks:
            self._engine.park(request_id)
        self._run_errands()

    def _run_errands(self) -> None:
        """One by one: should one break the engine, those behind it are still there to be answered. Those that cannot be
        done yet are tried again after the next step."""
        if not self._errands:  # one that comes at this moment is run before the next step
            return
        with self._changed:
            number = len(self._errands)
        for _ in range(number):
            with self._changed:
                errand = self._errands.pop(0)
            if not errand.run():
                with self._changed:
                    self._errands.append(errand)

    def _deliver(self) -> None:
        self._hand_over(self._engine.take_events())

    def _hand_over(self, events: Sequence[TokenEvent]) -> None:
        """Hand the events of a step to the sink, then forget the finished: their ids may come again."""
        if events:
            try:
                self._sink(events)
            finally:
                self._forget(events)

    def _forget(self, events: Sequence[TokenEvent]) -> None:
        finished = {event.request_id for event in events if isinstance(event, Finished)}
        if finished:
            with self._changed:
                self._live -= finished
                self._changed.notify_all()

    def _close(self, error: str) -> None:
        """End every live sequence with this error and free the backend. Nothing is taken afterwards."""
        with self._changed:
            self._is_taking = False
            self._is_closed = True
            inbox, self._inbox = self._inbox, []
            errands, self._errands = self._errands, []
        for errand in errands:
            if errand.result.set_running_or_notify_cancel():
                errand.result.set_exception(EngineError("engine_stopped", "the engine has stopped"))
        for request, submitted_at in inbox:
            self._engine.add(request, submitted_at)
        if error == STOPPING and self._keep_states is not None:
            self._give_states(self._keep_states)
        self._engine.end_all(error)
        for action in (self._deliver, lambda: self._end_lost(error), self._engine.free):
            try:
                action()
            except Exception:
                logger.exception("the engine could not be closed cleanly")

    def _end_lost(self, error: str) -> None:
        """What the engine lost half way when it crashed, such as a sequence that was getting its slot, ends, too."""
        with self._changed:
            lost = sorted(self._live)
        self._hand_over([Finished(each, FinishReason.ERROR, Receipt(prompt_tokens=0), error=error) for each in lost])

    def _give_states(self, keep: Callable[[Iterator[StoredState]], None]) -> None:
        try:
            keep(self._engine.all_states())
        except Exception:
            logger.exception("the states of the slots could not be kept")

    def _report(self, crash: BaseException) -> None:
        if self._on_crash is None:
            return
        try:
            self._on_crash(crash)
        except Exception:
            logger.exception("on_crash has failed")

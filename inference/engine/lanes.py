"""Lanes: several engines on one loaded model, each with a context, slots and a thread of its own.

A step carries one adapter vector, so with several busy vectors one engine takes turns (turns.py). Lanes compute them
side by side: routing.py says which lane serves a request, and shares the threads out over the lanes that have work.
Used by the worker for models with n_lanes above 1; others have a plain EngineRunner.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from inference.engine.backend import Backend, EmbeddingBackend
from inference.engine.drafting import DraftSettings
from inference.engine.engine import draw_seed
from inference.engine.gate import StepGate
from inference.engine.routing import LaneView, route, share_threads
from inference.engine.runner import CRASHED, STOPPING, EngineRunner, _Errand
from inference.engine.slot_keeper import SlotState
from inference.engine.slots import SlotName
from inference.engine.speculative import Proposer
from inference.engine.state_store import StoredState
from inference.engine.stats import EngineStats, combined
from inference.engine.types import (
    AdapterVector,
    EngineError,
    EventSink,
    Finished,
    GenerationRequest,
    SlotReport,
    Started,
    TokenEvent,
    effective,
)

OnCrash = Callable[[BaseException], None]
KeepStates = Callable[[Iterator[StoredState]], None]


class _Threads:
    """Who computes with how many threads. Lanes ask before each step and give theirs back when they have no work."""

    def __init__(self, n_threads: int) -> None:
        self._n_threads = n_threads
        self._lock = threading.Lock()
        self._loads: dict[int, int] = {}
        self._shares: dict[int, int] = {}

    def take(self, lane: int, load: int) -> int:
        """The threads of this lane's next step. load: its live sequences, at least 1."""
        with self._lock:
            if self._loads.get(lane) != load:
                self._loads[lane] = load
                self._shares = share_threads(self._n_threads, self._loads)
            return self._shares[lane]

    def give_back(self, lane: int) -> None:
        with self._lock:
            if self._loads.pop(lane, None):
                self._shares = share_threads(self._n_threads, self._loads)


class _Lane(EngineRunner):
    """An engine among others of the same model. Its slots have the numbers from `first_slot` on for everybody else."""

    def __init__(
        self,
        number: int,
        backend: Backend,
        *,
        sink: EventSink,
        gate: StepGate,
        threads: _Threads,
        on_end: Callable[[Sequence[TokenEvent]], None],
        on_crash: OnCrash,
        clock: Callable[[], float],
        max_waiting: int,
        draw_seed: Callable[[], int],
        proposer: Proposer | None,
        draft_settings: DraftSettings | None,
        state_bytes: int,
        states: Iterable[StoredState],
        keep_states: KeepStates | None,
        embedder: EmbeddingBackend | None,
    ) -> None:
        first_slot = number * backend.n_slots

        def keep_renumbered(states: Iterator[StoredState]) -> None:
            if keep_states is not None:
                keep_states(replace(each, number=each.number + first_slot) for each in states)

        super().__init__(
            backend,
            sink=self._renumbered,
            on_crash=on_crash,
            clock=clock,
            max_waiting=max_waiting,
            draw_seed=draw_seed,
            proposer=proposer,
            draft_settings=draft_settings,
            state_bytes=state_bytes,
            states=states,
            keep_states=keep_renumbered,
            embedder=embedder,
        )
        self._number, self._first_slot = number, first_slot
        self._outer_sink, self._on_end = sink, on_end
        self._gate, self._threads, self._num_threads = gate, threads, backend.n_threads

    def num_known(self, request: GenerationRequest) -> int:
        """See Engine.num_known. Any thread."""
        return self._engine.num_known(request)

    @property
    def is_closed(self) -> bool:
        with self._changed:
            return self._is_closed

    def load_adapter(self, digest: str, path: str | Path) -> None:
        """At once, on the caller's thread, which has closed the gate."""
        self._engine.load_adapter(digest, path)

    def unload_adapter(self, digest: str) -> None:
        """As load_adapter; for all lanes."""
        self._engine.unload_adapter(digest)

    def crash(self, error: BaseException) -> None:
        """Crash before the next step, because of an error on another thread."""

        def fail() -> None:
            raise error

        with self._changed:
            self._errands.append(_Errand(fail))
            self._changed.notify_all()

    # on the engine's thread

    def _advance(self) -> None:
        with self._gate.step():
            self._take_inbox()
            if self._engine.has_work:
                self._take_threads()
            self._engine.step()
        if not self._engine.has_work:
            self._threads.give_back(self._number)

    def _take_threads(self) -> None:
        number = self._threads.take(self._number, self._engine.num_live)
        if number != self._num_threads:
            self._engine.share_threads(number, before=self._num_threads)
            self._num_threads = number

    def _renumbered(self, events: Sequence[TokenEvent]) -> None:
        self._outer_sink([_shifted(event, self._first_slot) for event in events] if self._first_slot else events)

    def _forget(self, events: Sequence[TokenEvent]) -> None:
        super()._forget(events)
        self._on_end(events)

    def _close(self, error: str) -> None:
        """Inside the gate, since the context, and with the last one the model, is freed."""
        self._threads.give_back(self._number)
        with self._gate.step():
            super()._close(error)


def _shifted(event: TokenEvent, first_slot: int) -> TokenEvent:
    """The same event, about a slot of the lane whose first slot has this number."""
    if isinstance(event, Started):
        return replace(event, slot_id=event.slot_id + first_slot)
    if isinstance(event, Finished) and event.receipt.slot_id is not None:
        return replace(event, receipt=replace(event.receipt, slot_id=event.receipt.slot_id + first_slot))
    return event


@dataclass(frozen=True, slots=True)
class _Place:
    lane: int
    adapters: AdapterVector


class LaneRunner:
    """Runs backends of one loaded model side by side, and is used like an EngineRunner; see there.

    backends: made by sibling() of the first; they are freed in the end. sink is called on the threads of all lanes, in
    order for each request. proposers: one a lane. embedder: for the first lane, which has all requests for vectors.
    on_crash is called once: by then the crash of one lane has ended the others, too.
    """

    def __init__(
        self,
        backends: Sequence[Backend],
        *,
        sink: EventSink,
        clock: Callable[[], float] = time.monotonic,
        max_waiting: int = 4096,
        on_crash: OnCrash | None = None,
        draw_seed: Callable[[], int] = draw_seed,
        proposers: Sequence[Proposer | None] | None = None,
        draft_settings: DraftSettings | None = None,
        state_bytes: int = 0,
        states: Iterable[StoredState] = (),
        keep_states: KeepStates | None = None,
        embedder: EmbeddingBackend | None = None,
    ) -> None:
        self._num_slots = backends[0].n_slots
        self._on_crash = on_crash
        self._gate = StepGate()
        threads = _Threads(backends[0].n_threads)
        shares: list[list[StoredState]] = [[] for _ in backends]
        for state in states:
            lane, own = divmod(state.number, self._num_slots)
            shares[lane % len(backends)].append(replace(state, number=own))
        self._lanes = [
            _Lane(
                number,
                backend,
                sink=sink,
                gate=self._gate,
                threads=threads,
                on_end=self._forget,
                on_crash=self._crashed,
                clock=clock,
                max_waiting=max_waiting,
                draw_seed=draw_seed,
                proposer=proposers[number] if proposers else None,
                draft_settings=draft_settings,
                state_bytes=state_bytes // len(backends),
                states=shares[number],
                keep_states=keep_states,
                embedder=None if number else embedder,
            )
            for number, backend in enumerate(backends)
        ]
        self._lock = threading.Lock()
        # Guarded by _lock, which is taken before a lane's own:
        self._places: dict[str, _Place] = {}
        self._is_taking = True
        self._has_crashed = False

    def start(self) -> None:
        for lane in self._lanes:
            lane.start()

    def submit(self, request: GenerationRequest) -> None:
        """As EngineRunner.submit, in the lane that routing.py chooses or that has the slot asked for."""
        adapters = effective(request.adapters)
        known = [0 if request.embedding else lane.num_known(request) for lane in self._lanes]
        with self._lock:
            if not self._is_taking:
                raise EngineError("engine_stopped", "the engine takes no requests any more")
            if request.request_id in self._places:
                raise EngineError("duplicate_request", f"request {request.request_id} is already running")
            lane, request = self._pinned(request) or (route(self._views(known), adapters), request)
            self._lanes[lane].submit(request)
            self._places[request.request_id] = _Place(lane, adapters)

    def _pinned(self, request: GenerationRequest) -> tuple[int, GenerationRequest] | None:
        """The lane of the slot that a request asks for, and the request as that lane knows the slot. A slot that does
        not exist is left to the engine's check. Vectors are the first lane's."""
        if request.embedding is not None:
            return 0, request
        slot_id = request.decoding.slot_id
        if slot_id is None:
            return None
        lane, own = divmod(slot_id, self._num_slots)
        if not 0 <= lane < len(self._lanes):
            return 0, request
        return lane, replace(request, decoding=replace(request.decoding, slot_id=own))

    def _views(self, known: Sequence[int]) -> list[LaneView]:
        busy: list[Counter[AdapterVector]] = [Counter() for _ in self._lanes]
        for place in self._places.values():
            busy[place.lane][place.adapters] += 1
        return [LaneView(self._num_slots, vectors, number) for vectors, number in zip(busy, known, strict=True)]

    def cancel(self, request_id: str) -> None:
        with self._lock:
            place = self._places.get(request_id)
        if place is not None:
            self._lanes[place.lane].cancel(request_id)

    def park(self, request_id: str) -> None:
        """As EngineRunner.park: room is made in the request's own lane."""
        with self._lock:
            place = self._places.get(request_id)
        if place is not None:
            self._lanes[place.lane].park(request_id)

    def load_adapter(self, digest: str, path: str | Path) -> None:
        """Load an adapter while no lane computes, on the caller's thread. Raises as EngineRunner.load_adapter."""
        self._while_closed(lambda: self._lanes[0].load_adapter(digest, path))

    def unload_adapter(self, digest: str) -> None:
        """Free an adapter while no lane computes. Raises EngineError "adapter_in_use" or "engine_stopped"."""
        self._while_closed(lambda: self._unload(digest))

    def _unload(self, digest: str) -> None:
        """A request that comes at this moment ends with "adapter_not_loaded", as with one engine."""
        with self._lock:
            vectors = {place.adapters for place in self._places.values()}
        if any(digest == each for vector in vectors for each, _ in vector):
            raise EngineError("adapter_in_use", f"a live sequence uses adapter {digest}")
        self._lanes[0].unload_adapter(digest)

    def _while_closed(self, action: Callable[[], None]) -> None:
        try:
            with self._gate.closed():
                if any(lane.is_closed for lane in self._lanes):
                    raise EngineError("engine_stopped", "the engine has stopped")
                action()
        except EngineError:
            raise
        except BaseException as error:  # a broken backend; all lanes share it
            self._lanes[0].crash(error)
            raise

    @property
    def adapters(self) -> frozenset[str]:
        """Digests of the loaded adapters. Any thread."""
        return self._lanes[0].adapters

    def stats(self) -> EngineStats:
        """All lanes as one. Any thread."""
        return combined([lane.stats() for lane in self._lanes])

    @property
    def num_held_back(self) -> int:
        """As in stats(), which takes longer. Any thread."""
        return sum(lane.num_held_back for lane in self._lanes)

    @property
    def num_parked(self) -> int:
        """As in stats(). Any thread."""
        return sum(lane.num_parked for lane in self._lanes)

    # Slots, by the numbers that they have for everybody else

    def slots(self) -> list[SlotReport]:
        """As EngineRunner.slots."""
        return [
            replace(each, slot_id=each.slot_id + first, number=each.number + first)
            for first, lane in zip(count(0, self._num_slots), self._lanes, strict=False)
            for each in lane.slots()
        ]

    def save_slot(self, name: SlotName, seconds: float) -> SlotState:
        """As EngineRunner.save_slot."""
        lane, own = self._lane_of(name)
        return lane.save_slot(own, seconds)

    def restore_slot(self, name: SlotName, saved: SlotState, seconds: float) -> None:
        """As EngineRunner.restore_slot. Prompts that go to another lane do not find it."""
        lane, own = self._lane_of(name)
        lane.restore_slot(own, saved, seconds)

    def erase_slot(self, name: SlotName, seconds: float) -> int:
        """As EngineRunner.erase_slot; what other lanes have stored of the scope is forgotten, too."""
        lane, own = self._lane_of(name)
        number = lane.erase_slot(own, seconds)
        for other in self._lanes:
            if other is not lane and name[0] is not None:
                other.forget_states(name[0])
        return number

    def forget_states(self, scope: str) -> None:
        """As EngineRunner.forget_states, in every lane."""
        for lane in self._lanes:
            lane.forget_states(scope)

    def _lane_of(self, name: SlotName) -> tuple[_Lane, SlotName]:
        """Raises EngineError "invalid_request" for a number that no lane has."""
        scope, number = name
        lane, own = divmod(number, self._num_slots)
        if not 0 <= lane < len(self._lanes):
            most = self._num_slots * len(self._lanes)
            raise EngineError("invalid_request", f"there is no slot {number} of {most}")
        return self._lanes[lane], (scope, own)

    def drain(self, seconds: float) -> bool:
        """Take no more requests and wait until none is live, seconds at most. Returns whether none is."""
        self._take_no_more()
        deadline = time.monotonic() + seconds
        return all(lane.drain(deadline - time.monotonic()) for lane in self._lanes)

    def stop(self) -> None:
        """End what is live with Finished(ERROR, "worker_stopping"), join the threads, free everything. Idempotent."""
        self._stop(STOPPING)

    def _stop(self, error: str) -> None:
        self._take_no_more()
        for lane in self._lanes:
            lane.stop(error)

    def _take_no_more(self) -> None:
        with self._lock:
            self._is_taking = False

    # on the lanes' threads

    def _forget(self, events: Sequence[TokenEvent]) -> None:
        finished = [event.request_id for event in events if isinstance(event, Finished)]
        if finished:
            with self._lock:
                for request_id in finished:
                    self._places.pop(request_id, None)

    def _crashed(self, crash: BaseException) -> None:
        """The first lane that crashes ends the others, and waits for them; a second one has nothing to add."""
        with self._lock:
            if self._has_crashed:
                return
            self._has_crashed = True
        self._stop(CRASHED)
        if self._on_crash is not None:
            self._on_crash(crash)


Runner = EngineRunner | LaneRunner


def run_in_lanes(
    backend: Backend,
    n_lanes: int,
    *,
    sink: EventSink,
    on_crash: OnCrash | None = None,
    load_proposer: Callable[[Backend], Proposer | None] = lambda _backend: None,
    draft_settings: DraftSettings | None = None,
    state_bytes: int = 0,
    states: Iterable[StoredState] = (),
    keep_states: KeepStates | None = None,
    embeds: bool = False,
) -> Runner:
    """What runs this backend: one engine, or as many lanes on its model. Owns the backend from then on.

    load_proposer: who guesses tokens, once for each lane. embeds: requests for vectors are taken, too.
    state_bytes, states, keep_states: see EngineRunner; lanes
    share them, and keep_states is called by each. Raises EngineError, "model_does_not_fit" where the lanes are too
    many; whatever is raised, everything is freed.
    """
    backends, proposers = [backend], list[Proposer | None]()
    embedder: EmbeddingBackend | None = None
    try:
        embedder = backend.embedder() if embeds else None
        while len(backends) < n_lanes:
            backends.append(backend.sibling())
        proposers.extend(load_proposer(each) for each in backends)
        common: dict[str, Any] = {
            "sink": sink,
            "on_crash": on_crash,
            "draft_settings": draft_settings,
            "state_bytes": state_bytes,
            "states": states,
            "keep_states": keep_states,
            "embedder": embedder,
        }
        if n_lanes == 1:
            return EngineRunner(backend, proposer=proposers[0], **common)
        return LaneRunner(backends, proposers=proposers, **common)
    except BaseException as error:
        if embedder is not None:
            embedder.free()
        for each in backends:
            each.free()
        for proposer in filter(None, proposers):
            proposer.free()
        if not isinstance(error, EngineError) or len(backends) == n_lanes or (embeds and embedder is None):
            raise
        raise EngineError(error.code, f"{len(backends)} of {n_lanes} lanes fit, lower n_lanes: {error}") from error

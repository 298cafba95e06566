"""Plan, act, commit: one step of every live sequence at a time.

The engine owns the sequences, the slots and the backend, and is used by one thread only: the runner's. It knows nothing
of threads, inboxes or sinks; what happened is collected as events and taken by the caller after each step.
"""

from __future__ import annotations

import math
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from inference.engine import sampling, seating
from inference.engine.backend import Backend, Chosen, EmbeddingBackend, SlotWork
from inference.engine.drafter import Drafter
from inference.engine.drafting import DraftSettings, DraftTerms
from inference.engine.embedder import Embedder
from inference.engine.plan import Candidate, ScheduleView, Seat, StepPlan, Turn
from inference.engine.prefix import Held, common_prefix
from inference.engine.scheduler import schedule
from inference.engine.sequence import ParkedState, Sequence
from inference.engine.slot_keeper import SlotKeeper, SlotState
from inference.engine.slots import SlotName, SlotTable
from inference.engine.speculative import Proposer
from inference.engine.state_store import StateStore, StoredState
from inference.engine.stats import Counters, EngineStats
from inference.engine.types import (
    AdapterVector,
    Delta,
    Embedding,
    EngineError,
    Finished,
    FinishReason,
    GenerationRequest,
    Parked,
    Resumed,
    SlotReport,
    Started,
    TokenEvent,
    effective,
)

STEP_SECONDS = 0.2
"""How long a step may take because of prompt tokens: the bound on what a long prompt adds to everyone's next token."""

EMBED_ALONE_SECONDS = 0.25
"""The same for a step that embeds while nobody generates: fuller steps are faster, and whoever comes waits for one."""
MAX_PARKED_SECONDS = 5.0
"""A sequence that was parked for longer gets the next free slot, whoever waits."""

NO_DRAFTS = DraftTerms()
DRIFT_WEIGHT = 0.2
"""How much the latest step counts for how far reality is from the measured cost curve."""


def draw_seed() -> int:
    return secrets.randbits(32)


class Engine:
    """The live sequences of one backend, in order of arrival.

    clock: monotonic seconds. draw_seed: seeds for requests that bring none. proposer: who guesses tokens, on the terms
    of draft_settings; None is nobody. It is freed with the backend. state_bytes: room for the states of slots that
    others took. embedder: for requests that want vectors; None refuses them. It is freed with the backend.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        clock: Callable[[], float] = time.monotonic,
        draw_seed: Callable[[], int] = draw_seed,
        step_seconds: float = STEP_SECONDS,
        state_bytes: int = 0,
        proposer: Proposer | None = None,
        draft_settings: DraftSettings | None = None,
        embedder: EmbeddingBackend | None = None,
    ) -> None:
        self._backend = backend
        self._embedder = Embedder(embedder) if embedder else None
        self._drafter: Drafter | None = None
        if proposer is not None:
            most = backend.max_draft_tokens if backend.abilities.trim else 0
            self._drafter = Drafter(proposer, draft_settings or DraftSettings(), n_ctx=backend.n_ctx, most=most)
        self._clock = clock
        self._draw_seed = draw_seed
        self._step_seconds = step_seconds
        self._slots = SlotTable(backend.n_slots)
        self._waiting: OrderedDict[str, Sequence] = OrderedDict()
        self._running: dict[str, Sequence] = {}
        self._parked: OrderedDict[str, Sequence] = OrderedDict()
        self._next_deadline = math.inf
        self._drift = 1.0  # seconds that reading prompts really takes, per expected second
        self._turn = Turn()
        self._counters = Counters()
        self._events: list[TokenEvent] = []
        self._num_held_back = 0
        self._keeper = SlotKeeper(backend, self._slots, StateStore(state_bytes), clock=clock)

    @property
    def _can_reuse(self) -> bool:
        return self._backend.abilities.trim and self._backend.abilities.copy

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting or self._parked or self._embedder)

    @property
    def num_held_back(self) -> int:
        """Of the waiting requests, those that only a busy slot can serve, as of the latest step. Any thread."""
        return self._num_held_back

    @property
    def num_parked(self) -> int:
        """Any thread."""
        return len(self._parked)

    @property
    def num_live(self) -> int:
        return len(self._running) + len(self._waiting) + len(self._parked) + len(self._embedder or ())

    @property
    def _all_live(self) -> tuple[Sequence, ...]:
        embedding = self._embedder.live if self._embedder else ()
        return (*self._running.values(), *self._parked.values(), *self._waiting.values(), *embedding)

    def check(self, request: GenerationRequest) -> None:
        """Refuse a request that this engine could never serve. Reads constants only, so any thread may call it.

        Raises EngineError "prompt_too_long", "invalid_request", "invalid_sampling", "embeddings_not_supported",
        "adapters_not_supported" or "adapter_not_loaded".
        """
        backend = self._backend
        if request.embedding is not None:
            self._check_embedding(request, request.embedding)
            return
        if not request.prompt or request.max_tokens < 0:
            raise EngineError("invalid_request", "a request needs a prompt token and max_tokens of at least 0")
        if len(request.prompt) >= backend.n_ctx:
            raise EngineError(
                "prompt_too_long",
                f"the prompt has {len(request.prompt)} tokens and exceeds the available context size: "
                f"{backend.n_ctx} tokens, at least one of them for the answer",
            )
        self._check_vocabulary(request.prompt)
        self._check_adapters(request.adapters)
        slot_id = request.decoding.slot_id
        if slot_id is not None and not 0 <= slot_id < backend.n_slots:
            raise EngineError("invalid_request", f"there is no slot {slot_id} of {backend.n_slots}")
        sampling.check(request.sampling, backend.n_vocab)

    def _check_embedding(self, request: GenerationRequest, wanted: Embedding) -> None:
        if self._embedder is None:
            raise EngineError("embeddings_not_supported", "this model is served without embeddings")
        self._embedder.check(request, wanted)
        self._check_vocabulary(request.prompt)
        self._check_adapters(request.adapters)

    def _check_vocabulary(self, prompt: tuple[int, ...]) -> None:
        n_vocab = self._backend.n_vocab
        if min(prompt) < 0 or max(prompt) >= n_vocab:
            raise EngineError("invalid_request", f"the prompt has tokens outside the vocabulary of {n_vocab}")

    def _check_adapters(self, adapters: AdapterVector) -> None:
        digests = [digest for digest, _ in adapters]
        if len(set(digests)) < len(digests) or not all(math.isfinite(scale) for _, scale in adapters):
            raise EngineError("invalid_request", "an adapter vector names each adapter once, with a finite scale")
        wanted = {digest for digest, _ in effective(adapters)}
        if wanted and not self._backend.supports_adapters:
            raise EngineError("adapters_not_supported", "this model is served without adapters")
        if missing := wanted - self._backend.adapters:
            raise EngineError("adapter_not_loaded", f"adapters that are not loaded: {', '.join(sorted(missing))}")

    def add(self, request: GenerationRequest, submitted_at: float) -> None:
        """Take a checked request whose id is not live. One whose adapter was unloaded since then ends with ERROR."""
        seed = sampling.settle_seed(request.sampling.seed, self._draw_seed)
        sequence = Sequence(request, seed=seed, submitted_at=submitted_at, arrived_step=self._counters.num_steps)
        if request.embedding is not None and self._embedder is not None:
            self._embedder.add(sequence, request.embedding)
        else:
            self._waiting[request.request_id] = sequence
        if not {digest for digest, _ in sequence.adapters} <= self._backend.adapters:
            self._finish(sequence, FinishReason.ERROR, self._clock(), error="adapter_not_loaded")
            return
        if request.deadline is not None:
            self._next_deadline = min(self._next_deadline, request.deadline)

    def cancel(self, request_id: str) -> None:
        """End a sequence now, waiting or running. An id that is not live is ignored."""
        if sequence := self._live(request_id):
            self._finish(sequence, FinishReason.CANCELLED, self._clock())

    def park(self, request_id: str) -> None:
        """Let a generating sequence make room for one that waits, and go on when a slot is free: with the same tokens
        as if it had never stopped. Does nothing where that would help nobody, or costs too much."""
        sequence = self._running.get(request_id)
        if sequence is None or not sequence.is_decoding or sequence.request.decoding.slot_id is not None:
            return
        if sequence.is_truncated:
            return  # a shift leaves holes in the slot, a restored state has none: its sums differ in their last bits
        is_of_use = len(self._waiting) - len(self._held_back()) > len(self._slots.free)
        if not is_of_use or sequence.slot_id is None or not self._keeper.can_park(sequence.num_computed):
            return
        state = self._keeper.park(sequence.slot_id, sequence.num_computed)
        if state is None:
            return
        sequence.parked = ParkedState(state, self._backend.detach(sequence.slot_id))
        sequence.parked_at = self._clock()
        sequence.num_parks += 1
        self._counters.num_parks += 1
        if self._drafter:
            self._drafter.close(request_id)
        self._slots.give_back(sequence.slot_id, request_id)
        sequence.slot_id = None
        self._parked[request_id] = self._running.pop(request_id)
        self._events.append(Parked(request_id))

    def end_all(self, error: str) -> None:
        """End every live sequence with ERROR, without touching the backend's state: it may be broken."""
        now = self._clock()
        for sequence in self._all_live:
            self._events.append(Finished(sequence.request_id, FinishReason.ERROR, sequence.receipt(now), error=error))
            if self._drafter:
                self._drafter.close(sequence.request_id)
        if self._embedder:
            self._embedder.clear()
        self._running.clear()
        self._parked.clear()
        self._waiting.clear()
        self._slots.clear()

    # slots, by the numbers of a scope

    def slots(self) -> list[SlotReport]:
        """Every slot that is busy or holds something."""
        serving = {each.slot_id: each for each in self._running.values()}
        return [
            _report(slot_id, name, serving.get(slot_id), self._slots.held.get(slot_id))
            for slot_id, name in sorted(self._slots.names.items())
        ]

    def check_slot(self, number: int) -> None:
        """Raises EngineError "invalid_request"."""
        if not 0 <= number < self._backend.n_slots:
            raise EngineError("invalid_request", f"there is no slot {number} of {self._backend.n_slots}")

    def check_saves(self) -> None:
        """Raises EngineError "not_supported" where this memory cannot be saved, or what was saved not be put back."""
        if not (self._backend.abilities.save and self._backend.abilities.trim):
            reasons = self._backend.abilities.reasons
            raise EngineError("not_supported", reasons.get("save") or reasons.get("trim") or "slots cannot be saved")

    def is_slot_busy(self, name: SlotName) -> bool:
        """Whether a request of the scope runs in its slot of this number."""
        slot_id = self._slots.find(name)
        return slot_id is not None and self._slots.owner(slot_id) is not None

    def can_restore_slot(self, name: SlotName) -> bool:
        return not self.is_slot_busy(name) and bool(self._slots.free)

    def save_slot(self, name: SlotName) -> SlotState:
        """What a slot that is not busy holds."""
        return self._keeper.save(name)

    def restore_slot(self, name: SlotName, saved: SlotState) -> None:
        """Put a saved state into the scope's slot, in the place of what that held; or into another, as if a request
        came for it. Raises EngineError "state_invalid"; the scope's slot is empty then."""
        scope, number = name
        candidate = Candidate("", 1, adapters=saved.adapters, scope=scope, number=number)
        # who is parked sits in the next plan, not in this one
        view = replace(self._view(), waiting=(candidate,), parked=(), num_overdue=0)
        (chosen,) = seating.seat(view)[0]
        self._keeper.make_room(chosen.slot_id)
        if self._drafter:
            self._drafter.forget(chosen.slot_id)
        self._keeper.restore(chosen.slot_id, name, saved, self._counters.num_steps)

    def erase_slot(self, name: SlotName) -> int:
        """Forget what a slot that is not busy holds, stored states of its kind included; how many tokens that were."""
        return self._keeper.erase(name)

    def forget_states(self, scope: str) -> None:
        """Forget everything that is stored of a scope; what slots hold stays."""
        self._keeper.forget_states(scope)

    def put_back(self, states: Iterable[StoredState]) -> None:
        """Take in states that an earlier backend of the same model and options gave with all_states()."""
        self._keeper.put_back(states)

    def all_states(self) -> Iterator[StoredState]:
        """What is worth keeping until the next load, latest use first. The backend must be sound."""
        return self._keeper.all_states()

    # adapters

    def load_adapter(self, digest: str, path: str | Path) -> None:
        """Load an adapter, between steps. One that is loaded already stays. Raises what Backend.load_adapter does."""
        if not self._backend.supports_adapters:
            raise EngineError("adapters_not_supported", "this model is served without adapters")
        if digest not in self._backend.adapters:
            self._backend.load_adapter(digest, path)

    def unload_adapter(self, digest: str) -> None:
        """Free an adapter. One that is not loaded is left alone. Raises EngineError "adapter_in_use"."""
        if any(digest == each for sequence in self._all_live for each, _ in sequence.adapters):
            raise EngineError("adapter_in_use", f"a live sequence uses adapter {digest}")
        if digest in self._backend.adapters:
            self._backend.unload_adapter(digest)

    def num_known(self, request: GenerationRequest) -> int:
        """How many first tokens of this prompt are computed here already, or being computed. Any thread; a guess."""
        if request.cache_scope is None or not request.cache_prompt or not self._can_reuse:
            return 0
        key, prompt = (request.cache_scope, effective(request.adapters)), list(request.prompt[:-1])
        held = (each.tokens for each in tuple(self._slots.held.values()) if each.key == key)
        live = (
            each.request.prompt for each in (*self._running.values(), *self._waiting.values()) if each.cache_key == key
        )
        known = max((common_prefix(prompt, list(tokens)) for tokens in (*held, *live)), default=0)
        return max(known, self._keeper.num_found(key, prompt))

    def share_threads(self, number: int, *, before: int) -> None:
        """Compute with so many threads from the next step on. Until steps are measured, half as many take twice as
        long."""
        self._backend.set_threads(number)
        if self._embedder is not None:
            self._embedder.set_threads(number)
        self._drift *= before / number

    @property
    def adapters(self) -> frozenset[str]:
        """Digests of the loaded adapters. Any thread."""
        return self._backend.adapters

    def take_events(self) -> list[TokenEvent]:
        """What has happened since the last call, in order."""
        events, self._events = self._events, []
        return events

    def step(self) -> None:
        """Plan, act, commit. Does nothing when nothing is live. Backend errors other than EngineError are raised."""
        now = self._clock()
        self._end_expired(now)
        self._num_held_back = len(self._held_back())
        plan = schedule(self._view())
        self._seat(plan.seats)
        if work := self._start(plan, now):
            executed = self._clock() if plan.num_drafted else now  # the cost curve knows nothing of guessing
            outputs = self._backend.execute(list(work.values()), plan.adapters)
            self._take_turn(plan.adapters, self._clock() - now)
            self._commit(work, outputs, started=now, executed=executed)
            if self._drafter:
                self._drafter.spend(self._clock() - now, plan.probe_seconds)
        if self._embedder:
            self._embed(self._clock() - now)

    def _embed(self, spent: float) -> None:
        """A step of the inputs to embed, after one of those that generate took so many seconds. It has the rest of the
        time that a step may take, and half of it at least: _view leaves as much."""
        assert self._embedder is not None
        started = self._clock()
        seconds = EMBED_ALONE_SECONDS
        if self._running or self._waiting:
            seconds = max(self._step_seconds - spent, self._step_seconds / 2)
        seconds /= self._drift
        for each in self._embedder.live:
            if each.started_at is None:
                each.started_at = started
        done = self._embedder.step(lambda most: self._backend.cost.tokens_within(seconds, most))
        now, step = self._clock(), self._counters.num_steps
        self._counters.count_step(
            num_sequences=done.num_inputs,
            num_decoding=0,
            prompt=sum(done.num_tokens.values()),
            decoded=0,
            drafted=0,
            seconds=now - started,
        )
        self._counters.last_step_at = now
        for request_id, number in done.num_tokens.items():
            if sequence := self._embedder.get(request_id):
                sequence.count_step(step, number, done.num_inputs)
        self._events += done.embedded
        for sequence in done.done:
            self._finish(sequence, FinishReason.LENGTH, now)

    def stats(self) -> EngineStats:
        """A snapshot; any thread may call it."""
        counters = self._counters
        return EngineStats(
            num_slots=self._slots.num_slots,
            busy_slots=self._slots.num_busy,
            num_waiting=len(self._waiting),
            num_held_back=self._num_held_back,
            num_parked=len(self._parked),
            num_parks=counters.num_parks,
            num_steps=counters.num_steps,
            num_batched_sequences=counters.num_batched_sequences,
            num_decode_steps=counters.num_decode_steps,
            num_decode_sequences=counters.num_decode_sequences,
            prompt_tokens_total=counters.prompt_tokens_total,
            cached_tokens_total=counters.cached_tokens_total,
            completion_tokens_total=counters.completion_tokens_total,
            prefill_seconds_total=counters.prefill_seconds_total,
            decode_seconds_total=counters.decode_seconds_total,
            last_step_at=counters.last_step_at,
            num_switches=counters.num_switches,
            num_adapters=len(self._backend.adapters),
            cost_curve=self._backend.cost,
            num_drafts=counters.num_drafts,
            drafted_tokens_total=counters.drafted_tokens_total,
            accepted_tokens_total=counters.accepted_tokens_total,
            accepted_per_position=tuple(counters.accepted_per_position),
            draft_length=counters.draft_length,
            draft_chances=self._drafter.chances if self._drafter else {},
        )

    def free(self) -> None:
        if self._drafter:
            self._drafter.free()
        if self._embedder is not None:
            self._embedder.free()
        self._backend.free()

    # plan

    def _live(self, request_id: str) -> Sequence | None:
        embedding = self._embedder.get(request_id) if self._embedder else None
        generating = self._running.get(request_id) or self._waiting.get(request_id) or self._parked.get(request_id)
        return generating or embedding

    def _view(self) -> ScheduleView:
        free = self._slots.free
        drafter = self._drafter
        too_long_ago = self._clock() - MAX_PARKED_SECONDS if self._parked else 0.0
        return ScheduleView(
            running=tuple(sequence.candidate() for sequence in self._running.values()),
            waiting=tuple(self._waiting_candidates()) if free else (),
            free_slots=free,
            held={slot_id: len(held.tokens) for slot_id, held in self._slots.held.items()},
            used={slot_id: held.used for slot_id, held in self._slots.held.items()},
            names=dict(self._slots.names),
            busy={each.slot_id: each.adapters for each in self._running.values() if each.slot_id is not None},
            n_ctx=self._backend.n_ctx,
            num_slots=self._slots.num_slots,
            max_step_tokens=self._backend.max_step_tokens,
            max_chunk_tokens=self._backend.max_chunk_tokens,
            step_seconds=self._step_seconds / self._drift / (2 if self._embedder else 1),
            cost=self._backend.cost,
            step=self._counters.num_steps,
            turn=self._turn,
            parked=tuple(sequence.candidate() for sequence in self._parked.values()),
            num_overdue=sum(sequence.parked_at < too_long_ago for sequence in self._parked.values()),
            draftable=drafter.offers(self._running.values()) if drafter else {},
            draft_terms=drafter.terms if drafter else NO_DRAFTS,
        )

    def _waiting_candidates(self) -> Iterator[Candidate]:
        """Twice as many as there are slots: some may only wait for what others compute. Those that wait for a busy slot
        of their own are passed by, and do not count."""
        before = [sequence for sequence in self._running.values() if not sequence.is_decoding]
        held_back = self._held_back()
        eligible = (each for each in self._waiting.values() if each.request_id not in held_back)
        for sequence in islice(eligible, 2 * self._slots.num_slots):
            wanted = None if self._waits_for_slot(sequence) else sequence.request.decoding.slot_id
            if sequence.cache_key is None or not sequence.request.cache_prompt or not self._can_reuse:
                yield sequence.candidate(number=wanted)
            else:
                shared = {each.request_id: number for each in before if (number := sequence.num_shared(each))}
                yield sequence.candidate(self._prefixes(sequence), shared, wanted, self._keeper.num_stored(sequence))
            before.append(sequence)  # also one that reuses nothing: others may reuse what it computes

    def _held_back(self) -> frozenset[str]:
        """Waiting requests that only a busy slot can serve, as many as there are slots at most: those beyond that take
        any slot, else the requests of one tenant for one slot would fill the engine while other slots are idle."""
        if not self._waiting:
            return frozenset()
        pinned = (each.request_id for each in self._waiting.values() if self._waits_for_slot(each))
        return frozenset(islice(pinned, self._slots.num_slots))

    def _waits_for_slot(self, sequence: Sequence) -> bool:
        """It names a slot of its scope that is busy."""
        number = sequence.request.decoding.slot_id
        if number is None:
            return False
        slot_id = self._slots.find((sequence.request.cache_scope, number))
        return slot_id is not None and self._slots.owner(slot_id) is not None

    def _prefixes(self, sequence: Sequence) -> dict[int, int]:
        """How much of a waiting prompt each slot has computed under its key; its last token is always computed anew."""
        prompt = list(sequence.request.prompt[:-1])
        found = {
            slot_id: common_prefix(prompt, held.tokens)
            for slot_id, held in self._slots.held.items()
            if held.key == sequence.cache_key
        }
        for each in self._running.values():
            if each.slot_id is not None and each.cache_key == sequence.cache_key:
                found[each.slot_id] = min(sequence.num_reusable(each), len(prompt))
        return {slot_id: number for slot_id, number in found.items() if number}

    def _end_expired(self, now: float) -> None:
        """End what is past its deadline. Looks at the sequences only when some deadline can have passed."""
        if now < self._next_deadline:
            return
        deadlines = []
        for sequence in self._all_live:
            deadline = sequence.request.deadline
            if deadline is not None and deadline <= now:
                self._finish(sequence, FinishReason.DEADLINE, now)
            elif deadline is not None:
                deadlines.append(deadline)
        self._next_deadline = min(deadlines, default=math.inf)

    # act

    def _seat(self, seats: Iterable[Seat]) -> None:
        for seat in seats:
            if seat.is_resumed:
                self._resume(self._parked.pop(seat.request_id), seat)
                continue
            sequence = self._waiting.pop(seat.request_id)
            request = sequence.request
            num_cached = self._fill(sequence, seat)
            self._keeper.take(seat.slot_id, seat.request_id, (request.cache_scope, seat.number))
            sequence.slot_id, sequence.slot_number = seat.slot_id, seat.number
            self._running[seat.request_id] = sequence
            try:
                self._backend.open(seat.slot_id, request.prompt, request.sampling, sequence.seed, num_cached)
            except EngineError as error:
                self._finish(sequence, FinishReason.ERROR, self._clock(), error=error.code)
            else:
                if self._drafter:
                    in_place = seat.copy_from is None and not seat.is_restored
                    self._drafter.open(sequence, seat.slot_id, num_cached if in_place else 0)
                sequence.reuse(num_cached)
                self._counters.cached_tokens_total += num_cached

    def _resume(self, sequence: Sequence, seat: Seat) -> None:
        """A parked sequence goes on in this slot; what the slot held until now is stored, if that is worth it."""
        parked, sequence.parked = sequence.parked, None
        assert parked is not None
        self._keeper.make_room(seat.slot_id)
        self._keeper.take(seat.slot_id, seat.request_id, (sequence.request.cache_scope, seat.number))
        sequence.slot_id, sequence.slot_number = seat.slot_id, seat.number
        self._running[seat.request_id] = sequence
        self._backend.attach(seat.slot_id, parked.detached)
        seconds = self._clock() - sequence.parked_at
        sequence.parked_seconds += seconds
        self._events.append(Resumed(seat.request_id, seconds))
        try:
            self._keeper.unpark(seat.slot_id, parked.state, sequence.num_computed)
        except EngineError as error:
            sequence.num_exact = 0  # the slot holds nothing of it
            self._finish(sequence, FinishReason.ERROR, self._clock(), error=error.code)
            return
        if self._drafter:
            self._drafter.open(sequence, seat.slot_id, 0)

    def _fill(self, sequence: Sequence, seat: Seat) -> int:
        """Let the slot hold the beginning of the prompt that the plan found; how many tokens that are. What the slot
        held until now is stored, if that is worth it."""
        in_place = seat.copy_from is None and not seat.is_restored
        self._keeper.make_room(seat.slot_id, seat.num_cached if in_place else 0)
        if seat.is_restored:
            return self._keeper.restore_for(sequence, seat.slot_id)
        if seat.copy_from is not None:
            self._backend.copy(seat.copy_from, seat.slot_id)
        return seat.num_cached

    def _start(self, plan: StepPlan, now: float) -> dict[str, SlotWork]:
        """The plan as work for the backend, by request id and in order of slots; announces who is in a first step."""
        chosen = [self._running[request_id] for request_id in plan.num_tokens if request_id in self._running]
        for sequence in chosen:
            if sequence.started_at is None and sequence.slot_number is not None:
                sequence.started_at = now
                self._events.append(Started(sequence.request_id, sequence.slot_number, sequence.cached_tokens))
        # llama.cpp batches together only sequences that follow each other in rising order of their ids.
        seated = sorted((sequence.slot_id, sequence.request_id) for sequence in chosen if sequence.slot_id is not None)
        drafts = self._drafter.drafts(plan.num_drafted, self._running) if self._drafter and plan.num_drafted else {}
        return {
            request_id: self._running[request_id].work(slot_id, plan.num_tokens[request_id], drafts.get(request_id, ()))
            for slot_id, request_id in seated
        }

    def _take_turn(self, adapters: AdapterVector, seconds: float) -> None:
        self._counters.num_switches += adapters != self._turn.adapters
        self._turn = self._turn.after(adapters, seconds)

    # commit

    def _commit(self, work: dict[str, SlotWork], outputs: list[Chosen], *, started: float, executed: float) -> None:
        now = self._clock()
        step = self._counters.num_steps
        num_prompt, num_decoded = self._count(work, now - started, now)
        self._observe(num_prompt, num_decoded, now - executed)
        for (request_id, part), chosen in zip(work.items(), outputs, strict=True):
            sequence = self._running[request_id]
            sequence.count_step(step, len(part.tokens) - part.num_drafted, len(work))
            if part.num_drafted:
                num_accepted = max(len(chosen.tokens) - 1, 0)  # none was chosen where choosing failed
                sequence.count_draft(part.num_drafted, num_accepted)
                self._counters.count_draft(part.num_drafted, num_accepted)
            if chosen.tokens:
                self._extend(sequence, chosen, now)
                if self._drafter:
                    self._drafter.learn(sequence)
            elif sequence.is_prompt_done:
                self._finish(sequence, FinishReason.LENGTH, now)
            if chosen.error and request_id in self._running:
                self._finish(sequence, FinishReason.ERROR, now, error=chosen.error)

    def _count(self, work: dict[str, SlotWork], seconds: float, now: float) -> tuple[int, int]:
        """The step in the counters; its tokens of prompts and its others."""
        decoding = [part for request_id, part in work.items() if self._running[request_id].is_decoding]
        decoded = sum(len(part.tokens) for part in decoding)
        prompt = sum(len(part.tokens) for part in work.values()) - decoded
        self._counters.count_step(
            num_sequences=len(work),
            num_decoding=len(decoding),
            prompt=prompt,
            decoded=decoded,
            drafted=sum(part.num_drafted for part in decoding),
            seconds=seconds,
        )
        self._counters.last_step_at = now
        return prompt, decoded

    def _observe(self, num_prompt: int, num_decoded: int, seconds: float) -> None:
        """Learn how much slower or faster than measured the machine reads prompts now: it may be busy, or contexts
        long. A step counts as far as it read prompts: tokens of many sequences cost more than as many of one, and would
        make chunks too short.

        One step counts between a quarter and four times the expectation, so that an outlier does not shrink chunks.
        """
        num_tokens = num_prompt + num_decoded
        expected = self._backend.cost.seconds(num_tokens) * self._drift
        if expected > 0:
            ratio = min(max(seconds / expected, 0.25), 4.0)
            self._drift *= 1 + DRIFT_WEIGHT * num_prompt / num_tokens * (ratio - 1)

    def _extend(self, sequence: Sequence, chosen: Chosen, now: float) -> None:
        """Commit sampled tokens one by one until one of them ends the sequence."""
        if sequence.first_token_at is None:
            sequence.first_token_at = now
        text, taken, reason = "", 0, None
        for taken, token in enumerate(chosen.tokens, start=1):  # noqa: B007
            sequence.append(token)
            if self._backend.is_end(token):
                reason = FinishReason.EOS
            else:
                text += sequence.text.feed(self._piece(sequence, token))
                reason = self._reason(sequence, token, now)
            if reason:
                text += sequence.text.finish()
                break
        self._counters.completion_tokens_total += taken
        sequence.num_computed = min(sequence.num_computed, len(sequence.tokens) - 1)  # of a draft behind the end
        self._events.append(Delta(sequence.request_id, text, chosen.tokens[:taken], chosen.probs[:taken]))
        if reason:
            self._finish(sequence, reason, now)
        elif self._is_full(sequence):
            self._shift(sequence)

    def _piece(self, sequence: Sequence, token: int) -> bytes:
        is_shown = token in sequence.request.sampling.shown_tokens
        return self._backend.shown_piece(token) if is_shown else self._backend.piece(token)

    def _reason(self, sequence: Sequence, token: int, now: float) -> FinishReason | None:
        """Why the sequence ends after its latest token, if it does."""
        if sequence.text.stop_word is not None:
            return FinishReason.STOP
        if sequence.text.is_outdented:
            return FinishReason.LENGTH
        used_up = sequence.num_completion >= sequence.request.max_tokens
        if self._is_full(sequence) and (used_up or not self._can_shift(sequence)):
            sequence.is_truncated = True
            return FinishReason.LENGTH
        return FinishReason.LENGTH if used_up or self._is_late(sequence, token, now) else None

    def _is_late(self, sequence: Sequence, token: int, now: float) -> bool:
        """Its time to generate is over and a line ends here: as with llama.cpp's t_max_predict_ms, lines stay whole."""
        seconds, began = sequence.request.decoding.max_decode_seconds, sequence.first_token_at
        if seconds is None or began is None or now - began <= seconds:
            return False
        return b"\n" in self._backend.piece(token)

    def _is_full(self, sequence: Sequence) -> bool:
        """No token fits behind its latest one, which is not computed yet. Drafts never reach beyond this."""
        return len(sequence.tokens) >= self._backend.n_ctx

    def _can_shift(self, sequence: Sequence) -> bool:
        return sequence.request.decoding.context_shift and self._backend.abilities.shift

    def _shift(self, sequence: Sequence) -> None:
        """The one place where tokens of a running sequence disappear."""
        num_keep, num_discard = sequence.shift(self._backend.n_ctx, self._backend.adds_bos)
        assert sequence.slot_id is not None
        self._backend.shift(sequence.slot_id, num_keep, num_discard)
        if self._drafter:
            self._drafter.shift(sequence, num_keep, num_discard)

    def _finish(self, sequence: Sequence, reason: FinishReason, now: float, error: str | None = None) -> None:
        """End a live sequence: held text first, then the one Finished; its slot is free for the next step."""
        if tail := sequence.text.finish():
            self._events.append(Delta(sequence.request_id, tail))
        stop_word = sequence.text.stop_word
        self._events.append(
            Finished(sequence.request_id, reason, sequence.receipt(now), stop_word=stop_word, error=error)
        )
        if self._drafter:
            self._drafter.close(sequence.request_id)
        if self._embedder:
            self._embedder.drop(sequence.request_id)
        self._waiting.pop(sequence.request_id, None)
        if self._parked.pop(sequence.request_id, None) and sequence.parked:
            self._keeper.drop_parked(sequence.parked.state)
            self._backend.drop(sequence.parked.detached)
        if self._running.pop(sequence.request_id, None) and sequence.slot_id is not None:
            held = sequence.held(self._counters.num_steps)
            self._slots.give_back(sequence.slot_id, sequence.request_id, held)
            self._backend.close(sequence.slot_id)


def _report(slot_id: int, name: SlotName, sequence: Sequence | None, held: Held | None) -> SlotReport:
    scope, number = name
    if sequence is None:
        if held is None:
            return SlotReport(slot_id, scope, number)
        return SlotReport(slot_id, scope, number, num_held=len(held.tokens), task=held.task, adapters=held.key[1])
    return SlotReport(
        slot_id,
        scope,
        number,
        request_id=sequence.request_id,
        num_held=sequence.num_computed,
        task=sequence.task(),
        adapters=sequence.request.adapters,
    )

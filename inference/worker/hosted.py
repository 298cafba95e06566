"""A served model in the memory of a worker: loading, its engine's runner, and how many of its slots are taken.

model_keeper.py says when it is loaded and unloaded; worker.py uses it, from task threads, the engine's thread and the
upkeep thread. Knows no Redis.
"""

from __future__ import annotations

import logging
import math
import platform
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple
from enum import StrEnum
from functools import partial
from importlib.metadata import version
from typing import Any

from django.conf import settings

from inference.catalog import adapters
from inference.catalog.adapters import AdapterFile
from inference.catalog.served import Served
from inference.engine.backend import Abilities, Backend
from inference.engine.drafting import DraftPolicy, DraftSettings
from inference.engine.lanes import Runner, run_in_lanes
from inference.engine.slot_keeper import SlotState
from inference.engine.speculative import PromptLookup, Proposer
from inference.engine.stats import EngineStats
from inference.engine.types import EngineError, EventSink, GenerationRequest, SlotReport
from inference.models import ServedModel
from inference.slots.files import Origin, SlotFileError, SlotFiles, scope_of
from inference.worker.adapter_shelf import AdapterShelf

logger = logging.getLogger(__name__)

RETRY_SECONDS = 30.0
"""A model that failed to load, or whose engine crashed, is tried again after this."""
UNAVAILABLE = "llm_unavailable"
TOO_LARGE = "model_does_not_fit"
STOPPING = "worker_stopping"
MAX_STEP_DRAFT = 256
"""Guesses that one step verifies at most; each needs a row of scores over the whole vocabulary."""

LOAD_OVERHEAD_SECONDS = 1.0
"""What a load takes beside reading the file: contexts are made, and what steps cost is measured."""
FIRST_GUESS_BYTES_PER_SECOND = 500e6
MOST_BYTES_PER_SECOND = 4e9

LoadBackend = Callable[[Served], Backend]
Progress = Callable[[float], None]
"""Called with 0.0 to 1.0 while a file is read. What it raises ends the load."""
ReadAdapters = Callable[[Served], Sequence[AdapterFile]]


def slot_files() -> SlotFiles:
    """The states of slots in the state folder."""
    config = settings.CONFIG
    folder = config.state / "slots"
    return SlotFiles(
        folder,
        settings.SECRET_KEY,
        fallbacks=settings.SECRET_KEY_FALLBACKS,
        tenant_bytes=config.slot_disk_mb << 20,
        max_age_days=config.slot_days,
    )


class State(StrEnum):
    UNLOADED = "unloaded"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    RETIRING = "retiring"
    """Takes no more requests; is unloaded or replaced when it is idle."""


def load_backend(served: Served, progress: Progress = lambda part: None) -> Backend:
    """The backend that the configuration asks for. llama_cpp is imported here, in workers, and not before."""
    if settings.CONFIG.engine == "fake":
        from inference.engine.fake_backend import FakeBackend

        return FakeBackend(served.n_slots, served.n_ctx, supports_adapters=True)
    from inference.engine.llama import LlamaBackend

    drafts = served.draft_kind != ServedModel.DraftKind.NONE
    return LlamaBackend.load(
        served.path,
        n_ctx=served.n_ctx,
        n_slots=served.n_slots,
        n_threads=served.n_threads,
        n_gpu_layers=served.n_gpu_layers,
        kv_type=served.kv_type,
        flash_attention=served.flash_attention,
        max_draft_tokens=min(served.n_slots * served.draft_n_max, MAX_STEP_DRAFT) if drafts else 0,
        progress=_logged(served.name, progress),
    )


def load_proposer(served: Served, backend: Backend) -> Proposer | None:
    """Who guesses tokens for a loaded model. The fake engine looks tokens up at most. Raises EngineError."""
    if served.draft_kind == ServedModel.DraftKind.NONE:
        return None
    if not backend.abilities.trim:
        logger.warning("%s is served without drafts: %s", served.name, backend.abilities.reasons.get("trim", ""))
        return None
    if served.draft_path is None or settings.CONFIG.engine == "fake":
        return PromptLookup()
    from inference.engine.llama import DraftModel, LlamaBackend

    if not isinstance(backend, LlamaBackend):
        raise TypeError(f"a draft model guesses for llama.cpp, not for {type(backend).__name__}")
    return DraftModel.load(served.draft_path, backend, n_threads=served.n_threads, n_gpu_layers=served.n_gpu_layers)


def draft_settings(served: Served) -> DraftSettings:
    return DraftSettings(
        num_min=served.draft_n_min,
        num_max=served.draft_n_max,
        min_probability=served.draft_p_min,
        policy=DraftPolicy(served.draft_policy),
    )


def _logged(name: str, progress: Progress) -> Progress:
    """Log every quarter, too, so that a long load is seen to be alive."""
    told = [0.0]

    def report(part: float) -> None:
        progress(part)
        if part - told[0] >= 0.25:
            told[0] = part
            logger.info("loading %s: %d %%", name, part * 100)

    return report


def fingerprint(served: Served) -> tuple[Any, ...]:
    """What cannot change while a model is loaded."""
    options = (served.n_ctx, served.n_slots, served.n_lanes, served.n_threads, served.n_gpu_layers, served.kv_type)
    drafts = (served.draft_kind, str(served.draft_path), served.draft_digest, *astuple(draft_settings(served)))
    return (served.digest, str(served.path), served.flash_attention, served.embeds, *options, *drafts)


def _counts(stats: EngineStats) -> dict[str, int]:
    """Totals since the model was loaded; what their quotients mean is for the reader of a heartbeat to say."""
    return {
        "decode_steps": stats.num_decode_steps,
        "decode_sequences": stats.num_decode_sequences,
        "prompt_tokens": stats.prompt_tokens_total,
        "cached_tokens": stats.cached_tokens_total,
        "completion_tokens": stats.completion_tokens_total,
        "drafted_tokens": stats.drafted_tokens_total,
        "accepted_tokens": stats.accepted_tokens_total,
    }


class LoadSpeed:
    """How quickly this machine reads models: what was measured last, for all models of a worker."""

    def __init__(self) -> None:
        self._bytes_per_second = FIRST_GUESS_BYTES_PER_SECOND

    def seconds(self, num_bytes: int) -> float:
        return LOAD_OVERHEAD_SECONDS + num_bytes / self._bytes_per_second

    def learn(self, num_bytes: int, seconds: float) -> None:
        if num_bytes > 0:
            reading = max(seconds - LOAD_OVERHEAD_SECONDS, num_bytes / MOST_BYTES_PER_SECOND)
            self._bytes_per_second = num_bytes / reading


class HostedModel:
    """One model. `num_busy` counts the leases it serves, `num_visits` who else must find it loaded; the caller guards
    both, and `retire`, with one lock."""

    def __init__(
        self,
        served: Served,
        *,
        sink: EventSink,
        load: LoadBackend | None = None,
        read_adapters: ReadAdapters = adapters.files_of,
        files: SlotFiles | None = None,
        speed: LoadSpeed | None = None,
    ) -> None:
        """load: in the place of the backend that the configuration asks for."""
        self.served = served
        self._adapters = AdapterShelf(lambda: read_adapters(self.served))
        self.state = State.UNLOADED
        self.error = ""
        self.error_code = UNAVAILABLE
        self.num_busy = self.num_visits = 0
        self.is_replaced = False
        """Another has its place, or is about to."""
        self.failed_at: float | None = None
        self.used_at = self.loaded_at = time.monotonic()
        self.is_waiting = False
        """Wanted, and others must be loaded or unloaded first."""
        self.progress = 0.0
        """Of the load that goes on: 0.0 to 1.0."""
        self._plain_use_at = -math.inf
        self._short_until = -math.inf
        self._load = load or partial(load_backend, progress=self._note_progress)
        self._sink = sink
        self._runner: Runner | None = None
        self._files = files or slot_files()
        self._speed = speed or LoadSpeed()
        self._is_given_up = False
        self.comes_on_demand = False
        """It was in memory, or there was no room for it: its next request loads it."""
        self.load_seconds: float | None = None
        """Of its latest load."""
        self.abilities: Abilities | None = None
        """Of the memory, known once it was loaded."""
        self._loading = threading.Lock()

    @property
    def num_slots(self) -> int:
        """Slots that can serve now."""
        return self.served.n_slots if self.state is State.READY else 0

    @property
    def takes(self) -> bool:
        """Whether a ticket may be taken for it."""
        return self.state is State.READY and self.num_busy < self.served.n_slots + self.num_held_back

    @property
    def takes_batch(self) -> bool:
        """Whether a line of a batch may be taken for it, when nothing interactive waits: slots stay free for that."""
        return self.takes and self.num_busy < max(1, self.served.n_slots * settings.CONFIG.batch_slots_percent // 100)

    @property
    def num_held_back(self) -> int:
        """Requests that wait for a slot of their tenant which is busy: others need not wait for them."""
        runner = self._runner
        return 0 if runner is None else min(runner.num_held_back, self.served.n_slots)

    def is_idle(self) -> bool:
        return self.num_busy == 0 and self.num_visits == 0

    @property
    def is_in_memory(self) -> bool:
        return self._runner is not None or self.state is State.LOADING

    # How long it stays

    def use(self, keep_alive_seconds: float | None = None) -> None:
        """Somebody has used it until now, and wants it to stay for so long at most; None: as its settings say."""
        self.used_at = now = time.monotonic()
        own = self.keep_alive_seconds
        if keep_alive_seconds is None or keep_alive_seconds >= own:
            self._plain_use_at = now
        else:
            self._short_until = max(self._short_until, now + keep_alive_seconds)

    @property
    def keep_alive_seconds(self) -> float:
        """How long it stays when it is idle. One that is loaded when the worker starts stays, unless its own settings
        say how long."""
        own, idle = self.served.keep_alive_seconds, settings.CONFIG.model_idle_timeout_seconds
        if self.served.is_pinned:
            return math.inf
        if own is not None:
            return own
        return math.inf if self.served.load_mode == ServedModel.LoadMode.EAGER or not idle else idle

    @property
    def unload_at(self) -> float:
        """When it has been idle for long enough, by time.monotonic: whoever wanted it for the longest is heard."""
        keep = self.keep_alive_seconds
        return math.inf if math.isinf(keep) else max(self._plain_use_at + keep, self._short_until)

    def expected_load_seconds(self) -> float:
        """As long as the last time, or as its size says."""
        return self._speed.seconds(self.served.size_bytes) if self.load_seconds is None else self.load_seconds

    # Loading

    def runner(self) -> Runner:
        """The running engine. Raises EngineError where it is not loaded."""
        runner = self._runner
        if runner is None:
            raise EngineError(UNAVAILABLE, self.error or f"{self.served.name} is not loaded")
        return runner

    def submit(self, request: GenerationRequest) -> None:
        """Hand a request to the engine, with model and adapters loaded. Raises EngineError or DatabaseError."""
        self._adapters.submit(self.runner(), request)

    def follow_adapters(self) -> None:
        """Load and unload adapters as the registry says now. Raises DatabaseError."""
        runner = self._runner
        if runner is not None and self.state is State.READY:
            self._adapters.follow(runner)

    def load(self) -> Runner:
        """Load it now; a second caller waits for the first. Raises EngineError with what the operator must know.

        One that was replaced is not loaded: nobody would ever unload it.
        """
        with self._loading:
            if self._runner is not None:
                return self._runner
            if self.is_replaced:
                raise EngineError(STOPPING, f"{self.served.name} was replaced")
            self.state, self.progress = State.LOADING, 0.0
            started = time.monotonic()
            logger.info(
                "loading %s from %s, some %.1f s and %d MB",
                self.served.name,
                self.served.path,
                self.expected_load_seconds(),
                self.served.memory.total_bytes / 1e6,
            )
            try:
                runner = self._start()
            except Exception as error:
                if self._is_given_up:
                    self.state = State.UNLOADED
                    raise EngineError(STOPPING, f"the load of {self.served.name} was given up") from error
                self.fail(f"{self.served.name} could not be loaded: {error}")
                raise EngineError(UNAVAILABLE, self.error) from error
            self.used_at = self.loaded_at = time.monotonic()
            self.load_seconds, self.comes_on_demand = self.loaded_at - started, True
            self._speed.learn(self.served.size_bytes, self.load_seconds)
            self._runner, self.error, self.failed_at = runner, "", None
            if self.state is State.LOADING:  # else it was replaced meanwhile
                self.state = State.READY
            logger.info("%s is loaded after %.1f s", self.served.name, self.load_seconds)
            return runner

    def give_up_loading(self) -> None:
        """The worker ends: a load that goes on ends with the next piece of the file. Any thread."""
        self._is_given_up = True

    def _note_progress(self, part: float) -> None:
        if self._is_given_up:
            raise EngineError(STOPPING, "the worker stops")
        self.progress = part

    def _start(self) -> Runner:
        """A running engine, with the states that an earlier one has left."""
        backend = self._load(self.served)
        self.abilities = backend.abilities
        room = settings.CONFIG.slot_memory_mb << 20
        try:
            origin = self.origin
            states = self._files.take_kept(origin, room) if room else ()
        except BaseException:  # else its memory is lost, and once more with each attempt
            backend.free()
            raise
        runner = run_in_lanes(
            backend,
            self.served.n_lanes,
            embeds=self.served.embeds,
            sink=self._sink,
            on_crash=self._crashed,
            load_proposer=partial(load_proposer, self.served),
            draft_settings=draft_settings(self.served),
            state_bytes=room,
            states=states,
            keep_states=lambda states: logger.info("%d states kept", self._files.keep(origin, states, room)),
        )
        runner.start()
        return runner

    @property
    def origin(self) -> Origin:
        """What a slot's state must come from to be of use here."""
        served = self.served
        engine = settings.CONFIG.engine
        build = f"{engine} {version('llama-cpp-python') if engine == 'llama' else ''} {platform.machine()}"
        return Origin(
            model_digest=served.digest,
            vocabulary=f"{served.architecture} {served.vocabulary_size} {served.bos_token_id} {served.add_bos_token}",
            n_ctx=served.n_ctx,
            kv_type=served.kv_type,
            build=build,
        )

    # Slots, for slot_desk.py. Raise EngineError, SlotFileError or OSError.

    def slots(self, tenant_id: int | None) -> list[SlotReport]:
        """What runs in the slots and what they hold; None: of all tenants. Loads nothing."""
        runner = self._runner
        found = [] if runner is None else runner.slots()
        return [each for each in found if tenant_id is None or each.scope == scope_of(tenant_id)]

    def save_slot(self, tenant_id: int, number: int, label: str, seconds: float) -> tuple[int, int]:
        """(tokens, bytes) that were saved under the label."""
        saved = self.runner().save_slot((scope_of(tenant_id), number), seconds)
        return len(saved.tokens), self._files.save(tenant_id, label, self.origin, saved)

    def restore_slot(self, tenant_id: int, number: int, label: str, seconds: float) -> tuple[int, int]:
        """(tokens, bytes) that were read. Where it fails, the slot is empty afterwards."""
        runner, name = self.runner(), (scope_of(tenant_id), number)
        try:
            saved, num_bytes = self._files.load(tenant_id, label, self.origin)
        except SlotFileError:
            runner.restore_slot(name, SlotState(), seconds)
            raise
        runner.restore_slot(name, saved, seconds)
        return len(saved.tokens), num_bytes

    def erase_slot(self, tenant_id: int, number: int, seconds: float) -> int:
        """How many tokens the slot held."""
        self._files.forget_kept(tenant_id, self.origin)
        return self.runner().erase_slot((scope_of(tenant_id), number), seconds)

    def forget_tenant(self, tenant_id: int, seconds: float) -> None:
        """All that its slots hold, and what had to leave them. A slot that is busy is waited for."""
        runner, scope = self.runner(), scope_of(tenant_id)
        for number in range(self.served.n_slots * self.served.n_lanes):
            runner.erase_slot((scope, number), seconds)
        runner.forget_states(scope)

    def may_retry(self) -> bool:
        return self.failed_at is None or time.monotonic() - self.failed_at >= RETRY_SECONDS

    def fail(self, error: str, code: str = UNAVAILABLE) -> None:
        """It cannot be served, and why; code: what its requests end with."""
        logger.error(error)
        self.error_code, self.failed_at = code, time.monotonic()
        self.state, self.error = State.FAILED, error

    def forgive(self) -> None:
        """Try again at once what failed."""
        self.failed_at = None

    def _crashed(self, error: BaseException) -> None:
        """On the engine's thread: its sequences have ended; the model is loaded anew later."""
        self._runner = None
        self.fail(f"the engine of {self.served.name} crashed: {error!r}")

    def retire(self) -> None:
        self.state = State.RETIRING

    def drain(self, seconds: float) -> bool:
        """Take no more and wait for what runs; whether all of it ended in time."""
        runner = self._runner
        return runner is None or runner.drain(seconds)

    def unload(self, *, to: State = State.UNLOADED) -> None:
        """End what still runs, keep the states of its slots, and free the memory. What goes wrong is told by its state,
        and it is not in memory for anybody afterwards. Raises EngineError."""
        with self._loading:
            runner, self._runner = self._runner, None
            self._plain_use_at = self._short_until = -math.inf
            if runner is not None:
                try:
                    runner.stop()
                except Exception as error:
                    self.fail(f"{self.served.name} could not be unloaded: {error!r}")
                    raise EngineError(UNAVAILABLE, self.error) from error
                logger.info("%s is unloaded", self.served.name)
            self.state = to

    def cancel(self, request_id: str) -> None:
        runner = self._runner
        if runner is not None:
            runner.cancel(request_id)

    def can_park(self) -> bool:
        """Whether its sequences can make room for others and go on later, and not too many have already."""
        abilities, runner = self.abilities, self._runner
        has_room = settings.CONFIG.slot_memory_mb > 0 and runner is not None and runner.num_parked < self.served.n_slots
        return self.state is State.READY and has_room and abilities is not None and abilities.save and abilities.trim

    def park(self, request_id: str) -> None:
        """Let a running request make room for one that was submitted just now."""
        runner = self._runner
        if runner is not None:
            runner.park(request_id)

    def stats(self) -> EngineStats | None:
        runner = self._runner
        return None if runner is None else runner.stats()

    def report(self) -> dict[str, Any]:
        """Its part of the worker's heartbeat."""
        stats = self.stats()
        return {
            "id": self.served.id,
            "name": self.served.name,
            "digest": self.served.digest,
            "state": self.state.value,
            "is_waiting": self.is_waiting,
            "progress": round(self.progress, 2) if self.state is State.LOADING else None,
            "load_seconds": round(self.expected_load_seconds(), 1),
            "error": self.error if self.state is State.FAILED else "",
            "memory_bytes": self.served.memory.total_bytes,
            "on_demand": self.comes_on_demand or self.served.load_mode == ServedModel.LoadMode.LAZY,
            "n_ctx": self.served.n_ctx,
            "slots": self.served.n_slots,
            "busy": self.num_busy,
            "adapters": stats.num_adapters if stats else 0,
            "steps": stats.num_steps if stats else 0,
            "counts": _counts(stats) if stats else None,
            "cannot": dict(self.abilities.reasons) if self.abilities else None,
        }

"""A served model in the memory of a worker: loading, its engine's runner, and how many of its slots are taken.

Used by worker.py alone, from task threads, the engine's thread and the upkeep thread. Knows no Redis.
"""

from __future__ import annotations

import logging
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

from inference import adapters
from inference.adapter_shelf import AdapterShelf
from inference.adapters import AdapterFile
from inference.engine.backend import Abilities, Backend
from inference.engine.drafting import DraftPolicy, DraftSettings
from inference.engine.lanes import Runner, run_in_lanes
from inference.engine.slot_keeper import SlotState
from inference.engine.speculative import PromptLookup, Proposer
from inference.engine.stats import EngineStats
from inference.engine.types import EngineError, EventSink, GenerationRequest, SlotReport
from inference.models import ServedModel
from inference.registry import Served
from inference.slot_files import Origin, SlotFileError, SlotFiles, scope_of

logger = logging.getLogger(__name__)

RETRY_SECONDS = 30.0
"""A model that failed to load, or whose engine crashed, is tried again after this."""
UNAVAILABLE = "llm_unavailable"
MAX_STEP_DRAFT = 256
"""Guesses that one step verifies at most; each needs a row of scores over the whole vocabulary."""

LoadBackend = Callable[[Served], Backend]
ReadAdapters = Callable[[Served], Sequence[AdapterFile]]


def slot_files() -> SlotFiles:
    """The states of slots in the state folder."""
    config = settings.CONFIG
    folder = config.state / "slots"
    return SlotFiles(folder, settings.SECRET_KEY, tenant_bytes=config.slot_disk_mb << 20, max_age_days=config.slot_days)


class State(StrEnum):
    UNLOADED = "unloaded"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    RETIRING = "retiring"
    """Takes no more requests; is unloaded or replaced when it is idle."""


def load_backend(served: Served) -> Backend:
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
        progress=_progress(served.name),
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


def _progress(name: str) -> Callable[[float], None]:
    """Log every quarter, so that a long load is seen to be alive."""
    told = [0.0]

    def report(part: float) -> None:
        if part - told[0] >= 0.25:
            told[0] = part
            logger.info("loading %s: %d %%", name, part * 100)

    return report


def fingerprint(served: Served) -> tuple[Any, ...]:
    """What cannot change while a model is loaded."""
    options = (served.n_ctx, served.n_slots, served.n_lanes, served.n_threads, served.n_gpu_layers, served.kv_type)
    drafts = (served.draft_kind, str(served.draft_path), served.draft_digest, *astuple(draft_settings(served)))
    return (served.digest, str(served.path), served.flash_attention, *options, *drafts)


class HostedModel:
    """One model. `num_busy` counts the leases it serves; the caller guards `reserve` and `free` with one lock."""

    def __init__(
        self,
        served: Served,
        *,
        load: LoadBackend,
        sink: EventSink,
        read_adapters: ReadAdapters = adapters.files_of,
        files: SlotFiles | None = None,
    ) -> None:
        self.served = served
        self._adapters = AdapterShelf(lambda: read_adapters(self.served))
        self.state = State.UNLOADED
        self.error = ""
        self.num_busy = 0
        self.failed_at: float | None = None
        self.used_at = time.monotonic()
        self._load, self._sink = load, sink
        self._runner: Runner | None = None
        self._files = files or slot_files()
        self.abilities: Abilities | None = None
        """Of the memory, known once it was loaded."""
        self._loading = threading.Lock()

    @property
    def num_slots(self) -> int:
        """Slots that can serve now."""
        return self.served.n_slots if self.state is State.READY else 0

    @property
    def takes(self) -> bool:
        """Whether a ticket may be taken for it. A failed model takes tickets to answer them with its error; one that
        is not loaded yet is loaded by the first."""
        if self.state in (State.LOADING, State.RETIRING):
            return False
        return self.state is State.FAILED or self.num_busy < self.served.n_slots + self.num_held_back

    @property
    def num_held_back(self) -> int:
        """Requests that wait for a slot of their tenant which is busy: others need not wait for them."""
        stats = self.stats()
        return min(stats.num_held_back, self.served.n_slots) if stats else 0

    def is_idle(self) -> bool:
        return self.num_busy == 0

    def runner(self) -> Runner:
        """The running engine, loaded if it is not. Raises EngineError."""
        runner = self._runner
        if runner is None:
            runner = self.load()
        self.used_at = time.monotonic()
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
        """Load it now; a second caller waits for the first. Raises EngineError with what the operator must know."""
        with self._loading:
            if self._runner is not None:
                return self._runner
            if self.state is State.FAILED and not self.may_retry():
                raise EngineError(UNAVAILABLE, self.error)
            self.state = State.LOADING
            started = time.monotonic()
            logger.info("loading %s from %s", self.served.name, self.served.path)
            try:
                runner = self._start()
            except Exception as error:
                self._fail(f"{self.served.name} could not be loaded: {error}")
                raise EngineError(UNAVAILABLE, self.error) from error
            self._runner, self.state, self.error = runner, State.READY, ""
            logger.info("%s is loaded after %.1f s", self.served.name, time.monotonic() - started)
            return runner

    def _start(self) -> Runner:
        """A running engine, with the states that an earlier one has left."""
        backend = self._load(self.served)
        room = settings.CONFIG.slot_memory_mb << 20
        self.abilities = backend.abilities
        origin = self.origin
        runner = run_in_lanes(
            backend,
            self.served.n_lanes,
            sink=self._sink,
            on_crash=self._crashed,
            load_proposer=partial(load_proposer, self.served),
            draft_settings=draft_settings(self.served),
            state_bytes=room,
            states=self._files.take_kept(origin, room) if room else (),
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

    def may_retry(self) -> bool:
        return self.failed_at is None or time.monotonic() - self.failed_at >= RETRY_SECONDS

    def _fail(self, error: str) -> None:
        logger.error(error)
        self.state, self.error, self.failed_at = State.FAILED, error, time.monotonic()

    def _crashed(self, error: BaseException) -> None:
        """On the engine's thread: its sequences have ended; the model is loaded anew later."""
        self._runner = None
        self._fail(f"the engine of {self.served.name} crashed: {error!r}")

    def retire(self) -> None:
        self.state = State.RETIRING

    def drain(self, seconds: float) -> bool:
        """Take no more and wait for what runs; whether all of it ended in time."""
        runner = self._runner
        return runner is None or runner.drain(seconds)

    def unload(self, *, to: State = State.UNLOADED) -> None:
        """End what still runs and free the memory."""
        with self._loading:
            runner, self._runner = self._runner, None
            if runner is not None:
                runner.stop()
                logger.info("%s is unloaded", self.served.name)
            self.state = to

    def cancel(self, request_id: str) -> None:
        runner = self._runner
        if runner is not None:
            runner.cancel(request_id)

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
            "error": self.error,
            "n_ctx": self.served.n_ctx,
            "slots": self.served.n_slots,
            "busy": self.num_busy,
            "adapters": stats.num_adapters if stats else 0,
            "steps": stats.num_steps if stats else 0,
            "cannot": dict(self.abilities.reasons) if self.abilities else None,
        }

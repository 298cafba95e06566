"""One context of a model, one native sequence and sampler per slot.

Everything runs on the engine's thread after load() or sibling(). KV memory is one stream per sequence (kv_unified off),
which is faster with many sequences; streams are computed together where slot ids are consecutive.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from inference.engine.backend import NOTHING, Abilities, Chosen, SlotWork
from inference.engine.costs import CostCurve, measure
from inference.engine.llama import abilities
from inference.engine.llama.batch import Batch
from inference.engine.llama.candidates import Candidates
from inference.engine.llama.embedder import LlamaEmbedder
from inference.engine.llama.library import forward_log, native, token_bytes, token_texts
from inference.engine.llama.loading import (
    check_options,
    checked_file,
    is_causal,
    load_model,
    make_context,
    step_tokens,
    trained_context,
    usable_cpus,
)
from inference.engine.llama.model import SharedModel
from inference.engine.llama.samplers import SlotSampler
from inference.engine.types import AdapterVector, EngineError, SamplingParams

logger = logging.getLogger(__name__)

MAX_CPU_CHUNK = 63
"""From 64 tokens of one sequence on, llama.cpp's attention on a CPU takes another kernel, whose results differ in the
last bits and so in a token now and then. Below, prompts give the same tokens however they are cut."""


class LlamaBackend:
    """Implements Backend with llama.cpp. Made by load(); n_ctx is the exact limit of a slot in tokens."""

    supports_adapters = True

    def __init__(
        self,
        model: SharedModel,
        new_context: Callable[[], Any],
        *,
        n_ctx: int,
        n_slots: int,
        n_threads: int,
        max_draft_tokens: int = 0,
    ) -> None:
        """new_context makes a context of the model with these options; one is made here, sibling() makes others.
        Raises what it raises."""
        self.n_ctx = n_ctx
        self.n_slots = n_slots
        self.n_threads = n_threads
        self.max_draft_tokens = max_draft_tokens
        self.max_step_tokens = step_tokens(n_slots)
        self._model = model
        self._new_context = new_context
        self._context = new_context()
        model.join(self._detach)
        self._memory = native.llama_get_memory(self._context)
        self._vocab = model.vocab
        self.n_vocab = len(model.pieces)
        self.adds_bos: bool = native.llama_vocab_get_add_bos(self._vocab)
        self._is_end = frozenset(model.end_tokens)
        self._samplers: dict[int, SlotSampler] = {}
        self._detached: dict[int, SlotSampler] = {}
        self._num_detached = 0
        self._candidates = Candidates(self.n_vocab)
        self._attached: AdapterVector = ()
        self._batch = Batch(self.max_step_tokens)
        self._is_freed = False
        self._moved = False  # copies or shifts wait for the next decode
        self.abilities = Abilities()
        self.max_chunk_tokens = MAX_CPU_CHUNK if model.is_on_cpu else self.max_step_tokens
        self.cost = CostCurve()

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        n_ctx: int,
        n_slots: int,
        n_threads: int | None,
        n_gpu_layers: int = 0,
        kv_type: str = "f16",
        flash_attention: bool | None = None,
        max_draft_tokens: int = 0,
        progress: Callable[[float], None] | None = None,
    ) -> LlamaBackend:
        """Load a model and measure its cost curve. n_ctx: tokens per slot; max_draft_tokens: guesses of all slots
        together that a step can verify; progress: called with 0.0 to 1.0.

        n_threads: None takes one per CPU that this process may use. A context longer than the model was trained with is
        cut to that. Raises EngineError "model_file_missing", "model_file_invalid", "model_options_invalid" or
        "model_does_not_fit", with a message that says what to do.
        """
        check_options(n_ctx, n_slots, kv_type, flash_attention)
        file = checked_file(Path(path))
        native.llama_log_set(forward_log, None)
        native.llama_backend_init()
        n_threads = n_threads or usable_cpus()
        model = load_model(file, n_gpu_layers, progress)
        try:
            n_ctx = trained_context(model, n_ctx)
            # What sees all of its tokens at once gives them all, whatever is asked for, and aborts where that is more.
            num_outputs = n_slots + max_draft_tokens if is_causal(model) else step_tokens(n_slots)
            backend = cls(
                SharedModel(model, is_on_cpu=n_gpu_layers == 0),
                partial(make_context, model, n_ctx, n_slots, n_threads, kv_type, flash_attention, num_outputs),
                n_ctx=n_ctx,
                n_slots=n_slots,
                n_threads=n_threads,
                max_draft_tokens=max_draft_tokens,
            )
        except BaseException:
            native.llama_model_free(model)
            raise
        backend._measure()
        return backend

    def sibling(self) -> LlamaBackend:
        """The same costs and abilities: what was measured here is not measured again."""
        backend = type(self)(
            self._model,
            self._new_context,
            n_ctx=self.n_ctx,
            n_slots=self.n_slots,
            n_threads=self.n_threads,
            max_draft_tokens=self.max_draft_tokens,
        )
        backend.cost, backend.abilities = self.cost, self.abilities
        return backend

    def embedder(self) -> LlamaEmbedder:
        return LlamaEmbedder(self._model, n_ctx=self.n_ctx, n_threads=self.n_threads)

    def set_threads(self, number: int) -> None:
        native.llama_set_n_threads(self._context, number, number)

    def open(
        self, slot_id: int, prompt: Sequence[int], sampling: SamplingParams, seed: int, num_cached: int = 0
    ) -> None:
        self.close(slot_id)
        self.trim(slot_id, num_cached)
        self._samplers[slot_id] = SlotSampler(
            self._vocab,
            sampling,
            prompt=prompt,
            seed=seed,
            n_ctx=self.n_ctx,
            end_tokens=self._model.end_tokens,
            candidates=self._candidates,
            prefixes=self._model.prefixes,
            piece=self.piece,
            shown_piece=self.shown_piece,
        )

    def copy(self, source_id: int, target_id: int) -> None:
        """The whole stream: a part of one would abort the process. The data moves with the next decode, in the order of
        the calls and before anything is computed; which tokens a slot holds is known at once, so it can be cut now."""
        native.llama_memory_seq_cp(self._memory, source_id, target_id, -1, -1)
        self._moved = True

    def execute(self, work: Sequence[SlotWork], adapters: AdapterVector) -> list[Chosen]:
        if adapters != self._attached:
            self._attach(adapters)
        rows = self._decode(work)
        return [self._choose(part, row) if part.samples else NOTHING for part, row in zip(work, rows, strict=True)]

    def _choose(self, part: SlotWork, row: int) -> Chosen:
        draft = part.tokens[len(part.tokens) - part.num_drafted :]
        chosen = self._samplers[part.slot_id].choose(self._context, row, draft)
        num_wrong = part.num_drafted - max(0, len(chosen.tokens) - 1)
        if num_wrong > 0:
            native.llama_memory_seq_rm(self._memory, part.slot_id, part.start + len(part.tokens) - num_wrong, -1)
        return chosen

    def shift(self, slot_id: int, num_keep: int, num_discard: int) -> None:
        """The positions move with the next decode, before anything is computed."""
        native.llama_memory_seq_rm(self._memory, slot_id, num_keep, num_keep + num_discard)
        native.llama_memory_seq_add(self._memory, slot_id, num_keep + num_discard, -1, -num_discard)
        self._moved = True

    def save(self, slot_id: int) -> bytes:
        self._settle_moves(slot_id)
        size = native.llama_state_seq_get_size(self._context, slot_id)
        buffer = (ctypes.c_uint8 * size)()
        if native.llama_state_seq_get_data(self._context, buffer, size, slot_id) != size:
            raise RuntimeError(f"llama.cpp gave no state of slot {slot_id}")
        return bytes(buffer)

    def restore(self, slot_id: int, state: bytes) -> None:
        self._settle_moves(slot_id)
        self.erase(slot_id)
        buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        if native.llama_state_seq_set_data(self._context, buffer, len(state), slot_id) == 0:
            self.erase(slot_id)
            raise EngineError("state_invalid", "llama.cpp does not read this state")

    def trim(self, slot_id: int, num_tokens: int) -> None:
        if not native.llama_memory_seq_rm(self._memory, slot_id, num_tokens, -1):
            raise RuntimeError(f"slot {slot_id} cannot be cut to {num_tokens} tokens")

    def erase(self, slot_id: int) -> None:
        native.llama_memory_seq_rm(self._memory, slot_id, -1, -1)

    def _settle_moves(self, slot_id: int) -> None:
        """Copies and shifts happen with the next decode, and what is read before that is garbage. So one token is
        computed at the end of this slot, which always has room for it, and forgotten."""
        if self._moved:
            end = native.llama_memory_seq_pos_max(self._memory, slot_id) + 1
            self._decode([SlotWork(slot_id, end, [0], True)])
            native.llama_memory_seq_rm(self._memory, slot_id, end, -1)

    @property
    def adapters(self) -> frozenset[str]:
        return self._model.digests

    def load_adapter(self, digest: str, path: str | Path) -> None:
        self._model.load_adapter(digest, path)

    def unload_adapter(self, digest: str) -> None:
        self._model.unload_adapter(digest)

    def _detach(self) -> None:
        self._attach(())

    def _attach(self, adapters: AdapterVector) -> None:
        self._model.attach(self._context, adapters)
        self._attached = adapters

    def _decode(self, work: Sequence[SlotWork]) -> list[int]:
        """Compute the step; return the row of each part's first choice."""
        rows = self._batch.fill(work)
        status = native.llama_decode(self._context, self._batch.native)
        self._moved = False
        if status != 0:
            raise RuntimeError(f"llama_decode failed with status {status} for {self._batch.native.n_tokens} tokens")
        native.llama_synchronize(self._context)  # waits without the GIL, so that sampling, with it, never waits
        return rows

    def piece(self, token: int) -> bytes:
        return self._model.pieces[token]

    def shown_piece(self, token: int) -> bytes:
        return token_bytes(self._vocab, token, special=True)

    def token_texts(self) -> list[bytes]:
        """What each token is written as, control tokens too: what makes a vocabulary."""
        return token_texts(self._vocab)

    def is_end(self, token: int) -> bool:
        return token in self._is_end

    def detach(self, slot_id: int) -> int:
        self._num_detached += 1
        self._detached[self._num_detached] = self._samplers.pop(slot_id)
        self.erase(slot_id)
        return self._num_detached

    def attach(self, slot_id: int, number: int) -> None:
        self.close(slot_id)
        self._samplers[slot_id] = self._detached.pop(number)

    def drop(self, number: int) -> None:
        self._detached.pop(number).free()

    def close(self, slot_id: int) -> None:
        if sampler := self._samplers.pop(slot_id, None):
            sampler.free()

    def free(self) -> None:
        if self._is_freed:
            return
        self._is_freed = True
        for slot_id in tuple(self._samplers):
            self.close(slot_id)
        for number in tuple(self._detached):
            self.drop(number)
        with self._model.leaving(self._detach):
            native.llama_free(self._context)

    def _measure(self) -> None:
        """Measure what steps cost, with one sequence in slot 0, and empty the slot again."""

        def step(num_tokens: int) -> None:
            native.llama_memory_seq_rm(self._memory, 0, -1, -1)
            self._decode([SlotWork(0, 0, [0] * num_tokens, True)])

        most = min(self.max_step_tokens, self.n_ctx)
        self.cost = measure(step, most=most)
        self.abilities = abilities.probe(self._model.native, self._context, self._fill)
        native.llama_memory_seq_rm(self._memory, 0, -1, -1)
        logger.info("cost of a step, (tokens, seconds): %s", self.cost.points)

    def _fill(self, start: int, num_tokens: int) -> None:
        self._decode([SlotWork(0, start, [0] * num_tokens, True)])

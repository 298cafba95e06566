"""One model, one context, one native sequence and sampler per slot.

Everything runs on the engine's thread after load(). KV memory is one stream per sequence (kv_unified off), which is
faster with many sequences; streams are computed together where slot ids are consecutive.
"""

from __future__ import annotations

import ctypes
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from inference.engine.backend import NOTHING, Abilities, Chosen, SlotWork
from inference.engine.costs import CostCurve, measure
from inference.engine.llama import abilities
from inference.engine.llama.batch import Batch
from inference.engine.llama.candidates import Candidates
from inference.engine.llama.library import forward_log, native, token_bytes, token_texts
from inference.engine.llama.loading import (
    check_options,
    checked_file,
    load_model,
    make_context,
    step_tokens,
    trained_context,
    usable_cpus,
)
from inference.engine.llama.prefixes import Prefixes
from inference.engine.llama.samplers import SlotSampler
from inference.engine.lora_file import write_padded
from inference.engine.types import AdapterVector, EngineError, SamplingParams

logger = logging.getLogger(__name__)

MAX_CPU_CHUNK = 63
"""From 64 tokens of one sequence on, llama.cpp's attention on a CPU takes another kernel, whose results differ in the
last bits and so in a token now and then. Below, prompts give the same tokens however they are cut."""


class LlamaBackend:
    """Implements Backend with llama.cpp. Made by load(); n_ctx is the exact limit of a slot in tokens."""

    supports_adapters = True

    def __init__(
        self, model: Any, context: Any, *, n_ctx: int, n_slots: int, max_draft_tokens: int = 0, is_on_cpu: bool = True
    ) -> None:
        self.n_ctx = n_ctx
        self.n_slots = n_slots
        self.max_draft_tokens = max_draft_tokens
        self.max_step_tokens = step_tokens(n_slots)
        self._model = model
        self._context = context
        self._memory = native.llama_get_memory(context)
        self._vocab = native.llama_model_get_vocab(model)
        self.n_vocab: int = native.llama_vocab_n_tokens(self._vocab)
        self.adds_bos: bool = native.llama_vocab_get_add_bos(self._vocab)
        self._end_tokens = tuple(
            token for token in range(self.n_vocab) if native.llama_vocab_is_eog(self._vocab, token)
        )
        self._is_end = frozenset(self._end_tokens)
        self._pieces: dict[int, bytes] = {}
        self._samplers: dict[int, SlotSampler] = {}
        self._candidates = Candidates(self.n_vocab)
        self._prefixes = Prefixes([self.piece(token) for token in range(self.n_vocab)], self._end_tokens)
        self._adapters: dict[str, Any] = {}
        self._attached: AdapterVector = ()
        self.adapters: frozenset[str] = frozenset()
        self._batch = Batch(self.max_step_tokens)
        self._is_freed = False
        self._moved = False  # copies or shifts wait for the next decode
        self.abilities = Abilities()
        self._is_on_cpu = is_on_cpu
        self.max_chunk_tokens = MAX_CPU_CHUNK if is_on_cpu else self.max_step_tokens
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
        model = load_model(file, n_gpu_layers, progress)
        try:
            n_ctx = trained_context(model, n_ctx)
            context = make_context(
                model, n_ctx, n_slots, n_threads or usable_cpus(), kv_type, flash_attention, n_slots + max_draft_tokens
            )
        except BaseException:
            native.llama_model_free(model)
            raise
        backend = cls(
            model,
            context,
            n_ctx=n_ctx,
            n_slots=n_slots,
            max_draft_tokens=max_draft_tokens,
            is_on_cpu=n_gpu_layers == 0,
        )
        backend._measure()
        return backend

    def open(
        self, slot_id: int, prompt: Sequence[int], sampling: SamplingParams, seed: int, num_cached: int = 0
    ) -> None:
        self.close(slot_id)
        if not native.llama_memory_seq_rm(self._memory, slot_id, num_cached, -1):
            raise RuntimeError(f"slot {slot_id} cannot be cut to {num_cached} tokens")
        self._samplers[slot_id] = SlotSampler(
            self._vocab,
            sampling,
            prompt=prompt,
            seed=seed,
            n_ctx=self.n_ctx,
            end_tokens=self._end_tokens,
            candidates=self._candidates,
            prefixes=self._prefixes,
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

    def erase(self, slot_id: int) -> None:
        native.llama_memory_seq_rm(self._memory, slot_id, -1, -1)

    def _settle_moves(self, slot_id: int) -> None:
        """Copies and shifts happen with the next decode, and what is read before that is garbage. So one token is
        computed at the end of this slot, which always has room for it, and forgotten."""
        if self._moved:
            end = native.llama_memory_seq_pos_max(self._memory, slot_id) + 1
            self._decode([SlotWork(slot_id, end, [0], True)])
            native.llama_memory_seq_rm(self._memory, slot_id, end, -1)

    def load_adapter(self, digest: str, path: str | Path) -> None:
        """Between steps, so that nothing is computed while the model changes. A known digest is left alone."""
        if digest in self._adapters:
            return
        file = checked_file(Path(path), kind="adapter")
        try:
            with tempfile.NamedTemporaryFile(suffix=".gguf") as padded:
                is_padded = self._is_on_cpu and write_padded(file, padded.file)
                source = padded.name if is_padded else file
                adapter = native.llama_adapter_lora_init(self._model, os.fsencode(source))
        except OSError as error:
            raise EngineError("adapter_file_invalid", f"{file} cannot be prepared for this machine: {error}") from error
        if not adapter:
            raise EngineError(
                "adapter_file_invalid",
                f"llama.cpp cannot apply {file} to this model: the file is damaged, or made for another base model",
            )
        self._adapters[digest] = adapter
        self.adapters = frozenset(self._adapters)

    def unload_adapter(self, digest: str) -> None:
        """Detach everything, then free: the context must hold no pointer to what is gone."""
        if digest not in self._adapters:
            return
        self._attach(())
        native.llama_adapter_lora_free(self._adapters.pop(digest))
        self.adapters = frozenset(self._adapters)

    def _attach(self, adapters: AdapterVector) -> None:
        """The whole vector of the next step: what is not named is detached. Costs about 4 ms at the next decode."""
        number = len(adapters)
        handles = (native.llama_adapter_lora_p_ctypes * number)(*(self._adapters[digest] for digest, _ in adapters))
        scales = (ctypes.c_float * number)(*(scale for _, scale in adapters))
        status = native.llama_set_adapters_lora(self._context, handles, number, scales)
        if status != 0:
            raise RuntimeError(f"llama.cpp cannot attach {number} adapters (status {status})")
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
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = token_bytes(self._vocab, token)
        return piece

    def shown_piece(self, token: int) -> bytes:
        return token_bytes(self._vocab, token, special=True)

    def token_texts(self) -> list[bytes]:
        """What each token is written as, control tokens too: what makes a vocabulary."""
        return token_texts(self._vocab)

    def is_end(self, token: int) -> bool:
        return token in self._is_end

    def close(self, slot_id: int) -> None:
        if sampler := self._samplers.pop(slot_id, None):
            sampler.free()

    def free(self) -> None:
        if self._is_freed:
            return
        self._is_freed = True
        for slot_id in tuple(self._samplers):
            self.close(slot_id)
        native.llama_free(self._context)
        native.llama_model_free(self._model)  # and the adapters, which belong to it

    def _measure(self) -> None:
        """Measure what steps cost, with one sequence in slot 0, and empty the slot again."""

        def step(num_tokens: int) -> None:
            native.llama_memory_seq_rm(self._memory, 0, -1, -1)
            self._decode([SlotWork(0, 0, [0] * num_tokens, True)])

        most = min(self.max_step_tokens, self.n_ctx)
        self.cost = measure(step, most=most)
        self.abilities = abilities.probe(self._model, self._context, self._fill)
        native.llama_memory_seq_rm(self._memory, 0, -1, -1)
        logger.info("cost of a step, (tokens, seconds): %s", self.cost.points)

    def _fill(self, start: int, num_tokens: int) -> None:
        self._decode([SlotWork(0, start, [0] * num_tokens, True)])

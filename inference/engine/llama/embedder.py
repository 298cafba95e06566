"""A second context on a loaded model, whose tokens give vectors: what they are before the model's last matrix.

Made by LlamaBackend.embedder(), on the engine's thread afterwards. Each place has a KV stream of its own: in one that
all share, neighbours change the order of sums, and with quantized weights a vector's numbers in the third decimal.
llama.cpp pools nothing here (vectors.py does).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np

from inference.engine.backend import SlotWork
from inference.engine.embedder import PIECE_TOKENS
from inference.engine.llama.batch import Batch
from inference.engine.llama.library import native
from inference.engine.llama.loading import embedding_tokens, is_causal, make_embedding_context
from inference.engine.llama.model import SharedModel
from inference.engine.types import AdapterVector, Embedding
from inference.engine.vectors import Pool, Vectors

CPU_PLACES, GPU_PLACES = 4, 16
"""Each has key-value memory for n_ctx tokens. A step on a CPU has time for few short texts anyway."""
WHOLE_PLACES = 64
"""Where whole inputs are one step nothing is held from one step to the next."""


class LlamaEmbedder:
    """Implements EmbeddingBackend with llama.cpp. n_ctx: tokens of an input, exact."""

    def __init__(self, model: SharedModel, *, n_ctx: int, n_threads: int) -> None:
        """Raises EngineError "model_does_not_fit"."""
        self.n_ctx = n_ctx
        self.splits_inputs = is_causal(model.native)
        self.n_places = WHOLE_PLACES
        if self.splits_inputs:
            self.n_places = CPU_PLACES if model.is_on_cpu else GPU_PLACES
        self.max_step_tokens = embedding_tokens(model.native, n_ctx, is_on_cpu=model.is_on_cpu)
        self._model = model
        self._context = make_embedding_context(
            model.native, n_ctx, self.n_places, n_threads, step_tokens=self.max_step_tokens
        )
        self._memory = native.llama_get_memory(self._context)
        self._n_embd: int = native.llama_model_n_embd_out(model.native)
        self._batch = Batch(self.max_step_tokens)
        self._attached: AdapterVector = ()
        self._is_freed = False
        model.join(self._detach)

    def set_threads(self, number: int) -> None:
        native.llama_set_n_threads(self._context, number, number)

    def execute(self, work: Sequence[SlotWork], adapters: AdapterVector) -> list[Vectors]:
        if adapters != self._attached:
            self._model.attach(self._context, adapters)
            self._attached = adapters
        filled = [_filled_up(part) if self.splits_inputs else part for part in work]
        self._batch.fill(filled)
        self._batch.ask_for_all()
        number = self._batch.native.n_tokens
        status = native.llama_decode(self._context, self._batch.native)
        if status != 0:
            raise RuntimeError(f"llama_decode failed with status {status} for {number} tokens to embed")
        native.llama_synchronize(self._context)
        pointer = ctypes.cast(native.llama_get_embeddings(self._context), ctypes.POINTER(ctypes.c_float))
        rows = np.ctypeslib.as_array(pointer, (number, self._n_embd))
        starts = [0, *accumulate(len(part.tokens) for part in filled)]
        return [rows[start : start + len(part.tokens)] for start, part in zip(starts, work, strict=False)]

    def pool(self, wanted: Embedding) -> Pool:
        return Pool(wanted)

    def clear(self, place: int) -> None:
        if self._memory:
            native.llama_memory_seq_rm(self._memory, place, -1, -1)

    def free(self) -> None:
        if self._is_freed:
            return
        self._is_freed = True
        with self._model.leaving(self._detach):
            native.llama_free(self._context)

    def _detach(self) -> None:
        self._model.attach(self._context, ())
        self._attached = ()


def _filled_up(part: SlotWork) -> SlotWork:
    """An input's last piece with tokens behind it that nobody looks at: no token sees those behind it."""
    lacking = -len(part.tokens) % PIECE_TOKENS
    return replace(part, tokens=part.tokens + part.tokens[-1:] * lacking) if lacking else part

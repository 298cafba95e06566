"""A grammar tried out on a vocabulary: does llama.cpp take it, and can it be followed in time?

Runs in the tokenizer's child alone, which its parent kills when this takes too long: what ends or stalls llama.cpp does
so there, before a worker sees the grammar.
"""

from __future__ import annotations

import ctypes
import math
import time
from typing import Any

import llama_cpp as native

from inference.engine.types import EngineError

WALK_SECONDS = 0.06
"""Processor time for a walk through what the grammar allows."""
STEP_SECONDS = 0.02
"""And for one token of it: a hundred times what one usually takes."""
MAX_STEPS = 256
NUM_SHORT = 2_048
"""Vocabularies begin with their shortest tokens. A walk on those alone gets further, and into more nesting."""
SEED = 20_240_229


class GrammarTrial:
    """Tries grammars on one vocabulary, one at a time."""

    def __init__(self, vocab: Any) -> None:
        self._vocab = vocab
        self._size = native.llama_vocab_n_tokens(vocab)
        kind = native.llama_token_data * self._size
        self._all = kind(*((token, 0.0, 0.0) for token in range(self._size)))
        self._data = kind()
        self._array = native.llama_token_data_array()

    def run(self, grammar: str) -> int:
        """Follow the grammar along a random text for a moment; return the number of its tokens.

        Raises EngineError "grammar_refused" where llama.cpp does not take it, "grammar_dead_end" where no token of the
        vocabulary begins it, "grammar_too_slow" where the places to keep in mind grow. May stall or end the process.
        """
        sampler = native.llama_sampler_init_grammar(self._vocab, grammar.encode(), b"root")
        if not sampler:
            raise EngineError("grammar_refused", "llama.cpp cannot read it: it may name a token that the model lacks")
        chance = native.llama_sampler_init_dist(SEED)
        try:
            return self._walk(sampler, chance)
        finally:
            native.llama_sampler_free(sampler)
            native.llama_sampler_free(chance)

    def _walk(self, sampler: Any, chance: Any) -> int:
        started = time.thread_time()
        if self._next(sampler, chance, self._size) is None:
            raise EngineError("grammar_dead_end", "no token of the model's vocabulary begins it")
        for step in range(MAX_STEPS):
            step_started = time.thread_time()
            token = self._next(sampler, chance, min(NUM_SHORT, self._size))
            if time.thread_time() - step_started > STEP_SECONDS:
                raise EngineError("grammar_too_slow", "following it takes too long")
            if token is None:
                token = self._next(sampler, chance, self._size)
            if token is None or native.llama_vocab_is_eog(self._vocab, token):
                return step
            native.llama_sampler_accept(sampler, token)
            if time.thread_time() - started > WALK_SECONDS:
                return step + 1
        return MAX_STEPS

    def _next(self, sampler: Any, chance: Any, size: int) -> int | None:
        """Any of the first tokens that the grammar allows now, each as likely as the others; None if it allows none."""
        ctypes.memmove(self._data, self._all, size * ctypes.sizeof(native.llama_token_data))
        array, pointer = self._array, ctypes.byref(self._array)
        array.data = ctypes.cast(self._data, native.llama_token_data_p)
        array.size, array.selected, array.sorted = size, -1, False
        native.llama_sampler_apply(sampler, pointer)
        native.llama_sampler_apply(chance, pointer)
        chosen = array.data[array.selected] if 0 <= array.selected < array.size else None
        return None if chosen is None or chosen.logit == -math.inf or math.isnan(chosen.p) else int(chosen.id)

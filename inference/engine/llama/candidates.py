"""The candidates for a token as llama.cpp's samplers take them, in buffers of our own, and what numpy reads from them.

One set per backend, reused for every choice: a choice is over before the next begins. On the engine's thread.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from inference.engine.llama.library import apply, apply_slowly, logits_address, native
from inference.engine.llama.prefixes import Prefixes, Tokens

Rows = npt.NDArray[np.void]
NO_TOKENS: Tokens = np.zeros(0, np.int32)
MANY = 2_000
"""To ask a grammar about so many tokens takes some tenths of a millisecond: other threads may go on meanwhile."""
RECORD = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
"""llama_token_data."""


class Candidates:
    """A llama_token_data_array: filled with a row of logits, then thinned out by samplers, one of which chooses."""

    def __init__(self, n_vocab: int) -> None:
        self._n_vocab = n_vocab
        self._ids = np.arange(n_vocab, dtype=np.int32)
        self._buffer = np.zeros(n_vocab, RECORD)
        self._array = native.llama_token_data_array()
        self._pointer = ctypes.byref(self._array)
        self._single = (native.llama_token_data * 1)()
        self._single_array = native.llama_token_data_array()
        self._single_pointer = ctypes.byref(self._single_array)

    def logits(self, context: Any, row: int) -> npt.NDArray[np.float32]:
        """The model's own logits of a row of the batch, without a copy: gone with the next decode."""
        address = logits_address(context, row)
        if not address:
            raise RuntimeError(f"llama.cpp has no logits for row {row} of the batch")
        return _memory(address, np.dtype(np.float32), self._n_vocab)

    def fill(self, context: Any, row: int) -> None:
        """The whole vocabulary, as the model leaves it."""
        self._write(self._ids, self.logits(context, row))

    def _reset(self, size: int) -> None:
        self._array.data = ctypes.cast(self._buffer.ctypes.data, native.llama_token_data_p)
        self._array.size, self._array.selected, self._array.sorted = size, -1, False

    def choose(self, chain: Any) -> int | None:
        """The token that the last sampler of the chain picks, which leaves its trace only in the random numbers."""
        apply(chain, self._pointer)
        chosen = self._array.selected
        if not 0 <= chosen < self._array.size:
            return None
        return int(self._array.data[chosen].id)

    def fill_with(self, context: Any, row: int, tokens: Tokens) -> None:
        """These tokens alone, as the model leaves them."""
        self._write(tokens, self.logits(context, row)[tokens])

    def allowed(self, grammar: Any, prefixes: Prefixes | None, shown: Tokens = NO_TOKENS) -> Tokens:
        """The tokens that the grammar allows now; None: ask it about every single one. shown: some that are in no
        prefixes, and have a text here."""

        def ask(tokens: Tokens) -> npt.NDArray[np.bool_]:
            self._write(tokens, 1.0)
            (apply if len(tokens) < MANY else apply_slowly)(grammar, self._pointer)
            verdict: npt.NDArray[np.bool_] = self._buffer["logit"][: len(tokens)] != -math.inf
            return verdict

        if prefixes is None:
            return self._ids[ask(self._ids)]
        found = prefixes.allowed(ask)
        return np.union1d(found, shown[ask(shown)]) if len(shown) else found

    def _write(self, tokens: Tokens, logits: npt.NDArray[np.float32] | float) -> None:
        self._buffer["id"][: len(tokens)] = tokens
        self._buffer["logit"][: len(tokens)] = logits
        self._reset(len(tokens))

    def choose_best(self) -> int:
        """The most probable of those that are left, with certainty."""
        left = self._buffer[: self._array.size]
        best = left["logit"].argmax()
        left["p"] = 0.0
        left["p"][best] = 1.0
        return int(left["id"][best])

    def allows(self, grammar: Any, token: int) -> bool:
        """Whether the grammar takes this token now."""
        self._single[0].id, self._single[0].logit = token, 1.0
        self._single_array.data = ctypes.cast(self._single, native.llama_token_data_p)
        self._single_array.size, self._single_array.selected, self._single_array.sorted = 1, -1, False
        apply(grammar, self._single_pointer)
        return bool(self._single[0].logit != -math.inf)

    def left(self) -> Rows:
        """What the samplers have left, wherever they have put it."""
        size = self._array.size
        address = ctypes.cast(self._array.data, ctypes.c_void_p).value
        assert address is not None
        return _memory(address, RECORD, size)


def _memory(address: int, kind: np.dtype[Any], number: int) -> npt.NDArray[Any]:
    """An array over memory of llama.cpp's."""
    memory: Any = (ctypes.c_char * (number * kind.itemsize)).from_address(address)
    return np.frombuffer(memory, kind, number)


def log_softmax(logits: npt.NDArray[np.float32], places: Sequence[int]) -> list[float]:
    """Natural log-probabilities of these tokens, among the whole vocabulary."""
    highest = logits.max().astype(np.float64)
    shares = np.subtract(logits, highest, dtype=np.float64)
    np.exp(shares, out=shares)
    found: list[float] = (logits[places].astype(np.float64) - highest - math.log(shares.sum())).tolist()
    return found


def most_probable(values: npt.NDArray[Any], number: int) -> Sequence[int]:
    """The places of the highest values, best first; of equal ones the first comes first."""
    if number < len(values):
        # all that reach the lowest of the highest: argpartition alone would pick any of several equal ones
        lowest = np.partition(values, len(values) - number)[len(values) - number]
        places = np.flatnonzero(values >= lowest)
    else:
        places = np.arange(len(values))
    ordered: list[int] = places[np.argsort(-values[places], kind="stable")][:number].tolist()
    return ordered

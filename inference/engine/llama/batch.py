"""The tokens of a step as a llama_batch, filled in place."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from inference.engine.backend import SlotWork
from inference.engine.llama.library import native


class Batch:
    """A llama_batch over arrays of our own."""

    def __init__(self, size: int) -> None:
        self._tokens = np.zeros(size, np.int32)
        self._positions = np.zeros(size, np.int32)
        self._slot_ids = np.zeros(size, np.int32)
        self._outputs = np.zeros(size, np.int8)
        self._one_each = np.ones(size, np.int32)
        self._slot_id_pointers = (self._slot_ids.ctypes.data + 4 * np.arange(size)).astype(np.uintp)
        self.native = native.llama_batch(
            n_tokens=0,
            token=self._tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            pos=self._positions.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            n_seq_id=self._one_each.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            seq_id=self._slot_id_pointers.ctypes.data_as(ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
            logits=self._outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def fill(self, work: Sequence[SlotWork]) -> list[int]:
        """Write the step into the batch; return the row of each part's first choice. Logits are asked for there and
        for the drafted tokens behind it. Raises RuntimeError for a part without a token of its own: its choice would be
        made from the scores of the sequence before it."""
        end = 0
        rows = []
        for part in work:
            start, end = end, end + len(part.tokens)
            row = end - 1 - part.num_drafted
            if row < start:
                raise RuntimeError(f"nothing is to be computed in slot {part.slot_id}")
            self._tokens[start:end] = part.tokens
            self._positions[start:end] = range(part.start, part.start + len(part.tokens))
            self._slot_ids[start:end] = part.slot_id
            self._outputs[start:row] = 0
            self._outputs[row:end] = part.samples
            rows.append(row)
        self.native.n_tokens = end
        return rows

    def ask_for_all(self) -> None:
        """Every token of the step gives something."""
        self._outputs[: self.native.n_tokens] = 1

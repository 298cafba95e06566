"""From the vectors of an input's tokens to what the request wants: pooled, cut, normalized. On the engine's thread.

Pooled here and not by llama.cpp, which pools what one of its own batches holds: so an input may come in several steps,
and inputs that are pooled in different ways may share one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from inference.engine.types import Embedding, Pooling

Vectors = NDArray[np.float32]
"""Rows of n_embd numbers."""
LARGEST = 32760.0
"""llama.cpp's for normalize 0: what fits 16 bits."""


class Pool:
    """Implements VectorPool: takes the vectors of one input in the order of its tokens, and gives what was wanted."""

    def __init__(self, wanted: Embedding) -> None:
        self._wanted = wanted
        self._kept: list[Vectors] = []
        self._sum: NDArray[np.float64] | None = None
        self._num = 0

    def add(self, rows: Vectors) -> None:
        """rows: of the next tokens, at least one; copied where they are kept."""
        self._num += len(rows)
        match self._wanted.pooling:
            case Pooling.MEAN:
                if self._sum is None:
                    self._sum = np.zeros(rows.shape[1])
                for row in rows:  # one by one: the last bit must not depend on where steps cut the input
                    self._sum += row
            case Pooling.CLS:
                self._kept = self._kept or [rows[:1].copy()]
            case Pooling.LAST:
                self._kept = [rows[-1:].copy()]
            case Pooling.NONE:
                self._kept.append(rows.copy())

    def result(self) -> tuple[int, bytes]:
        """(num_vectors, data) as in types.Embedded."""
        rows = self._rows()
        return len(rows), rows.astype("<f4").tobytes()

    def _rows(self) -> Vectors:
        wanted = self._wanted
        rows = np.concatenate(self._kept) if self._sum is None else (self._sum / self._num)[None].astype(np.float32)
        rows = rows[:, : wanted.dimensions]
        return rows if wanted.pooling is Pooling.NONE else normalized(rows, wanted.normalize)


def normalized(rows: Vectors, kind: int) -> Vectors:
    """See Embedding.normalize. A vector of zeros stays one."""
    if kind < 0:
        return rows
    sizes = np.abs(rows.astype(np.float64))
    largest = sizes.max(axis=1, keepdims=True)
    if kind == 0:
        norms = largest / LARGEST
    else:  # divided by the largest first: high powers would leave the range of numbers
        shares = np.divide(sizes, largest, out=np.zeros_like(sizes), where=largest > 0)
        norms = largest * (shares**kind).sum(axis=1, keepdims=True) ** (1.0 / kind)
    scaled: Vectors = np.divide(rows, norms, out=np.zeros_like(sizes), where=norms > 0).astype(np.float32)
    return scaled

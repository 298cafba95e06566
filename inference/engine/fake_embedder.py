"""Vectors that mean nothing, at a set speed: the fake backend's second context, for tests of policy.

Deterministic: a token's vector depends on what stands before it in its input, never on neighbours.
"""

from __future__ import annotations

import time
import zlib
from array import array
from collections.abc import Callable, Sequence

import numpy as np

from inference.engine.backend import SlotWork
from inference.engine.types import AdapterVector, Embedding
from inference.engine.vectors import Pool, Vectors


class FakeEmbedder:
    """Implements EmbeddingBackend: a token's vector depends on it, on those before it in its input and on the adapters.
    ValueError where an input is not computed from its beginning on, or is too long."""

    n_places = 4

    def __init__(
        self,
        n_ctx: int,
        *,
        n_embd: int = 8,
        max_step_tokens: int = 64,
        splits_inputs: bool = True,
        seconds_per_token: float = 0.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.n_ctx = n_ctx
        self.splits_inputs = splits_inputs
        self.max_step_tokens = max_step_tokens if splits_inputs else max(n_ctx, max_step_tokens)
        self.steps: list[dict[int, int]] = []
        """Tokens by place, of each step."""
        self._n_embd = n_embd
        self._held: dict[int, list[int]] = {}
        self._seconds_per_token, self._sleep = seconds_per_token, sleep
        self.is_freed = False

    def set_threads(self, number: int) -> None:
        return

    def execute(self, work: Sequence[SlotWork], adapters: AdapterVector) -> list[Vectors]:
        self.steps.append({part.slot_id: len(part.tokens) for part in work})
        for part in work:
            held = self._held.setdefault(part.slot_id, [])
            if part.start != len(held):
                raise ValueError(f"place {part.slot_id} holds {len(held)} tokens, not {part.start}")
            held += part.tokens
        longest = max(map(len, self._held.values()))
        if longest > self.n_ctx or sum(len(part.tokens) for part in work) > self.max_step_tokens:
            raise ValueError("too many tokens")
        self._sleep(self._seconds_per_token * sum(len(part.tokens) for part in work))
        return [self._rows(self._held[part.slot_id], part.start, adapters) for part in work]

    def _rows(self, tokens: list[int], start: int, adapters: AdapterVector) -> Vectors:
        seeds = [
            zlib.crc32(array("q", tokens[: end + 1]).tobytes(), _seed(adapters)) for end in range(start, len(tokens))
        ]
        return np.stack([np.random.default_rng(seed).standard_normal(self._n_embd) for seed in seeds]).astype(
            np.float32
        )

    def pool(self, wanted: Embedding) -> Pool:
        return Pool(wanted)

    def clear(self, place: int) -> None:
        self._held.pop(place, None)

    def free(self) -> None:
        self.is_freed = True


def _seed(adapters: AdapterVector) -> int:
    return zlib.crc32(repr(adapters).encode())

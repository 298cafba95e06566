"""What the engine needs of whatever computes tokens. Two exist: llama_backend (real) and fake_backend (for tests).

All calls come from one thread, the engine's, after loading. A backend decides nothing: it does the step it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from inference.engine.costs import CostCurve
from inference.engine.types import AdapterVector, SamplingParams


@dataclass(frozen=True, slots=True)
class SlotWork:
    """The part of a step that belongs to one slot: compute tokens at positions start, start+1, ...

    samples: choose the next token after the last one of them.
    """

    slot_id: int
    start: int
    tokens: list[int]
    samples: bool


class Backend(Protocol):
    """A loaded model with n_slots sequences of n_ctx tokens each. Any exception but EngineError means it is broken."""

    @property
    def n_slots(self) -> int: ...

    @property
    def n_ctx(self) -> int:
        """Tokens a slot can hold, prompt and generated together."""
        ...

    @property
    def n_vocab(self) -> int: ...

    @property
    def max_step_tokens(self) -> int:
        """Tokens of all slots together that one step can compute."""
        ...

    @property
    def max_chunk_tokens(self) -> int:
        """Prompt tokens of one sequence that one step can compute."""
        ...

    @property
    def cost(self) -> CostCurve: ...

    @property
    def supports_adapters(self) -> bool: ...

    @property
    def adapters(self) -> frozenset[str]:
        """Digests of the adapters that are loaded. Any thread may read it."""
        ...

    def load_adapter(self, digest: str, path: str | Path) -> None:
        """Load a LoRA adapter, between steps. Raises EngineError "adapter_file_invalid"; then nothing has changed."""
        ...

    def unload_adapter(self, digest: str) -> None:
        """Free an adapter that no open sequence uses. One that is not loaded is left alone."""
        ...

    @property
    def supports_reuse(self) -> bool:
        """Whether a slot can forget its last tokens and keep the first, and be copied."""
        ...

    def open(
        self, slot_id: int, prompt: Sequence[int], sampling: SamplingParams, seed: int, num_cached: int = 0
    ) -> None:
        """Prepare a slot, which forgets all but its first num_cached tokens, and its sampler, which has then seen the
        whole prompt. EngineError ends only this sequence; what the slot holds is unknown then."""
        ...

    def copy(self, source_id: int, target_id: int) -> None:
        """Let one slot hold what another holds, and nothing else; open() follows."""
        ...

    def execute(self, work: Sequence[SlotWork], adapters: AdapterVector) -> list[tuple[int, ...]]:
        """Compute one step and return, for each part of it, the tokens chosen: () where nothing was to be sampled."""
        ...

    def piece(self, token: int) -> bytes:
        """The bytes of a token's text; b"" for control tokens."""
        ...

    def is_end(self, token: int) -> bool:
        """Whether the model ends its answer with this token."""
        ...

    def close(self, slot_id: int) -> None:
        """Free what belongs to the sequence in a slot. A slot that is not open is left alone."""
        ...

    def free(self) -> None:
        """Free everything. Idempotent; nothing else may be called afterwards."""
        ...

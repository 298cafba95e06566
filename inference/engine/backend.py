"""What the engine needs of whatever computes tokens. Two exist: llama/ (real) and fake_backend (for tests).

All calls come from one thread, the engine's, after loading. A backend decides nothing: it does the step it is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from inference.engine.costs import CostCurve
from inference.engine.types import AdapterVector, Embedding, SamplingParams, TokenProbs


@dataclass(frozen=True, slots=True)
class SlotWork:
    """The part of a step that belongs to one slot: compute tokens at positions start, start+1, ...

    samples: choose the next token after the last one of them. num_drafted: so many of the last tokens are guesses.
    After the last token that is none the next one is chosen, and for as long as a guess is what was chosen, the one
    after it, too; the slot forgets the wrong guesses.
    """

    slot_id: int
    start: int
    tokens: list[int]
    samples: bool
    num_drafted: int = 0


@dataclass(frozen=True, slots=True)
class Chosen:
    """What was chosen for a part of a step: nothing where nothing was to be sampled, else 1 to num_drafted + 1 tokens.

    probs: one a token where they were asked for. error: the code of why nothing could be chosen.
    """

    tokens: tuple[int, ...] = ()
    probs: tuple[TokenProbs, ...] = ()
    error: str | None = None


NOTHING = Chosen()


@dataclass(frozen=True, slots=True)
class Abilities:
    """What the memory of this model and context can do, found by trying at load.

    trim: forget a slot's last tokens and keep the first; prompt cache and drafts need it. copy: one slot to another.
    shift: drop tokens from the middle and move the rest. save: a slot's state out and in again. reasons: why not, by
    name.
    """

    trim: bool = True
    copy: bool = True
    shift: bool = True
    save: bool = True
    reasons: Mapping[str, str] = field(default_factory=dict)


class VectorPool(Protocol):
    """Takes the vectors of one input's tokens, and gives what was wanted of them."""

    def add(self, rows: Any) -> None:
        """Those of the next tokens, as execute() gave them."""
        ...

    def result(self) -> tuple[int, bytes]:
        """(num_vectors, data) as in types.Embedded."""
        ...


class EmbeddingBackend(Protocol):
    """A second context on a loaded model, whose tokens give vectors. It holds an input in each of the places
    0..n_places-1. Adapters are the model's. An exception means that it is broken."""

    @property
    def n_ctx(self) -> int:
        """Tokens of an input."""
        ...

    @property
    def n_places(self) -> int: ...

    @property
    def max_step_tokens(self) -> int:
        """Tokens of all places together that one step can compute; of one input, too."""
        ...

    @property
    def splits_inputs(self) -> bool:
        """Whether an input may be computed in several steps, of embedder.PIECE_TOKENS or multiples of them but for the
        last. With a model whose tokens see those behind them it may not."""
        ...

    def set_threads(self, number: int) -> None:
        """See Backend.set_threads."""
        ...

    def execute(self, work: Sequence[SlotWork], adapters: AdapterVector) -> list[Any]:
        """Compute one step; the vectors of each part's tokens, for a pool, until the next. slot_id is the place."""
        ...

    def pool(self, wanted: Embedding) -> VectorPool:
        """For the vectors of one input."""
        ...

    def clear(self, place: int) -> None:
        """Forget what a place holds."""
        ...

    def free(self) -> None:
        """Free everything of this context. Idempotent; before the backend that it was made from."""
        ...


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
    def adds_bos(self) -> bool:
        """Whether the vocabulary puts a token before every text."""
        ...

    @property
    def max_step_tokens(self) -> int:
        """Tokens of all slots together that one step can compute."""
        ...

    @property
    def max_chunk_tokens(self) -> int:
        """Prompt tokens of one sequence that one step can compute."""
        ...

    @property
    def max_draft_tokens(self) -> int:
        """Guesses of all slots together that one step can verify."""
        ...

    @property
    def cost(self) -> CostCurve: ...

    @property
    def n_threads(self) -> int:
        """Threads that computed the cost curve, and compute until set_threads says otherwise."""
        ...

    def set_threads(self, number: int) -> None:
        """Compute the next steps with so many threads, at least 1. Between steps."""
        ...

    def sibling(self) -> Backend:
        """Another backend on the same loaded model, with slots of its own, for another engine; nothing here changes.

        It sees the adapters that are loaded in either. Each is freed on its own. Raises EngineError
        "model_does_not_fit".
        """
        ...

    def embedder(self) -> EmbeddingBackend:
        """A context for vectors on the same loaded model, for the same engine. Raises EngineError
        "model_does_not_fit"."""
        ...

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
    def abilities(self) -> Abilities: ...

    def open(
        self, slot_id: int, prompt: Sequence[int], sampling: SamplingParams, seed: int, num_cached: int = 0
    ) -> None:
        """Prepare a slot, which forgets all but its first num_cached tokens, and its sampler, which has then seen the
        whole prompt. EngineError ends only this sequence; what the slot holds is unknown then."""
        ...

    def copy(self, source_id: int, target_id: int) -> None:
        """Let one slot hold what another holds, and nothing else; open() follows."""
        ...

    def execute(self, work: Sequence[SlotWork], adapters: AdapterVector) -> list[Chosen]:
        """Compute one step and return what was chosen for each part of it."""
        ...

    def shift(self, slot_id: int, num_keep: int, num_discard: int) -> None:
        """Forget num_discard tokens behind the first num_keep, and move those behind them to where these were."""
        ...

    def save(self, slot_id: int) -> bytes:
        """What the slot holds, for restore() in any slot of a backend of the same model and options, later, too."""
        ...

    def restore(self, slot_id: int, state: bytes) -> None:
        """Let the slot hold what was saved, and nothing else. Raises EngineError "state_invalid"; it is empty then."""
        ...

    def trim(self, slot_id: int, num_tokens: int) -> None:
        """Forget all but the first num_tokens that the slot holds."""
        ...

    def erase(self, slot_id: int) -> None:
        """Forget what the slot holds."""
        ...

    def piece(self, token: int) -> bytes:
        """The bytes of a token's text; b"" for control tokens."""
        ...

    def shown_piece(self, token: int) -> bytes:
        """The same, and control tokens by their names."""
        ...

    def is_end(self, token: int) -> bool:
        """Whether the model ends its answer with this token."""
        ...

    def detach(self, slot_id: int) -> int:
        """Take what chooses an open sequence's tokens out of its slot, which is not open any more and empty. Returns a
        number for attach() or drop()."""
        ...

    def attach(self, slot_id: int, number: int) -> None:
        """Open a slot with what was detached, in the state that it had; restore() follows."""
        ...

    def drop(self, number: int) -> None:
        """Free what was detached: it is not needed any more."""
        ...

    def close(self, slot_id: int) -> None:
        """Free what belongs to the sequence in a slot. A slot that is not open is left alone."""
        ...

    def free(self) -> None:
        """Free everything. Idempotent; nothing else may be called afterwards."""
        ...

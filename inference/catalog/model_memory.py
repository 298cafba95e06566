"""What a model needs in a worker's memory, estimated from its file's header before it is loaded. No row is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from django.conf import settings

from inference.catalog.pooling import POOLINGS, embedding_problem, has_embeddings
from inference.models import ModelVariant, ServedModel

CONTEXT_STEP = 256
"""llama.cpp rounds the context of a sequence up to a multiple of this."""
COMPUTE_BATCH = 512
"""Tokens of the largest step; scores for all of them are reserved."""
EMBEDDING_BATCH, EMBEDDING_PLACES = 128, 4
"""The same of a step that embeds, where they are kept twice; and inputs that have a context of their own."""
KV_BYTES: Mapping[str, float] = {"f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
"""Bytes of one number in the key-value cache."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes that a worker needs for one model, before it is loaded."""

    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    states_bytes: int = 0
    """For the states of slots that others took (SLOT_MEMORY_MB)."""

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.compute_bytes + self.states_bytes


def estimate_memory(
    metadata: Mapping[str, Any],
    *,
    n_ctx: int,
    n_slots: int,
    kv_type: str,
    n_lanes: int = 1,
    embeds: bool = False,
) -> MemoryEstimate:
    """From the header alone: an upper bound for models with sliding windows or recurrent layers. Lanes have only the
    weights in common. embeds: beside them there is a context for vectors."""
    slot = -(-n_ctx // CONTEXT_STEP) * CONTEXT_STEP
    elements = metadata.get("kv_elements_per_token") or 0
    scores = (metadata.get("vocabulary_size") or 0) * 4
    vectors = int(EMBEDDING_PLACES * slot * elements * KV_BYTES["f16"])
    return MemoryEstimate(
        weights_bytes=metadata.get("tensor_bytes") or 0,
        kv_bytes=n_lanes * int(slot * n_slots * elements * KV_BYTES[kv_type]) + embeds * vectors,
        compute_bytes=n_lanes * scores * (COMPUTE_BATCH + n_slots) + embeds * 2 * scores * EMBEDDING_BATCH,
    )


def memory_of(row: ServedModel, variant: ModelVariant | None = None) -> MemoryEstimate:
    """Of a served model as workers load it: its weights and contexts, those of the model that guesses for it, and the
    states of slots. variant: the file in the place of its own."""
    file = variant or row
    states = settings.CONFIG.slot_memory_mb << 20
    data = file.metadata
    own = estimate_memory(
        data,
        n_ctx=row.n_ctx,
        n_slots=row.n_slots,
        kv_type=row.kv_type,
        n_lanes=row.n_lanes,
        embeds=has_embeddings(row.capabilities, data.get("pooling_type") in POOLINGS, embedding_problem(data)),
    )
    if row.draft_kind != ServedModel.DraftKind.MODEL or row.draft_model is None:
        return replace(own, states_bytes=states)
    draft = estimate_memory(
        row.draft_model.metadata, n_ctx=row.n_ctx, n_slots=row.n_slots, kv_type="f16", n_lanes=row.n_lanes
    )
    return MemoryEstimate(
        weights_bytes=own.weights_bytes + draft.weights_bytes * row.n_lanes,
        kv_bytes=own.kv_bytes + draft.kv_bytes,
        compute_bytes=own.compute_bytes + draft.compute_bytes,
        states_bytes=states,
    )

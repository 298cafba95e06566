"""What a file's header says of vectors: how they are pooled, and whether they can be had. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from inference.engine.types import Pooling
from inference.models import ServedModel

POOLINGS: Mapping[int | None, Pooling] = {0: Pooling.NONE, 1: Pooling.MEAN, 2: Pooling.CLS, 3: Pooling.LAST}
"""llama.cpp's numbers of `pooling_type` in a file's header."""
RANK_POOLING = 4


def pooling_of(wanted: str, metadata: Mapping[str, Any]) -> Pooling:
    """The operator's, else the file's, else the mean."""
    if wanted != ServedModel.EmbeddingPooling.AUTO:
        return Pooling(wanted)
    return POOLINGS.get(metadata.get("pooling_type"), Pooling.MEAN)


def has_embeddings(capabilities: Mapping[str, Any], is_embedder: bool, problem: str) -> bool:
    return capabilities.get("embeddings", is_embedder) is True and not problem


def embedding_problem(metadata: Mapping[str, Any]) -> str:
    """Why a file's vectors cannot be had here, "" where they can."""
    if metadata.get("pooling_type") == RANK_POOLING:
        return "it ranks texts"
    if metadata.get("has_dense_head"):
        return "its vectors go through further matrices, which are not computed here"
    return ""

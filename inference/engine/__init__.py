"""The step's clock: what goes into this batch, and which tokens come out.

It has never heard of a tenant, a URL, a Celery task, Redis or a database row. Used by the worker through EngineRunner;
importing this package loads neither numpy nor llama.cpp: LlamaBackend is looked up when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from inference.engine.backend import Backend, SlotWork
from inference.engine.costs import CostCurve
from inference.engine.fake_backend import FakeBackend
from inference.engine.runner import EngineRunner
from inference.engine.stats import EngineStats
from inference.engine.types import (
    DEFAULT_SAMPLERS,
    KNOWN_SAMPLERS,
    AdapterVector,
    Decoding,
    Delta,
    EngineError,
    EventSink,
    Finished,
    FinishReason,
    GenerationRequest,
    Parked,
    Receipt,
    Resumed,
    SamplingParams,
    Speculation,
    Started,
    TokenEvent,
    TokenProbs,
)

if TYPE_CHECKING:
    from inference.engine.llama import LlamaBackend
else:

    def __getattr__(name: str) -> object:
        """LlamaBackend, by name: importing it here would load llama.cpp into every process that knows the types."""
        if name == "LlamaBackend":
            return import_module("inference.engine.llama").LlamaBackend
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "DEFAULT_SAMPLERS",
    "KNOWN_SAMPLERS",
    "AdapterVector",
    "Backend",
    "CostCurve",
    "Decoding",
    "Delta",
    "EngineError",
    "EngineRunner",
    "EngineStats",
    "EventSink",
    "FakeBackend",
    "FinishReason",
    "Finished",
    "GenerationRequest",
    "LlamaBackend",
    "Parked",
    "Receipt",
    "Resumed",
    "SamplingParams",
    "SlotWork",
    "Speculation",
    "Started",
    "TokenEvent",
    "TokenProbs",
]

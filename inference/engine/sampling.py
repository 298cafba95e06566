"""How the next token is chosen, as data: checks of SamplingParams, and the chain of samplers they stand for.

Order and meaning are those of llama.cpp's server (common/sampling.cpp). No library is called here: the backend turns
the steps into native samplers. Pure; called when a request is submitted and when its sequence starts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from inference.engine.types import DEFAULT_SAMPLERS, EngineError, SamplingParams

type_Argument = float | int | str | tuple[str, ...] | tuple[tuple[int, float], ...]

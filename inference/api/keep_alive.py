"""How long a request wants its model to stay loaded: the field `keep_alive` of every dialect that generates. Pure."""

from __future__ import annotations

import math
import re
from typing import Annotated

from pydantic import BeforeValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

MAX_SECONDS = 1e9
MAX_LENGTH = 32
UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "": 1.0}
FORM = re.compile(r"(-?\d{1,9}(?:\.\d{1,6})?)(ms|s|m|h)?")


def _seconds(value: object) -> float | None:
    """From seconds, or a text such as "90s", "5m", "-1". What is negative asks for nothing shorter: None."""
    if value is None:
        return None
    number = math.nan
    if isinstance(value, str) and len(value) <= MAX_LENGTH and (found := FORM.fullmatch(value)):
        number = float(found[1]) * UNITS[found[2] or ""]
    elif isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value)
    if not -MAX_SECONDS <= number <= MAX_SECONDS:
        raise PydanticCustomError("keep_alive", 'Input should be seconds, or a text such as "90s", "5m" or "1h"')
    return None if number < 0 else number


KeepAlive = Annotated[
    float | None,
    BeforeValidator(_seconds),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "minimum": -MAX_SECONDS, "maximum": MAX_SECONDS},
                {"type": "string", "maxLength": MAX_LENGTH},
            ],
            "nullable": True,
            "description": 'Idle time, in seconds or as "5m", after which the model may be unloaded for all that this '
            "request cares: at most what the operator has set.",
        }
    ),
]

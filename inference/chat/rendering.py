"""One conversation through one template: text and special tokens, told apart. Pure, in the rendering child."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

from inference.chat.conversation import variables
from inference.chat.sandbox import clock, compiled, render
from inference.chat.user_text import Marker, SpecialTokens

Segments = list[tuple[str, bool]]
"""(text, is it a special token?), in order."""


def rendered(
    source: str,
    prompt: Mapping[str, Any],
    traits: Mapping[str, Any],
    special: SpecialTokens,
    *,
    now: datetime,
    bos_token: str = "",
    eos_token: str = "",
) -> Segments:
    """prompt is a ChatPrompt in JSON, traits a ChatTemplate's facts. Raises TemplateError."""
    named, tail = variables(prompt, traits, _marker(source, special))
    named.update(bos_token=bos_token, eos_token=eos_token, strftime_now=clock(now))
    return special.split(render(compiled(source), named) + tail)


@lru_cache(maxsize=32)
def _marker(source: str, special: SpecialTokens) -> Marker:
    template = compiled(source)
    return Marker(special, template.literals, template.fields)


def text_of(segments: Segments) -> str:
    return "".join(text for text, _ in segments)

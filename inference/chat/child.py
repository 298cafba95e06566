"""The tokenizer's child that also renders conversations: `python -m inference.chat.child VOCAB.gguf ...`.

The protocol and its limits are those of inference/engine/tokenizer.py, and two operations more, so that a request is
rendered and tokenized in one hop. A template that runs away ends this process and no other.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from inference.chat.rendering import rendered, text_of
from inference.chat.sandbox import TemplateError
from inference.chat.user_text import SpecialTokens
from inference.engine import tokenizer as plain
from inference.engine.tokenizer import Tokenizer
from inference.engine.types import EngineError

RENDERING_BYTES = 256 << 20
"""Address space that a rendering may take beside what the process has."""


def answer(tokenizer: Tokenizer, request: dict[str, Any]) -> dict[str, Any]:
    """As inference.engine.tokenizer.answer, and:

    render: template, traits, prompt, now -> text
    chat: the same -> tokens
    """
    if request["op"] not in ("render", "chat"):
        return plain.answer(tokenizer, request)
    try:
        with _bounded_memory():
            segments = rendered(
                request["template"],
                request["prompt"],
                request["traits"],
                special_tokens(tokenizer),
                now=datetime.fromtimestamp(request["now"], UTC),
                bos_token=tokenizer.text_of_bos,
                eos_token=tokenizer.text_of_eos,
            )
    except TemplateError as error:
        raise EngineError(error.code, str(error)) from error
    if request["op"] == "render":
        return {"text": text_of(segments)}
    return {"tokens": tokenizer.encode_segments(segments)}


@lru_cache(maxsize=1)
def special_tokens(tokenizer: Tokenizer) -> SpecialTokens:
    return SpecialTokens(dict(tokenizer.special_tokens))


@contextmanager
def _bounded_memory() -> Iterator[None]:
    """A MemoryError for the template, long before the process has none."""
    if sys.platform != "linux":  # elsewhere the address space holds more than the process uses
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    bound = now + RENDERING_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (bound if soft == resource.RLIM_INFINITY else min(bound, soft), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


if __name__ == "__main__":
    plain.main(answer=answer)

"""OpenAI's answers and chunks from what every dialect knows of a request: text, probabilities, and how it ended. Pure.

https://platform.openai.com/docs/api-reference/chat and .../completions
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from inference.api.following import Ending
from inference.api.llamacpp.replies import timings
from inference.engine.types import TokenProbs

IMPROBABLE = -9999.0
"""OpenAI's log of next to nothing."""


@dataclass(slots=True)
class Tally:
    """What the answers of one request used. A prompt that several share counts once, where it was computed."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    endings: list[Ending] = field(default_factory=list)

    def add(self, ending: Ending, *, shares_prompt: bool = False) -> None:
        self.endings.append(ending)
        self.completion_tokens += ending.completion_tokens
        if not shares_prompt:
            self.prompt_tokens += ending.prompt_tokens
            self.cached_tokens += int(ending.receipt.get("cached_tokens", 0))

    def usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def timings(self) -> dict[str, Any]:
        """llama.cpp's, where they are those of one sequence."""
        return {"timings": timings(self.endings[0])} if len(self.endings) == 1 else {}


# Probabilities


def token_text(piece: bytes) -> str:
    """A part of a character has no text: its bytes are spelled, as OpenAI does."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def _likely(probs: TokenProbs) -> dict[str, Any]:
    return {"token": token_text(probs.piece), "logprob": _logprob(probs), "bytes": list(probs.piece)}


def _logprob(probs: TokenProbs) -> float:
    return max(probs.logprob, IMPROBABLE)


def chat_logprobs(probs: Sequence[TokenProbs], num_top: int) -> dict[str, Any]:
    content = [{**_likely(each), "top_logprobs": [_likely(top) for top in each.top[:num_top]]} for each in probs]
    return {"content": content, "refusal": None}


class TextLogprobs:
    """Of one answer, whole or chunk by chunk: where each token begins in its text."""

    def __init__(self, num_top: int) -> None:
        self._num_top = num_top
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0

    def of(self, probs: Sequence[TokenProbs]) -> dict[str, Any]:
        offsets = []
        for each in probs:
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(each.piece))
        return {
            "tokens": [token_text(each.piece) for each in probs],
            "token_logprobs": [_logprob(each) for each in probs],
            "top_logprobs": [_tops(each, self._num_top) for each in probs] if self._num_top else None,
            "text_offset": offsets,
        }


def _tops(probs: TokenProbs, num_top: int) -> dict[str, float]:
    """The chosen one too, where it is not among the most probable."""
    return {token_text(each.piece): _logprob(each) for each in (probs, *probs.top[:num_top])}

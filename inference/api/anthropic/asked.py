"""A request as its answer speaks of it: the message as a whole, and its head, end and usage in a stream. Pure."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from inference.api.anthropic.writer import BlockWriter, blocks_of
from inference.api.following import Collected, Ending
from inference.catalog.served import Served
from inference.chat.prompt import ChatPrompt
from inference.chat.thinking import Tags, ThoughtSplitter
from inference.tools import ToolPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedMessage:
    """model: as it was asked for. tags: of the model's thoughts. is_open: the prompt ends within thoughts."""

    request_id: str
    served: Served
    model: str
    prompt: ChatPrompt
    plan: ToolPlan
    tags: Tags
    parallel: bool = True
    is_open: bool = False

    @property
    def id(self) -> str:
        return f"msg_{self.request_id}"

    def writer(self, *, eager: bool | None = None) -> BlockWriter:
        """Who words the same answer again gives calls the same ids. eager: as ToolPlan.stream."""
        return BlockWriter(
            ThoughtSplitter(self.tags, is_open=self.is_open),
            self.plan.stream(rng=random.Random(self.request_id), eager=eager),
            signature=self.id,
            max_calls=None if self.parallel else 1,
        )

    def reply(self, collected: Collected) -> dict[str, Any]:
        writer = self.writer(eager=False)
        content = blocks_of(writer.feed(collected.text) + writer.finish())
        ending = collected.ending
        return self.head(usage_of(ending)) | {"content": content} | stop_of(ending, writer)

    def head(self, usage: dict[str, int]) -> dict[str, Any]:
        """The message before anything of it is known."""
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }


def stop_of(ending: Ending, writer: BlockWriter) -> dict[str, Any]:
    """An answer that was cut is not one that waits for its tools."""
    if ending.finish_reason == "length":
        reason = "max_tokens"
    elif writer.num_calls:
        reason = "tool_use"
    else:
        reason = "end_turn" if ending.stop_word is None else "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": ending.stop_word if reason == "stop_sequence" else None}


def usage_of(ending: Ending) -> dict[str, int]:
    return usage(ending.prompt_tokens, int(ending.receipt.get("cached_tokens", 0)), ending.completion_tokens)


def usage(prompt_tokens: int, cached_tokens: int, output_tokens: int) -> dict[str, int]:
    """input_tokens are those that were not held: the three kinds of the prompt add up to all of it."""
    return {
        "input_tokens": prompt_tokens - cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached_tokens,
        "output_tokens": output_tokens,
    }

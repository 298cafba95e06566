"""What a tenant asks for, in no dialect: every body that generates is parsed into one of these. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from inference.chat.prompt import ChatPrompt
from inference.chat.thinking import Opening
from inference.engine.types import Decoding, Embedding, SamplingParams
from inference.structured import Form

Wanted = tuple[tuple[str | int, float | None], ...]
"""(name or id of an adapter, scale or None for its own)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOrder:
    """One sequence to generate, or inputs to embed. Numbers are checked before they come here, but for what only the
    model can tell."""

    prompt: str | tuple[int, ...] | ChatPrompt
    """Text in which nothing becomes a special token, token ids, or a conversation for the model's chat template."""
    model: str | None = None
    """None is the default model."""
    max_tokens: int | None = None
    """None: as many as the context and the plan allow. 0: the prompt alone is computed, and held for those to come."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    form: Form | None = None
    """Of a forced answer: sampling.grammar is its widest grammar, until admission knows how long the answer may be."""
    opening: Opening | None = None
    """How an answer may begin within thoughts, which its reader tells apart; None: a forced one has none."""
    max_thought: int | None = None
    """Tokens of thoughts, where there is an opening; None: the model ends them."""
    decoding: Decoding = field(default_factory=Decoding)
    shown_texts: tuple[str, ...] = ()
    """Where the model has one of these as a control token, it is part of the answer's text (ToolPlan.shown_texts)."""
    stop: tuple[str, ...] = ()
    adapters: Wanted | None = None
    """Adapters by name or by llama.cpp's id; None: nothing was said, the tenant's default."""
    stream: bool = False
    return_tokens: bool = False
    """The ids of what is generated, beside the text."""
    use_cache: bool = False
    """The completion cache."""
    cache_prompt: bool = True
    """Reuse what the engine still holds of earlier prompts of the tenant."""
    keep_alive_seconds: float | None = None
    """How long the model stays loaded for this request's sake, at most as its settings say; None: as they say."""
    all_or_nothing: bool = False
    """Refuse rather than shorten the answer to what is left of the quota."""
    is_batch: bool = False
    """Part of a batch: a label of the metrics."""
    shares_prompt: bool = False
    """One of several answers to a prompt that another order of the same request pays for."""
    session: str = ""
    """What the client calls those requests that belong together; where an alias has a canary they get one version."""
    embedding: Embedding | None = None
    """Vectors of the inputs that the prompt's tokens are, and no answer: then max_tokens is 0."""

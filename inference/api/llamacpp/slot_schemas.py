"""Bodies and answers of the slots; parsed once, at the door."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, RootModel

MAX_LABEL_BYTES = 255
FORBIDDEN = frozenset('/\\:*?"<>|')


class SlotFileBody(BaseModel):
    """POST /slots/{id}?action=save or restore."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    filename: Annotated[str, Field(max_length=4096)] = Field(
        description="A label among the tenant's own; no path, though it must look like the name of a file."
    )


def is_label(text: str) -> bool:
    """Whether llama.cpp would take it as the name of a file. Here it is a label, and hashed before it is used."""
    try:
        encoded = text.encode()
    except UnicodeEncodeError:
        return False
    if not 0 < len(encoded) <= MAX_LABEL_BYTES or text.strip(" ") != text or text.endswith(".") or ".." in text:
        return False
    return all(character.isprintable() and character not in FORBIDDEN for character in text)


# Answers, for the OpenAPI document


class NextToken(BaseModel):
    has_next_token: bool
    n_remain: int
    n_decoded: int


class SlotReply(BaseModel):
    """A slot. What follows is_processing is of the request that runs in it, or of the last one, as long as tokens of
    that are held. speculative: the model is served with drafts, and its memory can take them back."""

    id: int
    n_ctx: int
    speculative: bool
    is_processing: bool
    id_task: str | None = None
    n_prompt_tokens: int | None = None
    n_prompt_tokens_processed: int | None = None
    n_prompt_tokens_cache: int | None = None
    n_held: int | None = Field(None, description="Tokens that the slot holds.")
    params: dict[str, Any] | None = None
    next_token: list[NextToken] | None = None
    tenant: int | None = Field(None, description="For operators: whose it is.")


class SlotsReply(RootModel[list[SlotReply]]):
    """All slots, in order of their numbers."""


class SlotActionReply(BaseModel):
    """n_saved, n_written and timings of a save; n_restored, n_read and timings of a restore; n_erased of an erase."""

    id_slot: int
    filename: str | None = None
    n_saved: int | None = None
    n_written: int | None = None
    n_restored: int | None = None
    n_read: int | None = None
    n_erased: int | None = None
    timings: dict[str, float] | None = None

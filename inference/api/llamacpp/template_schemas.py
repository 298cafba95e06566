"""The body of /apply-template; the conversation in it is that of every dialect (chat_schemas.py)."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, field_validator

from inference.api.chat_schemas import Messages, TemplateFields
from inference.api.llamacpp.schemas import FORM
from inference.api.native.schemas import ModelName
from inference.api.openai.tolerance import known_messages, known_tools


class ApplyTemplateBody(TemplateFields):
    """POST /apply-template: what else a chat completion has is ignored, and so may be sent along."""

    model_config = FORM

    messages: Messages
    model: ModelName | None = None

    @field_validator("messages", mode="before")
    @classmethod
    def _known_messages(cls, value: Any) -> Any:
        return known_messages(value)

    @field_validator("tools", mode="before")
    @classmethod
    def _known_tools(cls, value: Any) -> Any:
        return known_tools(value)


class ApplyTemplateReply(BaseModel):
    prompt: str

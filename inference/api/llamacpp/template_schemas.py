"""The body of /apply-template; the conversation in it is that of every dialect (chat_schemas.py)."""

from __future__ import annotations

from pydantic import BaseModel

from inference.api.chat_schemas import Messages, TemplateFields
from inference.api.native.schemas import ModelName


class ApplyTemplateBody(TemplateFields):
    """POST /apply-template."""

    messages: Messages
    model: ModelName | None = None


class ApplyTemplateReply(BaseModel):
    prompt: str

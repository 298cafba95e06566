"""What the views of Anthropic's dialect have in common: its errors and the headers that its clients read."""

from __future__ import annotations

from typing import ClassVar

from django.http import HttpResponseBase
from pydantic import BaseModel

from inference.api.anthropic.schemas import AnthropicErrorReply
from inference.api.async_view import AsyncAPIView
from inference.api.errors import ANTHROPIC, ErrorShape
from inference.api.headers import add_headers, anthropic_rate_headers


class AnthropicView(AsyncAPIView):
    """A view whose answers have Anthropic's headers, good or bad. Any `anthropic-version` is taken."""

    tag = "Anthropic"
    errors: ClassVar[ErrorShape] = ANTHROPIC
    error_reply: ClassVar[type[BaseModel]] = AnthropicErrorReply
    scopes: ClassVar[tuple[str, ...]] = ("generate",)

    def add_headers(self, response: HttpResponseBase) -> None:
        super().add_headers(response)
        headers: dict[str, str] = {}
        if self.principal is not None:
            headers |= anthropic_rate_headers("requests", self.request_rate)
            headers |= anthropic_rate_headers("tokens", self.token_rate)
        if wait := response.headers.get("Retry-After"):
            headers["retry-after-ms"] = str(int(wait) * 1000)
        add_headers(response, headers)

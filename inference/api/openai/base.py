"""What the views of OpenAI's dialect have in common: its errors and the headers that its clients read."""

from __future__ import annotations

import time
from typing import Any, ClassVar

from django.http import HttpRequest, HttpResponseBase
from pydantic import BaseModel

from inference.api.async_view import AsyncAPIView
from inference.api.errors import OPENAI, ErrorShape
from inference.api.headers import add_headers
from inference.api.openai.schemas import OpenAIErrorReply

VERSION = "2020-10-01"
"""Of OpenAI's API, in a header of every answer."""


class OpenAIView(AsyncAPIView):
    """A view whose answers have OpenAI's headers, good or bad."""

    tag = "OpenAI"
    errors: ClassVar[ErrorShape] = OPENAI
    error_reply: ClassVar[type[BaseModel]] = OpenAIErrorReply
    scopes: ClassVar[tuple[str, ...]] = ("generate",)

    async def dispatch(self, request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:  # type: ignore[override]
        self.started_at = time.perf_counter()
        return await super().dispatch(request, *args, **kwargs)

    def add_headers(self, response: HttpResponseBase) -> None:
        super().add_headers(response)
        milliseconds = round((time.perf_counter() - self.started_at) * 1000)
        headers = {"openai-version": VERSION, "openai-processing-ms": str(milliseconds)}
        if wait := response.headers.get("Retry-After"):
            headers["retry-after-ms"] = str(int(wait) * 1000)
        add_headers(response, headers)

"""The icon that browsers ask for by themselves at /favicon.ico, also before anybody signs in.

A coroutine, so it comes by the API's door: no middleware, no session, no thread and no query.
"""

from __future__ import annotations

from functools import cache

from django.http import HttpRequest, HttpResponse
from django.views.decorators.http import require_safe

from llmsite.config import BASE_DIR

MAX_AGE_SECONDS = 86400


@require_safe
async def icon(request: HttpRequest) -> HttpResponse:
    headers = {"Cache-Control": f"public, max-age={MAX_AGE_SECONDS}"}
    return HttpResponse(_drawn(), content_type="image/x-icon", headers=headers)


@cache
def _drawn() -> bytes:
    """The drawing of favicon.svg in 16, 32 and 48 pixels: some clients understand nothing else."""
    return (BASE_DIR / "llmsite/static/llmsite/favicon.ico").read_bytes()

"""What every endpoint that generates has in common, in any dialect: its scope, its metrics, what its log line says."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

from django.http import HttpRequest, HttpResponseBase
from drf_spectacular.utils import OpenApiParameter
from rest_framework.request import Request

from inference import metrics
from inference.admission import Admitted, CachedAnswer
from inference.api.async_view import AsyncAPIView
from inference.api.following import Ending
from inference.api.headers import server_timing, usage_headers
from inference.api.parts import Part
from inference.api.sse import EventStream

STATUS_CLIENT_GONE = 499
ALL_OR_NOTHING = OpenApiParameter(
    "x-quota-all-or-nothing",
    bool,
    OpenApiParameter.HEADER,
    description="`true`: 402 rather than a shorter answer where the quota does not cover the output bound.",
)


def is_all_or_nothing(request: Request) -> bool:
    return bool(request.META.get("HTTP_X_QUOTA_ALL_OR_NOTHING", "").lower() == "true")


def answer_headers(ending: Ending, *, cached: bool, clamped: bool = False) -> dict[str, str]:
    """Of one answer that does not stream."""
    headers = usage_headers(ending.prompt_tokens, ending.completion_tokens)
    headers["x-cache"] = "hit" if cached else "miss"
    if clamped:
        headers["x-quota-clamped"] = "true"
    if ending.receipt and not cached:
        headers["Server-Timing"] = server_timing(ending.seconds())
    return headers


class GenerationView(AsyncAPIView):
    """Counted in llm_api_request_total and its latency, up to the last byte of a stream."""

    scopes: ClassVar[tuple[str, ...]] = ("generate",)

    async def dispatch(self, request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:  # type: ignore[override]
        started_at = time.perf_counter()
        try:
            response = await super().dispatch(request, *args, **kwargs)
        except asyncio.CancelledError:
            self._measure(started_at, STATUS_CLIENT_GONE)
            raise
        measure = partial(self._measure, started_at, response.status_code)
        if isinstance(response, EventStream):
            response.on_end = measure
        else:
            measure()
        return response

    def note_admission(self, answer: Admitted | CachedAnswer) -> None:
        """For log line, metrics and headers."""
        cached = isinstance(answer, CachedAnswer)
        self.log_fields.update(model_id=answer.served.name, cached=cached)
        self.token_rate = None if cached else answer.tokens

    def headers_of_parts(self, parts: Sequence[Part]) -> dict[str, str]:
        """The sums of several answers, for headers and log line; a prompt that several share counts once.

        Server-Timing has the longest of each: they ran side by side.
        """
        headers = usage_headers(
            sum(part.collected.ending.prompt_tokens for part in parts if not part.shares_prompt),
            sum(part.collected.ending.completion_tokens for part in parts),
        )
        computed = [part.collected.ending.seconds() for part in parts if not part.cached]
        headers["x-cache"] = "miss" if computed else "hit"
        all_cached = not computed
        if computed:
            longest = {name: max(seconds[name] for seconds in computed) for name in computed[0]}
            headers["Server-Timing"] = server_timing(longest)
        self.log_fields["cached"] = all_cached
        return headers

    def _measure(self, started_at: float, status: int) -> None:
        """Labels hold names of registered models alone: what a client made up must not become a time series."""
        fields = self.log_fields
        labels = (self.route, fields.get("model_id", ""), str(fields.get("cached", False)).lower(), str(status))
        metrics.REQUESTS.labels(*labels).inc()
        metrics.REQUEST_SECONDS.labels(*labels).observe(time.perf_counter() - started_at)
        if status >= 400 and "error_type" in fields:
            metrics.REFUSALS.labels(fields["error_type"]).inc()

"""What every endpoint that generates has in common, in any dialect: its scope, its metrics, what its log line says."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import Any

from django.http import HttpRequest, HttpResponseBase

from inference import metrics
from inference.admission import Admitted, CachedAnswer
from inference.api.async_view import AsyncAPIView
from inference.api.sse import EventStream

STATUS_CLIENT_GONE = 499


class GenerationView(AsyncAPIView):
    """Counted in llm_api_request_total and its latency, up to the last byte of a stream."""

    scopes = ("generate",)

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

    def _measure(self, started_at: float, status: int) -> None:
        """Labels hold names of registered models alone: what a client made up must not become a time series."""
        fields = self.log_fields
        labels = (self.route, fields.get("model_id", ""), str(fields.get("cached", False)).lower(), str(status))
        metrics.REQUESTS.labels(*labels).inc()
        metrics.REQUEST_SECONDS.labels(*labels).observe(time.perf_counter() - started_at)
        if status >= 400 and "error_type" in fields:
            metrics.REFUSALS.labels(fields["error_type"]).inc()

"""What every endpoint that generates has in common, in any dialect: its scope, its metrics, what its log line says."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from django.conf import settings
from django.http import HttpRequest, HttpResponse, HttpResponseBase
from drf_spectacular.utils import OpenApiParameter
from rest_framework.request import Request

from accounts.identity.principals import Principal
from accounts.limits.throttling import RateState
from accounts.trail.refusals import Refusal
from inference import metrics
from inference.api import presence
from inference.api.async_view import Outcome, json_response
from inference.api.following import Ending
from inference.api.headers import server_timing, usage_headers
from inference.api.parts import Part, Parts
from inference.api.repeating import Repeating
from inference.api.replaying import ReplayableView
from inference.api.sse import EventStream
from inference.catalog import adapters
from inference.intake import admission, idempotency
from inference.intake.admission import Admitted, CachedAnswer
from inference.intake.together import Together
from inference.orders import GenerateOrder
from inference.transport.holding import (
    BATCH_KEPT_SECONDS,
    TO_THE_END,
    VECTORS_KEPT_SECONDS,
    Hold,
    Question,
)

STATUS_CLIENT_GONE = 499
BATCH_HOLD = Hold(keep_seconds=BATCH_KEPT_SECONDS)
"""Of a line: no process waits for it that could go away."""
ALL_OR_NOTHING = OpenApiParameter(
    "x-quota-all-or-nothing",
    bool,
    OpenApiParameter.HEADER,
    description="`true`: 402 rather than a shorter answer where the quota does not cover the output bound.",
)


IDEMPOTENCY_KEY = OpenApiParameter(
    "Idempotency-Key",
    str,
    OpenApiParameter.HEADER,
    description="The same key and body is computed and charged once: it is given the same answer, or joins the first.",
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


class GenerationView(ReplayableView):
    """Counted in llm_api_request_total and its latency, up to the last byte of a stream."""

    scopes: ClassVar[tuple[str, ...]] = ("generate",)
    error_codes: ClassVar[tuple[str, ...]] = ("quota_exhausted", "generation_timeout")
    _repeating: Repeating | None = None
    _is_background: bool = False
    _is_stream: bool = False

    async def dispatch(self, request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:  # type: ignore[override]
        if self.batch is not None:  # nobody waits for it: its time would only blur that of the others
            return await super().dispatch(request, *args, **kwargs)
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

    def _enter(self, handler: Callable[..., Outcome], http_request: HttpRequest, kwargs: dict[str, Any]) -> Outcome:
        if http_request.method == "POST":
            handler = partial(self._post_once, handler)
        return super()._enter(handler, http_request, kwargs)

    def _post_once(self, handler: Callable[..., Outcome], request: Request, **kwargs: Any) -> Outcome:
        """The handler; with an Idempotency-Key for one of all that have the same."""
        answer = partial(self._post, handler, request, **kwargs)
        key = request.META.get("HTTP_IDEMPOTENCY_KEY")
        if key is None:
            return answer()
        principal = self.admit_to_view()
        place = idempotency.place_of(principal.tenant_id, self.route, key, self.http_request.body)
        self._repeating = Repeating(self, place, answer)
        return self._repeating.enter()

    def _post(self, handler: Callable[..., Outcome], request: Request, **kwargs: Any) -> Outcome:
        outcome = handler(request, **kwargs)
        if self._is_background and not self._is_stream:
            return self._accepted()  # a Later that is not run has taken nothing but the ticket
        return outcome

    def _accepted(self) -> HttpResponse:
        here = f"/v1/requests/{self.request_id}"
        links = {"self": here, "events": f"{here}/events", "cancel": f"{here}/cancel"}
        content = {"id": self.request_id, "status": "waiting", "links": links}
        return json_response(content, status=202, headers={"Location": here})

    def admit(self, order: GenerateOrder, *, background: bool | None = False) -> Admitted | CachedAnswer:
        """The order as this request's only one. Blocking. Raises Refusal.

        background: it goes on without a reader, and comes from no cache, as its answer is fetched from its events.
        """
        self.is_followable, self._is_background, self._is_stream = True, bool(background), order.stream
        self.model_asked = order.model
        if self.replayed is not None:
            return self._admitted_before(self.replayed, order)
        assert self.principal is not None
        if background:
            order = replace(order, use_cache=False)
        answer = admission.admit(
            self.principal,
            order,
            request_id=self.request_id,
            route=self.route,
            batch=self.batch,
            hold=self._hold(order),
        )
        self.note_admission(answer)
        return answer

    def parts(self, principal: Principal, orders: Sequence[GenerateOrder], *, background: bool | None = False) -> Parts:
        """Several orders of this request, which hang on this process. Raises Refusal."""
        if background and len(orders) > 1:
            raise Refusal("bad_request", "A background request has one answer: send one prompt, and n of 1.")
        self.model_asked = orders[0].model
        record = self._repeating.place.record if self._repeating else ""
        hold = Hold(web=presence.web_id(), keep_seconds=settings.CONFIG.stream_kept_seconds, record=record)
        hold = BATCH_HOLD if self.batch else hold
        return Parts(Together(principal, orders, self.request_id, self.route, hold, self.batch))

    def _hold(self, order: GenerateOrder) -> Hold:
        """What is posted is kept where somebody may read the answer later: plain requests leave nothing behind."""
        if self.batch is not None:
            return BATCH_HOLD
        config, repeating = settings.CONFIG, self._repeating
        patience, keep = 0.0, VECTORS_KEPT_SECONDS if order.embedding else config.stream_kept_seconds
        if repeating:
            patience, keep = idempotency.PATIENCE_SECONDS, idempotency.ttl_seconds()
        if self._is_background:
            patience, keep = TO_THE_END, config.background_kept_seconds
        is_kept = order.stream or repeating is not None or self._is_background
        return Hold(
            web=presence.web_id(),
            patience_seconds=patience,
            keep_seconds=keep,
            path=self.http_request.path if is_kept else "",
            body=self.http_request.body,
            record=repeating.place.record if repeating else "",
        )

    def _admitted_before(self, question: Question, order: GenerateOrder) -> Admitted:
        """Whoever may no longer use the model may not read its answers either. Raises Refusal."""
        assert self.principal is not None
        served, _ = adapters.resolve_model(order.model, self.principal)
        ticket = question.ticket
        return Admitted(ticket, served, RateState(), ticket.clamped, is_replay=True, after=self.after)

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
        if any(part.clamped for part in parts):
            headers["x-quota-clamped"] = "true"
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

"""POST /v1/admission: what would become of a request at this moment. Any body that generates, of any dialect.

The header X-Admission-Route says which route's body it is. The body goes the way of that route's own view, up to where
something would be taken (inference/intake/dry_run.py): no dialect needs a line here.
"""

from __future__ import annotations

from typing import Any

from django.http import HttpResponse
from django.urls import Resolver404, resolve
from django.utils import timezone
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, extend_schema
from pydantic import BaseModel, Field
from rest_framework.request import Request

from accounts.limits.throttling import RateState
from inference.api.async_view import AsyncAPIView, json_response
from inference.api.errors import wrong_field
from inference.api.generation import ALL_OR_NOTHING, GenerationView
from inference.intake import dry_run

HEADER = "X-Admission-Route"
DEFAULT_ROUTE = "/v1/generate"
MAX_ROUTE = 100


class AdmissionReply(BaseModel):
    """What would be taken, which limit binds and when it frees, and how long the queue is."""

    object: str
    route: str
    admitted: bool
    model: str
    requests: int = Field(description="Answers, each with a place and a request of the month.")
    cached: bool = Field(description="The completion cache has it: a request, and no tokens.")
    prompt_tokens: int
    max_tokens: int = Field(description="Output that it would get.")
    clamped: bool = Field(description="Less output than asked, because the quota has no more.")
    reserved_tokens: int
    cost_at_most: str
    currency: str
    refusal: dict[str, Any] | None = Field(description="The very words that the request would get.")
    binding: dict[str, Any] | None
    limits: list[dict[str, Any]]
    queue: dict[str, Any]


class AdmissionView(AsyncAPIView):
    """Would it be admitted? Charges nothing; it counts as an attempt in the requests a minute."""

    route = "/v1/admission"
    scopes = ("generate",)

    @extend_schema(
        operation_id="admission",
        summary="Dry run: exact tokens, the limit that binds, the queue",
        request=OpenApiTypes.OBJECT,
        parameters=[
            OpenApiParameter(
                HEADER,
                str,
                OpenApiParameter.HEADER,
                description=f"The route that the body is meant for, such as /v1/chat/completions; {DEFAULT_ROUTE}.",
            ),
            ALL_OR_NOTHING,
        ],
        responses=AdmissionReply,
    )
    def post(self, request: Request) -> HttpResponse:
        route = self.http_request.headers.get(HEADER, DEFAULT_ROUTE)
        view = self._view_of(route)
        self.errors = view.errors  # type: ignore[misc]  # what is wrong with a body is said in its dialect
        view.__dict__.update(self.__dict__)
        wanted = _go(view, request)
        principal = self.admit_to_view()
        rate = self.request_rate
        state = RateState() if rate is None else RateState(rate.limit, rate.remaining, rate.reset_seconds)
        facts = dry_run.verdict(principal, wanted, state, timezone.now())
        return json_response({"object": "admission", "route": route, **facts})

    def _view_of(self, route: str) -> Any:
        """The view that answers POST there. Raises Refusal."""
        try:
            found = resolve(route[:MAX_ROUTE]).func
        except Resolver404:
            found = None
        kind = getattr(found, "view_class", None) or getattr(found, "cls", None)
        if kind is None or not issubclass(kind, GenerationView) or not hasattr(kind, "post"):
            raise wrong_field(HEADER, "use a route that generates, such as /v1/generate or /v1/chat/completions")
        return kind()


def _go(view: Any, request: Request) -> list[dry_run.Wanted]:
    """Raises Refusal and what else a body is refused with. An answer that was given before is not given again."""
    request.META.pop("HTTP_IDEMPOTENCY_KEY", None)
    with dry_run.asking():
        try:
            view.post(request)
        except dry_run.Found as found:
            return found.wanted
    raise wrong_field(HEADER, "requests of this route take nothing")

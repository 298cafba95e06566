"""DRF views with an asynchronous dispatch: one hop into the bounded executor, then the event loop.

The hop runs what DRF runs before a handler (authentication, throttles, parsing, permissions), in the order of the
contract, and the handler itself: a plain method. A handler that has to wait returns a Later; its `run` is awaited on
the loop, where any number of requests may wait without a thread. Every dialect's views descend from here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import orjson
from asgiref.sync import iscoroutinefunction
from django.db import DatabaseError
from django.http import HttpRequest, HttpResponse, HttpResponseBase
from django.utils.cache import patch_vary_headers
from pydantic import BaseModel
from rest_framework.parsers import JSONParser
from rest_framework.request import Request
from rest_framework.views import APIView

from accounts.identity.authentication import APIKeyAuthentication
from accounts.identity.principals import Principal
from accounts.limits import throttling
from accounts.trail import refusal_log
from accounts.trail.refusals import Refusal
from inference.api import cross_origin
from inference.api.errors import JSON_TYPE, NATIVE, ErrorShape, error_response, to_refusal
from inference.api.headers import Rate, add_headers, log_fields, rate_headers, request_id_of
from inference.api.hop import shared_hop
from inference.api.schema import ApiSchema
from inference.batches.terms import BatchTerms

Body = TypeVar("Body", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Later:
    """What a handler returns when the rest of its answer comes from the event loop.

    run: makes the response. abandon: undoes what the handler took, in a thread, if the client has gone before `run`.
    """

    run: Callable[[], Awaitable[HttpResponseBase]]
    abandon: Callable[[], object]


Outcome = HttpResponseBase | Later


def json_response(data: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> HttpResponse:
    return HttpResponse(orjson.dumps(data), status=status, content_type=JSON_TYPE, headers=headers)


class AsyncAPIView(APIView):
    """Handlers (`get`, `post`) are plain methods that run in the hop, or coroutines that touch nothing that blocks."""

    view_is_async = True
    errors: ClassVar[ErrorShape] = NATIVE
    error_codes: ClassVar[tuple[str, ...]] = ()
    """For the OpenAPI document: what this view may refuse with beyond what every view may."""
    scopes: ClassVar[tuple[str, ...]] = ()
    """The key must have one of these. Empty: any valid key."""
    is_public: ClassVar[bool] = False
    """No key is asked for, and none is looked at."""
    route: ClassVar[str] = ""
    """The name under which the request is logged, measured and kept in its receipt."""
    stage: str = "request"
    batch: BatchTerms | None = None
    """Of the batch that this request is a line of: its key was looked at, and its minute's limits do not count."""
    caller: Principal | None = None
    """Who asks, where somebody else has made sure of it: a person at the console, with a key of their tenant."""
    schema = ApiSchema()
    authentication_classes = [APIKeyAuthentication]
    permission_classes = []  # `scopes` says it; tests hold every view of the URL table to it
    parser_classes = [JSONParser]  # for the OpenAPI document: bodies are parsed by `parse`

    request_rate: Rate | None = None
    token_rate: Rate | None = None
    principal: Principal | None = None

    async def dispatch(self, request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:  # type: ignore[override]
        self.http_request = request
        self.request_id = request_id_of(request)
        self.log_fields = log_fields(request)
        self.log_fields["route"] = self.route
        try:
            response = await self._answer(self._handler(request), request, kwargs)
        except Exception as error:  # noqa: BLE001 the request's border: to_refusal logs what nobody foresaw
            response = self.refused(error)
        self.add_headers(response)
        await self._share(response)
        return response

    async def _answer(
        self, handler: Callable[..., Any], request: HttpRequest, kwargs: dict[str, Any]
    ) -> HttpResponseBase:
        if iscoroutinefunction(handler):
            response: HttpResponseBase = await handler(request, **kwargs)
            return response
        outcome = await shared_hop().run(lambda: self._enter(handler, request, kwargs), abandon=_abandon)
        return await outcome.run() if isinstance(outcome, Later) else outcome

    def _handler(self, request: HttpRequest) -> Callable[..., Any]:
        name = (request.method or "").lower()
        if cross_origin.takes_part(self.scopes) and cross_origin.is_preflight(request):
            return self._preflight
        if name == "head":
            name = "get"
        handler = getattr(self, name, None) if name in ("get", "post", "put", "patch", "delete") else None
        return handler or self._not_allowed

    async def _not_allowed(self, request: HttpRequest, **kwargs: Any) -> HttpResponseBase:
        refusal = Refusal("method_not_allowed", f"{request.method} is not allowed here.")
        response = error_response(self.errors, refusal, self.request_id)
        response.headers["Allow"] = ", ".join(self._allowed_methods())
        self.log_fields["error_type"] = refusal.code
        return response

    def _allowed_methods(self) -> list[str]:
        return [name.upper() for name in ("get", "post", "put", "patch", "delete") if hasattr(self, name)]

    async def _preflight(self, request: HttpRequest, **kwargs: Any) -> HttpResponseBase:
        """A browser's question before its request. Raises Refusal."""
        self.stage = "preflight"
        allowed = await cross_origin.any_tenants()
        headers = cross_origin.preflight_headers(request, allowed, self._allowed_methods())
        return HttpResponse(content_type="text/plain", headers=headers)

    async def _share(self, response: HttpResponseBase) -> None:
        """Says whether a page of another origin may read the answer: the tenant of the key decides, and where no key is
        known, whether any tenant lists the origin."""
        if not cross_origin.takes_part(self.scopes):
            return
        patch_vary_headers(response, ("Origin",))
        origin = cross_origin.origin_of(self.http_request)
        if not origin:
            return
        try:
            allowed = self.principal.allowed_origins if self.principal else await cross_origin.any_tenants()
        except (Refusal, DatabaseError) as error:  # the answer stays as it is, and the page sees a network error
            self.log_fields["origins"] = type(error).__name__
            return
        add_headers(response, cross_origin.headers(origin, allowed))

    # In a thread

    def _enter(self, handler: Callable[..., Outcome], http_request: HttpRequest, kwargs: dict[str, Any]) -> Outcome:
        request = Request(http_request, authenticators=self.get_authenticators() if not self.is_public else ())
        self.request = request
        if self.is_public:
            return handler(request, **kwargs)
        try:
            self.authenticate(request)
            return handler(request, **kwargs)
        finally:
            self._look_up_rates()

    def authenticate(self, request: Request) -> None:
        """Who asks, and may they ask this often? Raises Refusal."""
        self.stage = "authentication"
        if self.batch is not None:
            self.principal = self.batch.principal
            return
        user = self.caller or request.user
        if not isinstance(user, Principal):
            raise Refusal("missing_api_key", "Send an API key in X-API-Key or Authorization: Bearer.")
        self.principal = user
        self.log_fields.update(
            api_key_id=user.public_id, api_key_name=user.key_name, api_key_role=user.role, tenant_id=user.tenant_id
        )
        self.request_rate = throttling.count_request(user, request)

    def _look_up_rates(self) -> None:
        """For the headers of an answer that came about before its limits were counted, or without. Best effort."""
        principal = self.principal
        if principal is None or self.batch is not None:
            return
        with contextlib.suppress(Refusal):  # no Redis: the answer itself says so already
            if self.request_rate is None:
                self.request_rate = throttling.peek_requests(principal, self.request)
            if self.token_rate is None and principal.limit("tokens_per_minute") is not None:
                self.token_rate = throttling.peek_tokens(principal)

    def admit_to_view(self) -> Principal:
        """The principal, if its key may use this view. After parsing: see CONTRACT, order of limits. Raises Refusal."""
        assert self.principal is not None
        if self.scopes and self.principal.scopes.isdisjoint(self.scopes):
            raise Refusal("forbidden", f"This key lacks the scope {' or '.join(self.scopes)}.")
        return self.principal

    def parse(self, form: type[Body]) -> Body:
        """The request's JSON as `form`. Raises pydantic.ValidationError."""
        self.stage = "request_validation"
        return form.model_validate_json(self.http_request.body)

    # Anywhere

    def refused(self, error: Exception) -> HttpResponse:
        """The error as this dialect's answer."""
        request = self.http_request
        refusal = to_refusal(error, method=request.method or "", path=request.path, stage=self.stage)
        self.log_fields["error_type"] = refusal.code
        if self.stage != "generation":  # what was admitted has a receipt
            refusal_log.note(refusal, request_id=self.request_id, route=self.route, principal=self.principal)
        return error_response(self.errors, refusal, self.request_id)

    def add_headers(self, response: HttpResponseBase) -> None:
        """The headers of every answer, good or bad; X-Request-ID comes from the guard."""
        if self.principal is not None:
            add_headers(response, rate_headers("requests", self.request_rate))
            add_headers(response, rate_headers("tokens", self.token_rate))


def _abandon(outcome: Outcome) -> None:
    if isinstance(outcome, Later):
        outcome.abandon()

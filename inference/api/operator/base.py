"""What the operator's views share: the scope, the limits of the key, the headers, native errors. DRF, synchronous."""

from __future__ import annotations

import contextlib
from typing import Any

from rest_framework.renderers import JSONRenderer
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from accounts.identity.permissions import IsOperator
from accounts.identity.principals import Principal
from accounts.limits import throttling
from accounts.trail import audit_log, refusal_log
from accounts.trail.refusals import Refusal
from inference.api.errors import field_error, validation_refusal
from inference.api.headers import Rate, add_headers, log_fields, rate_headers, request_id_of
from inference.api.schema import ApiSchema
from inference.vetting.inspection import RegistrationError


def registration_refusal(error: RegistrationError) -> Refusal:
    """Why a file is not taken, as errors of fields."""
    listed = [field_error((field,), text, error.code) for field, texts in error.fields.items() for text in texts]
    return validation_refusal(listed)


class OperatorView(APIView):
    """Mix in before DRF's views. Order: key, requests a minute, scope; then DRF parses."""

    schema = ApiSchema()
    permission_classes = [IsOperator]  # type: ignore[list-item]  # an instance stands in for its class
    request_rate: Rate | None = None
    token_rate: Rate | None = None

    def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
        fields = log_fields(request._request)
        match = request._request.resolver_match
        fields["route"] = f"/{match.route}" if match else ""
        self.perform_authentication(request)
        principal = request.user
        assert isinstance(principal, Principal)  # the authenticator returns nothing else
        fields.update(api_key_id=principal.public_id, api_key_role=principal.role, tenant_id=principal.tenant_id)
        audit_log.act_as(audit_log.Actor("key", f"{principal.public_id} of {principal.tenant_name}"[:150]))
        self.request_rate = throttling.count_request(principal, request)
        super().initial(request, *args, **kwargs)

    def perform_content_negotiation(self, request: Request, force: bool = False) -> Any:
        """JSON, whatever is accepted; `format` is a parameter of the reports and not of DRF."""
        renderer = JSONRenderer()
        return renderer, renderer.media_type

    def finalize_response(self, request: Request, response: Response, *args: Any, **kwargs: Any) -> Response:
        response = super().finalize_response(request, response, *args, **kwargs)
        refusal: Refusal | None = getattr(request._request, "refusal", None)
        if refusal is not None:
            fields = log_fields(request._request)
            fields["error_type"] = refusal.code
        principal = getattr(request, "_user", None)
        if refusal is not None:
            refusal_log.note(
                refusal,
                request_id=request_id_of(request._request),
                route=fields.get("route", ""),
                principal=principal if isinstance(principal, Principal) else None,
            )
        if isinstance(principal, Principal):
            self._look_up_rates(principal, request)
            add_headers(response, rate_headers("requests", self.request_rate))
            add_headers(response, rate_headers("tokens", self.token_rate))
        return response

    def _look_up_rates(self, principal: Principal, request: Request) -> None:
        with contextlib.suppress(Refusal):  # no Redis: the answer itself says so already
            if self.request_rate is None:
                self.request_rate = throttling.peek_requests(principal, request)
            if principal.limit("tokens_per_minute") is not None:
                self.token_rate = throttling.peek_tokens(principal)

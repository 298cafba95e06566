"""What drf-spectacular cannot see by itself: how keys are sent, and the errors that every operation may answer with."""

from __future__ import annotations

from typing import Any

from drf_spectacular.extensions import OpenApiAuthenticationExtension
from drf_spectacular.openapi import AutoSchema

from inference.api.errors import NATIVE, STATUS
from inference.api.native.schemas import ErrorReply

HEADERS_TOO_LARGE = 431
"""The server says it before it knows the address."""
PUBLIC_ERRORS = frozenset((400, 405, 408, 413, 500))
KEY_ERRORS = PUBLIC_ERRORS | {401, 403, 404, 406, 409, 415, 422, 429, 503}
"""Native statuses of what every operation may be refused with; its dialect may move some. A view adds `error_codes`."""


class KeyScheme(OpenApiAuthenticationExtension):  # type: ignore[no-untyped-call]
    """One key, two headers."""

    target_class = "accounts.identity.authentication.APIKeyAuthentication"
    name = ["bearerKey", "headerKey"]

    def get_security_definition(self, auto_schema: AutoSchema) -> list[dict[str, Any]]:
        return [
            {"type": "http", "scheme": "bearer", "bearerFormat": "llms_..."},
            {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        ]

    def get_security_requirement(self, auto_schema: AutoSchema) -> list[dict[str, list[str]]]:
        return [{"bearerKey": []}, {"headerKey": []}]


class ApiSchema(AutoSchema):
    """Adds the shape of errors to each operation, and one tag per block of the URL table."""

    def get_operation(self, *args: Any, **kwargs: Any) -> Any:
        operation = super().get_operation(*args, **kwargs)
        if operation is None:
            return None
        shape_of_errors = getattr(self.view, "error_reply", ErrorReply)
        for status in self._error_statuses():
            if str(status) not in operation["responses"]:
                shape = self._get_response_for_code(shape_of_errors, str(status))  # type: ignore[no-untyped-call]
                operation["responses"][str(status)] = shape
        return operation

    def _error_statuses(self) -> list[int]:
        common = PUBLIC_ERRORS if getattr(self.view, "is_public", False) else KEY_ERRORS
        own = getattr(self.view, "error_codes", ())
        status_of = getattr(self.view, "errors", NATIVE).status
        codes = [code for code, status in STATUS.items() if status in common or code in own]
        return sorted({HEADERS_TOO_LARGE, *(status_of(code) for code in codes)})

    def get_tags(self) -> list[str]:
        if "/admin/" in self.path:
            return ["operator"]
        if tag := getattr(self.view, "tag", ""):
            return [tag]
        return ["health"] if getattr(self.view, "is_public", False) or self.path == "/metrics" else ["native"]

"""What drf-spectacular cannot see by itself: how keys are sent, and the errors that every operation may answer with."""

from __future__ import annotations

from typing import Any

from drf_spectacular.extensions import OpenApiAuthenticationExtension
from drf_spectacular.openapi import AutoSchema

from inference.api.native.schemas import ErrorReply

KEY_ERRORS = (400, 401, 403, 404, 405, 406, 408, 409, 413, 415, 422, 429, 500, 503)
PUBLIC_ERRORS = (400, 405, 408, 413, 500)


class KeyScheme(OpenApiAuthenticationExtension):  # type: ignore[no-untyped-call]
    """One key, two headers."""

    target_class = "accounts.authentication.APIKeyAuthentication"
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
        errors = PUBLIC_ERRORS if getattr(self.view, "is_public", False) else KEY_ERRORS
        shape_of_errors = getattr(self.view, "error_reply", ErrorReply)
        for status in errors:
            if str(status) not in operation["responses"]:
                shape = self._get_response_for_code(shape_of_errors, str(status))  # type: ignore[no-untyped-call]
                operation["responses"][str(status)] = shape
        return operation

    def get_tags(self) -> list[str]:
        if "/admin/" in self.path:
            return ["operator"]
        if tag := getattr(self.view, "tag", ""):
            return [tag]
        return ["health"] if getattr(self.view, "is_public", False) or self.path == "/metrics" else ["native"]

"""What a key may do, as DRF permissions. Each view names its scope; a view that names none is open to no key at all."""

from __future__ import annotations

from rest_framework.permissions import BasePermission
from rest_framework.request import Request
from rest_framework.views import APIView

from accounts.identity.principals import Principal
from accounts.models import Scope
from accounts.trail.refusals import Refusal


def require_scope(principal: object, scope: str) -> None:
    """Raises Refusal: missing_api_key for whoever is no Principal, forbidden without the scope."""
    if not isinstance(principal, Principal):
        raise Refusal("missing_api_key", "Send an API key as `X-API-Key` or as `Authorization: Bearer`.")
    if scope not in principal.scopes:
        raise Refusal("forbidden", f"This API key does not have the scope `{scope}`.", scope=scope)


class HasScope(BasePermission):
    """`permission_classes = [HasScope("operator")]`: an instance stands in for its class, as DRF only calls it."""

    def __init__(self, scope: str) -> None:
        self.scope = Scope(scope).value

    def __call__(self) -> HasScope:
        return self

    def has_permission(self, request: Request, view: APIView) -> bool:
        """True, or a Refusal that says what is missing."""
        require_scope(request.user, self.scope)
        return True


IsOperator = HasScope(Scope.OPERATOR)

"""From request headers to a Principal: the only reader of keys, for every dialect. Blocking; any thread but the loop.

A text that no key can have is refused without a query or a Redis trip. An unknown id costs the same HMAC and the same
query as a wrong secret, so answers and their times do not tell them apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from django.conf import settings
from django.db import DatabaseError
from django.utils import timezone
from rest_framework.authentication import BaseAuthentication
from rest_framework.request import Request

from accounts.identity import key_rows, keys, known_keys
from accounts.identity.principals import Credential, Principal
from accounts.limits import throttling
from accounts.trail.refusals import Refusal

KEY_HEADER = "X-API-Key"
BEARER = "bearer"


class APIKeyAuthentication(BaseAuthentication):
    """DRF's door: request.user and request.auth are the Principal. Raises Refusal, never returns anonymous."""

    def authenticate(self, request: Request) -> tuple[Principal, Principal]:
        principal = authenticate_credentials(request.headers, address=str(request.META.get("REMOTE_ADDR", "")))
        return principal, principal

    def authenticate_header(self, request: Request) -> str:
        return "Bearer"


def authenticate_credentials(
    headers: Mapping[str, str], *, address: str = "", now: datetime | None = None
) -> Principal:
    """The caller that the headers name (looked up without regard to case if the mapping does so, as Django's does).

    Raises Refusal: missing_api_key, invalid_api_key (unknown, wrong, revoked, tenant suspended: not told apart),
    expired_api_key (told only to who knows the secret), rate_limit_exceeded for an address that guesses keys,
    service_unavailable without a database.
    """
    parsed = keys.parse(presented_key(headers))
    if parsed is None:
        raise _invalid()
    try:
        credential = key_rows.find(parsed.public_id)
    except DatabaseError as error:
        raise Refusal("service_unavailable", "Keys cannot be checked at the moment.", retry_after=1) from error
    if not _matches(credential, parsed.secret) or credential is None or not credential.is_usable:
        throttling.count_failure(address)
        raise _invalid()
    moment = now or timezone.now()
    if credential.expires_at is not None and credential.expires_at <= moment:
        raise Refusal("expired_api_key", "This API key has expired.")
    credential = known_keys.current(credential, moment)
    key_rows.touch(credential, moment)
    return credential.principal


def presented_key(headers: Mapping[str, str]) -> str:
    """The text after `X-API-Key:`, else after `Authorization: Bearer`. Raises Refusal where there is neither."""
    text = headers.get(KEY_HEADER, "").strip()
    if text:
        return text
    scheme, _, credentials = headers.get("Authorization", "").strip().partition(" ")
    credentials = credentials.strip()
    if scheme.lower() != BEARER or not credentials:
        raise Refusal("missing_api_key", "Send an API key as `X-API-Key` or as `Authorization: Bearer`.")
    return credentials


def _matches(credential: Credential | None, secret: str) -> bool:
    peppers = keys.parse_peppers(settings.KEY_PEPPER)
    if credential is None:
        return keys.verify(secret, peppers[0].id, keys.NO_HASH, peppers)
    return keys.verify(secret, credential.pepper_id, credential.secret_hash, peppers)


def _invalid() -> Refusal:
    return Refusal("invalid_api_key", "This API key is not valid.")

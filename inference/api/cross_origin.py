"""Cross-origin requests (https://fetch.spec.whatwg.org/#http-cors-protocol): what browsers are told of others' pages.

A preflight carries no key, so it is answered well if any tenant lists the page's origin; the answer to the request
itself is shown to the page only if the key's own tenant does. Never with credentials, so cookies are out of the matter.
Which addresses take part follows from the URL table: those of the API that do not belong to operators alone. Called by
async_view.py, and by the guard for what it refuses itself. Not django-cors-headers: its settings are one list for the
site, it knows no key, and it is middleware, which the API's door has none of.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, MutableMapping, Set
from typing import Any

from django.http import HttpRequest
from django.urls import Resolver404, resolve

from accounts.identity import known_origins, origins
from accounts.trail.refusals import Refusal
from inference.api.hop import shared_hop

ASKED_METHOD, ASKED_HEADERS = "Access-Control-Request-Method", "Access-Control-Request-Headers"
MAX_AGE_SECONDS = 600
"""How long a browser goes by a preflight's answer; the request's own answer is looked at every time."""
MAX_ASKED_HEADERS = 4096
"""Characters."""
OPERATOR_ALONE = {"operator"}

EXPOSED = (
    "x-request-id",
    "request-id",
    "retry-after",
    "x-should-retry",
    "x-cache",
    "location",
    "content-disposition",
    "server-timing",
    "idempotency-key",
    "x-quota-clamped",
    "x-quota-all-or-nothing",
    "x-admission-route",
    "x-usage-prompt-tokens",
    "x-usage-completion-tokens",
    "x-usage-total-tokens",
    "openai-processing-ms",
    "openai-version",
    *(f"x-ratelimit-{what}-{kind}" for what in ("limit", "remaining", "reset") for kind in ("requests", "tokens")),
    *(
        f"anthropic-ratelimit-{kind}-{what}"
        for kind in ("requests", "tokens")
        for what in ("limit", "remaining", "reset")
    ),
)
"""What a page may read of an answer beyond what every page may; a test compares with the answers of all dialects."""

_NAMES = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+(?:[ \t]*,[ \t]*[!#$%&'*+.^_`|~0-9A-Za-z-]+)*")


def takes_part(scopes: Iterable[str]) -> bool:
    """Whether pages of others may ask a view of these scopes at all."""
    return set(scopes) != OPERATOR_ALONE


def origin_of(request: HttpRequest) -> str:
    return request.headers.get("Origin", "")


def is_preflight(request: HttpRequest) -> bool:
    return bool(request.method == "OPTIONS" and origin_of(request) and request.headers.get(ASKED_METHOD))


def preflight_headers(request: HttpRequest, allowed: Set[str], methods: Iterable[str]) -> dict[str, str]:
    """Of the answer. Any header may be sent: none of them is trusted more than another client's. Raises Refusal."""
    shown = origins.answer(origin_of(request), allowed)
    if shown is None:
        text = "No tenant allows web pages of this origin to ask: an operator adds it to the tenant's allowed origins."
        raise Refusal("forbidden", text)
    found = {
        "Access-Control-Allow-Origin": shown,
        "Access-Control-Allow-Methods": ", ".join(methods),
        "Access-Control-Max-Age": str(MAX_AGE_SECONDS),
        "Vary": f"{ASKED_METHOD}, {ASKED_HEADERS}",
    }
    names = request.headers.get(ASKED_HEADERS, "")
    if names:
        if len(names) > MAX_ASKED_HEADERS or not _NAMES.fullmatch(names):
            raise Refusal(
                "bad_request", f"{ASKED_HEADERS} is no list of names, or over {MAX_ASKED_HEADERS} characters."
            )
        found["Access-Control-Allow-Headers"] = names
    return found


def headers(origin: str, allowed: Set[str]) -> dict[str, str]:
    """Of the answer to a page of this origin; nothing where it may not read it."""
    shown = origins.answer(origin, allowed)
    if shown is None:
        return {}
    return {"Access-Control-Allow-Origin": shown, "Access-Control-Expose-Headers": ", ".join(EXPOSED)}


_reading: asyncio.Future[frozenset[str]] | None = None


async def any_tenants() -> frozenset[str]:
    """The origins that tenants list. Raises Refusal or DatabaseError where they cannot be looked up.

    However many ask, one thread reads: a database that hangs must not hold the others.
    """
    global _reading
    found = known_origins.remembered()
    if found is not None:
        return found
    if _reading is None or _reading.done() or _reading.get_loop() is not asyncio.get_running_loop():
        _reading = asyncio.ensure_future(shared_hop().run(known_origins.all_of_them, abandon=lambda _: None))
    return await asyncio.shield(_reading)


def of_refusal(scope: MutableMapping[str, Any]) -> list[tuple[bytes, bytes]]:
    """Headers of what is refused before its view is asked: a body that is too large, or too slow. Does not block: where
    origins are not in memory there are none, and the page sees a network error."""
    origin = next((value for name, value in scope["headers"] if name == b"origin"), None)
    if origin is None or not _is_shared(scope["path"]):
        return []
    found = headers(origin.decode("latin1"), known_origins.remembered() or frozenset())
    return [(name.lower().encode(), value.encode("latin1")) for name, value in {**found, "Vary": "Origin"}.items()]


def _is_shared(path: str) -> bool:
    try:
        view = getattr(resolve(path).func, "cls", None)
    except Resolver404:
        return False
    return bool(getattr(view, "view_is_async", False)) and takes_part(getattr(view, "scopes", ()))

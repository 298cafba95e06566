"""What every page of the console's door carries: security headers, the bounds of a session, the name of who acts.

Middleware, in the thread of a synchronous view; generation endpoints do not come by here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from django.conf import settings
from django.contrib.auth import logout
from django.http import HttpRequest, HttpResponseBadRequest, HttpResponseBase

from accounts.trail import audit_log

_COMMON = (
    "default-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; connect-src 'self'; "
    "font-src 'self'"
)
_IMAGES = "img-src 'self' data:"
# Alpine compiles the expressions of django-unfold's own templates; no script that stands in a page ever runs.
CONSOLE_POLICY = f"{_COMMON}; {_IMAGES}; script-src 'self' 'unsafe-eval'; style-src 'self' 'unsafe-inline'"
PAGE_POLICY = f"{_COMMON}; {_IMAGES}; script-src 'self'; style-src 'self' 'unsafe-inline'"
PERMISSIONS = "accelerometer=(), camera=(), geolocation=(), gyroscope=(), microphone=(), payment=(), usb=()"
CONSOLE = "/admin/"

BEGAN, SEEN = "console_began", "console_seen"
SEEN_EVERY_SECONDS = 60
"""How often a session writes down that somebody is there."""
BY_ITSELF = {"X-Requested-With": "fetch"}
"""What a page sends that shows itself anew (dashboard.js, background.js): no sign that somebody is there."""


class SecurityHeaders:
    """A policy of content for pages; Django's SecurityMiddleware has the headers of every answer."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponseBase]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponseBase:
        response = self.get_response(request)
        is_console = request.path.startswith(CONSOLE)
        response.headers.setdefault("Content-Security-Policy", CONSOLE_POLICY if is_console else PAGE_POLICY)
        response.headers.setdefault("Permissions-Policy", PERMISSIONS)
        if is_console:
            response.headers.setdefault("Cache-Control", "no-store")
        return response


class NoNul:
    """The console's forms refuse a NUL; in an address it would reach PostgreSQL, which takes none: a 500."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponseBase]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponseBase:
        if request.path.startswith(CONSOLE) and ("\0" in request.path or "%00" in request.META["QUERY_STRING"]):
            return HttpResponseBadRequest("This address contains a NUL character.", content_type="text/plain")
        return self.get_response(request)


class ConsoleSessions:
    """Ends sessions that were idle for too long, or are too old; who acts is known to the audit log."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponseBase]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponseBase:
        if request.path.startswith(CONSOLE) and request.user.is_authenticated:
            self._bound(request, int(time.time()))
        with audit_log.acting(lambda: _person(request)):
            return self.get_response(request)

    def _bound(self, request: HttpRequest, now: int) -> None:
        session = request.session
        began, seen = session.get(BEGAN), session.get(SEEN)
        if began is None or seen is None:
            session[BEGAN] = session[SEEN] = now
            return
        idle = settings.CONFIG.console_idle_minutes * 60
        if now - began > settings.SESSION_COOKIE_AGE or now - seen > idle:
            logout(request)
        elif now - seen >= SEEN_EVERY_SECONDS and not _asks_by_itself(request):
            session[SEEN] = now


def _asks_by_itself(request: HttpRequest) -> bool:
    return all(request.headers.get(name) == value for name, value in BY_ITSELF.items())


def begin_session(sender: Any, request: HttpRequest, **kwargs: Any) -> None:
    """Django's user_logged_in."""
    request.session[BEGAN] = request.session[SEEN] = int(time.time())


def _person(request: HttpRequest) -> audit_log.Actor:
    if request.path.startswith(CONSOLE) and request.user.is_authenticated:
        return audit_log.Actor("person", request.user.get_username())
    return audit_log.SYSTEM

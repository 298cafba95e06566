"""What the guard refuses itself (413, 408, 431 and what is unreadable), noted as every other refusal is.

On the event loop, called by the guard, which knows bytes alone: here they get the name of their route, some 50 µs. Of
an address that no view has nothing is kept, since it is what the client said.
"""

from __future__ import annotations

from typing import Any

from django.urls import Resolver404, resolve

from accounts.trail import refusal_log
from accounts.trail.refusals import Refusal
from llmsite.guard import TurnedAway


def note(turned_away: TurnedAway) -> None:
    facts: dict[str, Any] = {}
    if turned_away.limit is not None:
        facts["limit"], facts["value"] = turned_away.limit
    refusal = Refusal(turned_away.code, turned_away.message, **facts)
    refusal_log.note_unread(refusal, request_id=turned_away.request_id, route=route_of(turned_away.path))


def route_of(path: str) -> str:
    """As its view is logged; empty where there is none."""
    try:
        match = resolve(path) if path else None
    except Resolver404:
        return ""
    if match is None:
        return ""
    view = getattr(match.func, "cls", None)
    return getattr(view, "route", "") or f"/{match.route}"

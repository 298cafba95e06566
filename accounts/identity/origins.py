"""Origins of web pages that may ask with a tenant's keys: how one is written, and what a list of them allows.

Pure. An origin is compared as browsers send it (RFC 6454, serialized), character by character.
"""

from __future__ import annotations

import re
from collections.abc import Set
from urllib.parse import SplitResult, urlsplit

ANY = "*"
"""Every origin there is, and pages that have none."""
MAX_ORIGINS = 20
MAX_ORIGIN_LENGTH = 255
DEFAULT_PORTS = {"http": 80, "https": 443}

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(?:[a-z0-9_-]+(?:\.[a-z0-9_-]+)*|\[[0-9a-f:.]+\])(?::[1-9][0-9]{0,4})?")


def validate(value: object) -> None:
    """Raises ValueError with a sentence unless it is a list of origins, each once, or of `*` alone."""
    if not isinstance(value, list) or not all(isinstance(origin, str) for origin in value):
        raise ValueError('use a list of origins such as ["https://app.example.org"]')
    if len(value) > MAX_ORIGINS:
        raise ValueError(f"{MAX_ORIGINS} origins are the most")
    if len(set(value)) != len(value):
        raise ValueError("name each origin once")
    if ANY in value and len(value) > 1:
        raise ValueError(f"{ANY} allows every origin: let it stand alone, or remove it")
    for origin in value:
        if origin != ANY:
            _check(origin)


def _check(origin: str) -> None:
    shown = origin if len(origin) <= 100 else f"{origin[:100]}…"
    if len(origin) > MAX_ORIGIN_LENGTH:
        raise ValueError(f"{shown!r} is longer than {MAX_ORIGIN_LENGTH} characters")
    if ANY in origin:
        raise ValueError(f"{shown!r}: {ANY} stands alone, for every origin; there are no patterns, name each origin")
    if _ORIGIN.fullmatch(origin) and not _has_default_port(origin):
        return
    right = _as_browsers_write(origin)
    hint = f"write {right!r}" if right else "write scheme, host and port alone, such as 'https://app.example.org'"
    raise ValueError(f"{shown!r} is no origin as browsers send it: {hint}")


def _has_default_port(origin: str) -> bool:
    """Or one that is no port at all."""
    try:
        parts = urlsplit(origin)
        return parts.port is not None and parts.port == DEFAULT_PORTS.get(parts.scheme)
    except ValueError:
        return True


def _as_browsers_write(text: str) -> str | None:
    """What was probably meant, if that is an origin."""
    try:
        parts = urlsplit(text.strip())
        port = parts.port
    except ValueError:
        return None
    host = _host(parts)
    if not parts.scheme or not host:
        return None
    shown_port = "" if port is None or port == DEFAULT_PORTS.get(parts.scheme) else f":{port}"
    found = f"{parts.scheme}://{host}{shown_port}"
    return found if _ORIGIN.fullmatch(found) and len(found) <= MAX_ORIGIN_LENGTH else None


def _host(parts: SplitResult) -> str:
    """Lower case, names of other scripts as DNS has them; empty where there is none."""
    try:
        host = (parts.hostname or "").encode("idna").decode("ascii")
    except UnicodeError:
        return ""
    return f"[{host}]" if ":" in host else host


def answer(origin: str, allowed: Set[str]) -> str | None:
    """What `Access-Control-Allow-Origin` says to a page of this origin; None: nothing."""
    if ANY in allowed:
        return ANY
    return origin if origin in allowed else None

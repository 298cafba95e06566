"""Bearer tokens of hosts that do not give their files to all (FETCH_TOKENS), read when they are sent.

A token is in memory for one request. It is in no row, no message and no line of a log.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from inference.imports.addresses import WEB_PORTS, Policy
from inference.vetting.inspection import RegistrationError
from llmsite.config import BEARER_TOKEN

MAX_FILE_BYTES = 8192


def authorization(parts: SplitResult, policy: Policy) -> dict[str, str]:
    """The header for this address; none for a host without a token, or without encryption. Raises RegistrationError."""
    if parts.scheme != "https":
        return {}
    for entry in policy.tokens:
        host, _, token = entry.partition("=")
        known = urlsplit(f"//{host}")
        if (known.hostname, known.port or WEB_PORTS["https"]) == (parts.hostname, parts.port or WEB_PORTS["https"]):
            return {"Authorization": f"Bearer {_read(host, token[1:]) if token.startswith('@') else token}"}
    return {}


def _read(host: str, path: str) -> str:
    try:
        with Path(path).open("rb") as file:
            found = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        why = error.strerror or type(error).__name__
        text = f"The file that FETCH_TOKENS names for {host} cannot be read: {why}."
        raise RegistrationError("fetch_failed", text) from error
    token = found.decode("ascii", errors="replace").strip()
    if not BEARER_TOKEN.fullmatch(token):
        raise RegistrationError("fetch_failed", f"The file that FETCH_TOKENS names for {host} holds no bearer token.")
    return token

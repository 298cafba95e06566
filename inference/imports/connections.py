"""One HTTP request to an allowed machine, redirects followed by hand. Blocking, every wait bounded; standard library.

The name is resolved here and the connection made to an address that was looked at: no answer of a name server in
between leads elsewhere. No proxy of the environment is used, and nothing secret is sent.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import ssl
from collections.abc import Iterator, Mapping
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from urllib.parse import SplitResult

from inference.imports.addresses import WEB_PORTS, Policy, checked, forbidden, is_same_server, may_connect
from inference.imports.tokens import authorization
from inference.vetting.inspection import RegistrationError

CONNECT_SECONDS = 10.0
SILENCE_SECONDS = 30.0
"""A server that sends nothing for so long has gone."""
MAX_REDIRECTS = 5
REDIRECTS = (301, 302, 303, 307, 308)
AGENT = "llmsite"


class TryAgain(Exception):
    """The network or the server failed in a way that may pass; the message says how."""


@contextlib.contextmanager
def get(url: str, headers: Mapping[str, str], policy: Policy) -> Iterator[HTTPResponse]:
    """The answer to GET, its body unread. Raises RegistrationError where it may not be asked, else TryAgain; `read`
    of the body raises OSError or HTTPException."""
    before, wanted = "", url
    first: SplitResult | None = None
    secret: dict[str, str] = {}
    for _ in range(MAX_REDIRECTS + 1):
        parts = checked(wanted, policy, before=before)
        if first is None:
            first, secret = parts, authorization(parts, policy)
        elif not is_same_server(first, parts):
            secret = {}  # for good: what another host says must not be asked for in the operator's name
        connection = _connect(parts, policy)
        try:
            answer = _ask(connection, parts, {**headers, **secret})
            if answer.status not in REDIRECTS:
                with contextlib.closing(answer):
                    yield answer
                return
            before, wanted = parts.geturl(), answer.headers.get("Location") or ""
        finally:
            connection.close()
        if not wanted:
            raise RegistrationError("fetch_failed", f"{parts.hostname} redirects to nowhere.")
    raise RegistrationError("fetch_failed", f"{parts.hostname}: more than {MAX_REDIRECTS} redirects.")


def _ask(connection: HTTPConnection, parts: SplitResult, headers: Mapping[str, str]) -> HTTPResponse:
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    try:
        connection.request("GET", target, headers={"User-Agent": AGENT, "Accept-Encoding": "identity", **headers})
        return connection.getresponse()
    except (OSError, HTTPException) as error:
        raise TryAgain(f"{parts.hostname} does not answer: {error or type(error).__name__}") from error
    except ValueError as error:  # what http.client does not put into a request line
        raise forbidden(f"This address cannot be asked for: {error}.") from error


def _connect(parts: SplitResult, policy: Policy) -> HTTPConnection:
    """Connected to the first address that may be, and can be, reached."""
    host, port = parts.hostname or "", parts.port or WEB_PORTS[parts.scheme]
    problem: Exception | None = None
    for address in _addresses(host, port, policy):
        try:
            raw = socket.create_connection((address, port), timeout=CONNECT_SECONDS)
        except OSError as error:
            problem = error
            continue
        raw.settimeout(SILENCE_SECONDS)
        connection: HTTPConnection
        try:
            if parts.scheme == "https":
                connection = HTTPSConnection(host, port)
                connection.sock = ssl.create_default_context().wrap_socket(raw, server_hostname=host)
            else:
                connection = HTTPConnection(host, port)
                connection.sock = raw
        except OSError as error:
            raw.close()
            if isinstance(error, ssl.SSLCertVerificationError):
                raise RegistrationError("fetch_failed", f"{host} cannot prove who it is: {error}.") from error
            problem = error
            continue
        return connection
    raise TryAgain(f"{host}:{port} cannot be reached: {problem}") from problem


def _addresses(host: str, port: int, policy: Policy) -> list[str]:
    """Raises RegistrationError where the name leads to machines alone that may not be asked, TryAgain where nowhere."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise TryAgain(f"{host} is not found: {error}") from error
    addresses = list(dict.fromkeys(str(each[4][0]).partition("%")[0] for each in found))
    allowed = [each for each in addresses if may_connect(ipaddress.ip_address(each), policy)]
    if not allowed:
        raise forbidden(
            f"{host} is {', '.join(addresses[:3])}, in a private network: FETCH_PRIVATE_NETWORKS does not name it."
        )
    return allowed

"""Where models may be fetched from: what an operator writes becomes an address, and addresses are allowed or not.

Pure: no socket, no setting. connections.py asks it again for every redirect, and looks at the machine behind the name.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit, urlunsplit

from inference.gguf.parts import name_of, place_among
from inference.vetting.inspection import RegistrationError

MAX_URL_CHARACTERS = 2000
WEB_PORTS = {"http": 80, "https": 443}
NAT64 = ipaddress.ip_network("64:ff9b::/96")
ON_HUB = re.compile(
    r"(?P<repository>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(@(?P<revision>[\w./-]{1,100}))?:(?P<file>.{1,500})",
    re.ASCII,
)
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What the operator allows (FETCH_HOSTS, FETCH_PRIVATE_NETWORKS), and has tokens for (FETCH_TOKENS)."""

    hosts: tuple[str, ...]
    private_networks: tuple[Network, ...] = ()
    tokens: tuple[str, ...] = field(default=(), repr=False)
    """Each `host=token` or `host=@file`, as the setting has them; tokens.py reads them."""


def forbidden(why: str) -> RegistrationError:
    return RegistrationError("fetch_forbidden", why, {"url": [why]})


def absolute_url(text: str, hub: str) -> str:
    """The address that an operator means: a URL, or `owner/repository[@revision]:file` of the hub. Raises
    RegistrationError for what is neither."""
    text = text.strip()
    if len(text) > MAX_URL_CHARACTERS:
        raise forbidden(f"The address is longer than {MAX_URL_CHARACTERS} characters.")
    if "://" in text:
        parts = urlsplit(text)
        path = parts.path
        if text.startswith(f"{hub}/"):  # a page of the hub that shows a file is not the file
            path = re.sub(r"^(/[^/]+/[^/]+)/blob/", r"\1/resolve/", path)
        return urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))
    found = ON_HUB.fullmatch(text)
    if found is None:
        raise forbidden(
            "Write an address such as https://models.example.org/tiny.gguf, or owner/repository:file.gguf for one of "
            f"{hub}."
        )
    revision = quote(found["revision"] or "main", safe="")
    return f"{hub}/{found['repository']}/resolve/{revision}/{quote(found['file'])}"


def checked(url: str, policy: Policy, *, before: str = "") -> SplitResult:
    """The parts of an allowed address. before: the one that redirected to it. Raises RegistrationError."""
    try:
        parts = urlsplit(urljoin(before, url) if before else url)
        port = parts.port or WEB_PORTS.get(parts.scheme, 0)
    except ValueError as error:
        raise forbidden(f"This is no address: {error}.") from error
    if parts.scheme not in WEB_PORTS:
        raise forbidden("Only http:// and https:// addresses are fetched.")
    if before.startswith("https:") and parts.scheme != "https":
        raise forbidden(f"{parts.hostname} would be asked without encryption, after an address that had it.")
    if parts.username is not None or not (parts.path + parts.query).isprintable():
        raise forbidden("An address with a password, or with characters that cannot be seen, is not fetched.")
    host = (parts.hostname or "").rstrip(".")
    if not any(_fits(host, port, pattern) for pattern in policy.hosts):
        what = "The redirect leads to" if before else "The address is of"
        raise forbidden(f"{what} {host}:{port}: FETCH_HOSTS does not name it, so nothing is fetched from there.")
    return parts


def _fits(host: str, port: int, pattern: str) -> bool:
    known = urlsplit(f"//{pattern.removeprefix('*.')}")
    if port != known.port if known.port else port not in WEB_PORTS.values():
        return False
    name = known.hostname or ""
    return host.endswith(f".{name}") if pattern.startswith("*.") else host == name


def is_same_server(first: SplitResult, second: SplitResult) -> bool:
    """Whether both are asked of one host, at one port, in one way."""
    return _server(first) == _server(second)


def _server(parts: SplitResult) -> tuple[str, str | None, int | None]:
    return parts.scheme, parts.hostname, parts.port or WEB_PORTS.get(parts.scheme)


def may_connect(address: Address, policy: Policy) -> bool:
    """Whether a machine may be asked: one of the public network, or of FETCH_PRIVATE_NETWORKS."""
    inner = _inner(address)
    if any(inner in network for network in policy.private_networks):
        return True
    return inner.is_global and not inner.is_multicast


def _inner(address: Address) -> Address:
    """The IPv4 address within an IPv6 one, where that is what is reached by it."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else address)


def shown(url: str) -> str:
    """Without its query: signed addresses have their secret there."""
    address, mark, _ = url.partition("?")
    return f"{address}?…" if mark else address


def file_name(url: str) -> str:
    """The last part of the path, as people read it."""
    return unquote(urlsplit(url).path.rpartition("/")[2])


def parts_at(url: str) -> Sequence[tuple[str, str]]:
    """(name in quarantine, address) of the file there, or of all parts of the model that it belongs to. The server
    chooses no name."""
    place = place_among(file_name(url))
    if place is None:
        return [("model.gguf", url)]
    stem, _, count = place
    split = urlsplit(url)
    folder = split.path.rpartition("/")[0]
    names = [(name_of("model", each, count), name_of(stem, each, count)) for each in range(1, count + 1)]
    return [(own, urlunsplit(split._replace(path=f"{folder}/{quote(theirs)}"))) for own, theirs in names]

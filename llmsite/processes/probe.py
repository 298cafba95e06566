"""Two questions over plain sockets, so that the supervisor stays small: is the site ready, and forget this worker.

Standard library only, no HTTP or Redis client. Every call is bounded in time and returns an answer, never raises.
"""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit


@dataclass(frozen=True)
class Readiness:
    """What /readyz said. `status` is 0 where nobody answered."""

    status: int
    reason: str = ""

    @property
    def is_ready(self) -> bool:
        return self.status == 200


def readiness(host: str, port: int, *, timeout_seconds: float = 2.0) -> Readiness:
    """Ask GET /readyz."""
    try:
        with socket.create_connection((host, port), timeout=timeout_seconds) as link:
            link.sendall(f"GET /readyz HTTP/1.1\r\nHost: {_host_header(host)}\r\nConnection: close\r\n\r\n".encode())
            answer = b""
            while (data := link.recv(65536)) and len(answer) < 1 << 20:
                answer += data
    except OSError:
        return Readiness(0, "the web process does not answer yet")
    head, _, body = answer.partition(b"\r\n\r\n")
    parts = head.split(b" ", 2)
    if len(parts) < 2 or not parts[1].isdigit():
        return Readiness(0, "the web process does not speak HTTP")
    return Readiness(int(parts[1]), _reason(body))


def _host_header(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _reason(body: bytes) -> str:
    try:
        found = json.loads(body)
    except ValueError:
        return ""
    if not isinstance(found, dict):
        return ""
    parts = [f"{name}: {found[name]}" for name in ("db", "redis", "llm") if found.get(name) not in {None, "ok"}]
    return (", ".join(parts) or str(found.get("message") or found.get("status") or ""))[:200]


def redis_commands(url: str, *commands: tuple[str, ...], timeout_seconds: float = 1.0) -> bool:
    """Send commands to a Redis at redis:// or unix://; whether all were taken. rediss:// is left alone: False."""
    parts = urlsplit(url)
    try:
        with _connect(url, timeout_seconds) as link:
            preamble: list[tuple[str, ...]] = []
            if parts.password:
                names = (unquote(parts.username),) if parts.username else ()
                preamble.append(("AUTH", *names, unquote(parts.password)))
            if parts.scheme == "redis" and parts.path.strip("/").isdigit():
                preamble.append(("SELECT", parts.path.strip("/")))
            everything = [*preamble, *commands]
            link.sendall(b"".join(map(_encoded, everything)))
            answer = b""
            while answer.count(b"\r\n") < len(everything) and (data := link.recv(4096)):
                answer += data
            return answer.count(b"\r\n") >= len(everything) and b"-" not in {line[:1] for line in answer.splitlines()}
    except (OSError, ValueError):
        return False


def _connect(url: str, timeout_seconds: float) -> socket.socket:
    parts = urlsplit(url)
    if parts.scheme == "unix":
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        link.settimeout(timeout_seconds)
        link.connect(parts.path)
        return link
    if parts.scheme == "redis":
        return socket.create_connection((parts.hostname or "localhost", parts.port or 6379), timeout=timeout_seconds)
    raise ValueError(f"no plain socket to {parts.scheme}")


def _encoded(command: tuple[str, ...]) -> bytes:
    words = [word.encode() for word in command]
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)

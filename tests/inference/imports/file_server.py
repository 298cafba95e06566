"""An HTTP server on loopback that serves files with ranges, and misbehaves as a test tells it to."""

from __future__ import annotations

import contextlib
import re
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

BREAK_SECONDS = 5.0


@dataclass
class Shelf:
    """What is served, and how. Paths begin with a slash."""

    files: dict[str, bytes] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    etag: str = '"one"'
    breaks: list[int] = field(default_factory=list)
    """After so many bytes of a body the connection is cut: one entry for each answer with a body of many bytes."""
    has_ranges: bool = True
    tells_size: bool = True
    is_endless: bool = False
    statuses: list[int] = field(default_factory=list)
    """Answered before anything else, one each."""
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    """(path, Range) of each request."""
    authorizations: list[str | None] = field(default_factory=list)
    """Of each request."""
    wants: str = ""
    """The only Authorization that is let in; empty: everybody is."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    shelf: Shelf

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        shelf, path = self.shelf, self.path.partition("?")[0]
        shelf.asked.append((self.path, self.headers.get("Range")))
        shelf.authorizations.append(self.headers.get("Authorization"))
        if shelf.wants and self.headers.get("Authorization") != shelf.wants:
            self._bare(401)
        elif shelf.statuses:
            self._bare(shelf.statuses.pop(0))
        elif path in shelf.redirects:
            self._bare(302, {"Location": shelf.redirects[path]})
        elif path not in shelf.files:
            self._bare(404)
        else:
            self._file(shelf.files[path])

    def _bare(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": "0"}.items():
            self.send_header(name, value)
        self.end_headers()

    def _file(self, data: bytes) -> None:
        shelf, start, end = self.shelf, 0, len(data)
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if found and shelf.has_ranges and self.headers.get("If-Range") in (None, shelf.etag):
            start = int(found[1])
            end = min(len(data), int(found[2]) + 1) if found[2] else len(data)
            if start >= len(data):
                self._bare(416, {"Content-Range": f"bytes */{len(data)}"})
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("ETag", shelf.etag)
        if shelf.tells_size:
            self.send_header("Content-Length", str(end - start))
        else:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        self._body(data[start:end])

    def _body(self, data: bytes) -> None:
        shelf = self.shelf
        with contextlib.suppress(OSError):
            if shelf.is_endless:
                until = time.monotonic() + BREAK_SECONDS
                while time.monotonic() < until:
                    self.wfile.write(bytes(1 << 16))
            if len(data) > 1 and shelf.breaks:
                data = data[: shelf.breaks.pop(0)]
                self.close_connection = True
            self.wfile.write(data)


@contextlib.contextmanager
def serving(shelf: Shelf, context: ssl.SSLContext | None = None) -> Iterator[str]:
    """The server's address, such as http://127.0.0.1:41234; https with a context."""
    handler = type("OwnHandler", (Handler,), {"shelf": shelf})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"{'https' if context else 'http'}://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)

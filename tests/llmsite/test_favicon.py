"""/favicon.ico through the whole application: without a query, a session or a thread, for everybody."""

from __future__ import annotations

import struct
from typing import Any

import httpx
import pytest
from django.urls import resolve

from llmsite.asgi import application

pytestmark = pytest.mark.unit  # no database: a query would raise


async def ask(method: str, **headers: str) -> httpx.Response:
    transport = httpx.ASGITransport(app=application)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        return await client.request(method, "/favicon.ico", headers=headers)


async def test_everybody_gets_the_icon_and_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_is_asked_for(*_: Any) -> None:
        raise AssertionError("a session")

    monkeypatch.setattr("django.contrib.sessions.middleware.SessionMiddleware.process_request", none_is_asked_for)
    answer = await ask("GET", cookie="sessionid=somebodys")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/x-icon")
    assert answer.headers["cache-control"] == "public, max-age=86400"
    assert "set-cookie" not in answer.headers and "vary" not in answer.headers
    assert answer.headers["x-content-type-options"] == "nosniff"


async def test_it_is_an_icon_in_three_sizes() -> None:
    data = (await ask("GET")).content
    reserved, kind, count = struct.unpack_from("<HHH", data)
    assert (reserved, kind, count) == (0, 1, 3)
    end = 6 + 16 * count
    for number, pixels in enumerate((16, 32, 48)):
        width, height, _, _, _, bits, size, offset = struct.unpack_from("<BBBBHHII", data, 6 + 16 * number)
        assert (width, height, bits, offset) == (pixels, pixels, 32, end)
        assert data[offset : offset + 8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack_from(">II", data, offset + 16) == (pixels, pixels)
        end += size
    assert end == len(data)


async def test_it_is_only_read() -> None:
    assert (await ask("HEAD")).status_code == 200
    for method in ("POST", "PUT", "DELETE"):
        assert (await ask(method)).status_code == 405


async def test_it_needs_no_thread() -> None:
    from asgiref.sync import iscoroutinefunction

    assert iscoroutinefunction(resolve("/favicon.ico").func)

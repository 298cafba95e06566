"""An application that says who asks, as Django sees it, behind the real web process's options."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import orjson
import uvicorn
from django.core.handlers.asgi import ASGIRequest

from llmsite.config import Config
from llmsite.processes.web import server_config
from tests.in_process import wait_until


async def say_who(scope: Any, receive: Any, send: Any) -> None:
    request = ASGIRequest(dict(scope), BytesIO())
    body = orjson.dumps(
        {
            "address": request.META["REMOTE_ADDR"],
            "secure": request.is_secure(),
            "host": request.META.get("HTTP_HOST"),
            "forwarded_for": request.META.get("HTTP_X_FORWARDED_FOR"),
        }
    )
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": body})


@contextlib.contextmanager
def echo(config: Config) -> Iterator[str]:
    """A server with the options of processes/web.py; yields its base URL."""
    options = server_config(config)
    options.app, options.log_config, options.lifespan, options.loop = say_who, None, "off", "asyncio"
    server = uvicorn.Server(options)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    wait_until(lambda: server.started or not thread.is_alive())
    assert thread.is_alive(), "the server did not start"
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()

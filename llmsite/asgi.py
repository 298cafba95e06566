"""The ASGI application: the guard, behind it two doors, behind them one URL table. `uvicorn llmsite.asgi:application`.

Serve it with `http=llmsite.guard.HeaderDeadlineProtocol`, which bounds what no application can see, and `ws="none"`.
"""

from __future__ import annotations

import os
from typing import Any

from django.core.asgi import get_asgi_application

from llmsite.config import get_config
from llmsite.doors import ApiDoor, Doors, Lifespan
from llmsite.guard import App, Bounds, Guard, HeaderDeadlineProtocol

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "llmsite.settings")


def build() -> App:
    """Sets Django up first: views can be imported only then."""
    console: Any = get_asgi_application()
    from inference.api import cross_origin, turned_away
    from inference.api.lifespan import close_api, open_api

    config = get_config()
    bounds = Bounds(
        max_body_bytes=config.max_body_bytes,
        body_seconds=config.body_timeout_seconds,
        send_seconds=config.body_timeout_seconds,
    )
    doors = Doors(ApiDoor(), console, Lifespan([open_api], [close_api]))
    HeaderDeadlineProtocol.noted = staticmethod(turned_away.note)
    return Guard(doors, bounds, cross_origin.of_refusal, turned_away.note)


application = build()

"""The web process: uvicorn on llmsite.asgi, with bounds on slow clients and on the time to stop.

`python -m llmsite.processes.web`, called by the supervisor, the compose file, or any other process manager.
"""

from __future__ import annotations

import os
import sys

import uvicorn

from llmsite.config import Config, ConfigError, get_config
from llmsite.logs import logging_config


def server_config(config: Config) -> uvicorn.Config:
    """uvicorn's options; forwarding headers are believed from TRUSTED_PROXIES alone."""
    from llmsite.guard import HeaderDeadlineProtocol

    return uvicorn.Config(
        "llmsite.asgi:application",
        host=config.host,
        port=config.port,
        loop="uvloop",
        http=HeaderDeadlineProtocol,
        ws="none",
        lifespan="auto",
        interface="asgi3",
        log_config=logging_config(config.log_level, config.log_format),
        log_level=config.log_level.lower(),
        access_log=False,
        server_header=False,
        date_header=True,
        proxy_headers=bool(config.trusted_proxies),
        forwarded_allow_ips=config.trusted_proxies,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=max(1, round(config.drain_seconds)),
        limit_concurrency=config.max_connections,
        backlog=2048,
    )


def main() -> int:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "llmsite.settings")
    try:
        config = get_config()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 78
    (config.state / "static").mkdir(parents=True, exist_ok=True)  # whitenoise warns where it is missing
    server = uvicorn.Server(server_config(config))
    server.run()
    return 0 if server.started else 1


if __name__ == "__main__":
    sys.exit(main())

"""Log lines as one JSON object each, or for people; never a prompt, never a key.

structlog renders, the standard library routes. `request_id`, `tenant` and so on are bound by context variables.
The line of each request takes a shorter way to the same handler: by structlog it costs more than the request's routing.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import orjson
import structlog

KEY_SHAPE = re.compile(r"llms_[0-9A-Za-z]{12}_[0-9A-Za-z]{20,}")


def redact(_logger: Any, _name: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Anything in the shape of an API key is cut, wherever a library may have logged it."""
    for field, value in event.items():
        if isinstance(value, str) and "llms_" in value:
            event[field] = KEY_SHAPE.sub("llms_[redacted]", value)
    return event


PROBES = frozenset({"/healthz", "/readyz", "/health", "/metrics"})


def drop_colors(_logger: Any, _name: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    event.pop("color_message", None)  # uvicorn's, the same again with escape codes
    return event


requests = logging.getLogger("llmsite.request")


def log_request(fields: dict[str, Any]) -> None:
    """The one line of a request. Machines ask every second whether the site lives: their requests are no news."""
    if fields["path"] not in PROBES and requests.isEnabledFor(logging.INFO):
        requests.handle(requests.makeRecord(requests.name, logging.INFO, __file__, 0, fields, (), None))


class Formatter(structlog.stdlib.ProcessorFormatter):
    """structlog's, but for the lines of requests: their fields go straight to `render_request`."""

    def __init__(self, *args: Any, render_request: Callable[[structlog.typing.EventDict], str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._render_request = render_request

    def format(self, record: logging.LogRecord) -> str:
        if record.name != requests.name or not isinstance(record.msg, dict):
            return super().format(record)
        moment = datetime.fromtimestamp(record.created, UTC).isoformat().replace("+00:00", "Z")
        fields = {"event": "request", **record.msg, "level": "info", "logger": record.name, "ts": moment}
        return self._render_request(redact(None, "", fields))


def _as_json(fields: structlog.typing.EventDict) -> str:
    return orjson.dumps(_rename(None, "", fields), default=repr).decode()


def _for_people(fields: structlog.typing.EventDict) -> str:
    return structlog.dev.ConsoleRenderer(colors=False)(None, "info", fields)


def _rename(_logger: Any, _name: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    event["message"] = event.pop("event", "")
    return event


def logging_config(level: str, log_format: str) -> dict[str, Any]:
    """A dictConfig for web, worker, beat and commands alike; everything goes to standard error."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
        structlog.processors.format_exc_info,
        redact,
    ]
    if log_format == "json":
        tail: list[Any] = [_rename, structlog.processors.JSONRenderer()]
    else:
        tail = [structlog.dev.ConsoleRenderer(colors=False)]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {
            "default": {
                "()": Formatter,
                "render_request": _as_json if log_format == "json" else _for_people,
                "foreign_pre_chain": [*shared, drop_colors],
                "processors": [structlog.stdlib.ProcessorFormatter.remove_processors_meta, *tail],
            }
        },
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "default"}},
        "root": {"handlers": ["stderr"], "level": level},
        "loggers": {
            "uvicorn.error": {"level": "WARNING" if level == "INFO" else level},
            "uvicorn.access": {"level": "WARNING"},
            "celery": {"level": "WARNING" if level == "INFO" else level},
            "kombu": {"level": "WARNING"},
        },
    }

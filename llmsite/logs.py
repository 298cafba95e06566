"""Log lines as one JSON object each, or for people; never a prompt, never a key.

structlog renders, the standard library routes. `request_id`, `tenant` and so on are bound by context variables.
"""

from __future__ import annotations

import re
from typing import Any

import structlog

KEY_SHAPE = re.compile(r"llms_[0-9A-Za-z]{12}_[0-9A-Za-z]{20,}")


def redact(_logger: Any, _name: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Anything in the shape of an API key is cut, wherever a library may have logged it."""
    for field, value in event.items():
        if isinstance(value, str) and "llms_" in value:
            event[field] = KEY_SHAPE.sub("llms_[redacted]", value)
    return event


PROBES = frozenset({"/healthz", "/readyz", "/health", "/metrics"})


def drop_probes(_logger: Any, _name: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Machines ask every second whether the site lives: their requests are no news."""
    if event.get("path") in PROBES and event.get("event") == "request":
        raise structlog.DropEvent
    event.pop("color_message", None)  # uvicorn's, the same again with escape codes
    return event


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
        processors=[drop_probes, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {
            "default": {
                "()": structlog.stdlib.ProcessorFormatter,
                "foreign_pre_chain": [*shared, drop_probes],
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

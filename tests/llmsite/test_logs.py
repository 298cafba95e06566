"""Log lines: one JSON object each, and never a key."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from llmsite.logs import redact

pytestmark = pytest.mark.unit

KEY = "llms_LguSsKIzxyej_g9mddRg1nq9D9PaED7hX8wdoLksMxet2396YQ5"
SCRIPT = f"""
import logging, logging.config, structlog
from llmsite.logs import log_request, logging_config
logging.config.dictConfig(logging_config("INFO", "FORMAT"))
logging.getLogger("somebody").warning("key %s", "{KEY}")
structlog.get_logger("ours").info("event", tenant="Alice's", key="{KEY}")
logging.getLogger("uvicorn.access").info("GET /")
log_request({{"path": "/v1/generate", "status_code": 200, "key": "{KEY}"}})
log_request({{"path": "/readyz", "status_code": 200}})
logging.getLogger().setLevel("WARNING")
log_request({{"path": "/v1/generate", "status_code": 200}})
"""


def lines_of(log_format: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("FORMAT", log_format)], capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_every_line_is_an_object_without_the_key() -> None:
    first, second, third = (json.loads(line) for line in lines_of("json"))
    assert first["message"] == "key llms_[redacted]"
    assert first["level"] == "warning"
    assert first["logger"] == "somebody"
    assert first["ts"].endswith("Z")
    assert second["message"] == "event"
    assert second["tenant"] == "Alice's"
    assert second["key"] == "llms_[redacted]"
    assert third.pop("ts").endswith("Z")
    assert third == {
        "message": "request",
        "level": "info",
        "logger": "llmsite.request",
        "path": "/v1/generate",
        "status_code": 200,
        "key": "llms_[redacted]",
    }


def test_lines_for_people_hold_no_key_either() -> None:
    lines = lines_of("console")
    assert len(lines) == 3
    assert "/v1/generate" in lines[2]
    assert not any("g9mdd" in line for line in lines)


def test_redaction_leaves_other_fields_alone() -> None:
    event = {"event": f"a {KEY} b", "count": 3, "name": "llms_short"}
    assert redact(None, "", event) == {"event": "a llms_[redacted] b", "count": 3, "name": "llms_short"}

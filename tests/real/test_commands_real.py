"""Commands against a running site with the real model: all dialects pass, and a sampled answer comes again the same."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import REPOSITORY, Site, site_environment

pytestmark = [pytest.mark.model, pytest.mark.slow]
BODY = {"prompt": "Once upon a time", "max_new_tokens": 16, "temperature": 0.9, "cache": False}


def manage(site: Site, *words: str) -> dict[str, Any]:
    env = site_environment(site.state, 1, API_KEY=site.key)
    done = subprocess.run(
        [sys.executable, "manage.py", *words, "--json"],
        cwd=REPOSITORY,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_every_dialect_of_a_running_site_conforms(live_site: Site) -> None:
    found = manage(live_site, "conformance", "--url", live_site.base_url)
    assert found["failed"] == 0 and found["passed"] >= 30


def test_a_request_is_replayed_with_the_same_tokens(live_site: Site, tmp_path: Path) -> None:
    with httpx.Client(base_url=live_site.base_url, headers=live_site.headers(), timeout=60) as client:
        answer = client.post("/v1/generate", json=BODY)
        request_id = answer.headers["x-request-id"]
        deadline = time.monotonic() + 20
        while client.get(f"/v1/requests/{request_id}").json().get("state") == "running" and time.monotonic() < deadline:
            time.sleep(0.05)
        client.get("/v1/me/usage")  # settles what has ended
    (tmp_path / "body.json").write_text(json.dumps(BODY))
    found = manage(live_site, "replay", request_id, "--body", str(tmp_path / "body.json"), "--text")
    assert (found["verdict"], found["text"]) == ("same", answer.json()["output"])

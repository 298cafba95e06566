"""top and conformance against a site in this process: its model is fake, its HTTP and its Redis are not."""

from __future__ import annotations

import json
from io import StringIO
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from redis import ConnectionError as NoRedis
from rich.console import Console

from inference.conformance import matrix
from inference.management.commands.top import screen_of
from inference.transport import queue
from tests.in_process import InProcessSite

pytestmark = pytest.mark.integration


def said(*words: str, status: int = 0) -> str:
    out = StringIO()
    if status:
        with pytest.raises(SystemExit) as end:
            call_command(*words, stdout=out)
        assert end.value.code == status
    else:
        call_command(*words, stdout=out)
    return out.getvalue()


def test_top_shows_workers_queues_and_the_tenants_of_this_minute(site: InProcessSite) -> None:
    assert site.client(site.cast.alice).generate(max_new_tokens=5).status_code == 200
    site.settle()
    found = json.loads(said("top", "--json"))
    [worker] = found["workers"]
    assert {model["name"] for model in worker["models"]} == {"fake-model", "granted-model"}
    assert found["pools"] == [{"pool": "default", "waiting": 0}]
    [row] = found["tenants"]
    assert (row["tenant"], row["requests_per_minute"], row["tokens_per_minute"], row["running"]) == ("Alice's", 1, 5, 0)
    assert row["used_tokens"] == 9 and row["monthly_tokens"] == 10_000_000
    text = said("top", "--once")
    assert "fake-model" in text and "0 of 4" in text and "Alice's" in text
    later: dict[str, Any] = json.loads(json.dumps(found))
    later["workers"][0]["models"][0]["steps"] += 12
    screen = StringIO()
    Console(file=screen, width=160).print(screen_of(later, found, 2.0))
    assert " 6 " in screen.getvalue()  # steps a second
    with pytest.raises(CommandError, match=r"0\.2 to 60"):
        said("top", "--seconds", "0")


def test_top_says_that_redis_is_gone_and_shows_the_rest(site: InProcessSite, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> None:
        raise NoRedis("gone")

    monkeypatch.setattr(queue, "ticket_queue", gone)
    assert "Redis does not answer" in said("top", "--once")


def test_conformance_prints_a_matrix_and_fails_for_what_a_server_does_not_keep(
    site: InProcessSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("API_KEY", site.cast.alice.text)
    out = said("conformance", "--url", site.base_url, "--json", status=2)  # invented text follows no grammar
    assert site.cast.alice.text not in out
    found = json.loads(out)
    failed = {(check["dialect"], check["name"]) for check in found["checks"] if check["outcome"] == "failed"}
    assert ("llama.cpp", "a grammar") in failed and ("OpenAI", "a forced tool call") in failed
    assert not {check for check in failed if check[0] == "native"}, found["checks"]
    text = said("conformance", "--url", site.base_url, "--dialect", "native")
    assert "✓" in text and f"{len(matrix.DIALECTS['native'])} passed, 0 failed" in text


def test_conformance_tells_a_server_that_is_not_there_from_one_that_fails(
    site: InProcessSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("API_KEY", raising=False)
    for words, code in (
        (["--url", site.base_url], "key_missing"),
        (["--url", "ftp://example.org", "--key", "x"], "url_invalid"),
        (["--url", "http://127.0.0.1:1", "--key", "x"], "unreachable"),
    ):
        out = StringIO()
        with pytest.raises(CommandError):
            call_command("conformance", *words, "--json", stdout=out)
        assert json.loads(out.getvalue())["error"]["code"] == code

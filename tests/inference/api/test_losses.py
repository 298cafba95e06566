"""What a client reads, in each dialect, when its key ends in the middle of an answer."""

from __future__ import annotations

import threading
from typing import Any

import httpx
import orjson
import pytest

from accounts.identity import issuing
from tests.in_process import FakeSpeed, InProcessSite, wait_until
from tests.timing import PATIENCE_SECONDS

pytestmark = pytest.mark.api


@pytest.fixture
def fake_speed() -> FakeSpeed:
    return FakeSpeed(0.01)


class Call(threading.Thread):
    """A request whose answer is read to its end."""

    def __init__(self, client: httpx.Client, path: str, body: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self._args = client, path, body
        self.status = 0
        self.lines: list[str] = []
        self.start()

    def run(self) -> None:
        client, path, body = self._args
        with client.stream("POST", path, json=body) as response:
            self.status = response.status_code
            self.lines += response.iter_lines()

    @property
    def data(self) -> list[dict[str, Any]]:
        found = [line.removeprefix("data: ") for line in self.lines if line.startswith("data: ")]
        return [orjson.loads(line) for line in found if line != "[DONE]"]


def revoke_while(site: InProcessSite, path: str, body: dict[str, Any]) -> Call:
    call = Call(site.client(site.cast.alice), path, body)
    wait_until(lambda: any(each.first_text_at for each in site.host._live.values()) if site.host else False)
    issuing.revoke(site.cast.alice.key)
    call.join(PATIENCE_SECONDS)
    assert not call.is_alive()
    used, reserved = site.charged(site.cast.alice)
    assert used > 0
    assert reserved == 0
    return call


def test_a_native_stream_ends_with_an_error_event(site: InProcessSite) -> None:
    call = revoke_while(site, "/v1/generate", {"prompt": "Once upon", "max_new_tokens": 200, "stream": True})
    assert "event: error" in call.lines
    assert call.data[-1]["code"] == "key_revoked"


def test_a_native_answer_that_does_not_stream_is_a_status(site: InProcessSite) -> None:
    call = revoke_while(site, "/v1/generate", {"prompt": "Once upon", "max_new_tokens": 200})
    assert call.status == 401
    assert orjson.loads("".join(call.lines))["code"] == "key_revoked"


def test_an_openai_stream_ends_with_an_error_that_its_clients_raise(site: InProcessSite) -> None:
    body = {"messages": [{"role": "user", "content": "Once"}], "max_tokens": 200, "stream": True}
    call = revoke_while(site, "/v1/chat/completions", body)
    assert call.data[-1]["error"]["code"] == "key_revoked"
    assert call.data[-1]["choices"][0]["finish_reason"] == "error"
    assert call.lines[-2:] == ["data: [DONE]", ""] or call.lines[-1] == "data: [DONE]"


def test_several_answers_of_one_openai_request_end_together(site: InProcessSite) -> None:
    body = {"prompt": "Once upon", "max_tokens": 200, "n": 2, "stream": True}
    call = revoke_while(site, "/v1/completions", body)
    assert call.data[-1]["error"]["code"] == "key_revoked"


def test_a_llama_cpp_stream_ends_with_its_error(site: InProcessSite) -> None:
    call = revoke_while(site, "/completion", {"prompt": "Once upon", "n_predict": 200, "stream": True})
    error = call.data[-1]["error"]
    assert (error["code"], error["type"]) == (401, "authentication_error")

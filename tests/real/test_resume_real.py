"""Streams across the death of the web process: real server processes, the real model, a ledger that says the cost."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from tests.conftest import REPOSITORY, Site, free_port, running_site, site_environment
from tests.llmsite.test_processes import descendants
from tests.llmsite.test_supervisor import is_alive, wait_until
from tests.timing import Stopwatch

pytestmark = [pytest.mark.integration, pytest.mark.model, pytest.mark.slow]

KILLS = int(os.environ.get("RESUME_KILLS", "1"))
TOKENS = 200
AT_ONCE = 8
"""Streams that each kill cuts: as many as there are slots, since one that waits begins when others have ended."""
BODY: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Tell me a long story."}],
    "max_tokens": TOKENS,
    "temperature": 0,
    "ignore_eos": True,
    "stream": True,
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with running_site(tmp_path_factory.mktemp("resume") / "state") as site:
        yield site


def kill_web(site: Site) -> None:
    """And wait until the supervisor's next one answers."""
    (web,) = [pid for pid in descendants(site.process.pid) if b"llmsite.processes.web" in command(pid)]
    os.kill(web, signal.SIGKILL)
    wait_until(lambda: not is_alive(web))
    # the supervisor waits longer each time, up to 30 s
    wait_until(lambda: answers(site.base_url), lambda: site.log.read_text()[-3000:], seconds=60)


def command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def answers(base_url: str) -> bool:
    try:
        return httpx.get(f"{base_url}/healthz", timeout=1).status_code == 200
    except httpx.HTTPError:
        return False


def tokenizes(base_url: str, site: Site) -> bool:
    """Whether its tokenizer's child has come up: many that meet a new one at once may be refused."""
    answer = httpx.post(f"{base_url}/tokenize", json={"content": "Once"}, headers=site.headers(), timeout=30)
    return answer.status_code == 200


def lines_of(response: httpx.Response) -> Iterator[str]:
    assert response.status_code == 200, response.read()
    return response.iter_lines()


def read(lines: Iterator[str], number: int | None = None) -> list[tuple[str, str]]:
    """Ids and texts of frames, at most so many, up to the end or the death of the server."""
    found: list[tuple[str, str]] = []
    event_id = ""
    try:
        for line in lines:
            if line.startswith("id: "):
                event_id = line.removeprefix("id: ")
            elif line.startswith("data: ") and event_id:
                data = line.removeprefix("data: ")
                choices = [] if data == "[DONE]" else orjson.loads(data)["choices"]
                found.append((event_id, "".join(each["delta"].get("content") or "" for each in choices)))
                event_id = ""
            if len(found) == number:
                break
    except httpx.HTTPError:
        pass  # the server died: what came until then counts
    return found


def text_of(found: list[tuple[str, str]]) -> str:
    return "".join(text for _, text in found)


def receipt_of(site: Site, request_id: str) -> dict[str, Any]:
    url = f"{site.base_url}/v1/requests/{request_id}"
    wait_until(lambda: "receipt" in httpx.get(url, headers=site.headers()).json(), seconds=30)
    found: dict[str, Any] = httpx.get(url, headers=site.headers()).json()
    return found


def used(site: Site) -> int:
    answer = httpx.get(f"{site.base_url}/v1/me/usage", headers=site.headers()).json()
    return int(answer["total_prompt_tokens"] + answer["total_completion_tokens"])


class Webs:
    """Whose web streams are read from: the supervisor's, or one of the test's own on the same site.

    The supervisor waits longer with each death, up to 30 s. By then every stream has ended, and nothing that goes on
    would be resumed; so after its first death webs of the test's own die, and the next one is there at once.
    """

    def __init__(self, site: Site) -> None:
        self._site, self.base_url = site, site.base_url
        self._own: subprocess.Popen[bytes] | None = None

    def move(self) -> None:
        """To a web of its own; the supervisor's goes on beside it, and nobody asks it anything."""
        self.base_url = f"http://127.0.0.1:{free_port()}"
        self._own = start_web(self._site, self.base_url)

    def kill(self) -> None:
        """And wait until the next one answers."""
        if self._own is None:
            kill_web(self._site)
        else:
            self.end()
            self._own = start_web(self._site, self.base_url)

    def end(self) -> None:
        if self._own is not None:
            self._own.kill()
            self._own.wait()


@pytest.fixture
def webs(site: Site) -> Iterator[Webs]:
    made = Webs(site)
    yield made
    made.end()


@pytest.mark.timeout(180 + 120 * KILLS)
def test_streams_resume_across_the_death_of_their_web(site: Site, webs: Webs) -> None:
    """Eight, each cut at a random event, the web killed, each cut again: the joined text is that of an uncut one."""
    path = "/v1/chat/completions"
    with httpx.stream("POST", webs.base_url + path, json=BODY, headers=site.headers(), timeout=60) as response:
        whole = text_of(read(lines_of(response)))
    before = used(site)
    draw = random.Random(5)

    def begin(number: int) -> tuple[str, list[tuple[str, str]]]:
        body = {**BODY, "background": True}
        with httpx.stream("POST", webs.base_url + path, json=body, headers=site.headers(), timeout=60) as response:
            return response.headers["x-request-id"], read(lines_of(response), number)

    def go_on(request_id: str, found: list[tuple[str, str]], number: int | None) -> list[tuple[str, str]]:
        events = f"{webs.base_url}/v1/requests/{request_id}/events"
        headers = {**site.headers(), "Last-Event-ID": found[-1][0]}
        with httpx.stream("GET", events, headers=headers, timeout=60) as response:
            return found + read(lines_of(response), number)

    def is_going_on(request_id: str) -> bool:
        return "receipt" not in httpx.get(f"{webs.base_url}/v1/requests/{request_id}", headers=site.headers()).json()

    num_going_on = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for number in range(KILLS):
            if number == 1:
                webs.move()
            wait_until(lambda: tokenizes(webs.base_url, site))
            begun = list(pool.map(begin, [draw.randint(1, TOKENS // 8) for _ in range(AT_ONCE)]))
            webs.kill()
            ids = [request_id for request_id, _ in begun]
            num_going_on.append(sum(pool.map(is_going_on, ids)))
            cut = pool.map(go_on, ids, [found for _, found in begun], [draw.randint(1, 30) for _ in ids])
            ended = list(pool.map(go_on, ids, cut, [None] * AT_ONCE))
            assert [text_of(found) for found in ended] == [whole] * AT_ONCE
            assert [len({event_id for event_id, _ in found}) for found in ended] == [len(found) for found in ended]
            receipts = [receipt_of(site, request_id) for request_id in ids]
            usages = [receipt["usage"] for receipt in receipts]
            assert {receipt["status"] for receipt in receipts} == {"completed"}
            assert {usage["completion_tokens"] for usage in usages} == {TOKENS}
    print(f"{KILLS} kills, each under {AT_ONCE} streams; {num_going_on} went on when the next web answered")
    assert used(site) - before == KILLS * sum(usage["total_tokens"] for usage in usages)


def test_a_post_that_is_sent_again_to_the_next_web_is_charged_once(site: Site) -> None:
    chat, key = f"{site.base_url}/v1/chat/completions", {"Idempotency-Key": uuid.uuid4().hex}
    before = used(site)
    with httpx.stream("POST", chat, json=BODY, headers={**site.headers(), **key}, timeout=60) as response:
        request_id = response.headers["x-request-id"]
        begun = read(lines_of(response), 3)
    kill_web(site)
    with httpx.stream("POST", chat, json=BODY, headers={**site.headers(), **key}, timeout=60) as response:
        assert response.headers["idempotent-replayed"] == "true"
        assert response.headers["x-request-id"] == request_id
        found = read(lines_of(response))
    assert text_of(found).startswith(text_of(begun))
    receipt = receipt_of(site, request_id)
    assert receipt["status"] == "completed"
    assert used(site) - before == receipt["usage"]["total_tokens"]


def test_what_a_dead_web_alone_read_is_cancelled_within_a_bound(site: Site) -> None:
    """It is charged as one whose client has gone: prompt, and what was generated until then."""
    chat = f"{site.base_url}/v1/chat/completions"
    body = {**BODY, "max_tokens": 8000, "context_shift": True}
    with httpx.stream("POST", chat, json=body, headers=site.headers(), timeout=60) as response:
        request_id = response.headers["x-request-id"]
        read(lines_of(response), 3)
        (web,) = [pid for pid in descendants(site.process.pid) if b"llmsite.processes.web" in command(pid)]
        watch = Stopwatch()
        os.kill(web, signal.SIGKILL)
        wait_until(lambda: not is_alive(web))
    wait_until(lambda: answers(site.base_url), seconds=30)
    receipt = receipt_of(site, request_id)
    assert watch.seconds() < 20
    assert receipt["status"] == "cancelled"
    usage = receipt["usage"]
    assert 0 < usage["completion_tokens"] < 8000
    assert receipt["receipt"]["charged_tokens"] == usage["total_tokens"]


def start_web(site: Site, base_url: str) -> subprocess.Popen[bytes]:
    """A web process of the same site on a port of its own, once it answers. Whoever calls ends it."""
    environment = site_environment(site.state, int(base_url.rsplit(":", 1)[1]), LOG_LEVEL="WARNING")
    with site.log.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "llmsite.processes.web"], env=environment, stdout=log, stderr=log, cwd=REPOSITORY
        )
    try:
        wait_until(lambda: process.poll() is not None or answers(base_url), seconds=30)
        assert process.poll() is None, site.log.read_text()[-2000:]
    except BaseException:
        process.kill()
        process.wait()
        raise
    return process


@contextmanager
def another_web(site: Site) -> Iterator[str]:
    """A second web process of the same site, on a port of its own."""
    url = f"http://127.0.0.1:{free_port()}"
    process = start_web(site, url)
    try:
        yield url
    finally:
        process.kill()
        process.wait()


def test_two_webs_answer_one_key_once_and_resume_each_others_streams(site: Site) -> None:
    body = {**BODY, "max_tokens": 20, "stream": False}
    before = used(site)
    with another_web(site) as other, ThreadPoolExecutor(32) as pool:
        for _ in range(3):
            headers = {**site.headers(), "Idempotency-Key": uuid.uuid4().hex}

            def ask(url: str, headers: dict[str, str] = headers) -> httpx.Response:
                return httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60)

            found = list(pool.map(ask, [site.base_url, other] * 16))
            assert {answer.status_code for answer in found} == {200}, found[0].text
            assert len({answer.json()["id"] for answer in found}) == 1
            assert len({answer.json()["choices"][0]["message"]["content"] for answer in found}) == 1
            assert sum("idempotent-replayed" not in answer.headers for answer in found) == 1
        usage = found[0].json()["usage"]["total_tokens"]
        receipt_of(site, found[0].headers["x-request-id"])
        assert used(site) - before == 3 * usage
        chat = f"{site.base_url}/v1/chat/completions"
        with httpx.stream("POST", chat, json=BODY, headers=site.headers(), timeout=60) as response:
            request_id = response.headers["x-request-id"]
            lines = lines_of(response)
            begun = read(lines, 5)
            events = f"{other}/v1/requests/{request_id}/events"
            after = {**site.headers(), "Last-Event-ID": begun[-1][0]}
            with httpx.stream("GET", events, headers=after, timeout=60) as second:
                rest = read(lines_of(second))
            begun += read(lines)
        assert text_of(begun) == text_of(begun[:5] + rest)

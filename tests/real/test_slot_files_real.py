"""A slot of the real model, saved, erased and restored over HTTP with a key; once more when the worker was killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import Site, running_site
from tests.in_process import wait_until
from tests.llamacpp_calls import complete
from tests.llmsite.test_processes import descendants

pytestmark = [pytest.mark.model, pytest.mark.integration, pytest.mark.slow]

LONG = "Alice kept a careful diary of the weather, the harvest and the visitors of her village. " * 14
MORE = " On the last day of the year she"
N_PREDICT = 16
SLOT = 1
WORKER = "manage.py\0worker"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with running_site(tmp_path_factory.mktemp("slots") / "state") as found:
        yield found


@dataclass(frozen=True)
class Slot:
    """One slot of whoever the client's key is of."""

    client: httpx.Client
    number: int = SLOT

    def act(self, action: str) -> dict[str, Any]:
        body = {} if action == "erase" else {"json": {"filename": "diary.bin"}}
        answer = self.client.post(f"/slots/{self.number}", params={"action": action}, **body)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def ask(self, prompt: Any, **fields: Any) -> dict[str, Any]:
        answer = complete(self.client, prompt, id_slot=self.number, ignore_eos=True, return_tokens=True, **fields)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        assert found["id_slot"] == self.number
        return found


def kill_worker(site: Site) -> None:
    """With -9, and wait for the one that the supervisor starts in its place."""
    (pid,) = workers(site)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: pid not in (found := workers(site)) and len(found) == 1, 30.0)


def workers(site: Site) -> list[int]:
    return [each for each in descendants(site.process.pid) if WORKER in command_of(each)]


def command_of(pid: int) -> str:
    """Empty where it has ended meanwhile."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


@pytest.mark.timeout(180)
def test_what_is_restored_is_computed_no_more_and_predicts_the_same_after_a_kill_too(site: Site) -> None:
    with httpx.Client(base_url=site.base_url, headers=site.headers(), timeout=60) as client:
        slot = Slot(client)
        begun = slot.ask(LONG, n_predict=N_PREDICT)
        num_prompt = len(client.post("/tokenize", json={"content": LONG, "add_special": True}).json()["tokens"])
        assert begun["timings"]["prompt_n"] == num_prompt

        saved = slot.act("save")
        assert saved["n_saved"] == num_prompt + N_PREDICT - 1, "the last token is not computed"
        more = client.post("/tokenize", json={"content": MORE}).json()["tokens"]
        held = client.post("/tokenize", json={"content": LONG, "add_special": True}).json()["tokens"]
        longer = [*held, *begun["tokens"][:-1], *more]

        def go_on() -> dict[str, Any]:
            return slot.ask(longer, n_predict=4, n_probs=5)

        before = go_on()
        assert (before["timings"]["cache_n"], before["timings"]["prompt_n"]) == (saved["n_saved"], len(more))

        assert slot.act("erase")["n_erased"] > saved["n_saved"]
        scratch = go_on()
        assert (scratch["timings"]["cache_n"], scratch["timings"]["prompt_n"]) == (0, len(longer))

        def restored() -> None:
            found = slot.act("restore")
            assert (found["n_restored"], found["n_read"]) == (saved["n_saved"], saved["n_written"])
            again = go_on()
            assert (again["timings"]["cache_n"], again["timings"]["prompt_n"]) == (saved["n_saved"], len(more))
            assert again["timings"]["prompt_ms"] < scratch["timings"]["prompt_ms"] / 4
            assert again["tokens"] == before["tokens"]
            assert again["completion_probabilities"] == before["completion_probabilities"]

        slot.act("erase")
        restored()
        slot.act("erase")
        kill_worker(site)
        wait_until(lambda: complete(client, "One", n_predict=1, id_slot=0).status_code == 200, 60.0)
        restored()

"""Batches on a running site with the real model: what is killed on the way is gone on with; answered once, paid once.

LLMSITE_BATCH_LINES sets the size of the batch that is killed three times (30).
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.conftest import Site, running_site
from tests.llmsite.test_processes import descendants
from tests.openai_calls import async_sdk, sdk

pytestmark = [pytest.mark.model, pytest.mark.integration, pytest.mark.slow]

NUM_LINES = int(os.environ.get("LLMSITE_BATCH_LINES", "30"))
MODEL = "smollm2-135m"
CHAT: Any = "/v1/chat/completions"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with running_site(tmp_path_factory.mktemp("batches") / "state") as found:
        yield found


def line(number: int, **body: Any) -> str:
    messages = [{"role": "user", "content": f"Say something about the number {number}."}]
    given = {"model": MODEL, "messages": messages, "max_tokens": 4, "temperature": 0, **body}
    return json.dumps({"custom_id": f"line {number}", "method": "POST", "url": CHAT, "body": given})


def begin(client: openai.OpenAI, text: str) -> str:
    file = client.files.create(file=("requests.jsonl", text.encode()), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h").id


def kill(site: Site, words: str) -> None:
    """With -9; the process that the supervisor starts in its place is another."""
    (found,) = [each for each in descendants(site.process.pid) if words in Path(f"/proc/{each}/cmdline").read_text()]
    os.kill(found, signal.SIGKILL)


def num_done(client: openai.OpenAI, batch_id: str) -> int:
    """Web processes come and go meanwhile."""
    try:
        batch = client.batches.retrieve(batch_id)
    except (openai.APIConnectionError, openai.InternalServerError):
        return -1
    if batch.status in {"completed", "failed", "cancelled", "expired"}:
        return NUM_LINES + 1
    return batch.request_counts.completed if batch.request_counts else 0


def wait(client: openai.OpenAI, batch_id: str, number: int, seconds: float = 150.0) -> None:
    deadline = time.monotonic() + max(seconds, NUM_LINES * 1.0)
    while num_done(client, batch_id) < number:
        assert time.monotonic() < deadline, client.batches.retrieve(batch_id)
        time.sleep(0.1)


@pytest.mark.timeout(max(180, NUM_LINES * 2))
def test_a_batch_survives_kill_9_of_worker_and_web(site: Site) -> None:
    with sdk(site.base_url, site.key, timeout=20) as client:
        batch_id = begin(client, "\n".join(map(line, range(NUM_LINES))))
        for number, victim in enumerate(("manage.py\0worker", "llmsite.processes.web", "manage.py\0worker"), 1):
            wait(client, batch_id, NUM_LINES * number // 5)
            kill(site, victim)
        wait(client, batch_id, NUM_LINES + 1)
        batch = client.batches.retrieve(batch_id)
        assert batch.status == "completed", batch
        assert batch.request_counts is not None
        assert (batch.request_counts.completed, batch.request_counts.failed) == (NUM_LINES, 0)
        assert batch.output_file_id is not None
        found = [json.loads(each) for each in client.files.content(batch.output_file_id).text.splitlines()]
    assert [each["custom_id"] for each in found] == [f"line {number}" for number in range(NUM_LINES)]
    promised = sum(each["response"]["body"]["usage"]["total_tokens"] for each in found)
    charged = wait_for_the_ledger(site, batch_id)
    assert (charged["lines"], charged["tokens"], charged["open"]) == (NUM_LINES, promised, 0)


def wait_for_the_ledger(site: Site, batch_id: str) -> dict[str, int]:
    """What the ledger says of the batch's requests, once nothing of it is reserved."""
    prefix = batch_id.removeprefix("batch_") + "-%"
    deadline = time.monotonic() + 20
    while True:
        with sqlite3.connect(site.state / "db.sqlite3", timeout=10) as database:
            lines, tokens = database.execute(
                "select count(distinct substr(request_id, 1, instr(request_id || '-r', '-r') - 1)), sum(used_tokens) "
                "from accounts_ledgerentry where kind in ('settle', 'adjust') and request_id like ?",
                [prefix],
            ).fetchone()
            (still_open,) = database.execute(
                "select count(*) from accounts_reservation where state = 'open' and request_id like ?", [prefix]
            ).fetchone()
            (doubled,) = database.execute(
                "select count(*) from (select 1 from accounts_ledgerentry where kind = 'settle' and request_id like ? "
                "group by substr(request_id, 1, instr(request_id || '-r', '-r') - 1) having count(*) > 1)",
                [prefix],
            ).fetchone()
        assert doubled == 0
        if not still_open or time.monotonic() > deadline:
            return {"lines": lines, "tokens": tokens or 0, "open": still_open}
        time.sleep(0.2)


async def test_the_asynchronous_client_does_it_all(site: Site) -> None:
    text = "\n".join(line(number, n=2) for number in range(3)) + "\n" + line(99, model="nothing")
    async with async_sdk(site.base_url, site.key) as client:
        file = await client.files.create(file=("three.jsonl", text.encode()), purpose="batch")
        assert (await client.files.retrieve(file.id)).bytes == len(text)
        batch = await client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        assert batch.id in [each.id async for each in client.batches.list(limit=1)]
        deadline = time.monotonic() + 60
        while batch.status != "completed":
            assert time.monotonic() < deadline, batch
            await asyncio.sleep(0.2)
            batch = await client.batches.retrieve(batch.id)
        output, errors = [
            (await client.files.content(each or "")).text.splitlines()
            for each in (batch.output_file_id, batch.error_file_id)
        ]
        assert [len(json.loads(each)["response"]["body"]["choices"]) for each in output] == [2, 2, 2]
        assert [json.loads(each)["response"]["status_code"] for each in errors] == [404]
        with pytest.raises(openai.ConflictError):
            await client.batches.cancel(batch.id)
        assert (await client.files.delete(file.id)).deleted
        assert file.id not in [each.id async for each in client.files.list(purpose="batch")]


def test_a_batch_that_is_cancelled_keeps_what_it_has(site: Site) -> None:
    with sdk(site.base_url, site.key) as client:
        batch_id = begin(client, "\n".join(line(number, max_tokens=24) for number in range(40)))
        wait(client, batch_id, 2)
        assert client.batches.cancel(batch_id).status == "cancelling"
        wait(client, batch_id, NUM_LINES + 1, 60)
        batch = client.batches.retrieve(batch_id)
        assert batch.status == "cancelled"
        assert batch.request_counts is not None
        assert 2 <= batch.request_counts.completed < 40
        assert batch.request_counts.completed + batch.request_counts.failed == 40
        output, errors = [
            [json.loads(each) for each in client.files.content(file_id or "").text.splitlines()]
            for file_id in (batch.output_file_id, batch.error_file_id)
        ]
    assert len(output) == batch.request_counts.completed
    assert {each["error"]["code"] for each in errors} == {"batch_cancelled"}
    charged = wait_for_the_ledger(site, batch_id)
    assert (charged["lines"], charged["open"]) == (len(output), 0)


def test_metrics_tell_of_batches(site: Site) -> None:
    text = httpx.get(f"{site.base_url}/metrics").text
    assert 'llm_batches{status="in_progress"}' in text
    assert "llm_batch_lines_waiting" in text


@pytest.mark.parametrize(
    ("endpoint", "body", "wanted"),
    [
        ("/v1/responses", {"input": "Say hello.", "max_output_tokens": 4}, "response"),
        ("/v1/embeddings", {"input": "Hello."}, "capability_not_supported"),
    ],
)
def test_lines_of_other_endpoints_are_answered_as_by_the_endpoint(
    site: Site, endpoint: Any, body: dict[str, Any], wanted: str
) -> None:
    """A model made for chats gives no vectors, in a batch either."""
    text = json.dumps({"custom_id": "a", "method": "POST", "url": endpoint, "body": {"model": MODEL, **body}})
    with sdk(site.base_url, site.key, timeout=20) as client:
        file = client.files.create(file=("requests.jsonl", text.encode()), purpose="batch")
        batch_id = client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h").id
        wait(client, batch_id, NUM_LINES + 1)
        batch = client.batches.retrieve(batch_id)
        result = batch.output_file_id or batch.error_file_id
        assert result is not None
        answer = json.loads(client.files.content(result).text)["response"]["body"]
    assert (answer["object"] if "object" in answer else answer["error"]["code"]) == wanted

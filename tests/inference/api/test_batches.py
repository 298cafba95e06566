"""/v1/files and /v1/batches by the official client, with a fake model: what is stored, answered and charged."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from openai.types import Batch

from inference.api.openai import uploads
from inference.batches.models import Batch as BatchRow
from tests.in_process import MODEL, InProcessSite, wait_until
from tests.openai_calls import HELLO, async_sdk, error_of, sdk
from tests.timing import PATIENCE_SECONDS

pytestmark = pytest.mark.api
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ENDED = {"completed", "failed", "expired", "cancelled"}


def chat_line(custom_id: str, **body: Any) -> dict[str, Any]:
    given = {"model": MODEL, "messages": HELLO, "max_tokens": 4, "temperature": 0, **body}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": given}


def response_line(custom_id: str, **body: Any) -> dict[str, Any]:
    given = {"model": MODEL, "input": "Hello", "max_output_tokens": 4, "temperature": 0, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/responses", "body": given}


def jsonl(lines: list[Any]) -> bytes:
    return b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)


def upload(client: openai.OpenAI, lines: list[Any] | bytes) -> str:
    content = lines if isinstance(lines, bytes) else jsonl(lines)
    return client.files.create(file=("requests.jsonl", content), purpose="batch").id


def run(client: openai.OpenAI, lines: list[Any] | bytes, endpoint: Any = CHAT, **options: Any) -> Batch:
    """A batch, once it has ended."""
    batch = client.batches.create(
        input_file_id=upload(client, lines), endpoint=endpoint, completion_window="24h", **options
    )
    return ended(client, batch.id)


def ended(client: openai.OpenAI, batch_id: str) -> Batch:
    wait_until(lambda: client.batches.retrieve(batch_id).status in ENDED, 2 * PATIENCE_SECONDS)
    return client.batches.retrieve(batch_id)


def results(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    if file_id is None:
        return []
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()]


def counts(batch: Batch) -> tuple[int, int, int]:
    found = batch.request_counts
    assert found is not None
    return found.total, found.completed, found.failed


@pytest.fixture
def alice(site: InProcessSite) -> Iterator[openai.OpenAI]:
    with sdk(site.base_url, site.cast.alice.text) as client:
        yield client


def test_every_line_is_answered_under_its_own_name(site: InProcessSite, alice: openai.OpenAI) -> None:
    lines = [chat_line(f"line {number}") for number in range(1, 41)]
    batch = run(alice, lines, metadata={"night": "one"})
    assert (batch.status, counts(batch), batch.error_file_id) == ("completed", (40, 40, 0), None)
    assert (batch.metadata, batch.endpoint, batch.completion_window) == ({"night": "one"}, CHAT, "24h")
    found = results(alice, batch.output_file_id)
    assert [each["custom_id"] for each in found] == [line["custom_id"] for line in lines]
    alone = alice.chat.completions.create(**lines[0]["body"])
    assert {each["response"]["status_code"] for each in found} == {200}
    assert {each["response"]["body"]["choices"][0]["message"]["content"] for each in found} == {
        alone.choices[0].message.content
    }
    assert len({each["id"] for each in found}) == 40


def test_each_line_is_charged_once_and_has_a_receipt(site: InProcessSite, alice: openai.OpenAI) -> None:
    from inference.models import Receipt

    batch = run(alice, [chat_line(str(number)) for number in range(12)])
    usages = [each["response"]["body"]["usage"] for each in results(alice, batch.output_file_id)]
    used, reserved = site.charged(site.cast.alice)
    assert (used, reserved) == (sum(usage["total_tokens"] for usage in usages), 0)
    assert Receipt.objects.filter(parent_id=batch.id).count() == 12


def test_lines_that_are_refused_are_in_the_error_file(site: InProcessSite, alice: openai.OpenAI) -> None:
    batch = run(alice, [chat_line("good"), chat_line("hot", temperature=9), chat_line("lost", model="nothing")])
    assert (batch.status, counts(batch)) == ("completed", (3, 1, 2))
    errors = {each["custom_id"]: each["response"] for each in results(alice, batch.error_file_id)}
    assert errors["hot"]["status_code"] == 400
    assert errors["hot"]["body"]["error"]["param"] == "temperature"
    assert errors["lost"]["body"]["error"]["code"] == "model_not_found"
    assert [each["custom_id"] for each in results(alice, batch.output_file_id)] == ["good"]


BAD_FILES: dict[str, tuple[bytes, str, int | None]] = {
    "not JSON": (jsonl([chat_line("a"), b"{'custom_id': 'b'}"]), "invalid_json_line", 2),
    "not an object": (jsonl([["a"]]), "invalid_json_line", 1),
    "a custom_id twice": (jsonl([chat_line("a"), b"", chat_line("a")]), "duplicate_custom_id", 3),
    "a custom_id that is a number": (jsonl([{**chat_line("a"), "custom_id": 1}]), "invalid_value", 1),
    "a custom_id that is too long": (jsonl([chat_line("a" * 600)]), "invalid_value", 1),
    "a custom_id with a NUL": (jsonl([chat_line("a\0b")]), "invalid_value", 1),
    "a url of another endpoint": (jsonl([{**chat_line("a"), "url": TEXT}]), "mismatched_url", 1),
    "a method other than POST": (jsonl([{**chat_line("a"), "method": "GET"}]), "invalid_method", 1),
    "no body": (jsonl([{"custom_id": "a", "method": "POST", "url": CHAT}]), "missing_required_parameter", 1),
    "a body that is a text": (jsonl([{**chat_line("a"), "body": "x"}]), "invalid_type", 1),
    "a request that streams": (jsonl([chat_line("a", stream=True)]), "invalid_value", 1),
    "blank lines alone": (b"\n \n\r\n", "empty_file", None),
    "Latin-1": (jsonl([chat_line("a")]) + '{"custom_id": "ü"}'.encode("latin-1"), "invalid_encoding", 2),
    "UTF-16": (jsonl([chat_line("a")]).decode().encode("utf-16"), "invalid_encoding", 1),
    "zeros": (bytes(4096), "invalid_json_line", 1),
    "deep nesting": (b"[" * 100_000, "invalid_json_line", 1),
    "a lone surrogate": (jsonl([b'{"custom_id": "\\ud800"}']), "invalid_json_line", 1),
}


def test_bad_files_fail_with_the_line_and_the_reason(site: InProcessSite, alice: openai.OpenAI) -> None:
    for name, (content, code, number) in BAD_FILES.items():
        batch = run(alice, content)
        assert batch.status == "failed", name
        assert batch.errors is not None
        assert batch.errors.data
        assert (batch.errors.data[0].code, batch.errors.data[0].line) == (code, number), name
        assert batch.errors.data[0].message
    from inference.models import BatchLine

    assert BatchLine.objects.count() == 0
    assert site.charged(site.cast.alice) == (0, 0)


def test_every_wrong_line_is_named_up_to_a_hundred(alice: openai.OpenAI) -> None:
    batch = run(alice, jsonl([chat_line("a"), *([b"x"] * 150)]))
    assert batch.errors is not None
    assert [each.line for each in batch.errors.data or ()] == list(range(2, 102))


def test_a_byte_order_mark_and_windows_line_ends_are_no_mistake(alice: openai.OpenAI) -> None:
    content = b"\xef\xbb\xbf" + jsonl([chat_line("ä"), chat_line("b")]).replace(b"\n", b"\r\n")
    batch = run(alice, content)
    assert (batch.status, counts(batch)) == ("completed", (2, 2, 0))
    assert [each["custom_id"] for each in results(alice, batch.output_file_id)] == ["ä", "b"]


def test_bounds_of_a_file_are_kept(
    site: InProcessSite, alice: openai.OpenAI, monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    tight = {"batch_lines": 2, "max_body_bytes": 400, "batch_file_mb": 1, "tenant_files": 3}
    settings.CONFIG = settings.CONFIG.model_copy(update=tight)
    batch = run(alice, [chat_line(str(number)) for number in range(3)])
    assert batch.errors is not None
    assert [each.code for each in batch.errors.data or ()] == ["too_many_lines"]
    batch = run(alice, [chat_line("a" * 400)])
    assert batch.errors is not None
    assert [each.code for each in batch.errors.data or ()] == ["line_too_long"]
    with pytest.raises(openai.APIStatusError) as caught:
        upload(alice, bytes((1 << 20) + 1))
    assert (caught.value.status_code, caught.value.code) == (413, "request_too_large")
    with pytest.raises(openai.APIStatusError) as caught:
        upload(alice, bytes(3 << 20))
    assert (caught.value.status_code, caught.value.code) == (413, "request_too_large")
    upload(alice, [chat_line("a")])
    with pytest.raises(openai.PermissionDeniedError) as denied:
        upload(alice, [chat_line("a")])
    assert denied.value.code == "file_limit_exceeded"
    assert list(files_on_disk(site)) == 3 * [0o600]


def files_on_disk(site: InProcessSite) -> Iterator[int]:
    from inference.batches import files

    yield from (path.stat().st_mode & 0o777 for path in files.folder().glob(f"{site.cast.alice.tenant.pk}/*"))


@pytest.fixture(autouse=True)
def _no_files_are_left() -> Iterator[None]:
    import shutil

    from inference.batches import files

    shutil.rmtree(files.folder(), ignore_errors=True)
    yield


def test_uploads_at_once_are_bounded(site: InProcessSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "UPLOADS_EACH", 1)
    client, go = site.client(site.cast.alice), threading.Event()
    head = {"Content-Type": "multipart/form-data; boundary=x"}
    body = (
        b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n{}\r\n--x--\r\n'
    )

    def slow() -> Iterator[bytes]:
        yield body[:20]
        go.wait(PATIENCE_SECONDS)
        yield body[20:]

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, "/v1/files", content=slow(), headers=head)
        wait_until(lambda: uploads._under_way.total() == 1)
        error_of(client.post("/v1/files", content=body, headers=head), 429, "too_many_concurrent_requests")
        monkeypatch.setattr(uploads, "UPLOADS_AT_ONCE", 1)
        others = site.client(site.cast.bob).post("/v1/files", content=body, headers=head)
        assert (others.status_code, others.headers["retry-after"]) == (503, "1")
        go.set()
        assert first.result().status_code == 200
    assert client.post("/v1/files", content=body, headers=head).status_code == 200
    assert uploads._under_way.total() == 0


def test_uploads_that_cannot_be_read_are_refused(site: InProcessSite) -> None:
    client = site.client(site.cast.alice)
    part = {"file": ("a.jsonl", b"{}")}
    error_of(client.post("/v1/files", files=part, data={"purpose": "assistants"}), 400, "invalid_value", "purpose")
    error_of(client.post("/v1/files", files=part), 400, "missing_required_parameter", "purpose")
    error_of(client.post("/v1/files", files={"other": b"x"}, data={"purpose": "batch"}), 400, "bad_request", "file")
    error_of(client.post("/v1/files", data={"purpose": "batch"}), 415, "unsupported_media_type")
    error_of(client.post("/v1/files", json={"purpose": "batch"}), 415, "unsupported_media_type")
    error_of(
        client.post("/v1/files", files={"file": ("a", b"")}, data={"purpose": "batch"}), 400, "bad_request", "file"
    )
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    error_of(client.post("/v1/files", content=b"nothing of the kind", headers=headers), 400, "bad_request", "file")
    error_of(client.post("/v1/files", content=b"", headers={"Content-Type": "multipart/form-data"}), 400, "bad_request")
    expiring = {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "60"}
    error_of(client.post("/v1/files", files=part, data=expiring), 400, "invalid_value", "expires_after.seconds")
    error_of(site.client().post("/v1/files", files=part, data={"purpose": "batch"}), 401, "missing_api_key")
    assert list(files_on_disk(site)) == []


def test_a_name_of_a_file_is_never_a_path(site: InProcessSite, alice: openai.OpenAI) -> None:
    from inference.batches import files

    for name in ("../../../etc/passwd", "/etc/passwd", "a\x00b", "ö" * 400, "CON", "a\r\nSet-Cookie: x=1"):
        file = alice.files.create(file=(name, jsonl([chat_line("a")])), purpose="batch")
        assert len(file.filename) <= 255
        assert "\n" not in alice.files.content(file.id).response.headers["content-disposition"]
        assert files.path_of(site.cast.alice.tenant.pk, file.id).exists()


def test_files_are_listed_page_by_page(alice: openai.OpenAI) -> None:
    ids = [upload(alice, [chat_line(str(number))]) for number in range(5)]
    assert [each.id for each in alice.files.list(limit=2)] == ids[::-1]
    assert [each.id for each in alice.files.list(limit=2, order="asc")] == ids
    assert alice.files.list(limit=5).has_more is False
    assert alice.files.list(limit=4).has_more is True
    assert list(alice.files.list(purpose="batch_output")) == []
    with pytest.raises(openai.BadRequestError):
        alice.files.list(limit=0)
    with pytest.raises(openai.NotFoundError):
        alice.files.list(after="file-nothing")


def test_a_file_comes_back_as_it_was_sent_and_goes_when_it_is_deleted(alice: openai.OpenAI) -> None:
    content = jsonl([chat_line("a")]) + bytes(range(256)) * 4096
    file = alice.files.create(
        file=("q.jsonl", content), purpose="batch", expires_after={"anchor": "created_at", "seconds": 7200}
    )
    assert (file.filename, file.bytes, file.purpose, file.status) == ("q.jsonl", len(content), "batch", "processed")
    assert file.expires_at == file.created_at + 7200
    assert alice.files.content(file.id).read() == content
    assert alice.files.retrieve(file.id) == file
    deleted = alice.files.delete(file.id)
    assert (deleted.deleted, deleted.id, deleted.object) == (True, file.id, "file")
    for call in (alice.files.retrieve, alice.files.content, alice.files.delete):
        with pytest.raises(openai.NotFoundError) as caught:
            call(file.id)
        assert caught.value.code == "file_not_found"


def test_charlie_sees_nothing(site: InProcessSite, alice: openai.OpenAI) -> None:
    batch = run(alice, [chat_line("a")])
    with sdk(site.base_url, site.cast.charlie.text) as charlie:
        assert list(charlie.files.list()) == []
        assert list(charlie.batches.list()) == []
        for file_id in (batch.input_file_id, batch.output_file_id or ""):
            for call in (charlie.files.retrieve, charlie.files.content, charlie.files.delete):
                with pytest.raises(openai.NotFoundError):
                    call(file_id)
            with pytest.raises(openai.NotFoundError):
                charlie.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h")
        for look in (charlie.batches.retrieve, charlie.batches.cancel):
            with pytest.raises(openai.NotFoundError) as caught:
                look(batch.id)
            assert caught.value.code == "batch_not_found"


def test_wrong_orders_of_batches_name_the_field(site: InProcessSite, alice: openai.OpenAI) -> None:
    client, file_id = site.client(site.cast.alice), upload(alice, [chat_line("a")])
    good = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
    for change, param in [
        ({"endpoint": "/v1/images"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"metadata": {"a": "b" * 513}}, "metadata.a"),
        ({"metadata": {str(number): "x" for number in range(17)}}, "metadata"),
        ({"input_file_id": 5}, "input_file_id"),
    ]:
        answer = client.post("/v1/batches", json={**good, **change})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    with pytest.raises(openai.NotFoundError):
        alice.batches.create(input_file_id="file-nothing", endpoint=CHAT, completion_window="24h")
    output = run(alice, [chat_line("a")]).output_file_id
    with pytest.raises(openai.BadRequestError) as caught:
        alice.batches.create(input_file_id=output or "", endpoint=CHAT, completion_window="24h")
    assert caught.value.param == "input_file_id"


def test_a_nul_is_no_error_of_the_server(site: InProcessSite, alice: openai.OpenAI) -> None:
    """PostgreSQL stores none, in texts or in JSON; SQLite stores them."""
    client, file_id = site.client(site.cast.alice), upload(alice, [chat_line("a")])
    good = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
    for answer in (
        client.post("/v1/batches", json={**good, "metadata": {"night": "a\0b"}}),
        client.post("/v1/batches", json={**good, "metadata": {"a\0b": "night"}}),
        client.post("/v1/batches", json={**good, "input_file_id": "file-\0"}),
        client.get("/v1/files", params={"after": "\0"}),
        client.get("/v1/batches", params={"after": "\0"}),
    ):
        assert answer.status_code in (200, 400, 404), answer.text
        if answer.status_code == 400:
            assert "bad_request" in answer.text


def test_a_batch_is_created_once_for_each_idempotency_key(site: InProcessSite, alice: openai.OpenAI) -> None:
    client, header = site.client(site.cast.alice), {"Idempotency-Key": "night-1"}
    order = {"input_file_id": upload(alice, [chat_line("a")]), "endpoint": CHAT, "completion_window": "24h"}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: client.post("/v1/batches", json=order, headers=header), range(8)))
    assert {answer.status_code for answer in answers} == {200}, answers[0].text
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sorted(answer.headers.get("idempotent-replayed", "") for answer in answers) == ["", *["true"] * 7]
    ended(alice, answers[0].json()["id"])
    assert client.post("/v1/batches", json=order, headers=header).json()["status"] == "completed"
    other = client.post("/v1/batches", json={**order, "metadata": {"a": "b"}}, headers=header)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_key_conflict")
    assert client.post("/v1/batches", json=order, headers={"Idempotency-Key": "two words"}).status_code == 400
    for more in ({"Idempotency-Key": "night-2"}, {}):
        assert client.post("/v1/batches", json=order, headers=more).json()["id"] != answers[0].json()["id"]
    assert BatchRow.objects.count() == 3


def test_creates_that_race_do_not_pass_the_bound_on_open_batches(
    site: InProcessSite, alice: openai.OpenAI, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.CONFIG = settings.CONFIG.model_copy(update={"open_batches": 2})
    site.stop_worker()
    order = {"input_file_id": upload(alice, [chat_line("a")]), "endpoint": CHAT, "completion_window": "24h"}
    client, save = site.client(site.cast.alice), BatchRow.save

    def slowly(self: BatchRow, *arguments: Any, **options: Any) -> None:
        time.sleep(0.05)
        save(self, *arguments, **options)

    monkeypatch.setattr(BatchRow, "save", slowly)
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: client.post("/v1/batches", json=order), range(6)))
    assert sorted(answer.status_code for answer in answers) == [200, 200, 429, 429, 429, 429], answers[0].text
    assert BatchRow.objects.count() == 2
    site.start_worker()


async def test_the_asynchronous_client_does_the_same(site: InProcessSite) -> None:
    async with async_sdk(site.base_url, site.cast.alice.text) as client:
        line = {"custom_id": "a", "method": "POST", "url": TEXT, "body": {"prompt": ["one", "two"], "max_tokens": 4}}
        file = await client.files.create(file=("r.jsonl", jsonl([line])), purpose="batch")
        batch = await client.batches.create(input_file_id=file.id, endpoint=TEXT, completion_window="24h")
        while batch.status != "completed":
            batch = await client.batches.retrieve(batch.id)
        content = (await client.files.content(batch.output_file_id or "")).text
        assert [choice["index"] for choice in json.loads(content)["response"]["body"]["choices"]] == [0, 1]
        assert [each.id async for each in client.batches.list()] == [batch.id]


# What ends a batch early


@pytest.fixture
def slow(site: InProcessSite) -> InProcessSite:
    """A worker whose answers take a second."""
    site.speed.seconds_per_step = 0.05
    site.stop_worker()
    site.start_worker()
    return site


def start(client: openai.OpenAI, lines: list[Any]) -> str:
    endpoint = lines[0]["url"]
    return client.batches.create(input_file_id=upload(client, lines), endpoint=endpoint, completion_window="24h").id


def test_a_cancelled_batch_keeps_its_answers_and_frees_its_quota(slow: InProcessSite, alice: openai.OpenAI) -> None:
    batch_id = start(alice, [chat_line(str(number), max_tokens=8) for number in range(60)])
    wait_until(lambda: (counts(alice.batches.retrieve(batch_id)))[1] > 2)
    assert alice.batches.cancel(batch_id).status == "cancelling"
    assert alice.batches.cancel(batch_id).status in {"cancelling", "cancelled"}
    batch = ended(alice, batch_id)
    assert batch.status == "cancelled"
    assert (batch.cancelling_at or 0) <= (batch.cancelled_at or 0)
    total, completed, failed = counts(batch)
    assert (total, completed + failed) == (60, 60)
    output = results(alice, batch.output_file_id)
    assert len(output) == completed < 60
    errors = results(alice, batch.error_file_id)
    assert {each["error"]["code"] for each in errors} == {"batch_cancelled"}
    assert {each["response"] for each in errors} == {None}
    tokens = sum(each["response"]["body"]["usage"]["total_tokens"] for each in output)
    assert slow.charged(slow.cast.alice) == (tokens, 0), "what ran was answered, what waited was free"
    with pytest.raises(openai.ConflictError):
        alice.batches.cancel(batch_id)


def test_what_is_not_done_in_time_expires(slow: InProcessSite, alice: openai.OpenAI) -> None:
    from django.utils import timezone

    from inference.models import Batch as Row

    batch_id = start(alice, [chat_line(str(number), max_tokens=8) for number in range(60)])
    wait_until(lambda: (counts(alice.batches.retrieve(batch_id)))[1] > 2)
    Row.objects.filter(pk=batch_id).update(expires_at=timezone.now())
    batch = ended(alice, batch_id)
    assert (batch.status, sum(counts(batch)[1:])) == ("expired", 60)
    assert {each["error"]["code"] for each in results(alice, batch.error_file_id)} == {"batch_expired"}
    assert len(results(alice, batch.output_file_id)) == counts(batch)[1] > 2
    assert slow.charged(slow.cast.alice)[1] == 0


def test_a_revoked_key_ends_its_batch(slow: InProcessSite, plan: Any) -> None:
    from accounts.identity import issuing
    from inference.api import cancelling
    from tests.conftest import make_customer

    dora = make_customer("Dora's", plan)
    _, text = issuing.issue(dora.tenant, "second", list(dora.key.scopes), {}, None)
    with sdk(slow.base_url, dora.text) as first, sdk(slow.base_url, text) as other:
        batch_id = start(first, [chat_line(str(number), max_tokens=8) for number in range(60)])
        wait_until(lambda: (counts(first.batches.retrieve(batch_id)))[1] > 2)
        issuing.revoke(dora.key)
        cancelling.cancel_all(key_id=dora.key.pk)
        batch = ended(other, batch_id)
        assert batch.status == "failed"
        assert batch.errors is not None
        assert [each.code for each in batch.errors.data or ()] == ["invalid_api_key"]
        assert len(results(other, batch.output_file_id)) == counts(batch)[1] > 2
        codes = {
            (each["error"] or each["response"]["body"]["error"])["code"] for each in results(other, batch.error_file_id)
        }
    assert codes <= {"batch_failed", "request_cancelled", "key_revoked"}
    assert slow.charged(dora)[1] == 0


def test_a_quota_that_ends_in_the_middle_fails_the_lines_behind_it(site: InProcessSite, plan: Any) -> None:
    from tests.conftest import make_customer

    poor = make_customer("Poor", plan, monthly_tokens=60, requests_per_minute=1000, concurrent_requests=1)
    with sdk(site.base_url, poor.text) as client:
        batch = run(client, [chat_line(str(number)) for number in range(20)])
        total, completed, failed = counts(batch)
        assert (batch.status, total, completed + failed) == ("completed", 20, 20)
        assert completed >= 1
        assert failed >= 1
        found = results(client, batch.error_file_id)
    assert {each["response"]["status_code"] for each in found} == {429}
    assert {each["response"]["body"]["error"]["code"] for each in found} == {"insufficient_quota"}
    used, reserved = site.charged(poor)
    assert used <= 60
    assert reserved == 0


def test_the_minutes_limits_do_not_count_lines(site: InProcessSite, plan: Any) -> None:
    from tests.conftest import make_customer

    narrow = make_customer(
        "Narrow", plan, requests_per_minute=1000, tokens_per_minute=5, concurrent_requests=0, queue_length=0
    )
    with sdk(site.base_url, narrow.text) as client:
        assert counts(run(client, [chat_line(str(number)) for number in range(20)])) == (20, 20, 0)


def test_a_file_that_a_batch_reads_cannot_be_deleted(slow: InProcessSite, alice: openai.OpenAI) -> None:
    batch_id = start(alice, [chat_line(str(number), max_tokens=8) for number in range(20)])
    file_id = alice.batches.retrieve(batch_id).input_file_id
    with pytest.raises(openai.ConflictError):
        alice.files.delete(file_id)
    alice.batches.cancel(batch_id)
    ended(alice, batch_id)
    assert alice.files.delete(file_id).deleted


def test_as_many_batches_may_be_open_as_the_operator_says(
    slow: InProcessSite, alice: openai.OpenAI, settings: Any
) -> None:
    settings.CONFIG = settings.CONFIG.model_copy(update={"open_batches": 1})
    batch_id = start(alice, [chat_line(str(number), max_tokens=8) for number in range(20)])
    with pytest.raises(openai.RateLimitError) as caught:
        start(alice, [chat_line("a")])
    assert caught.value.code == "batch_limit_exceeded"
    alice.batches.cancel(batch_id)
    ended(alice, batch_id)
    assert run(alice, [chat_line("a")]).status == "completed"


def test_interactive_requests_go_before_lines_that_wait(slow: InProcessSite, alice: openai.OpenAI) -> None:
    """Half of the slots are the batch's while nobody else asks, never more; nobody waits behind the queue of lines."""
    batch_id = start(alice, [chat_line(str(number), max_tokens=16) for number in range(40)])
    wait_until(lambda: slow.num_running() == 2)
    from inference.transport.queue import batch_queue, ticket_queue

    wait_until(lambda: ticket_queue().num_waiting(batch_queue("default")) > 20)
    client, before = slow.client(slow.cast.bob), counts(alice.batches.retrieve(batch_id))[1]
    assert client.generate(max_new_tokens=2, cache=False).status_code == 200
    assert counts(alice.batches.retrieve(batch_id))[1] - before <= 4
    alice.batches.cancel(batch_id)
    ended(alice, batch_id)


def test_a_batch_that_nobody_serves_leaves_room_for_others(
    site: InProcessSite, alice: openai.OpenAI, settings: Any
) -> None:
    """Its lines would hold all places until it expires: their model's pool has no worker."""
    from accounts.models import Reservation
    from inference.api.openai import feeder
    from inference.catalog import registry
    from inference.models import ServedModel
    from inference.transport.queue import batch_queue, ticket_queue

    settings.CONFIG = settings.CONFIG.model_copy(update={"batch_lines_at_once": 4})
    model = ServedModel.objects.get(name=MODEL)
    model.pk, model.name, model.pool, model.is_default, model.aliases = None, "far", "far", False, []
    model.save()
    registry.forget()
    far = start(alice, [chat_line(str(number), model="far") for number in range(8)])
    wait_until(lambda: ticket_queue().num_waiting(batch_queue("far")) == 4)
    with sdk(site.base_url, site.cast.bob.text) as bob:
        for _ in range(3):  # each of which needs places anew
            batch = run(bob, [chat_line(str(number)) for number in range(20)])
            assert (batch.status, counts(batch)) == ("completed", (20, 20, 0))
    assert ticket_queue().num_waiting(batch_queue("far")) == 2
    assert not Reservation.objects.filter(request_id__contains="-r").exists(), "a line has a few hundred ids, not more"
    assert feeder._feeder is not None
    found = feeder._feeder[0]

    def has_all_again() -> bool:
        found._curbed = {batch_id: (most, 0.0) for batch_id, (most, _) in found._curbed.items()}  # the time is over
        return ticket_queue().num_waiting(batch_queue("far")) == 4

    wait_until(has_all_again)
    assert counts(alice.batches.retrieve(far)) == (8, 0, 0)
    alice.batches.cancel(far)
    assert ended(alice, far).status == "cancelled"
    assert site.charged(site.cast.alice) == (0, 0)


def test_an_upload_that_breaks_off_leaves_nothing(site: InProcessSite) -> None:
    import socket

    host, port = site.base_url.removeprefix("http://").split(":")
    head = (
        f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {site.cast.alice.text}\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 100000\r\n\r\n"
        '--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    )
    from inference.batches import files

    parts = files.folder() / str(site.cast.alice.tenant.pk)
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + b"x" * 4096)
        wait_until(lambda: parts.exists() and list(parts.iterdir()))
    wait_until(lambda: not list(parts.iterdir()))
    assert site.client(site.cast.alice).get("/v1/files").json()["data"] == []


def test_an_upload_without_a_key_or_a_length_is_bounded_all_the_same(
    site: InProcessSite, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.CONFIG = settings.CONFIG.model_copy(update={"batch_file_mb": 1})
    client = site.client(site.cast.alice)

    def pieces() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(40):
            yield bytes(1 << 16)

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    error_of(client.post("/v1/files", content=pieces(), headers=headers), 413, "request_too_large", "file")
    error_of(site.client().post("/v1/files", content=pieces(), headers=headers), 401, "missing_api_key")
    assert list(files_on_disk(site)) == []


def on_the_loop(work: Any) -> None:
    """Something asynchronous, on the loop of the site."""
    from inference.api.openai import feeder

    assert feeder._feeder is not None
    asyncio.run_coroutine_threadsafe(work, feeder._feeder[1]).result(PATIENCE_SECONDS)


async def test_a_feeder_that_is_stopped_in_the_moment_of_news_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """asyncio.wait_for forgets that it was cancelled where what it waits for has just come."""
    from inference.api.openai import feeder

    async def nothing(_: feeder.Feeder) -> None:
        return None

    monkeypatch.setattr(feeder.Feeder, "_round", nothing)
    monkeypatch.setattr(feeder.Feeder, "_give_back_lease", lambda _: None)
    for num_turns in range(6):
        found, ending = feeder.Feeder(), asyncio.Event()
        found.start()
        line = asyncio.create_task(feeder._either(ending, PATIENCE_SECONDS))
        await asyncio.sleep(0.01)
        found.wake()
        ending.set()
        for _ in range(num_turns):
            await asyncio.sleep(0)
        is_over = line.done() or not line.cancel()
        async with asyncio.timeout(PATIENCE_SECONDS / 6):
            await found.stop()
            await asyncio.gather(line, return_exceptions=True)
        assert is_over or line.cancelled()


@pytest.mark.parametrize("line", [chat_line, response_line])
def test_a_feeder_that_stops_or_loses_its_lease_leaves_its_lines_to_the_next(
    slow: InProcessSite, alice: openai.OpenAI, line: Any
) -> None:
    """Nothing that runs is cancelled, and nothing is begun twice."""
    from accounts import redis_client
    from accounts.models import LedgerEntry
    from inference.api.openai import feeder

    async def change_over() -> None:
        await feeder.stop()
        feeder.start()

    batch_id = start(alice, [line(str(number)) for number in range(24)])
    wait_until(lambda: counts(alice.batches.retrieve(batch_id))[1] > 0)
    on_the_loop(change_over())
    done = counts(alice.batches.retrieve(batch_id))[1]
    wait_until(lambda: counts(alice.batches.retrieve(batch_id))[1] > done)
    client = redis_client.client()
    client.set(feeder.LEASE_KEY, "another", px=1500)
    batch = ended(alice, batch_id)
    assert (batch.status, counts(batch)) == ("completed", (24, 24, 0))
    tokens = sum(each["response"]["body"]["usage"]["total_tokens"] for each in results(alice, batch.output_file_id))
    assert slow.charged(slow.cast.alice) == (tokens, 0)
    ids = list(LedgerEntry.objects.filter(kind="settle").values_list("request_id", flat=True))
    assert len(ids) == 24
    assert not [each for each in ids if "-r" in each], "no line was begun a second time"

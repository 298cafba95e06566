"""/v1/admin/imports over HTTP: uploads onto the disk, broken off and gone on with, refused; tokens of the console."""

from __future__ import annotations

import http.client
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import User

from inference.imports import importer, quarantine, upload_tokens
from inference.imports.importer import Importer
from inference.models import ServedModel
from tests.in_process import Client, InProcessSite, wait_until
from tests.inference import gguf_files
from tests.inference.gguf_files import PassingTrial

pytestmark = [pytest.mark.api, pytest.mark.integration]
IMPORTS = "/v1/admin/imports"


@pytest.fixture(autouse=True)
def _passing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The web's importer, with a trial that passes; nothing of other tests is in its folders."""
    monkeypatch.setattr(importer, "Importer", lambda: Importer(trial=PassingTrial()))
    for folder in (quarantine.folder(), quarantine.imported()):
        shutil.rmtree(folder, ignore_errors=True)
    yield


@pytest.fixture
def operator(site: InProcessSite) -> Client:
    return site.client(site.cast.operator)


def begun(operator: Client, **fields: Any) -> int:
    reply = operator.post(IMPORTS, json={"name": "uploaded", **fields})
    assert reply.status_code == 201 and reply.json()["state"] == "receiving", reply.text
    return int(reply.json()["id"])


def ended(operator: Client, number: int) -> dict[str, Any]:
    wait_until(lambda: operator.get(f"{IMPORTS}/{number}").json()["state"] in ("ready", "refused", "cancelled"))
    return dict(operator.get(f"{IMPORTS}/{number}").json())


def test_an_uploaded_model_is_checked_and_served(operator: Client) -> None:
    data = gguf_files.build()
    number = begun(operator, size_bytes=len(data), visibility="granted")
    reply = operator.put(f"{IMPORTS}/{number}/content", content=data)
    assert (reply.status_code, reply.json()["received_bytes"]) == (200, len(data)), reply.text
    assert ended(operator, number)["state"] == "ready"
    served = ServedModel.objects.get(name="uploaded")
    assert Path(served.path).read_bytes() == data and served.visibility == "granted"
    assert operator.put(f"{IMPORTS}/{number}/content", content=data).status_code == 409
    assert operator.delete(f"{IMPORTS}/{number}").status_code == 409
    assert operator.get(IMPORTS).json()["results"][0]["id"] == number


def test_an_upload_that_broke_off_goes_on_after_what_is_there(site: InProcessSite, operator: Client) -> None:
    data = gguf_files.build() + bytes(3 << 20)  # larger than any other body may be
    number = begun(operator)
    broken = http.client.HTTPConnection(site.base_url.removeprefix("http://"))
    broken.putrequest("PUT", f"{IMPORTS}/{number}/content")
    broken.putheader("Authorization", f"Bearer {operator.key}")
    broken.putheader("Content-Length", str(len(data)))
    broken.endheaders()
    broken.send(data[: 2 << 20])
    wait_until(lambda: quarantine.received(number) >= 1 << 20)
    assert operator.put(f"{IMPORTS}/{number}/content", content=data).status_code == 409  # one alone writes
    assert broken.sock is not None
    broken.sock.shutdown(socket.SHUT_RDWR)
    broken.close()

    def has_noted() -> bool:
        return bool(operator.get(f"{IMPORTS}/{number}").json()["received_bytes"] == quarantine.received(number) > 0)

    wait_until(has_noted)
    have = quarantine.received(number)
    wrong = {"Content-Range": f"bytes 5-{len(data) - 1}/{len(data)}"}
    reply = operator.put(f"{IMPORTS}/{number}/content", content=data[5:], headers=wrong)
    assert (reply.status_code, reply.json()["code"]) == (409, "conflict") and str(have) in reply.text
    rest = {"Content-Range": f"bytes {have}-{len(data) - 1}/{len(data)}"}
    reply = operator.put(f"{IMPORTS}/{number}/content", content=data[have:], headers=rest)
    assert reply.status_code == 200, reply.text
    assert ended(operator, number)["state"] == "ready"
    assert Path(ServedModel.objects.get(name="uploaded").path).read_bytes() == data


def test_a_file_that_is_no_model_is_refused_and_gone(operator: Client) -> None:
    number = begun(operator)
    assert operator.put(f"{IMPORTS}/{number}/content", content=b"<html>" * 20).status_code == 200
    found = ended(operator, number)
    assert (found["state"], found["problem_code"]) == ("refused", "gguf_not_gguf") and "not a GGUF" in found["problem"]
    assert list(quarantine.folder().glob("*/*")) == [] and not ServedModel.objects.filter(name="uploaded").exists()


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Content-Range": "bytes 0-1/5"}, "bad_request"),
        ({"Content-Range": "bytes 0-9/10"}, "bad_request"),
        ({"Content-Range": "lines 0-4/5"}, "bad_request"),
        ({"Content-Range": "bytes 3-7/8"}, "conflict"),
        ({"Content-Range": f"bytes {10**14}-{10**14 + 4}/{10**14 + 5}"}, "conflict"),
    ],
)
def test_ranges_that_do_not_fit_are_refused(operator: Client, headers: dict[str, str], code: str) -> None:
    number = begun(operator)
    reply = operator.put(f"{IMPORTS}/{number}/content", content=b"12345", headers=headers)
    assert reply.json()["code"] == code
    assert operator.put(f"{IMPORTS}/{number}/content", content=b"").json()["code"] == "bad_request"
    assert operator.put(f"{IMPORTS}/{number + 1000}/content", content=b"x").status_code == 404


def test_bounds_are_told_before_the_file_is_read(operator: Client, settings: Any) -> None:
    number = begun(operator)
    settings.CONFIG = settings.CONFIG.model_copy(update={"import_mb": 1})
    reply = operator.put(f"{IMPORTS}/{number}/content", content=bytes(2 << 20))
    assert reply.status_code == 422 and reply.json()["extra"]["fields"][0]["type"] == "import_too_large"
    assert quarantine.received(number) == 0
    reply = operator.post(IMPORTS, json={"name": "b", "size_bytes": 2 << 20})
    assert reply.json()["extra"]["fields"][0]["type"] == "import_too_large"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"name": "no blanks"}, "name"),
        ({"name": "a", "kind": "adapter"}, "base_model"),
        ({"name": "a", "kind": "adapter", "base_model": "no-such"}, "base_model"),
        ({"name": "a", "url": "https://example.org/a.gguf"}, "url"),
        ({"name": "a", "url": "http://127.0.0.1/a.gguf"}, "url"),
        ({"name": "a", "sha256": "12"}, "sha256"),
        ({"name": "a", "size_bytes": 0}, "size_bytes"),
        ({}, "name"),
    ],
)
def test_wrong_orders_name_the_field(operator: Client, body: dict[str, Any], field: str) -> None:
    reply = operator.post(IMPORTS, json=body)
    assert reply.status_code == 422 and reply.json()["extra"]["fields"][0]["field"] == field, reply.text


def test_a_cancelled_upload_is_gone(operator: Client) -> None:
    number = begun(operator)
    operator.put(f"{IMPORTS}/{number}/content", content=b"12", headers={"Content-Range": "bytes 0-1/2"})
    number = begun(operator, name="other")
    assert operator.delete(f"{IMPORTS}/{number}").json()["state"] == "cancelled"
    assert operator.put(f"{IMPORTS}/{number}/content", content=b"x").status_code == 409


def test_charlie_sees_and_sends_nothing(site: InProcessSite, operator: Client) -> None:
    number, charlie = begun(operator), site.client(site.cast.charlie)
    assert charlie.get(IMPORTS).status_code == 403
    assert charlie.put(f"{IMPORTS}/{number}/content", content=b"x").status_code == 403
    assert site.client().put(f"{IMPORTS}/{number}/content", content=b"x").status_code == 401
    assert quarantine.received(number) == 0


def test_a_page_of_the_console_sends_with_its_token(site: InProcessSite, operator: Client) -> None:
    number, other = begun(operator), begun(operator, name="other")
    root, nobody = User.objects.create_superuser("root"), User.objects.create_user("nobody")
    page, data = site.client(), gguf_files.build()

    def sent(token: str, to: int = number) -> int:
        headers = {upload_tokens.HEADER: token}
        return page.put(f"{IMPORTS}/{to}/content", content=data, headers=headers).status_code

    token = upload_tokens.make(number, root.pk)
    assert sent("nonsense") == sent(token + "x") == sent(upload_tokens.make(number, nobody.pk)) == 403
    assert sent(token, to=other) == 403
    assert sent(token) == 200
    assert ended(operator, number)["state"] == "ready"
    User.objects.filter(pk=root.pk).update(is_active=False)
    assert sent(upload_tokens.make(other, root.pk), to=other) == 403

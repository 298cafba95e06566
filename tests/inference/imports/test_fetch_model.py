"""manage.py fetch_model: one model from a server on loopback, refused with status 1, interrupted and gone on with."""

from __future__ import annotations

import json
from io import StringIO
from typing import Any

import pytest
from django.core.management import CommandError, call_command

from inference.imports import importer, quarantine
from inference.imports.connections import TryAgain
from inference.imports.fetching import fetch
from inference.imports.models import ModelImport
from inference.models import ServedModel
from inference.vetting.inspection import inspect
from tests.inference import gguf_files
from tests.inference.gguf_files import PassingTrial
from tests.inference.imports.file_server import Shelf

pytestmark = [pytest.mark.integration, pytest.mark.django_db, pytest.mark.usefixtures("own_state")]


@pytest.fixture(autouse=True)
def _passing(monkeypatch: pytest.MonkeyPatch) -> None:
    from inference.imports import checking

    def without_llama(path: Any, *, trial: Any = None, **more: Any) -> Any:
        return inspect(path, trial=trial or PassingTrial(), **more)

    monkeypatch.setattr(checking, "inspect", without_llama)


def fetched(*arguments: str) -> dict[str, Any]:
    out = StringIO()
    call_command("fetch_model", *arguments, "--json", stdout=out)
    return dict(json.loads(out.getvalue()))


def test_a_model_is_fetched_under_its_own_name(server: str, shelf: Shelf) -> None:
    shelf.files["/o/r/resolve/v2/small-Q4_0.gguf"] = gguf_files.build()
    found = fetched("o/r@v2:small-Q4_0.gguf", "--visibility", "granted", "--default")
    served = ServedModel.objects.get(name="small-Q4_0")
    assert found["state"] == "ready" and found["digest"] == served.digest
    assert served.visibility == "granted" and served.is_default
    with pytest.raises(CommandError, match="already"):
        call_command("fetch_model", "o/r@v2:small-Q4_0.gguf")


def test_a_refusal_ends_with_its_code(server: str, shelf: Shelf) -> None:
    shelf.files["/a.gguf"] = b"nothing of the kind, and long enough for a header"
    out = StringIO()
    with pytest.raises(CommandError):
        call_command("fetch_model", f"{server}/a.gguf", "--json", stdout=out)
    assert json.loads(out.getvalue())["error"]["code"] == "gguf_not_gguf"
    with pytest.raises(CommandError, match="FETCH_HOSTS"):
        call_command("fetch_model", "https://example.org/a.gguf")


def test_in_the_background_it_is_the_webs(server: str, shelf: Shelf) -> None:
    shelf.files["/a.gguf"] = gguf_files.build()
    found = fetched(f"{server}/a.gguf", "--background", "--name", "b")
    assert found["state"] == "receiving" and shelf.asked == []
    found = importer.Importer(trial=PassingTrial())
    found.fetch_due()
    found.check_due()
    assert ServedModel.objects.get().name == "b"


def test_ctrl_c_keeps_what_has_come_and_the_same_command_goes_on(
    server: str, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = gguf_files.build()
    shelf.files["/a.gguf"], shelf.breaks = data, [100]

    def interrupted(*arguments: Any) -> None:
        with pytest.raises(TryAgain):
            fetch(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(importer, "fetch", interrupted)
        with pytest.raises(CommandError) as stopped:
            call_command("fetch_model", f"{server}/a.gguf")
    assert stopped.value.returncode == 130
    row = ModelImport.objects.get()
    assert row.is_open and quarantine.received(row.pk) == 100
    with pytest.raises(CommandError, match="with other options"):
        call_command("fetch_model", f"{server}/a.gguf", "--sha256", "a" * 64)
    assert fetched(f"{server}/a.gguf")["id"] == row.pk
    assert shelf.asked[-1][1] == "bytes=100-" and ServedModel.objects.get().name == "a"

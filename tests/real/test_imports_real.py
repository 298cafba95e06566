"""The real way: an adapter and the demo model, uploaded and fetched, through llama.cpp's trial into the registry."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from inference.catalog.model_memory import memory_of
from inference.imports import desk, importer, quarantine
from inference.imports.desk import Asked
from inference.imports.models import ModelImport
from inference.models import Adapter, ServedModel
from llmsite.demo import ADAPTER_FOLDER
from tests.inference import gguf_files
from tests.inference.imports.conftest import own_state, server  # noqa: F401  fixtures
from tests.inference.imports.file_server import Shelf

pytestmark = [pytest.mark.model, pytest.mark.integration, pytest.mark.slow, pytest.mark.django_db]


@pytest.fixture
def shelf(model_path: Path, tmp_path: Path) -> Iterator[Shelf]:
    """The demo model in two parts, on a server that breaks off once in each."""
    first = gguf_files.split(model_path, tmp_path, 2, "smollm2")
    yield Shelf(
        files={f"/demo/smollm2/resolve/main/{part.name}": part.read_bytes() for part in first.parent.glob("smollm2-*")},
        breaks=[10_000_000, 30_000_000],
    )


@pytest.mark.usefixtures("own_state")
def test_a_fetched_model_and_an_uploaded_adapter_are_served(shelf: Shelf, settings: object) -> None:
    config = settings.CONFIG  # type: ignore[attr-defined]
    settings.CONFIG = config.model_copy(update={"import_mb": 200, "quarantine_mb": 400})  # type: ignore[attr-defined]
    whole = hashlib.sha256(b"".join(shelf.files[name] for name in sorted(shelf.files))).hexdigest()
    row = desk.ask(Asked(kind="model", name="smollm2", url="demo/smollm2:smollm2-00001-of-00002.gguf", sha256=whole))
    found = importer.Importer()
    found.fetch_due()
    found.check_due()
    row.refresh_from_db()
    assert row.state == ModelImport.State.READY, row.problem
    assert any(each and each.endswith("-") for _, each in shelf.asked), "it went on where it broke"
    served = ServedModel.objects.get(name="smollm2")
    assert served.metadata["trial"]["vocabulary_size"] == 49152 and served.digest == whole
    assert memory_of(served).weights_bytes > 50_000_000

    for name, data, state in (
        ("clerk", (ADAPTER_FOLDER / "smollm2-135m-json-reply.gguf").read_bytes(), "ready"),
        ("none", gguf_files.build({**gguf_files.ADAPTER}, tensors=gguf_files.MATRICES), "refused"),
    ):
        asked = desk.ask(Asked(kind="adapter", name=name, base_model=served))
        (quarantine.make_folder(asked.pk) / quarantine.ONE_FILE).write_bytes(data)
        desk.note(asked, state=ModelImport.State.QUEUED, total_bytes=len(data), received_bytes=len(data))
        with quarantine.held(asked.pk):
            importer.work(asked, threading.Event())
        asked.refresh_from_db()
        assert asked.state == state, asked.problem
    assert [row.name for row in Adapter.objects.all()] == ["clerk"]
    assert Adapter.objects.get().metadata["trial"]["effect"] > 1
    assert asked.problem_code == "adapter_wrong_base"

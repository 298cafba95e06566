"""Imports from their beginning to the registry: by address and as uploads, refused with reasons, through restarts."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.utils import timezone

from accounts.models import AuditEntry
from accounts.trail import audit_log
from inference.catalog import model_rows
from inference.imports import desk, importer, quarantine, rounds
from inference.imports.desk import Asked
from inference.imports.models import ModelImport
from inference.models import Adapter, ServedModel
from inference.vetting.inspection import RegistrationError
from tests.inference import gguf_files
from tests.inference.gguf_files import FailingTrial, PassingTrial
from tests.inference.imports.file_server import Shelf

pytestmark = [pytest.mark.integration, pytest.mark.django_db, pytest.mark.usefixtures("own_state")]
State = ModelImport.State


def ask(**fields: Any) -> ModelImport:
    return desk.ask(Asked(**{"kind": "model", "name": "tiny-2", **fields}))


def bring(row: ModelImport, trial: Any = None) -> ModelImport:
    with quarantine.held(row.pk) as is_ours:
        assert is_ours
        importer.work(row, threading.Event(), trial=trial or PassingTrial())
    row.refresh_from_db()
    return row


def uploaded(row: ModelImport, data: bytes) -> ModelImport:
    """As the API leaves it."""
    path = quarantine.make_folder(row.pk) / quarantine.ONE_FILE
    path.write_bytes(data)
    desk.note(row, state=State.QUEUED, received_bytes=len(data), total_bytes=len(data))
    return row


def left() -> list[str]:
    return sorted(path.name for path in quarantine.folder().glob("*/*"))


def refusal(row: ModelImport) -> str:
    assert row.state == State.REFUSED and row.problem and left() == []
    return row.problem_code


# By address


def test_a_model_is_fetched_checked_and_served(server: str, shelf: Shelf) -> None:
    data = gguf_files.build()
    shelf.files["/owner/repo/resolve/main/tiny.gguf"] = data
    digest = hashlib.sha256(data).hexdigest()
    with audit_log.acting(lambda: audit_log.Actor("person", "root")):
        row = ask(url="owner/repo:tiny.gguf", sha256=digest, is_default=True)
    assert bring(row).state == State.READY, row.problem
    served = ServedModel.objects.get(name="tiny-2")
    path = Path(served.path)
    assert path.read_bytes() == data and path.parent == quarantine.imported()
    assert path.name == f"tiny-2-{digest[:12]}.gguf" and path.stat().st_mode & 0o777 == 0o600
    assert served.digest == row.digest == digest and served.is_default
    assert model_rows.examine(path, known=served).metadata == served.metadata  # it is not inspected a second time
    assert left() == [] and row.received_bytes == row.checked_bytes == len(data)
    assert {each.actor for each in AuditEntry.objects.filter(model="inference.servedmodel")} == {"root"}


def test_all_parts_of_a_split_model_come_and_the_first_is_served(server: str, shelf: Shelf, tmp_path: Path) -> None:
    whole = gguf_files.write(tmp_path, "whole.gguf")
    first = gguf_files.split(whole, tmp_path, 2, "big")
    parts = sorted(tmp_path.glob("big-*"))
    for part in parts:
        shelf.files[f"/{part.name}"] = part.read_bytes()
    digest = hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()
    row = bring(ask(name="org/big", url=f"{server}/big-00002-of-00002.gguf", sha256=digest))
    assert row.state == State.READY, row.problem
    served = ServedModel.objects.get(name="org/big")
    assert Path(served.path).name == f"org-big-{digest[:12]}-00001-of-00002.gguf"
    assert len(list(quarantine.imported().glob("org-big-*"))) == 2
    assert served.size_bytes == row.total_bytes == sum(part.stat().st_size for part in parts)
    assert served.metadata["num_parts"] == 2 and first.exists()


def test_an_interrupted_download_goes_on_in_the_next_process(server: str, shelf: Shelf) -> None:
    data = gguf_files.build()
    shelf.files["/tiny.gguf"], shelf.breaks = data, [100, 200]
    row, stop = ask(url=f"{server}/tiny.gguf"), threading.Event()
    stopper = threading.Timer(0.3, stop.set)
    stopper.start()
    with quarantine.held(row.pk), pytest.raises(rounds.Stopped):
        importer.work(row, stop, trial=PassingTrial())  # it waits before it tries again, and is stopped
    stopper.join()
    row = ModelImport.objects.get(pk=row.pk)
    assert row.state == State.RECEIVING and quarantine.received(row.pk) == 100
    shelf.breaks = []
    assert bring(row).state == State.READY
    assert shelf.asked[-1][1] == "bytes=100-"


def test_the_wrong_hash_is_refused_before_anything_loads_the_file(server: str, shelf: Shelf) -> None:
    shelf.files["/tiny.gguf"] = gguf_files.build()
    row = bring(ask(url=f"{server}/tiny.gguf", sha256="0" * 64), trial=FailingTrial())
    assert refusal(row) == "digest_mismatch" and not ServedModel.objects.exists()


PARTS = ("/a-00001-of-00002.gguf", "/a-00002-of-00002.gguf")


@pytest.mark.parametrize(
    ("files", "path", "code"),
    [
        ({"/a.gguf": b"<html>not a model</html>" * 9}, "/a.gguf", "gguf_not_gguf"),
        ({"/a.gguf": gguf_files.build()[:-9]}, "/a.gguf", "gguf_truncated"),
        ({"/a.gguf": bytes(5 << 20)}, "/a.gguf", "import_too_large"),
        ({"/a.gguf": b""}, "/a.gguf", "fetch_failed"),
        ({}, "/a.gguf", "fetch_failed"),
        ({PARTS[0]: gguf_files.build()}, PARTS[0], "fetch_failed"),
        (dict.fromkeys(PARTS, gguf_files.build()), PARTS[0], "gguf_split"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason_and_removed(
    server: str, shelf: Shelf, files: dict[str, bytes], path: str, code: str
) -> None:
    shelf.files.update(files)
    assert refusal(bring(ask(url=f"{server}{path}"))) == code
    assert not ServedModel.objects.exists() and list(quarantine.imported().glob("*")) == []


def test_a_body_without_an_end_stops_at_the_limit(server: str, shelf: Shelf) -> None:
    shelf.files["/a.gguf"] = b"GGUF" * 10
    shelf.tells_size, shelf.has_ranges, shelf.is_endless = False, False, True
    assert refusal(bring(ask(url=f"{server}/a.gguf"))) == "import_too_large"


def test_a_full_disk_is_told_before_a_byte_comes(server: str, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf.files["/a.gguf"] = gguf_files.build()
    monkeypatch.setattr(quarantine.shutil, "disk_usage", lambda path: _Usage(300 << 20))
    assert bring(ask(url=f"{server}/a.gguf")).state == State.READY
    monkeypatch.setattr(quarantine.shutil, "disk_usage", lambda path: _Usage(quarantine.SPARE_BYTES))
    assert refusal(bring(ask(name="tiny-3", url=f"{server}/a.gguf"))) == "disk_full"
    assert [each for _, each in shelf.asked][-1] == "bytes=0-0"


class _Usage:
    def __init__(self, free: int) -> None:
        self.free = free


@pytest.mark.parametrize(
    "url", ["https://example.org/a.gguf", "http://localhost/a.gguf", "file:///etc/passwd", "nonsense"]
)
def test_what_is_not_allowed_is_not_even_written_down(url: str) -> None:
    with pytest.raises(RegistrationError) as refused:
        ask(url=url)
    assert refused.value.code == "fetch_forbidden" and not ModelImport.objects.exists()


# Uploads, adapters, names


def test_an_adapter_is_activated_after_its_proof_of_effect_alone(tiny: ServedModel, tmp_path: Path) -> None:
    data = gguf_files.write_adapter(tmp_path).read_bytes()
    row = uploaded(ask(kind="adapter", name="style", base_model=tiny, visibility="shared"), data)

    class WithoutEffect(PassingTrial):
        def run_adapter(self, path: Path, base: Path) -> dict[str, Any]:
            assert not Adapter.objects.exists()
            return {"effect": 0.0, "residue": 0.0}

    assert refusal(bring(row, trial=WithoutEffect())) == "adapter_without_effect" and not Adapter.objects.exists()
    row = uploaded(ask(kind="adapter", name="style", base_model=tiny, visibility="shared"), data)
    assert bring(row).state == State.READY
    made = Adapter.objects.get(name="style")
    assert made.enabled and made.visibility == "shared" and Path(made.path).parent == quarantine.imported()


def test_a_trial_that_fails_says_why(tmp_path: Path) -> None:
    row = bring(uploaded(ask(), gguf_files.build()), trial=FailingTrial())
    assert refusal(row) == "trial_failed" and "SIGSEGV" in row.problem


def test_a_name_is_taken_once_unless_it_is_to_be_replaced(tiny: ServedModel) -> None:
    with pytest.raises(RegistrationError) as refused:
        ask(name="tiny")
    assert refused.value.code == "name_taken"
    other = gguf_files.build({"general.name": (8, "Other")})
    assert bring(uploaded(ask(name="tiny", replaces=True), other)).state == State.READY
    served = ServedModel.objects.get(name="tiny")
    assert served.pk == tiny.pk and served.digest == hashlib.sha256(other).hexdigest()
    row = uploaded(ask(name="late"), gguf_files.build())
    model_rows.register(tiny.path, "late", trial=PassingTrial())
    assert refusal(bring(row)) == "name_taken"
    assert not list(quarantine.imported().glob("late-*"))


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"name": "no blanks"}, "name"),
        ({"name": "../etc"}, "name"),
        ({"kind": "adapter"}, "base_model"),
        ({"sha256": "abc"}, "sha256"),
        ({"visibility": "everybody"}, "visibility"),
        ({"kind": "picture"}, "kind"),
    ],
)
def test_wrong_words_name_their_field(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(RegistrationError) as refused:
        ask(**fields)
    assert list(refused.value.fields) == [field]


def test_room_is_promised_to_those_who_asked_first() -> None:
    ask(name="a", size_bytes=3 << 20)
    ask(name="b", size_bytes=3 << 20)
    with pytest.raises(RegistrationError) as refused:
        ask(name="c", size_bytes=3 << 20)
    assert refused.value.code == "quarantine_full"
    with pytest.raises(RegistrationError) as refused:
        ask(name="c", size_bytes=5 << 20)
    assert refused.value.code == "import_too_large"


# What dies, who waits


def test_a_check_that_was_interrupted_begins_again_and_not_for_ever() -> None:
    row = uploaded(ask(), gguf_files.build())

    class Killed(PassingTrial):
        def run(self, path: Path, vocabulary: Path) -> dict[str, Any]:
            raise KeyboardInterrupt

    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            bring(row, trial=Killed())
        row = ModelImport.objects.get(pk=row.pk)
        assert row.state == State.LOADING and left() == [quarantine.ONE_FILE]
    assert refusal(bring(row)) == "check_interrupted"


def test_a_process_that_died_between_link_and_row_leaves_nothing_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    row, data = ask(), gguf_files.build()
    uploaded(row, data)
    quarantine.let_in(quarantine.folder_of(row.pk) / quarantine.ONE_FILE, "tiny-2", hashlib.sha256(data).hexdigest())
    assert bring(row).state == State.READY
    again = bring(uploaded(ask(replaces=True), data))  # the very same file, once more
    assert again.state == State.READY and len(list(quarantine.imported().glob("tiny-2-*"))) == 1


def test_what_is_cancelled_is_not_registered_however_far_it_is() -> None:
    row = uploaded(ask(), gguf_files.build())

    class Cancelling(PassingTrial):
        def run(self, path: Path, vocabulary: Path) -> dict[str, Any]:
            assert desk.cancel(ModelImport.objects.get(pk=row.pk))
            return super().run(path, vocabulary)

    assert bring(row, trial=Cancelling()).state == State.CANCELLED
    assert not ServedModel.objects.exists() and left() == [] and not list(quarantine.imported().glob("*"))
    assert not desk.cancel(row)


def test_an_import_is_held_by_one_alone() -> None:
    row = ask()
    with quarantine.held(row.pk) as is_ours, quarantine.held(row.pk) as is_theirs:
        assert is_ours and not is_theirs
    with quarantine.held(row.pk) as is_ours:
        assert is_ours


def test_what_a_killed_process_held_is_free_at_once() -> None:
    row = ask()
    with quarantine.held(row.pk):
        pass
    lock = quarantine.folder() / f"{row.pk}.lock"
    holding = "import fcntl, sys, time; f = open(sys.argv[1]); fcntl.flock(f, 2); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", holding, str(lock)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline()
        with quarantine.held(row.pk) as is_ours:
            assert not is_ours
        other.kill()
        other.wait()
        with quarantine.held(row.pk) as is_ours:
            assert is_ours


def test_abandoned_uploads_and_strays_are_swept(tmp_path: Path) -> None:
    old, new = ask(name="old"), ask(name="new")
    for row in (old, new):
        (quarantine.make_folder(row.pk) / quarantine.ONE_FILE).write_bytes(b"GGUF")
    ModelImport.objects.filter(pk=old.pk).update(updated_at=timezone.now() - timedelta(hours=25))
    stray = quarantine.make_folder(999_999)
    (stray / quarantine.ONE_FILE).write_bytes(b"GGUF")
    long_ago = time.time() - 2 * quarantine.STRAY_SECONDS
    os.utime(stray, (long_ago, long_ago))
    with quarantine.held(old.pk):  # somebody still writes
        desk.sweep(timezone.now())
    old.refresh_from_db()
    assert old.is_open and not stray.exists()
    assert desk.sweep(timezone.now()) == 1
    old.refresh_from_db()
    new.refresh_from_db()
    assert (old.state, old.problem_code, new.state) == (State.REFUSED, "import_abandoned", State.RECEIVING)
    assert left() == [quarantine.ONE_FILE]


def test_the_importer_takes_what_is_due_and_nothing_else(server: str, shelf: Shelf) -> None:
    shelf.files["/a.gguf"] = gguf_files.build()
    fetched = ask(name="a", url=f"{server}/a.gguf")
    attended = ask(name="b", url=f"{server}/a.gguf", is_attended=True)
    waiting = ask(name="c")
    uploaded(sent := ask(name="d"), gguf_files.build())
    found = importer.Importer(trial=PassingTrial())
    found.fetch_due()
    found.check_due()
    states = [ModelImport.objects.get(pk=row.pk).state for row in (fetched, attended, waiting, sent)]
    assert states == [State.READY, State.RECEIVING, State.RECEIVING, State.READY]

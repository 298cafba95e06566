"""States of slots on disk: whose they are, what they are good for, how long they stay, and what is not believed."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from inference.engine.slot_keeper import SlotState
from inference.engine.state_store import StoredState
from inference.slots.files import Origin, SlotFileError, SlotFiles, scope_of

pytestmark = pytest.mark.unit

ALICE, BOB = 1, 2
ORIGIN = Origin(model_digest="a" * 64, vocabulary="llama 49152", n_ctx=512, kv_type="f16", build="llama 0.3 x86_64")
STATE = SlotState((5, 6, 7), (("poet", 0.5),), bytes(range(256)) * 8)


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def files_of(tmp_path: Path) -> Callable[..., SlotFiles]:
    def make(**options: Any) -> SlotFiles:
        values: dict[str, Any] = {"tenant_bytes": 1 << 20, "max_age_days": 7.0}
        return SlotFiles(tmp_path / "slots", "a secret", **{**values, **options})

    return make


@pytest.fixture
def files(files_of: Callable[..., SlotFiles]) -> SlotFiles:
    return files_of()


def paths(tmp_path: Path) -> list[Path]:
    return sorted(path for path in tmp_path.rglob("*") if path.is_file())


def test_what_is_saved_is_read_again_by_its_owner_alone(files: SlotFiles, tmp_path: Path) -> None:
    written = files.save(ALICE, "diary", ORIGIN, STATE)
    assert files.load(ALICE, "diary", ORIGIN) == (STATE, written)
    (path,) = paths(tmp_path)
    assert path.stat().st_size == written
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert "diary" not in str(path)
    for tenant_id, label in [(BOB, "diary"), (ALICE, "other")]:
        with pytest.raises(SlotFileError, match="nothing is saved"):
            files.load(tenant_id, label, ORIGIN)


def test_a_file_that_is_moved_to_another_tenant_is_not_read(files: SlotFiles, tmp_path: Path) -> None:
    files.save(ALICE, "diary", ORIGIN, STATE)
    files.save(BOB, "diary", ORIGIN, STATE)
    alices, bobs = paths(tmp_path)
    alices.replace(bobs)
    with pytest.raises(SlotFileError, match="somebody else"):
        files.load(BOB, "diary", ORIGIN)


@pytest.mark.parametrize("field", ["vocabulary", "n_ctx", "kv_type", "build", "model_digest"])
def test_a_state_of_something_else_is_not_read(files: SlotFiles, field: str) -> None:
    files.save(ALICE, "diary", ORIGIN, STATE)
    value: Any = 1024 if field == "n_ctx" else "another"
    with pytest.raises(SlotFileError, match="nothing is saved" if field == "model_digest" else "saved with another"):
        files.load(ALICE, "diary", replace(ORIGIN, **{field: value}))


def test_a_cut_or_changed_file_is_not_read(files: SlotFiles, tmp_path: Path) -> None:
    files.save(ALICE, "diary", ORIGIN, STATE)
    (path,) = paths(tmp_path)
    whole, rng = path.read_bytes(), random.Random(7)
    damaged = [b"", whole[:1], whole[:31], whole[:-1], whole[:-40], whole + b"x", bytes(len(whole))]
    for _ in range(200):
        place = rng.randrange(len(whole))
        damaged.append(whole[:place] + bytes([whole[place] ^ (1 << rng.randrange(8))]) + whole[place + 1 :])
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(SlotFileError, match="damaged"):
            files.load(ALICE, "diary", ORIGIN)
    path.write_bytes(whole)
    assert files.load(ALICE, "diary", ORIGIN)[0] == STATE


def test_a_file_of_another_installation_is_not_read(files: SlotFiles, tmp_path: Path) -> None:
    other = SlotFiles(tmp_path / "other", "another secret", tenant_bytes=1 << 20, max_age_days=7)
    files.save(ALICE, "diary", ORIGIN, STATE)
    other.save(ALICE, "diary", ORIGIN, STATE)
    (theirs,) = paths(tmp_path / "other")
    (ours,) = paths(tmp_path / "slots")
    theirs.replace(ours)
    with pytest.raises(SlotFileError, match="damaged"):
        files.load(ALICE, "diary", ORIGIN)


def test_a_link_a_pipe_and_a_folder_are_not_read(files: SlotFiles, tmp_path: Path) -> None:
    files.save(ALICE, "diary", ORIGIN, STATE)
    (path,) = paths(tmp_path)
    kept = tmp_path / "kept"
    path.rename(kept)
    path.symlink_to(kept)
    with pytest.raises(SlotFileError):
        files.load(ALICE, "diary", ORIGIN)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(SlotFileError):
        files.load(ALICE, "diary", ORIGIN)
    path.unlink()
    path.mkdir()
    with pytest.raises(SlotFileError):
        files.load(ALICE, "diary", ORIGIN)


def test_whatever_the_label_the_file_is_in_the_tenants_folder(files: SlotFiles, tmp_path: Path) -> None:
    for label in ["../../x", "/etc/passwd", "a\0b", "\ud800", "x" * 5000, "", "..", "a/b"]:
        files.save(ALICE, label, ORIGIN, STATE)
    assert len(paths(tmp_path)) == 8
    assert {path.parent for path in paths(tmp_path)} == {tmp_path / "slots" / "1"}


def test_a_tenants_bytes_are_bounded_and_the_oldest_goes(files_of: Callable[..., SlotFiles], tmp_path: Path) -> None:
    size = files_of().save(ALICE, "0", ORIGIN, STATE)
    files = files_of(tenant_bytes=3 * size)
    files.save(BOB, "0", ORIGIN, STATE)
    for number in range(1, 5):
        files.save(ALICE, str(number), ORIGIN, STATE)
        for age, path in enumerate(sorted(paths(tmp_path / "slots" / "1"), key=lambda each: -each.stat().st_mtime)):
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 10 - age))
    kept = [label for label in "01234" if _is_there(files, label)]
    assert kept == ["2", "3", "4"]
    assert files.load(BOB, "0", ORIGIN)[0] == STATE
    with pytest.raises(SlotFileError, match="are allowed"):
        files.save(ALICE, "big", ORIGIN, SlotState((1,), (), bytes(4 * size)))
    files.save(ALICE, "4", ORIGIN, STATE)
    assert [label for label in "01234" if _is_there(files, label)] == ["2", "3", "4"]


def _is_there(files: SlotFiles, label: str) -> bool:
    try:
        files.load(ALICE, label, ORIGIN)
    except SlotFileError:
        return False
    return True


def test_a_failed_write_leaves_what_was_there(
    files: SlotFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.save(ALICE, "diary", ORIGIN, STATE)

    def full(descriptor: int) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        files.save(ALICE, "diary", ORIGIN, SlotState((1,), (), b"new"))
    assert files.load(ALICE, "diary", ORIGIN)[0] == STATE
    assert len(paths(tmp_path)) == 1


def stored(tenant_id: int, first: int, size: int = 100) -> StoredState:
    return StoredState((scope_of(tenant_id), (("poet", 1.0),)), 3, [first, 2, 3], bytes(size))


def same(one: StoredState, other: StoredState) -> bool:
    return (one.key, one.number, one.tokens, one.state) == (other.key, other.number, other.tokens, other.state)


def test_kept_states_come_back_once_in_their_order(files: SlotFiles, tmp_path: Path) -> None:
    states = [stored(ALICE, 1), stored(BOB, 1), stored(ALICE, 9)]
    assert files.keep(ORIGIN, iter(states), 1000) == 3
    files.save(ALICE, "diary", ORIGIN, STATE)
    assert files.take_kept(replace(ORIGIN, model_digest="b" * 64), 10_000) == []
    found = files.take_kept(ORIGIN, 10_000)
    assert len(found) == 3
    assert all(map(same, found, states))
    assert files.take_kept(ORIGIN, 10_000) == []
    assert len(paths(tmp_path)) == 1


def test_what_is_kept_in_a_folder_that_may_not_be_written_keeps_nobody_from_a_load(
    files: SlotFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = stored(ALICE, 1)
    assert files.keep(ORIGIN, [kept], 1000) == 1

    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "the file system may not be written")

    monkeypatch.setattr(Path, "unlink", read_only)
    (found,) = files.take_kept(ORIGIN, 10_000)
    assert same(found, kept)


def test_what_is_kept_is_bounded_when_it_is_written_and_when_it_is_read(files: SlotFiles) -> None:
    states = [stored(ALICE, number) for number in range(10)]
    assert files.keep(ORIGIN, states, 450) == 4
    assert [each.tokens[0] for each in files.take_kept(ORIGIN, 500)] == [0]
    assert files.take_kept(ORIGIN, 10_000) == []


def test_kept_states_make_room_for_saved_ones(files_of: Callable[..., SlotFiles]) -> None:
    size = files_of().save(ALICE, "diary", ORIGIN, STATE)
    files = files_of(tenant_bytes=2 * size)
    assert files.keep(ORIGIN, [stored(ALICE, 1)], 10_000) == 1
    files.save(ALICE, "second", ORIGIN, STATE)
    assert files.load(ALICE, "diary", ORIGIN)[0] == STATE
    assert files.take_kept(ORIGIN, 10_000) == []


def test_old_files_and_unfinished_ones_are_swept(files_of: Callable[..., SlotFiles], tmp_path: Path) -> None:
    clock = Clock()
    files = files_of(clock=clock)
    files.save(ALICE, "diary", ORIGIN, STATE)
    (path,) = paths(tmp_path)
    os.utime(path, (clock.now, clock.now))
    unfinished = path.with_suffix(".part")
    unfinished.write_bytes(b"x")
    os.utime(unfinished, (clock.now, clock.now))
    assert files.sweep() == 0
    clock.now += 2 * 3600
    assert files.sweep() == 1
    clock.now += 7 * 86400
    assert files.sweep() == 1
    assert paths(tmp_path) == []


def test_kept_states_that_are_too_old_do_not_come_back(files_of: Callable[..., SlotFiles], tmp_path: Path) -> None:
    clock = Clock()
    files = files_of(clock=clock)
    files.keep(ORIGIN, [stored(ALICE, 1)], 10_000)
    (path,) = paths(tmp_path)
    os.utime(path, (clock.now - 8 * 86400,) * 2)
    assert files.take_kept(ORIGIN, 10_000) == []
    assert paths(tmp_path) == []


def test_a_tenant_is_forgotten_whole(files: SlotFiles, tmp_path: Path) -> None:
    for tenant_id in (ALICE, BOB):
        files.save(tenant_id, "diary", ORIGIN, STATE)
        files.keep(ORIGIN, [stored(tenant_id, 1)], 1000)
    files.forget_kept(ALICE, ORIGIN)
    assert len(paths(tmp_path)) == 3
    files.forget_tenant(ALICE)
    assert {path.parent.name for path in paths(tmp_path)} == {"2"}


def test_nothing_is_kept_where_files_are_off(files_of: Callable[..., SlotFiles], tmp_path: Path) -> None:
    files = files_of(tenant_bytes=0)
    assert not files.is_on
    assert files.keep(ORIGIN, [stored(ALICE, 1)], 1000) == 0
    assert paths(tmp_path) == []


def test_files_are_listed_and_removed_by_name_alone(files: SlotFiles, tmp_path: Path) -> None:
    """What is damaged is listed, too, and nothing that is no file of a state."""
    files.save(ALICE, "diary", ORIGIN, STATE)
    files.save(BOB, "letters", ORIGIN, STATE)
    stored = StoredState((scope_of(BOB), ()), 0, [1, 2], b"state")
    files.keep(ORIGIN, [stored], 1 << 20)
    (tmp_path / "slots" / "1" / "notes.txt").write_text("no state")
    (tmp_path / "slots" / "1" / f"{'0' * 40}.saved").write_bytes(b"damaged")
    listed = files.listing(10)
    assert sorted((each.tenant_id, each.is_kept, each.num_tokens) for each in listed if each.model_digest) == [
        (ALICE, False, 3),
        (BOB, False, 3),
        (BOB, True, 2),
    ]
    assert len(listed) == 4 and len(files.listing(2)) == 2
    name = next(each.name for each in listed if each.tenant_id == ALICE and each.num_tokens)
    assert not files.forget(BOB, name) and files.forget(ALICE, name) and not files.forget(ALICE, name)
    for wrong in ("notes.txt", "../2/" + name, "/etc/passwd", "", name + "\n", name + "/../x"):
        with pytest.raises(SlotFileError, match="no name"):
            files.forget(ALICE, wrong)
    with pytest.raises(SlotFileError, match="nothing is saved"):
        files.load(ALICE, "diary", ORIGIN)


def test_with_a_new_secret_what_the_old_one_sealed_is_read_and_new_files_have_the_new_seal(
    files: SlotFiles, tmp_path: Path
) -> None:
    def installation(secret: str, *fallbacks: str) -> SlotFiles:
        return SlotFiles(tmp_path / "slots", secret, fallbacks=fallbacks, tenant_bytes=1 << 20, max_age_days=7.0)

    files.save(ALICE, "diary", ORIGIN, STATE)
    files.keep(ORIGIN, [stored(ALICE, 1)], 1 << 20)
    rotated, without = installation("a new secret", "a secret"), installation("a new secret")
    with pytest.raises(SlotFileError, match="nothing is saved"):
        without.load(ALICE, "diary", ORIGIN)
    assert rotated.load(ALICE, "diary", ORIGIN)[0] == STATE
    newer = SlotState((9, 9), STATE.adapters, STATE.state)
    rotated.save(ALICE, "diary", ORIGIN, newer)
    assert len([path for path in paths(tmp_path) if path.suffix == ".saved"]) == 1, "the old file has gone"
    assert without.load(ALICE, "diary", ORIGIN)[0] == newer, "it needs the new secret alone"
    (kept,) = rotated.take_kept(ORIGIN, 1 << 20)
    assert same(kept, stored(ALICE, 1))
    rotated.keep(ORIGIN, [kept], 1 << 20)
    (again,) = without.take_kept(ORIGIN, 1 << 20)
    assert same(again, kept)


def test_everything_of_a_tenant_goes_and_nothing_of_others(files: SlotFiles, tmp_path: Path) -> None:
    for tenant_id in (ALICE, BOB):
        files.save(tenant_id, "diary", ORIGIN, STATE)
    files.forget_tenant(ALICE)
    files.forget_tenant(ALICE)
    assert [path.parent.name for path in paths(tmp_path)] == [str(BOB)]

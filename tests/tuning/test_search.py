"""The order of a run, with fakes for llama.cpp and the clock; the workshop, with a small disk; the child's ends."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inference.gguf.header import read_header
from inference.tuning import steps, workshop
from inference.tuning.choice import Settings, Speed
from inference.tuning.formats import FORMATS, Format
from inference.tuning.search import Found, NotMeasured, Order, Search
from inference.tuning.steps import StepFailed
from inference.tuning.workshop import WorkshopError
from tests.inference import gguf_files

pytestmark = pytest.mark.unit
NOW = Settings(2)
Tell = Callable[[float], None]


class FakeSteps:
    """Speeds and losses by the name of the file; every step takes one second of the fake clock."""

    def __init__(self, times: dict[str, float], losses: dict[str, float] | None = None) -> None:
        self.times, self.its_losses = times, losses or {}
        self.now = 0.0
        self.calls: list[str] = []
        self.fails: dict[str, str] = {}
        self.one_thread = 1.0
        """How much faster one thread is than two."""

    def clock(self) -> float:
        return self.now

    def _step(self, what: str, name: str) -> None:
        self.now += 1
        self.calls.append(f"{what} {name}")
        if reason := self.fails.get(f"{what} {name}"):
            raise StepFailed(reason)

    def quantize(self, source: Path, target: Path, into: Format, most_bytes: int, seconds: float, tell: Tell) -> None:
        target.write_bytes(b"half of it")
        self._step("quantize", into.name)
        tell(1.0)

    def losses(self, path: Path, most_windows: int, seconds: float, tell: Tell) -> list[float]:
        self._step("losses", path.stem)
        return [self.its_losses.get(path.stem, 3.0)] * most_windows

    def speed(self, path: Path, settings: Settings, seconds: float, tell: Tell) -> Speed:
        self._step("speed", path.stem)
        times = self.times[path.stem] * (self.one_thread if settings.n_threads == 1 else 1.0)
        return Speed(100 * times, 10 * times, 40 * times)


def search(folder: Path, fake: FakeSteps, *names: str, seconds: float = 1000.0) -> Search:
    source = gguf_files.write(folder, "source.gguf")
    made = folder / "made"
    made.mkdir()
    order = Order(
        source=source,
        header=read_header(source),
        formats=[FORMATS[name] for name in names],
        settings=NOW,
        usable_cpus=2,
        kv_type="f16",
        folder=made,
        most_increase=3.0,
        rounds=2,
        seconds=seconds,
    )
    return Search(order, fake, lambda what, part, done, total: told.append((what, done, total)), fake.clock)


told: list[tuple[str, int, int]] = []


def run(folder: Path, fake: FakeSteps, *names: str, seconds: float = 1000.0) -> Found:
    told.clear()
    return search(folder, fake, *names, seconds=seconds).run()


def test_the_best_format_and_the_best_settings_are_found(tmp_path: Path) -> None:
    fake = FakeSteps({"source": 1.0, "Q4_0": 1.5, "Q8_0": 1.2})
    fake.one_thread = 1.5
    found = run(tmp_path, fake, "Q8_0", "Q4_0")
    assert (found.format_name, found.settings, found.path) == ("Q4_0", Settings(1), tmp_path / "made" / "Q4_0.gguf")
    assert found.gain == pytest.approx(1.5 * 1.5)
    assert found.notes == []


def test_progress_counts_every_step_once_and_ends_at_the_total(tmp_path: Path) -> None:
    run(tmp_path, FakeSteps({"source": 1.0, "Q4_0": 1.5}), "Q4_0")
    dones = [done for _, done, _ in told]
    assert dones == sorted(dones)
    assert dones[-1] == told[-1][2] - 1


def test_rounds_begin_with_another_file_each_time(tmp_path: Path) -> None:
    fake = FakeSteps({"source": 1.0, "Q4_0": 1.0})
    run(tmp_path, fake, "Q4_0")
    speeds = [call for call in fake.calls if call.startswith("speed")][:4]
    assert speeds == ["speed source", "speed Q4_0", "speed Q4_0", "speed source"]


def test_a_format_that_crashes_is_told_of_and_the_others_go_on(tmp_path: Path) -> None:
    fake = FakeSteps({"source": 1.0, "Q8_0": 1.2})
    fake.fails["quantize Q4_0"] = "llama.cpp crashed on it (SIGABRT)"
    found = run(tmp_path, fake, "Q4_0", "Q8_0")
    assert found.candidates[0].problem == "llama.cpp crashed on it (SIGABRT)"
    assert found.format_name == "Q8_0"
    assert not (tmp_path / "made" / "Q4_0.gguf").exists()
    assert "losses Q4_0" not in fake.calls


def test_a_model_that_cannot_be_measured_itself_ends_the_run(tmp_path: Path) -> None:
    fake = FakeSteps({"source": 1.0})
    fake.fails["losses source"] = "llama.cpp cannot load it"
    with pytest.raises(NotMeasured, match="cannot load it"):
        run(tmp_path, fake, "Q4_0")
    assert fake.calls == ["losses source"]


def test_nothing_better_leaves_the_settings_of_now(tmp_path: Path) -> None:
    found = run(tmp_path, FakeSteps({"source": 1.0, "Q4_0": 0.8}), "Q4_0")
    assert (found.format, found.path, found.gain, found.settings) == (None, None, None, NOW)


def test_settings_alone_may_be_the_gain(tmp_path: Path) -> None:
    fake = FakeSteps({"source": 1.0, "Q4_0": 0.8})
    fake.one_thread = 2.0
    found = run(tmp_path, fake, "Q4_0")
    assert (found.format, found.path, found.settings) == (None, None, Settings(1))
    assert found.gain == pytest.approx(2.0)


def test_when_time_runs_out_whole_rounds_decide_and_an_unconfirmed_choice_is_not_kept(tmp_path: Path) -> None:
    fake = FakeSteps({"source": 1.0, "Q4_0": 1.5})
    found = run(tmp_path, fake, "Q4_0", seconds=6.5)  # load, score, write, score, and one round of two
    assert (set(found.source.speeds), set(found.candidates[0].speeds)) == ({0}, {0, 1})
    assert found.path is None
    assert "max-minutes" in found.notes[0]
    assert fake.now < 10


def test_time_that_ends_before_any_speed_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotMeasured, match="max-minutes"):
        run(tmp_path, FakeSteps({"source": 1.0, "Q4_0": 1.5}), "Q4_0", seconds=3.5)


# The workshop


def test_a_disk_that_is_too_small_is_seen_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(1 << 30, 0, 1 << 30))
    with pytest.raises(WorkshopError, match="--out") as caught, workshop.workshop(tmp_path / "out", 1 << 30):
        pytest.fail("there is no room")
    assert caught.value.code == "disk_full"
    assert list((tmp_path / "out").iterdir()) == []
    with workshop.workshop(tmp_path / "out", 1 << 20) as own:
        assert own.is_dir()


def test_whatever_ends_a_run_its_folder_is_gone(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), workshop.workshop(tmp_path, 1) as own:
        (own / "Q4_0.gguf").write_bytes(b"half of it")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_swept_away_and_a_live_run_is_left_alone(tmp_path: Path) -> None:
    left = tmp_path / f"{workshop.PREFIX}dead"
    left.mkdir()
    with workshop.workshop(tmp_path, 1) as own:
        assert not left.exists()
        with pytest.raises(WorkshopError) as caught, workshop.workshop(tmp_path, 1):
            pytest.fail("two runs at once")
        assert caught.value.code == "already_running"
        assert own.is_dir()


def test_the_chosen_file_is_renamed_whole_under_a_name_of_its_content(tmp_path: Path) -> None:
    for is_new in (True, False):
        with workshop.workshop(tmp_path, 1) as own:
            (own / "Q4_0.gguf").write_bytes(b"weights")
            path, found_new = workshop.keep(own / "Q4_0.gguf", tmp_path, "house/smollm2")
        assert (path.read_bytes(), found_new) == (b"weights", is_new)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    assert path.name.startswith("house-smollm2-Q4_0-")


# The child


def ask(manner: str, seconds: float = 30.0) -> dict[str, object]:
    return steps.ask_child("tests.tuning.children", {"manner": manner}, seconds, heard.append, {})


heard: list[float] = []


def test_a_child_tells_how_far_it_is_and_what_it_found() -> None:
    heard.clear()
    assert ask("answer")["pid"]
    assert heard[-1] == 0.5 and set(heard) <= {0.0, 0.5}


def test_who_waits_for_a_silent_child_hears_of_it_and_may_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "TICK_SECONDS", 0.05)
    told: list[float] = []

    def third_time(part: float) -> None:
        told.append(part)
        if told.count(0.5) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        steps.ask_child("tests.tuning.children", {"manner": "hang"}, 30.0, third_time, {})
    assert told[-3:] == [0.5, 0.5, 0.5], "said once, and repeated while nothing comes"


@pytest.mark.parametrize(
    ("manner", "reason"),
    [
        ("crash", r"crashed on it \(SIGABRT\): GGML_ASSERT failed"),
        ("babble", "an answer that is not one"),
        ("refuse", "refuses the format"),
        ("leave", "ended with status 0"),
    ],
)
def test_every_end_of_a_child_is_a_reason(manner: str, reason: str) -> None:
    with pytest.raises(StepFailed, match=reason):
        ask(manner)


def test_a_child_that_hangs_is_killed_in_time() -> None:
    begun = time.monotonic()
    with pytest.raises(StepFailed, match="longer than"):
        ask("hang", seconds=2.0)
    assert time.monotonic() - begun < 20


def test_an_interrupted_step_leaves_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Recorded(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            started.append(self)

    def interrupt(_part: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    with pytest.raises(KeyboardInterrupt):
        steps.ask_child("tests.tuning.children", {"manner": "hang"}, 30.0, interrupt, {})
    [child] = started
    assert child.returncode == -signal.SIGKILL

"""The installer, without installing: progress, stamps, advice, unknown .pth files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmsite import install

pytestmark = pytest.mark.unit


def progress_after(*lines: str, seconds: float = 0.0) -> str:
    progress = install.Progress("worker", is_terminal=False)
    for line in lines:
        progress.note(line)
    if progress.compiling_since:
        progress.compiling_since = progress.started_at
    return progress.sentence(progress.started_at + seconds)


def test_compiling_shows_steps_and_the_time_left() -> None:
    text = progress_after("Building wheel for llama-cpp-python", "  [50/200] Building C object x.o", seconds=60)
    assert text == "worker: compiling llama.cpp 50/200, 1 min 00 s so far, about 3 min 00 s left"


def test_the_first_steps_promise_nothing() -> None:
    assert "left" not in progress_after("[1/200] Building C object", seconds=10)


def test_stages_before_and_after_compiling_are_named() -> None:
    assert progress_after("Collecting numpy==2.0") == "worker: fetching numpy, 0 s so far"
    assert "building llama-cpp-python" in progress_after("  Building wheel for llama-cpp-python (pyproject.toml)")
    assert "unpacking" in progress_after("[9/9] Linking", "Installing collected packages: a, b")
    assert "50/100" in progress_after("[ 50%] Building CXX object")


def test_elsewhere_than_on_a_terminal_a_word_comes_every_quarter_of_a_minute(
    capsys: pytest.CaptureFixture[str],
) -> None:
    progress = install.Progress("worker", is_terminal=False)
    for second in range(61):
        progress.show(progress.started_at + second)
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_on_a_terminal_one_line_is_written_again(capsys: pytest.CaptureFixture[str]) -> None:
    progress = install.Progress("worker", is_terminal=True)
    progress.show(progress.started_at)
    progress.show(progress.started_at + 1)
    progress.end("installed")
    out = capsys.readouterr().out
    assert out.count("\r") == 4
    assert out.endswith("worker: installed in 0 s\n")


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("CMake Error: CMAKE_C_COMPILER not set, after EnableLanguage", "build-essential"),
        ("c++: fatal error: Killed signal terminated program cc1plus", "CMAKE_BUILD_PARALLEL_LEVEL=1"),
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES", "nothing was installed"),
        ("NewConnectionError: Temporary failure in name resolution", "network"),
        ("something new", "same command"),
    ],
)
def test_the_usual_failures_come_with_advice(text: str, advice: str) -> None:
    assert advice in install.explain(text)


def test_a_child_that_fails_is_told_with_its_last_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "LOG", tmp_path / "log")
    progress = install.Progress("worker", is_terminal=False)
    script = "print('first'); print('[1/2] step'); print('CMAKE_C_COMPILER not set'); raise SystemExit(3)"
    status, lines = install.run_with_progress([sys.executable, "-c", script], {}, progress)
    assert status == 3
    assert lines == ["first", "[1/2] step", "CMAKE_C_COMPILER not set"]
    assert (tmp_path / "log").read_text().startswith("first\n")
    assert progress.total == 2


def test_an_unknown_pth_file_is_found(tmp_path: Path) -> None:
    assert install.unknown_pth_files(tmp_path) == []
    (tmp_path / "a1_coverage.pth").write_text("import os")
    (tmp_path / "zz.pth").write_text("import os")
    changed, unknown = install.unknown_pth_files(tmp_path)
    assert "not the file that is known" in changed
    assert "zz.pth is not known" in unknown


def test_verification_looks_into_the_virtual_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "VENV", tmp_path)
    packages = tmp_path / "lib" / "python3.11" / "site-packages"
    packages.mkdir(parents=True)
    assert install.main(["--verify"]) == 0
    (packages / "stealer.pth").write_text("import os")
    assert install.main(["--verify"]) == 1


def test_what_is_stamped_is_not_installed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "REQUIREMENTS", tmp_path)
    monkeypatch.setattr(install, "PYTHON", Path(sys.executable))
    monkeypatch.setattr(install, "STAMP", tmp_path / "stamp.json")
    for group in ("build", *install.GROUPS):
        (tmp_path / f"{group}.txt").write_text(group)
    installed: list[str] = []
    monkeypatch.setattr(install, "install", installed.append)
    assert install.main(["worker", "demo"]) == 0
    assert install.main(["worker", "demo"]) == 0
    assert installed == ["build", "worker", "demo"]  # llama.cpp is compiled
    (tmp_path / "worker.txt").write_text("changed")
    assert install.main(["dev", "worker"]) == 0
    assert installed == ["build", "worker", "demo", "dev"]  # dev.txt holds worker.txt
    assert set(json.loads((tmp_path / "stamp.json").read_text())) == {"build", "worker", "demo", "dev"}


def test_a_kept_llama_cpp_that_does_not_run_here_is_compiled_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """pip's cache holds a wheel of another machine, or one with AMX."""
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/sh
echo "$CFLAGS|$CXXFLAGS|$*" >> {tmp_path}/calls
case "$*" in *print_system_info*) cat {tmp_path}/info; rm {tmp_path}/info; echo 'AMX_INT8 = 0' > {tmp_path}/info;; esac
"""
    )
    python.chmod(0o700)
    (tmp_path / "info").write_text("AVX512 = 1 | AMX_INT8 = 1 |")
    monkeypatch.setattr(install, "PYTHON", python)
    monkeypatch.setattr(install, "LOG", tmp_path / "log")
    monkeypatch.setenv("CFLAGS", "-O2")
    monkeypatch.delenv("CXXFLAGS", raising=False)
    install.install("worker")
    calls = [line.split("|") for line in (tmp_path / "calls").read_text().splitlines()]
    installs = [(c, cxx) for c, cxx, call in calls if " install " in call]
    assert installs == [("-O2 -U__AMX_INT8__", "-U__AMX_INT8__")] * 2
    assert [call.split()[3:5] for _, _, call in calls if "install" in call and " install " not in call] == [
        ["uninstall", "--yes"]
    ]
    assert any("cache remove llama_cpp_python" in call for _, _, call in calls)
    assert "compiled anew" in capsys.readouterr().out
    (tmp_path / "calls").unlink()
    install.install("demo")  # has nothing that is compiled
    assert "print_system_info" not in (tmp_path / "calls").read_text()


def test_a_llama_cpp_that_does_not_run_however_it_is_compiled_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *print_system_info*) kill -ILL $$;; esac\n')
    python.chmod(0o700)
    monkeypatch.setattr(install, "PYTHON", python)
    monkeypatch.setattr(install, "LOG", tmp_path / "log")
    with pytest.raises(install.InstallError, match="doctor"):
        install.install("worker")


def test_an_old_python_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "version_of", lambda path: (3, 9, 2))
    with pytest.raises(install.InstallError, match=r"3\.11 or newer"):
        install.find_python()


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "VENV", tmp_path)
    monkeypatch.setattr(install, "PYTHON", tmp_path / "bin" / "python")
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(install.InstallError, match="in the way"):
        install.make_venv()


def test_the_installer_runs_on_a_python_without_packages() -> None:
    script = Path(install.__file__)
    done = subprocess.run([sys.executable, "-I", "-S", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_lock_file_pins_every_package_with_hashes_and_names_no_index() -> None:
    for path in sorted(install.REQUIREMENTS.glob("*.txt")):
        text = path.read_text().replace("\\\n", " ")
        lines = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
        assert lines, path
        assert all("==" in line and "--hash=sha256:" in line for line in lines), path
        assert "index-url" not in text
        assert "://" not in text, path


def test_the_lock_files_agree_with_each_other() -> None:
    def pins(name: str) -> dict[str, str]:
        lines = (install.REQUIREMENTS / f"{name}.txt").read_text().splitlines()
        return dict(
            line.split(" ")[0].split("==") for line in lines if "==" in line and not line.startswith((" ", "#"))
        )

    base, worker, dev = pins("base"), pins("worker"), pins("dev")
    assert base.items() <= worker.items()
    assert worker.items() <= dev.items()

"""The doctor: finds what is wrong, says how to mend it, and works with wrong settings."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmsite import doctor
from llmsite.config import Config
from llmsite.doctor import Finding
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.integration


def examine(**environment: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "manage.py", "doctor", "--json"],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout)


def levels(findings: Iterator[Finding]) -> list[str]:
    return [finding.level for finding in findings]


def test_wrong_settings_are_found_and_do_not_stop_it() -> None:
    status, report = examine(PORT="0", LOG_LEVEL="LOUD")
    assert status == 1
    assert report["ok"] is False
    texts = [finding["text"] for finding in report["findings"] if finding["subject"] == "settings"]
    assert [text.split(":")[0] for text in texts] == ["PORT", "LOG_LEVEL"]
    assert all(finding["mend"] for finding in report["findings"] if finding["level"] != "ok")


def test_a_fresh_state_folder_is_told_what_to_do_next(tmp_path: Path) -> None:
    _, report = examine(STATE_DIR=str(tmp_path / "state"), REDIS_URL="", DATABASE_URL="")
    found = {finding["subject"]: finding for finding in report["findings"]}
    assert found["database"]["level"] == "warning"
    assert "manage.py migrate" in found["database"]["mend"]
    assert "make run" in found["redis"]["mend"]
    assert found["workers"]["level"] == "warning"


def test_a_good_database_redis_and_model_are_well(db: None, valkey: Any, tmp_path: Path) -> None:
    from inference.models import ServedModel

    assert levels(doctor.look_at_database()) == ["ok"]
    assert levels(doctor.look_at_redis()) == ["ok"]
    assert levels(doctor.look_at_workers()) == ["warning"]
    valkey.sadd("workers", "one")
    valkey.set("worker:one", json.dumps({"pool": "default"}))
    assert [finding.text for finding in doctor.look_at_workers()] == ["one in pool default"]
    assert levels(doctor.look_at_models()) == ["warning"]
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    ServedModel.objects.create(name="gone", path=str(tmp_path / "gone.gguf"), digest="0" * 64)
    ServedModel.objects.create(name="other", path=str(tmp_path / "other.gguf"), digest="0" * 64)
    gone, other = doctor.look_at_models()
    assert (gone.level, gone.subject) == ("error", "model gone")
    assert "register_model" in gone.mend
    assert (other.level, other.text) == ("warning", f"{tmp_path / 'other.gguf'} is not the file that was registered")


def test_a_redis_that_may_evict_is_warned_of(valkey: Any) -> None:
    valkey.config_set("maxmemory-policy", "allkeys-lru")
    try:
        (finding,) = doctor.look_at_redis()
        assert finding.level == "warning"
        assert "noeviction" in finding.mend
    finally:
        valkey.config_set("maxmemory-policy", "noeviction")


def test_a_part_that_breaks_does_not_hide_the_next(monkeypatch: pytest.MonkeyPatch, db: None) -> None:
    def broken() -> Iterator[Finding]:
        raise ValueError("broken")

    monkeypatch.setattr(doctor, "look_at_database", broken)
    found = {finding.subject: finding for finding in doctor.look_at_django()}
    assert found["database"].text == "cannot be looked at: ValueError: broken"
    assert found["redis"].level == "ok"


def test_llama_that_needs_another_processor_is_found() -> None:
    info = "CPU : SSE3 = 1 | AVX2 = 1 | AVX512 = 1 | FMA = 0 | LLAMAFILE = 1 |"
    assert doctor.missing_cpu_features(info, frozenset({"avx2"})) == ["AVX512"]
    assert doctor.missing_cpu_features(info, frozenset({"avx2", "avx512f"})) == []
    assert doctor.missing_cpu_features(info, None) == []
    assert levels(doctor.look_at_llama()) == ["ok", "ok", "ok"]


def test_what_the_build_leaves_of_the_processor_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    info = "CPU : SSE3 = 1 | AVX = 1 | AVX2 = 1 | AVX512 = 0 |"
    monkeypatch.setattr(doctor, "processor_flags", lambda: frozenset({"avx", "avx2", "avx512f"}))
    finding = doctor.look_at_processor(info)
    assert finding.level == "warning" and "AVX512" in finding.text and "AVX2" in finding.text
    monkeypatch.setattr(doctor, "processor_flags", lambda: frozenset({"avx", "avx2"}))
    assert doctor.look_at_processor(info).level == "ok"
    monkeypatch.setattr(doctor, "processor_flags", lambda: None)
    assert "none was looked for" in doctor.look_at_processor(info).text


def test_a_gpu_that_the_build_cannot_use_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0"
    card.mkdir(parents=True)
    (card / "information").write_text("Model: \t\t NVIDIA H200\nIRQ:   \t\t 42\n")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/kfd").touch()
    seen = doctor.gpus(tmp_path)
    assert seen[:2] == [("NVIDIA H200", "CUDA"), ("an AMD GPU", "HIP")]
    assert doctor.gpus(tmp_path / "nothing") in ([], [("Apple's GPU", "METAL")])
    monkeypatch.setattr(doctor, "gpus", lambda: seen)
    finding = doctor.look_at_gpu("CPU : AVX = 1 | OFFLOADS = 0")
    assert finding.level == "warning" and "NVIDIA H200" in finding.text and "-DGGML_CUDA=ON" in finding.mend
    assert doctor.look_at_gpu("CPU : AVX = 1 | OFFLOADS = 1").level == "ok"
    monkeypatch.setattr(doctor, "gpus", list)
    assert "processors alone" in doctor.look_at_gpu("CPU : AVX = 1 | OFFLOADS = 0").text


def test_llama_that_dies_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.sys, "executable", "/bin/false")
    (finding,) = doctor.look_at_llama()
    assert finding.level == "error"
    assert "another processor" in finding.mend


def test_a_missing_llama_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "version", missing)
    assert levels(doctor.look_at_llama()) == ["warning"]


def test_a_llama_with_amx_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'CPU : AMX_INT8 = 1 |'\n")
    python.chmod(0o700)
    monkeypatch.setattr(doctor.sys, "executable", str(python))
    finding = next(doctor.look_at_llama())
    assert finding.level == "warning" and "AMX" in finding.text and "-U__AMX_INT8__" in finding.mend


@pytest.mark.parametrize(("free", "level"), [(10**6, "error"), (10**9, "warning"), (10**12, "ok")])
def test_a_full_disk_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, level: str) -> None:
    usage = type("Usage", (), {"free": free})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    assert levels(doctor.look_at_state_folder(Config(state_dir=tmp_path / "not" / "there"))) == [level]


def test_a_state_folder_that_cannot_be_written_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert levels(doctor.look_at_state_folder(Config(state_dir=tmp_path))) == ["error"]


def test_secrets_of_the_state_folder_are_warned_of_with_services(tmp_path: Path) -> None:
    shared = Config(state_dir=tmp_path, secret_key="", key_pepper="", redis_url="redis://127.0.0.1")
    assert levels(doctor.look_at_secrets(shared)) == ["warning", "warning"]
    alone = Config(state_dir=tmp_path, secret_key="", key_pepper="", redis_url="", database_url="")
    assert levels(doctor.look_at_secrets(alone)) == ["ok", "ok"]


def test_the_socket_path_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = Config(state_dir=tmp_path / ("deep" * 30), redis_url="")
    (finding,) = doctor.look_at_socket_path(deep)
    assert "too long for a socket" in finding.text
    assert levels(doctor.look_at_socket_path(Config(state_dir=Path("/s"), redis_url=""))) == ["ok"]
    assert levels(doctor.look_at_socket_path(Config(redis_url="redis://127.0.0.1"))) == []
    monkeypatch.setattr(doctor, "MAX_SOCKET_PATH_BYTES", 10)
    assert levels(doctor.look_at_socket_path(Config(state_dir=Path("/s"), redis_url=""))) == ["error"]


def test_lines_say_what_to_do() -> None:
    assert doctor.as_line(doctor.ok("disk", "fine")) == "ok      disk: fine"
    assert doctor.as_line(doctor.error("disk", "full", "Make room.")).endswith("\n        → Make room.")


def test_every_setting_is_in_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--settings-table"]) == 0
    table = capsys.readouterr().out.strip()
    rows = re.findall(r"^\| `([A-Z_]+)` \|", table, flags=re.MULTILINE)
    assert rows == [name.upper() for name in Config.model_fields]
    assert "| `PORT` | `8000` |" in table
    assert "One of `json`, `console`." in table


def test_the_readme_shows_the_table_of_settings() -> None:
    text = (REPOSITORY / "README.md").read_text()
    assert doctor.settings_table() in text, "run `manage.py doctor --settings-table` and put it into README.md"

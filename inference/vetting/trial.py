"""Starts the trial of a model, adapter or chat template in a child; any end of it becomes a report or a reason.

The calling thread waits; the registry calls it at registration. Whatever the file does, this process survives.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from inference.gguf.parts import size_of

BASE_DIR = Path(__file__).resolve().parents[2]
KEPT_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "LANG", "TMPDIR", "PYTHONPATH", "VIRTUAL_ENV")
"""No secret reaches a process that opens hostile files."""
MAX_ANSWER_BYTES = 64 << 10
OVERHEAD_BYTES = 3 << 30
"""Address space beside the weights: Python, llama.cpp, thread stacks, compute buffers."""
TEMPLATE_CPU_SECONDS = 5
TEMPLATE_WALL_SECONDS = 20.0
TEMPLATE_BYTES = 512 << 20


class TrialError(Exception):
    """The model did not pass; the message says why, for a person."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """Bounds of one trial. CPU seconds are of all threads together."""

    cpu_seconds: int = 600
    wall_seconds: float = 600.0
    overhead_bytes: int = OVERHEAD_BYTES

    def run(self, path: Path, vocabulary: Path) -> dict[str, Any]:
        """What llama.cpp says about the model (trial_load.examine). Raises TrialError."""
        question = {"path": str(path), "vocabulary": str(vocabulary)}
        return self._ask("inference.vetting.trial_load", question, size_of(path))

    def run_adapter(self, path: Path, base: Path) -> dict[str, Any]:
        """What an adapter does to its base model (trial_adapter.examine). Raises TrialError."""
        question = {"path": str(path), "base": str(base)}
        return self._ask("inference.vetting.trial_adapter", question, size_of(base) + size_of(path))

    def run_template(self, source: str) -> dict[str, Any]:
        """What a chat template can do (inference.chat.probing.examine). Raises TrialError."""
        tight = replace(
            self,
            cpu_seconds=min(self.cpu_seconds, TEMPLATE_CPU_SECONDS),
            wall_seconds=min(self.wall_seconds, TEMPLATE_WALL_SECONDS),
            overhead_bytes=min(self.overhead_bytes, TEMPLATE_BYTES),
        )
        return tight._ask("inference.vetting.trial_template", {"source": source}, 0)

    def _ask(self, module: str, question: dict[str, Any], file_bytes: int) -> dict[str, Any]:
        with tempfile.TemporaryFile() as answers, tempfile.TemporaryFile() as logs:
            try:
                status = self._run_child(module, question, file_bytes, answers, logs)
            except subprocess.TimeoutExpired as error:
                raise TrialError(f"it was not done within {self.wall_seconds:g} s") from error
            if status != 0:
                raise TrialError(describe_end(status, tail(logs)))
            report = _parse(tail(answers))
            if not report.pop("ok"):
                raise TrialError(with_log(str(report.get("reason")), tail(logs)))
            return report

    def _run_child(
        self, module: str, question: dict[str, Any], file_bytes: int, answers: IO[bytes], logs: IO[bytes]
    ) -> int:
        limits = {
            "parent": os.getpid(),
            "cpu_seconds": self.cpu_seconds,
            # The weights are mapped, and kernels that repack them keep a second copy.
            "max_memory_bytes": 2 * file_bytes + self.overhead_bytes,
        }
        environment = {name: os.environ[name] for name in KEPT_ENVIRONMENT if name in os.environ}
        child = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=answers,
            stderr=logs,
            cwd=BASE_DIR,
            # llama.cpp checks each tensor in a thread of its own: an arena each would use up the address space
            env={**environment, "CUDA_VISIBLE_DEVICES": "", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
        )
        try:
            child.communicate(json.dumps({**question, **limits}).encode(), timeout=self.wall_seconds)
        except BaseException:
            child.kill()
            child.wait()
            raise
        return child.returncode


def _parse(data: bytes) -> dict[str, Any]:
    try:
        report = json.loads(data)
    except ValueError as error:
        raise TrialError("the trial process gave no answer") from error
    if not isinstance(report, dict) or not isinstance(report.get("ok"), bool):
        raise TrialError("the trial process gave an answer that is not one")
    return report


def tail(file: IO[bytes]) -> bytes:
    """The last of what a child wrote; never more than may be kept in memory."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - MAX_ANSWER_BYTES))
    return file.read()


def describe_end(status: int, log: bytes) -> str:
    """Why a child ended that gave no answer, as a person may read it."""
    if status >= 0:
        return with_log(f"the child process ended with status {status}", log)
    if -status == signal.SIGXCPU:
        return "it used more processor time than it may"
    return with_log(f"the trial process crashed on it ({signal.Signals(-status).name})", log)


def with_log(reason: str, log: bytes) -> str:
    """The reason with llama.cpp's last word on it, one line, printable."""
    lines = [line.strip() for line in log.decode(errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower() or "assert" in line.lower() or "bad_alloc" in line]
    if not telling:
        return reason
    last_word = "".join(character for character in telling[-1] if character.isprintable())[:300]
    return f"{reason}: {last_word}"

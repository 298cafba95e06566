"""The native steps of a run, each in a child that can be killed: quantize, score a passage, measure speed.

The calling thread waits and hears how far the child is. Whatever the child does (crash, hang, fill its memory), the
step ends in what it found or in StepFailed, and no process of it is left.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from inference.gguf.parts import size_of
from inference.tuning.choice import Settings, Speed
from inference.tuning.formats import Format
from inference.vetting.trial import BASE_DIR, KEPT_ENVIRONMENT, OVERHEAD_BYTES, describe_end, tail, with_log

PASSAGE = Path(__file__).with_name("passage.txt")
"""From chapter II of News from Nowhere by William Morris (1890), in the public domain; its lines are joined."""
MAX_LINE_BYTES = 1 << 20
SPARE_SECONDS = 10
TICK_SECONDS = 1.0
"""So often who waits hears of a child that says nothing, too: it may want to stop."""
UNLIMITED = -1
PATIENT_THREADS = {
    "OMP_WAIT_POLICY": "active",
    "GOMP_SPINCOUNT": "500",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
}
"""As in the engine: threads that spin long beside a busy process take many times as long for a step."""

Tell = Callable[[float], None]
"""How much of the step is done, 0.0 to 1.0. Called at least each TICK_SECONDS; what it raises ends the child."""


class StepFailed(Exception):
    """A step that found nothing; the message says why, for a person."""


class Steps(Protocol):
    """What a run needs of llama.cpp. `seconds` is the most that a step may take. All raise StepFailed."""

    def quantize(
        self, source: Path, target: Path, into: Format, most_bytes: int, seconds: float, tell: Tell
    ) -> None: ...

    def losses(self, path: Path, most_windows: int, seconds: float, tell: Tell) -> list[float]:
        """For each counted token of the passage: minus the logarithm of its probability."""
        ...

    def speed(self, path: Path, settings: Settings, seconds: float, tell: Tell) -> Speed: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeSteps:
    """Steps of inference/tuning/native.py. kv_bytes: of the context that a speed is measured with."""

    n_threads: int
    n_gpu_layers: int
    kv_type: str
    kv_bytes: int
    measured_seconds: float
    """Of each of the three speeds, at least."""
    module: str = "inference.tuning.native"

    def quantize(self, source: Path, target: Path, into: Format, most_bytes: int, seconds: float, tell: Tell) -> None:
        question = {"job": "quantize", "target": str(target), "file_type": into.number, "n_threads": self.n_threads}
        self._ask(source, question, seconds, tell, most_bytes=most_bytes)

    def losses(self, path: Path, most_windows: int, seconds: float, tell: Tell) -> list[float]:
        passage = PASSAGE.read_text(encoding="utf-8")
        question = {"job": "perplexity", "passage": passage, "most_windows": most_windows, "n_threads": self.n_threads}
        found = self._ask(path, {**question, "n_gpu_layers": self.n_gpu_layers}, seconds, tell)
        return [float(loss) for loss in found["losses"]]

    def speed(self, path: Path, settings: Settings, seconds: float, tell: Tell) -> Speed:
        question = {
            "job": "speed",
            "n_threads": settings.n_threads,
            "flash_attention": settings.flash_attention,
            "n_gpu_layers": self.n_gpu_layers,
            "kv_type": self.kv_type,
            "seconds": self.measured_seconds,
        }
        found = self._ask(path, question, seconds, tell)
        return Speed(**{name: float(found[name]) for name in ("prompt", "decode_1", "decode_8")})

    def _ask(
        self, path: Path, question: Mapping[str, Any], seconds: float, tell: Tell, most_bytes: int | None = None
    ) -> dict[str, Any]:
        is_on_cpu = question.get("n_gpu_layers", 0) == 0
        # The weights are mapped, and kernels that repack them keep a second copy. A driver maps more than it uses.
        memory = 2 * size_of(path) + self.kv_bytes + OVERHEAD_BYTES if is_on_cpu else UNLIMITED
        limits = {
            "path": str(path),
            "parent": os.getpid(),
            "cpu_seconds": int(seconds * max(1, os.cpu_count() or 1)) + SPARE_SECONDS,
            "max_memory_bytes": memory,
            "max_file_bytes": most_bytes,
        }
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if is_on_cpu else {}
        return ask_child(self.module, {**question, **limits}, seconds, tell, hidden)


def ask_child(
    module: str, question: Mapping[str, Any], seconds: float, tell: Tell, environment: Mapping[str, str]
) -> dict[str, Any]:
    """Run `python -m module` for at most so many seconds and return its last line. Raises StepFailed."""
    kept = {name: os.environ[name] for name in KEPT_ENVIRONMENT if name in os.environ}
    with tempfile.TemporaryFile() as log, tempfile.TemporaryFile() as asked:
        asked.write(json.dumps(question).encode())
        asked.seek(0)
        child = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=asked,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=BASE_DIR,
            env={**kept, **PATIENT_THREADS, **environment},
            start_new_session=True,  # Ctrl-C reaches the command alone, which kills the child
        )
        assert child.stdout is not None
        try:
            last = _follow(child.stdout, time.monotonic() + seconds, tell)
            status = child.wait(SPARE_SECONDS)
        except (TimeoutError, subprocess.TimeoutExpired) as error:
            raise StepFailed(f"it took longer than the {seconds:.0f} s that were left for it") from error
        finally:
            child.kill()
            child.wait()
            child.stdout.close()
        if status != 0 or last is None:
            raise StepFailed(describe_end(status, tail(log)))
        if not last.pop("ok", False):
            raise StepFailed(with_log(str(last.get("reason", "it gave no reason")), tail(log)))
        return last


def _follow(output: IO[bytes], deadline: float, tell: Tell) -> dict[str, Any] | None:
    """The last line that is an answer, once the child has closed its output. Raises TimeoutError or StepFailed."""
    rest, last, told = b"", None, 0.0

    def hear(part: float) -> None:
        nonlocal told
        told = part
        tell(part)

    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        while True:
            left = max(0.0, deadline - time.monotonic())
            if not selector.select(min(TICK_SECONDS, left)):
                if left <= TICK_SECONDS:
                    raise TimeoutError
                tell(told)
                continue
            if not (data := os.read(output.fileno(), 65536)):
                return last
            *lines, rest = (rest + data).split(b"\n")
            last = _heard(lines, hear) or last
            if len(rest) > MAX_LINE_BYTES:
                raise StepFailed("the child process gave an answer that is not one")


def _heard(lines: Sequence[bytes], tell: Tell) -> dict[str, Any] | None:
    last = None
    for line in lines:
        try:
            said = json.loads(line)
        except ValueError as error:
            raise StepFailed("the child process gave an answer that is not one") from error
        if "part" in said:
            tell(float(said["part"]))
        else:
            last = said
    return last

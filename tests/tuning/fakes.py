"""Fakes for llama.cpp under a search that has rows: small real files, made up losses and speeds."""

from __future__ import annotations

from pathlib import Path

from inference.tuning.formats import Format
from inference.tuning.steps import StepFailed
from tests.inference import gguf_files
from tests.tuning.test_search import FakeSteps, Tell


class WritingSteps(FakeSteps):
    """Writes a small real file for each format; losses and speeds are made up."""

    def quantize(self, source: Path, target: Path, into: Format, most_bytes: int, seconds: float, tell: Tell) -> None:
        if reason := self.fails.get(f"quantize {into.name}"):
            target.write_bytes(b"half of it")
            raise KeyboardInterrupt if reason == "interrupt" else StepFailed(reason)
        target.write_bytes(gguf_files.build({"general.file_type": (4, into.number)}))

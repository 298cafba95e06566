"""A served model whose search writes small files and makes up losses and speeds (fakes.py)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from inference.catalog import registry
    from inference.tuning import optimizer
    from inference.vetting.trial import Trial
    from tests.inference.gguf_files import PassingTrial
    from tests.tuning.fakes import WritingSteps

    steps = WritingSteps({"source": 1.0, "tiny": 1.0, "Q4_0": 1.5, "Q8_0": 1.2})
    monkeypatch.setattr(optimizer, "steps_for", lambda base, header, seconds: steps)
    monkeypatch.setattr(Trial, "run", PassingTrial.run)
    monkeypatch.setattr(Trial, "calls", 0, raising=False)
    registry.forget()
    yield steps
    registry.forget()


@pytest.fixture
def base(fake: Any, tmp_path: Path) -> Any:
    from inference.catalog import model_rows
    from tests.inference import gguf_files

    path = gguf_files.write(tmp_path, "tiny.gguf")
    return model_rows.register(path, "tiny", aliases=["chat"], n_threads=2)

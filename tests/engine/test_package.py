"""What importing the engine costs: no Django, no numpy, no llama.cpp."""

from __future__ import annotations

import subprocess
import sys

import pytest

import inference.engine
from inference.engine import FakeBackend

pytestmark = pytest.mark.unit


def test_the_engine_is_imported_without_django_numpy_or_llama_cpp() -> None:
    code = (
        "import sys, inference.engine; "
        "print([name for name in ('django', 'numpy', 'llama_cpp', 'redis') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert result.stdout.strip() == "[]"


def test_the_llama_backend_is_found_by_name() -> None:
    from inference.engine.llama import LlamaBackend

    assert inference.engine.LlamaBackend is LlamaBackend


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="NoSuchThing"):
        inference.engine.NoSuchThing  # noqa: B018


def test_the_fake_refuses_a_slot_that_is_open_or_does_not_exist() -> None:
    from inference.engine import SamplingParams

    backend = FakeBackend(1, 64)
    backend.open(0, (1,), SamplingParams(), 1)
    for slot_id in (0, 1):
        with pytest.raises(ValueError, match="cannot be opened"):
            backend.open(slot_id, (1,), SamplingParams(), 1)

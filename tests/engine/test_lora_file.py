"""Padding of adapters: what is written is the same adapter, and what cannot be padded is left alone."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inference import demo_adapters
from inference.engine.lora_file import write_padded
from inference.gguf.header import read_header
from tests.inference import gguf_files

pytestmark = pytest.mark.unit

DEMO = Path(demo_adapters.__file__).parent / "smollm2-135m-shakespeare.gguf"
A, B = "blk.0.ffn_up.weight.lora_a", "blk.0.ffn_up.weight.lora_b"


def matrix(path: Path, name: str, offset: int = 0) -> Any:
    """A float16 tensor of a file in which all tensors are float16."""
    header = read_header(path)
    for other, shape in header.shapes.items():
        if other == name:
            break
        offset += -(-2 * shape[0] * shape[1] // 32) * 32
    data = path.read_bytes()[header.data_offset + offset :]
    return np.frombuffer(data, np.float16, shape[0] * shape[1]).reshape(shape[1], shape[0])


def test_the_padded_adapter_changes_the_model_as_the_original(tmp_path: Path) -> None:
    padded = tmp_path / "padded.gguf"
    with padded.open("wb") as file:
        assert write_padded(DEMO, file)
    before, after = read_header(DEMO), read_header(padded)
    assert after.text("adapter.type") == "lora"
    assert after.decimal("adapter.lora.alpha") == 18.0
    assert list(before.shapes) == list(after.shapes)
    for name in list(before.shapes)[-2:]:
        old, new = matrix(DEMO, name), matrix(padded, name)
        assert (new[: old.shape[0], : old.shape[1]] == old).all()
        assert np.count_nonzero(new) == np.count_nonzero(old)
        assert new.size > old.size


@pytest.mark.parametrize(
    "tensors",
    [
        ((A, (64, 6), 0), (B, (6, 2), 0)),  # not a multiple of 4: computed alike already
        ((A, (64, 8), 0), (B, (8, 2), 0), ("blk.1" + A[5:], (64, 4), 0), ("blk.1" + B[5:], (4, 2), 0)),
        ((A, (64, 8), 3), (B, (8, 2), 0)),  # quantized
        ((A, (64, 8, 2), 0), (B, (8, 2, 2), 0)),  # experts
        (("token_embd.weight.lora_a", (8, 4), 0), ("token_embd.weight.lora_b", (8, 64), 0)),
    ],
)
def test_what_cannot_be_padded_is_left_alone(tmp_path: Path, tensors: Any) -> None:
    path = tmp_path / "adapter.gguf"
    path.write_bytes(gguf_files.build({"adapter.lora.alpha": (6, 16.0)}, tensors=tensors))
    target = io.BytesIO()
    assert not write_padded(path, target)
    assert target.getvalue() == b""


def test_a_file_that_is_no_adapter_is_left_alone(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(gguf_files.build({}))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(DEMO.read_bytes()[:5000])
    assert not write_padded(model, io.BytesIO())
    assert not write_padded(broken, io.BytesIO())

"""A LoRA file made so that llama.cpp computes it alike in any company: its rank is padded to an odd number.

On a CPU ggml multiplies float matrices with other kernels for one token than for several, unless the number of rows is
no multiple of 4. With rank 8, sequences of one adapter gave other tokens alone than together (5 of 8 within 64 tokens);
with a ninth row of zeros they give the same, at the same speed. Called by the backend when it loads an adapter.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np

from inference.gguf.header import DEFAULT_ALIGNMENT, FIXED_HEADER, MAGIC, STRING, GGUFError, Header, read_header

ELEMENT_BYTES = {0: 4, 1: 2, 30: 2}
"""F32, F16 and BF16; zero is all bits 0 in each."""
ROWS_OF_OTHER_KERNELS = 4
_FLOAT = 6


@dataclass(frozen=True, slots=True)
class _Tensor:
    """offset: bytes from the start of the data. shape: the length of a row, then the number of rows."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int

    @property
    def is_a(self) -> bool:
        return self.name.endswith(".lora_a")

    @property
    def rank(self) -> int:
        return self.shape[1] if self.is_a else self.shape[0]


def write_padded(source: Path, target: IO[bytes]) -> bool:
    """Write the adapter with one more row of zeros in each A and column in each B, and alpha in proportion.

    False, and nothing is written, where that is not needed or not possible: ranks that differ, quantized tensors, those
    of experts or embeddings, or a file that is no adapter at all, of which llama.cpp will say so.
    """
    try:
        header = read_header(source)
    except GGUFError:
        return False
    with source.open("rb") as file:
        file.seek(header.metadata_end)
        tensors = [_read_tensor(file) for _ in range(header.num_tensors)]
        alpha = header.decimal("adapter.lora.alpha")
        if alpha is None or not _fits(tensors) or "general.alignment" in header.values:
            return False
        rank = tensors[0].rank
        target.write(_head(header, tensors, alpha * (rank + 1) / rank))
        for tensor in tensors:
            file.seek(header.data_offset + tensor.offset)
            data = _padded(tensor, file.read(math.prod(tensor.shape) * ELEMENT_BYTES[tensor.kind]))
            target.write(data + bytes(-len(data) % DEFAULT_ALIGNMENT))
    target.flush()
    return True


def _fits(tensors: list[_Tensor]) -> bool:
    ranks = {tensor.rank for tensor in tensors if len(tensor.shape) == 2}
    return (
        len(ranks) == 1
        and min(ranks) % ROWS_OF_OTHER_KERNELS == 0
        and all(len(tensor.shape) == 2 and tensor.kind in ELEMENT_BYTES for tensor in tensors)
        and all(tensor.name.endswith((".lora_a", ".lora_b")) for tensor in tensors)
        and not any(tensor.name.startswith("token_embd.") for tensor in tensors)  # llama.cpp has these transposed
    )


def _read_tensor(file: BinaryIO) -> _Tensor:
    """An entry of the tensor list, which read_header has checked."""
    name = _read_text(file)
    (num_dimensions,) = struct.unpack("<I", file.read(4))
    shape = struct.unpack(f"<{num_dimensions}Q", file.read(8 * num_dimensions))
    kind, offset = struct.unpack("<IQ", file.read(12))
    return _Tensor(name, shape, kind, offset)


def _read_text(file: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", file.read(8))
    return file.read(length).decode()


def _padded(tensor: _Tensor, data: bytes) -> bytes:
    row_bytes = tensor.shape[0] * ELEMENT_BYTES[tensor.kind]
    if tensor.is_a:
        return data + bytes(row_bytes)
    rows = np.frombuffer(data, np.uint8).reshape(tensor.shape[1], row_bytes)
    return np.pad(rows, ((0, 0), (0, ELEMENT_BYTES[tensor.kind]))).tobytes()


def _padded_shape(tensor: _Tensor) -> tuple[int, int]:
    length, rows = tensor.shape
    return (length, rows + 1) if tensor.is_a else (length + 1, rows)


def _head(header: Header, tensors: list[_Tensor], alpha: float) -> bytes:
    """As much as llama.cpp asks for, and the list of tensors."""
    texts = ("general.architecture", "general.type", "adapter.type")
    pairs = [_text(key) + struct.pack("<I", STRING) + _text(str(header.values.get(key, ""))) for key in texts]
    pairs.append(_text("adapter.lora.alpha") + struct.pack("<If", _FLOAT, alpha))
    head = FIXED_HEADER.pack(MAGIC, header.version, len(tensors), len(pairs)) + b"".join(pairs)
    head += b"".join(_entries(tensors))
    return head + bytes(-len(head) % DEFAULT_ALIGNMENT)


def _entries(tensors: list[_Tensor]) -> Iterator[bytes]:
    offset = 0
    for tensor in tensors:
        shape = _padded_shape(tensor)
        yield _text(tensor.name) + struct.pack("<I2QIQ", 2, *shape, tensor.kind, offset)
        num_bytes = math.prod(shape) * ELEMENT_BYTES[tensor.kind]
        offset += num_bytes + -num_bytes % DEFAULT_ALIGNMENT


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data

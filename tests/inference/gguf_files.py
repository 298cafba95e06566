"""Small GGUF files for tests: valid ones to order, and random damage to them."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from inference.gguf.header import read_header
from inference.gguf.parts import name_of
from inference.vetting.trial import Trial, TrialError
from inference.vetting.trial_load import Unfit
from inference.vetting.trial_template import facts

STRING, ARRAY = 8, 9
METADATA: dict[str, tuple[int, Any]] = {
    "general.architecture": (STRING, "llama"),
    "general.name": (STRING, "Tiny"),
    "general.file_type": (4, 1),
    "llama.context_length": (4, 4096),
    "llama.block_count": (4, 2),
    "llama.embedding_length": (4, 64),
    "llama.attention.head_count": (4, 4),
    "llama.attention.head_count_kv": (4, 2),
    "tokenizer.ggml.model": (STRING, "gpt2"),
    "tokenizer.ggml.tokens": (ARRAY, (STRING, ["<s>", "</s>", "a", "b"])),
    "tokenizer.ggml.token_type": (ARRAY, (5, [3, 3, 1, 1])),
    "tokenizer.ggml.bos_token_id": (4, 0),
    "tokenizer.ggml.eos_token_id": (4, 1),
    "tokenizer.ggml.add_bos_token": (7, True),
    "tokenizer.chat_template": (STRING, "{{ messages[0].content }}"),
}
"""Key → (type, value); an array's value is (type of its items, items)."""
SHAPES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TENSORS = (("token_embd.weight", (64, 4), 0), ("blk.0.ffn_up.weight", (64, 2), 3))
"""Name, dimensions, type. Offsets follow."""
BLOCKS = {0: (1, 4), 3: (32, 20)}


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def value_of(kind: int, value: Any) -> bytes:
    if kind == STRING:
        return text(value)
    if kind == ARRAY:
        item_kind, items = value
        return struct.pack("<IQ", item_kind, len(items)) + b"".join(value_of(item_kind, item) for item in items)
    return struct.pack("<" + SHAPES[kind], value)


def pair(key: str, kind: int, value: Any) -> bytes:
    return text(key) + struct.pack("<I", kind) + value_of(kind, value)


def build(
    changes: dict[str, tuple[int, Any] | None] | None = None,
    *,
    tensors: tuple[tuple[str, tuple[int, ...], int], ...] = TENSORS,
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    """A whole file. `changes` replace metadata; None leaves a key out."""
    metadata = {key: item for key, item in {**METADATA, **(changes or {})}.items() if item is not None}
    head = struct.pack("<4sIQQ", b"GGUF", version, len(tensors), len(metadata))
    head += b"".join(pair(key, *item) for key, item in metadata.items())
    data = b""
    for name, sizes, kind in tensors:
        data += bytes(-len(data) % alignment)
        head += text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, len(data))
        elements = 1
        for size in sizes:
            elements *= size
        block, size = BLOCKS[kind]
        data += bytes(range(256)) * (elements // block * size // 256) + bytes(elements // block * size % 256)
    return head + bytes(-len(head) % alignment) + data


ADAPTER: dict[str, tuple[int, Any] | None] = {
    **dict.fromkeys(METADATA, None),
    "general.architecture": (STRING, "llama"),
    "general.type": (STRING, "adapter"),
    "general.name": (STRING, "Tiny style"),
    "adapter.type": (STRING, "lora"),
    "adapter.lora.alpha": (6, 4.0),
    "adapter.lora.task_name": (STRING, "style"),
    "adapter.lora.prompt_prefix": (STRING, "In style: "),
}
"""What an adapter of the tiny model says."""
MATRICES = (("blk.0.ffn_up.weight.lora_a", (64, 2), 0), ("blk.0.ffn_up.weight.lora_b", (2, 2), 0))


def write_adapter(
    folder: Path,
    name: str = "style.gguf",
    changes: dict[str, tuple[int, Any] | None] | None = None,
    tensors: tuple[tuple[str, tuple[int, ...], int], ...] = MATRICES,
) -> Path:
    """An adapter of rank 2 for the tiny model. Its digest follows its name."""
    path = folder / name
    title = {"general.name": (STRING, f"Tiny {path.stem}")}
    path.write_bytes(build({**ADAPTER, **title, **(changes or {})}, tensors=tensors))
    return path


def write(folder: Path, name: str = "tiny.gguf", **options: Any) -> Path:
    path = folder / name
    path.write_bytes(build(**options))
    return path


def damaged(original: bytes, seed: int, count: int) -> Iterator[bytes]:
    """Files with one to four of: a byte flipped, a number replaced, bytes cut out, put in, or cut off."""
    chance = random.Random(seed)
    for _ in range(count):
        data = bytearray(original)
        for _ in range(chance.randint(1, 4)):
            _damage(data, chance)
        yield bytes(data)


HOSTILE_NUMBERS = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def _damage(data: bytearray, chance: random.Random) -> None:
    place = chance.randrange(max(1, len(data)))
    match chance.randrange(5):
        case 0 if data:
            data[place] ^= 1 << chance.randrange(8)
        case 1:
            data[place : place + 8] = struct.pack("<Q", chance.choice(HOSTILE_NUMBERS))
        case 2:
            del data[place : place + chance.randint(1, 64)]
        case 3:
            data[place:place] = chance.randbytes(chance.randint(1, 64))
        case _:
            del data[place:]


class PassingTrial(Trial):
    """Says that every file loads, tries templates in this process; counts how often it was asked."""

    calls = 0

    def run(self, path: Path, vocabulary: Path) -> dict[str, Any]:
        type(self).calls += 1
        assert vocabulary.is_file()
        return {"vocabulary_size": 4, "add_bos_token": True}

    def run_adapter(self, path: Path, base: Path) -> dict[str, Any]:
        type(self).calls += 1
        assert base.is_file()
        return {"effect": 5.0, "residue": 0.0}

    def run_template(self, source: str) -> dict[str, Any]:
        try:
            return facts(source)
        except Unfit as error:
            raise TrialError(str(error)) from error


class FailingTrial(Trial):
    def run(self, path: Path, vocabulary: Path) -> dict[str, Any]:
        raise TrialError("llama.cpp crashed on it (SIGSEGV)")

    def run_adapter(self, path: Path, base: Path) -> dict[str, Any]:
        raise TrialError("llama.cpp crashed on it (SIGSEGV)")


def split(source: Path, folder: Path, count: int, stem: str = "tiny") -> Path:
    """Writes a file in `count` parts, as llama.cpp's gguf-split does, and returns the first."""
    header, data = read_header(source), source.read_bytes()
    entries = list(_entries(data, header.metadata_end, header.num_tensors))
    ends = [offset for _, offset in entries[1:]] + [len(data) - header.data_offset]
    share = -(-len(entries) // count)
    for number in range(count):
        own = {
            "split.no": (2, number),
            "split.count": (2, count),
            "split.tensors.count": (5, len(entries)),
        }
        pairs = b"".join(pair(key, *item) for key, item in own.items())
        known = data[24 : header.metadata_end] if number == 0 else b""
        infos, weights = b"", b""
        for place in range(number * share, min(len(entries), (number + 1) * share)):
            entry, offset = entries[place]
            weights += bytes(-len(weights) % 32)
            infos += entry + struct.pack("<Q", len(weights))
            weights += data[header.data_offset + offset : header.data_offset + ends[place]]
        num_tensors = max(0, min(len(entries), (number + 1) * share) - number * share)
        num_pairs = 3 + (len(header.values) if number == 0 else 0)
        head = struct.pack("<4sIQQ", b"GGUF", 3, num_tensors, num_pairs) + known + pairs + infos
        (folder / name_of(stem, number + 1, count)).write_bytes(head + bytes(-len(head) % 32) + weights)
    return folder / name_of(stem, 1, count)


def _entries(data: bytes, position: int, count: int) -> Iterator[tuple[bytes, int]]:
    """The tensor list: each entry without its offset, and that."""
    for _ in range(count):
        begin = position
        position += 8 + struct.unpack_from("<Q", data, position)[0]
        position += 4 + 8 * struct.unpack_from("<I", data, position)[0] + 4
        yield data[begin:position], struct.unpack_from("<Q", data, position)[0]
        position += 8

"""GGUF headers, read with bounds: what a model file says about itself, and a copy of it without weights.

A file is hostile until proven otherwise: every count and length is checked before anything is read or allocated, big
arrays are walked and not kept. No mmap, no numpy, no llama_cpp. The registry calls it, on any thread, file by file.
Layout: the GGUF specification of the ggml project (versions 2 and 3, little endian).
"""

from __future__ import annotations

import contextlib
import math
import os
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from inference.gguf.parts import parts_of, place_among

MAGIC = b"GGUF"
VERSIONS = (2, 3)
FIXED_HEADER = struct.Struct("<4sIQQ")
"""Magic, version, number of tensors, number of metadata pairs."""

MAX_PAIRS = 4096
MAX_TENSORS = 65536
MAX_KEY_BYTES = 1024
MAX_STRING_BYTES = 1 << 20
MAX_ARRAY_LENGTH = 1 << 24
MAX_KEPT_NUMBERS = 1024
"""Longest array of numbers whose values are kept, such as key-value heads per layer."""
MAX_LISTED_STRINGS = 1 << 21
"""Strings in all arrays together; the largest vocabularies have about 800,000 tokens and merges."""
MAX_HEADER_BYTES = 128 << 20
MAX_TENSOR_NAME_BYTES = 63
MAX_DIMENSIONS = 4
MAX_TENSOR_ELEMENTS = 1 << 44
MAX_ALIGNMENT = 1 << 16
SPLIT = "split."
"""Keys that only a model in several files has."""
CHAT_TEMPLATE = "tokenizer.chat_template"
MAX_NAMED_TEMPLATES = 8
DENSE_HEAD = "dense_"
"""Tensors behind the pooling of some models made for vectors."""
DEFAULT_ALIGNMENT = 32

STRING, ARRAY = 8, 9
SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
U32, U64 = struct.Struct("<I"), struct.Struct("<Q")

TENSOR_TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}
"""ggml's tensor types by number: name, elements of a block, bytes of a block."""

FILE_TYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    19: "IQ2_XXS",
    20: "IQ2_XS",
    21: "Q2_K_S",
    22: "IQ3_XS",
    23: "IQ3_XXS",
    24: "IQ1_S",
    25: "IQ4_NL",
    26: "IQ3_S",
    27: "IQ3_M",
    28: "IQ2_S",
    29: "IQ2_M",
    30: "IQ4_XS",
    31: "IQ1_M",
    32: "BF16",
    36: "TQ1_0",
    37: "TQ2_0",
    38: "MXFP4_MOE",
    39: "NVFP4",
    40: "Q1_0",
    41: "Q2_0",
}
"""llama.cpp's numbers of `general.file_type`."""


class GGUFError(Exception):
    """A file that is not a usable GGUF. `code` is stable, the message says what is wrong and what to do."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True, slots=True)
class ArrayInfo:
    """An array that was walked and not kept."""

    item_type: int
    length: int


Value = str | int | float | bool | ArrayInfo | tuple[Any, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a GGUF file says about itself. Offsets and sizes are bytes.

    Of a model in several files: metadata and offsets of the first one, tensors and sizes of all.
    """

    version: int
    values: Mapping[str, Value]
    num_tensors: int
    num_parameters: int
    tensor_bytes: int
    tensor_types: Mapping[str, int] = field(default_factory=dict)
    """Bytes of each tensor type, by name."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict, repr=False)
    """Dimensions of each tensor, the length of a row first."""
    metadata_end: int
    data_offset: int
    size_bytes: int
    num_parts: int = 1
    split_pairs: tuple[tuple[int, int], ...] = field(default=(), repr=False)
    """Where the keys that belong to the split begin and end."""

    @property
    def architecture(self) -> str:
        return str(self.values["general.architecture"])

    @property
    def kind(self) -> str:
        """`model`, `adapter`, `mmproj`, ...; files from before that key existed are models."""
        return self.text("general.type") or "model"

    def text(self, key: str) -> str | None:
        value = self.values.get(key)
        return value if isinstance(value, str) else None

    def number(self, key: str) -> int | None:
        value = self.values.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def decimal(self, key: str) -> float | None:
        value = self.values.get(key)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

    def of_architecture(self, key: str) -> int | None:
        return self.number(f"{self.architecture}.{key}")

    @property
    def context_length(self) -> int | None:
        return self.of_architecture("context_length")

    @property
    def vocabulary_size(self) -> int | None:
        tokens = self.values.get("tokenizer.ggml.tokens")
        if isinstance(tokens, ArrayInfo):
            return tokens.length
        return self.of_architecture("vocab_size")

    @property
    def quantization(self) -> str:
        """The name of the file type, else of the tensor type that fills most of the file."""
        number = self.number("general.file_type")
        named = None if number is None else FILE_TYPES.get(number)
        return named or max(self.tensor_types, key=self.tensor_types.__getitem__, default="unknown")

    def chat_templates(self) -> dict[str, str]:
        """By name; that of most files is `default`. A few, such as `tool_use`, have keys of their own."""
        texts = {"default": self.text(CHAT_TEMPLATE)}
        named = [key for key in self.values if key.startswith(f"{CHAT_TEMPLATE}.")]
        texts.update({key.removeprefix(f"{CHAT_TEMPLATE}."): self.text(key) for key in named[:MAX_NAMED_TEMPLATES]})
        return {name: text for name, text in texts.items() if text}

    def kv_elements_per_token(self) -> int | None:
        """Numbers that the key-value cache holds for one token over all layers; None where the header does not say.

        An upper bound for models with sliding windows or recurrent layers.
        """
        layers, width = self.of_architecture("block_count"), self.of_architecture("embedding_length")
        heads = self._per_layer("attention.head_count", layers)
        if not layers or not width or not heads:
            return None
        kv_heads = self._per_layer("attention.head_count_kv", layers) or heads
        head_width = width // max(heads)
        key_width = self.of_architecture("attention.key_length") or head_width
        value_width = self.of_architecture("attention.value_length") or head_width
        return sum(kv_heads) * (key_width + value_width)

    def _per_layer(self, key: str, layers: int | None) -> tuple[int, ...] | None:
        """A head count that may be one number or one for each layer; None if absent, senseless or all zero."""
        value = self.values.get(f"{self.architecture}.{key}")
        if isinstance(value, int) and not isinstance(value, bool):
            value = (value,) * min(layers or 0, MAX_KEPT_NUMBERS)
        if not isinstance(value, tuple) or not all(isinstance(item, int) and item >= 0 for item in value):
            return None
        return value if any(value) else None

    def summary(self) -> dict[str, Any]:
        """What ServedModel.metadata keeps: JSON, names without the architecture's prefix."""
        return {
            "gguf_version": self.version,
            "kind": self.kind,
            "architecture": self.architecture,
            "title": self.text("general.name"),
            "license": self.text("general.license"),
            "context_length": self.context_length,
            "block_count": self.of_architecture("block_count"),
            "embedding_length": self.of_architecture("embedding_length"),
            "pooling_type": self.of_architecture("pooling_type"),
            "is_causal": self.values.get(f"{self.architecture}.attention.causal") is not False,
            "has_dense_head": any(name.startswith(DENSE_HEAD) for name in self.shapes),
            "kv_elements_per_token": self.kv_elements_per_token(),
            "vocabulary_size": self.vocabulary_size,
            "tokenizer_model": self.text("tokenizer.ggml.model"),
            "bos_token_id": self.number("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.number("tokenizer.ggml.eos_token_id"),
            "add_bos_token": self.values.get("tokenizer.ggml.add_bos_token"),
            "chat_templates": self.chat_templates(),
            "file_type": self.number("general.file_type"),
            "quantization": self.quantization,
            "num_parameters": self.num_parameters,
            "num_tensors": self.num_tensors,
            "tensor_bytes": self.tensor_bytes,
            "data_offset": self.data_offset,
            "num_parts": self.num_parts,
        }


class _Cursor:
    """A position in the file that refuses to pass the file's end or the header's bound."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._end = min(size, MAX_HEADER_BYTES)
        self._size = size
        self.position = 0
        self.listed_strings = 0
        self.wanted_key = ""
        self.wanted: list[bytes] = []
        self.split_pairs: list[tuple[int, int]] = []

    def _advance(self, count: int) -> None:
        self.position += count
        if self.position > self._end:
            if self.position > self._size:
                raise GGUFError(
                    "gguf_truncated", "The file ends inside its header: it is incomplete or damaged. Copy it again."
                )
            raise GGUFError("gguf_too_large", f"The header is larger than {MAX_HEADER_BYTES >> 20} MiB.")

    def take(self, count: int) -> bytes:
        self._advance(count)
        data = self._file.read(count)
        if len(data) != count:
            raise GGUFError(
                "gguf_truncated", "The file became shorter while it was read. Try again when it is complete."
            )
        return data

    def skip(self, count: int) -> None:
        self._advance(count)
        self._file.seek(count, os.SEEK_CUR)

    def unpack(self, shape: struct.Struct) -> Any:
        return shape.unpack(self.take(shape.size))[0]

    def text(self, what: str, longest: int) -> str:
        length = self.unpack(U64)
        if length > longest:
            raise GGUFError("gguf_too_large", f"{what} is {length} bytes long; {longest} are the most.")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as error:
            raise GGUFError("gguf_malformed", f"{what} is not UTF-8: the file is damaged. Copy it again.") from error


def read_header(path: Path) -> Header:
    """Read and check the header of a model's file, or of all its files where `path` is the first of several.

    Raises GGUFError for everything that is not a usable GGUF.
    """
    first = _read_file(path)
    count, place = first.number("split.count") or 1, place_among(path.name)
    if count == 1 and place is None:
        return first
    if place is None or place[1:] != (1, count):
        raise GGUFError(
            "gguf_split",
            f"The file says that it is one of {count} part(s), and its name does not: put all parts on this machine, "
            "named X-00001-of-0000N.gguf and so on, and give the path of the first, or join them with "
            "`llama-gguf-split --merge`.",
        )
    return _joined([first, *(_read_file(part, is_further_part=True) for part in parts_of(path)[1:])])


def _read_file(path: Path, *, is_further_part: bool = False) -> Header:
    try:
        if not path.is_file():
            raise GGUFError("gguf_missing", f"There is no file {path}: give the path of a .gguf file on this machine.")
        with path.open("rb", buffering=1 << 18) as file:
            size = os.fstat(file.fileno()).st_size
            return _read(_Cursor(file, size), size, is_further_part=is_further_part)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise GGUFError("gguf_unreadable", f"{path} cannot be read: {error}.") from error


def _joined(parts: list[Header]) -> Header:
    """One header of all parts. Raises GGUFError where they do not belong together."""
    first = parts[0]
    shapes: dict[str, tuple[int, ...]] = {}
    types: Counter[str] = Counter()
    for number, part in enumerate(parts):
        if part.number("split.no") != number or part.number("split.count") != len(parts):
            raise GGUFError("gguf_split", f"Part {number + 1} of {len(parts)} is another file's part: copy it again.")
        shapes.update(part.shapes)
        types.update(part.tensor_types)
    num_tensors = sum(part.num_tensors for part in parts)
    if num_tensors > MAX_TENSORS:
        raise GGUFError("gguf_too_large", f"The parts hold {num_tensors} tensors; {MAX_TENSORS} are the most.")
    if not len(shapes) == num_tensors == first.number("split.tensors.count"):
        raise GGUFError("gguf_split", "The parts do not hold the tensors that the first one names: copy them again.")
    return replace(
        first,
        num_tensors=num_tensors,
        num_parameters=sum(part.num_parameters for part in parts),
        tensor_bytes=sum(part.tensor_bytes for part in parts),
        tensor_types=dict(types),
        shapes=shapes,
        size_bytes=sum(part.size_bytes for part in parts),
        num_parts=len(parts),
    )


def read_strings(path: Path, key: str) -> list[bytes]:
    """The items of one array of strings, such as the vocabulary; [] where there is none. Raises GGUFError."""
    try:
        with path.open("rb", buffering=1 << 18) as file:
            cursor = _Cursor(file, size := os.fstat(file.fileno()).st_size)
            cursor.wanted_key = key
            _read(cursor, size)
            return cursor.wanted
    except (OSError, ValueError) as error:
        raise GGUFError("gguf_unreadable", f"{path} cannot be read: {error}.") from error


def _read(cursor: _Cursor, size: int, *, is_further_part: bool = False) -> Header:
    version, num_tensors, num_pairs = _read_fixed(cursor, size)
    values = _read_pairs(cursor, num_pairs)
    metadata_end = cursor.position
    if not is_further_part:  # those name the split alone
        _check_values(values)
    alignment = _alignment(values)
    tensors = _read_tensors(cursor, num_tensors, alignment)
    data_offset = _aligned(cursor.position, alignment)
    if num_tensors and data_offset + tensors.end > size:
        missing = data_offset + tensors.end - size
        raise GGUFError(
            "gguf_truncated", f"{missing} bytes of the weights are missing: the file is incomplete. Copy it again."
        )
    return Header(
        version=version,
        values=values,
        num_tensors=num_tensors,
        num_parameters=tensors.elements,
        tensor_bytes=sum(tensors.types.values()),
        tensor_types=dict(tensors.types),
        shapes=tensors.shapes,
        metadata_end=metadata_end,
        data_offset=data_offset,
        size_bytes=size,
        split_pairs=tuple(cursor.split_pairs),
    )


def _read_fixed(cursor: _Cursor, size: int) -> tuple[int, int, int]:
    if size < FIXED_HEADER.size:
        raise GGUFError("gguf_not_gguf", f"The file has {size} bytes: it is not a GGUF file.")
    magic, version, num_tensors, num_pairs = FIXED_HEADER.unpack(cursor.take(FIXED_HEADER.size))
    if magic != MAGIC:
        raise GGUFError(
            "gguf_not_gguf", "This is not a GGUF file. Convert the model with llama.cpp's convert_hf_to_gguf.py first."
        )
    if version not in VERSIONS:
        hint = "It is big endian. " if version & 0xFFFF == 0 and version else ""
        raise GGUFError(
            "gguf_version",
            f"GGUF version {version} is not supported. {hint}Convert the model again with a current llama.cpp.",
        )
    if num_pairs > MAX_PAIRS:
        raise GGUFError("gguf_too_large", f"The header claims {num_pairs} metadata entries; {MAX_PAIRS} are the most.")
    if num_tensors > MAX_TENSORS:
        raise GGUFError("gguf_too_large", f"The header claims {num_tensors} tensors; {MAX_TENSORS} are the most.")
    return version, num_tensors, num_pairs


def _read_pairs(cursor: _Cursor, count: int) -> dict[str, Value]:
    values: dict[str, Value] = {}
    for _ in range(count):
        begin = cursor.position
        key = cursor.text("A metadata key", MAX_KEY_BYTES)
        if not key or key in values or not key.isprintable():
            raise GGUFError("gguf_malformed", f"The metadata key {key!r} is empty, unprintable or there twice.")
        values[key] = _read_value(cursor, key, cursor.unpack(U32))
        if key.startswith(SPLIT):
            cursor.split_pairs.append((begin, cursor.position))
    return values


def _read_value(cursor: _Cursor, key: str, kind: int) -> Value:
    if kind == STRING:
        text = cursor.text(f"The value of {key!r}", MAX_STRING_BYTES)
        if "\0" in text:  # llama.cpp would read half of it, PostgreSQL would refuse it
            raise GGUFError("gguf_malformed", f"The value of {key!r} contains a NUL character: the file is damaged.")
        return text
    if kind == ARRAY:
        return _read_array(cursor, key)
    if kind not in SCALARS:
        raise GGUFError("gguf_malformed", f"{key!r} has the unknown type {kind}: the file is damaged or too new.")
    value: Value = cursor.unpack(SCALARS[kind])
    return value


def _read_array(cursor: _Cursor, key: str) -> Value:
    kind, length = cursor.unpack(U32), cursor.unpack(U64)
    if length > MAX_ARRAY_LENGTH:
        raise GGUFError("gguf_too_large", f"{key!r} has {length} items; {MAX_ARRAY_LENGTH} are the most.")
    if kind == STRING:
        _skip_strings(cursor, key, length)
        return ArrayInfo(kind, length)
    if kind not in SCALARS:  # an array of arrays too: llama.cpp does not read those either
        raise GGUFError("gguf_malformed", f"The items of {key!r} have the unsupported type {kind}.")
    shape = SCALARS[kind]
    if length > MAX_KEPT_NUMBERS:
        cursor.skip(length * shape.size)
        return ArrayInfo(kind, length)
    return tuple(item for (item,) in shape.iter_unpack(cursor.take(length * shape.size)))


def _skip_strings(cursor: _Cursor, key: str, count: int) -> None:
    cursor.listed_strings += count
    if cursor.listed_strings > MAX_LISTED_STRINGS:
        raise GGUFError("gguf_too_large", f"With {key!r} the lists hold more than {MAX_LISTED_STRINGS} strings.")
    for _ in range(count):
        length = cursor.unpack(U64)
        if length > MAX_STRING_BYTES:
            raise GGUFError("gguf_too_large", f"An item of {key!r} is {length} bytes long.")
        if key == cursor.wanted_key:
            cursor.wanted.append(cursor.take(length))
        else:
            cursor.skip(length)


def _check_values(values: Mapping[str, Value]) -> None:
    if not values.get("general.architecture") or not isinstance(values["general.architecture"], str):
        raise GGUFError("gguf_malformed", "The header names no `general.architecture`: this is not a llama.cpp model.")


def _alignment(values: Mapping[str, Value]) -> int:
    value = values.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(value, int) or not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
        raise GGUFError("gguf_malformed", f"`general.alignment` is {value!r}; it must be a power of two.")
    return value


@dataclass(slots=True)
class _Tensors:
    """Sums over the tensor list. `end`: the byte after the last tensor, counted from the start of the data."""

    end: int = 0
    elements: int = 0
    types: Counter[str] = field(default_factory=Counter)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)


def _read_tensors(cursor: _Cursor, count: int, alignment: int) -> _Tensors:
    tensors = _Tensors()
    for _ in range(count):
        name = cursor.text("A tensor name", MAX_TENSOR_NAME_BYTES)
        if name in tensors.shapes:
            raise GGUFError("gguf_malformed", f"The tensor {name!r} appears twice.")
        _read_tensor(cursor, name, tensors, alignment)
    return tensors


def _read_tensor(cursor: _Cursor, name: str, tensors: _Tensors, alignment: int) -> None:
    sizes = _read_dimensions(cursor, name)
    elements, row = math.prod(sizes), sizes[0]
    kind, offset = cursor.unpack(U32), cursor.unpack(U64)
    if kind not in TENSOR_TYPES:
        raise GGUFError(
            "gguf_unsupported",
            f"The tensor {name!r} has the unknown type {kind}. Quantize the model again with a current llama.cpp.",
        )
    type_name, block, block_bytes = TENSOR_TYPES[kind]
    if row % block:
        raise GGUFError("gguf_malformed", f"Rows of {row} in {name!r} do not fill blocks of {block} ({type_name}).")
    # llama.cpp demands the same: tensors lie one after the other, padded to the alignment, so none overlap.
    if offset != _aligned(tensors.end, alignment):
        raise GGUFError("gguf_malformed", f"The tensor {name!r} is not where it must be: the file is damaged.")
    num_bytes = elements // block * block_bytes
    tensors.end = offset + num_bytes
    tensors.elements += elements
    tensors.types[type_name] += num_bytes
    tensors.shapes[name] = sizes


def _read_dimensions(cursor: _Cursor, name: str) -> tuple[int, ...]:
    """The length of a row, then the number of rows, and so on."""
    count = cursor.unpack(U32)
    if not 1 <= count <= MAX_DIMENSIONS:
        raise GGUFError("gguf_malformed", f"The tensor {name!r} has {count} dimensions; 1 to {MAX_DIMENSIONS} exist.")
    sizes = [cursor.unpack(U64) for _ in range(count)]
    elements = 1
    for size in sizes:
        elements *= size
        if not 1 <= elements <= MAX_TENSOR_ELEMENTS:
            raise GGUFError("gguf_malformed", f"The tensor {name!r} has an impossible size: the file is damaged.")
    return tuple(sizes)


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def write_vocabulary_only(source: Path, target: Path) -> Header:
    """Write `source` without its weights: the same metadata, no tensors, one file. Returns the header of `source`.

    llama.cpp opens the result with `vocab_only`, so hosts that only tokenize need no weights. Atomic: `target`
    appears complete or not at all. Raises GGUFError (source) or OSError (target).
    """
    header = read_header(source)
    scratch = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with source.open("rb") as reader, scratch.open("wb") as writer:
            num_pairs = len(header.values) - len(header.split_pairs)
            writer.write(FIXED_HEADER.pack(MAGIC, header.version, 0, num_pairs))
            position = FIXED_HEADER.size
            for begin, end in (*header.split_pairs, (header.metadata_end, header.metadata_end)):
                reader.seek(position)
                _copy(reader, writer, begin - position)
                position = end
            writer.flush()
            os.fsync(writer.fileno())
        scratch.replace(target)
    finally:
        with contextlib.suppress(OSError):  # it was renamed, or the folder is gone: told already
            scratch.unlink()
    return header


def _copy(reader: BinaryIO, writer: BinaryIO, count: int) -> None:
    while count:
        block = reader.read(min(count, 1 << 20))
        if not block:
            raise GGUFError(
                "gguf_truncated", "The file became shorter while it was read. Try again when it is complete."
            )
        writer.write(block)
        count -= len(block)

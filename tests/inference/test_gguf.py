"""The bounded header reader: what it reads, and that no file harms it."""

from __future__ import annotations

import os
import struct
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.gguf import header as gguf
from inference.gguf.header import GGUFError, read_header, write_vocabulary_only
from tests.inference import gguf_files
from tests.inference.gguf_files import ARRAY, STRING, build

pytestmark = pytest.mark.unit
NUM_DAMAGED = int(os.environ.get("LLMSITE_FUZZ_FILES", "600"))


def read(tmp_path: Path, data: bytes) -> gguf.Header:
    path = tmp_path / "file.gguf"
    path.write_bytes(data)
    return read_header(path)


def refused(tmp_path: Path, data: bytes) -> GGUFError:
    with pytest.raises(GGUFError) as caught:
        read(tmp_path, data)
    return caught.value


def test_a_header_tells_what_the_model_is(tmp_path: Path) -> None:
    header = read(tmp_path, build())
    summary = header.summary()
    assert summary["architecture"] == "llama"
    assert summary["context_length"] == 4096
    assert summary["vocabulary_size"] == 4
    assert summary["quantization"] == "F16"
    assert summary["num_parameters"] == 64 * 4 + 64 * 2
    assert summary["tensor_bytes"] == 64 * 4 * 4 + 64 * 2 // 32 * 20
    assert summary["chat_templates"] == {"default": "{{ messages[0].content }}"}
    assert (summary["bos_token_id"], summary["eos_token_id"], summary["add_bos_token"]) == (0, 1, True)
    assert header.data_offset % 32 == 0
    assert header.size_bytes == header.data_offset + 1024 + 80


def test_version_2_reads_like_version_3(tmp_path: Path) -> None:
    assert read(tmp_path, build(version=2)).version == 2


def test_long_arrays_are_walked_and_not_kept(tmp_path: Path) -> None:
    tokens = [f"token {number}" for number in range(5000)]
    header = read(
        tmp_path,
        build(
            {"tokenizer.ggml.tokens": (ARRAY, (STRING, tokens)), "tokenizer.ggml.scores": (ARRAY, (6, [0.5] * 5000))}
        ),
    )
    assert header.values["tokenizer.ggml.tokens"] == gguf.ArrayInfo(STRING, 5000)
    assert header.values["tokenizer.ggml.scores"] == gguf.ArrayInfo(6, 5000)
    assert header.vocabulary_size == 5000


def test_the_vocabulary_size_may_come_from_the_architecture(tmp_path: Path) -> None:
    header = read(tmp_path, build({"tokenizer.ggml.tokens": None, "llama.vocab_size": (4, 123)}))
    assert header.vocabulary_size == 123


def test_the_quantization_falls_back_to_the_type_of_most_bytes(tmp_path: Path) -> None:
    assert read(tmp_path, build({"general.file_type": None})).quantization == "F32"
    assert read(tmp_path, build({"general.file_type": (4, 0)})).quantization == "F32"
    assert read(tmp_path, build({"general.file_type": None}, tensors=())).quantization == "unknown"


@pytest.mark.parametrize(
    ("changes", "elements"),
    [
        ({}, 2 * 2 * (16 + 16)),
        ({"llama.attention.head_count_kv": None}, 2 * 4 * (16 + 16)),
        ({"llama.attention.head_count_kv": (ARRAY, (4, [1, 2]))}, (1 + 2) * (16 + 16)),
        ({"llama.attention.key_length": (4, 8), "llama.attention.value_length": (4, 24)}, 2 * 2 * (8 + 24)),
        ({"llama.attention.head_count": None}, None),
        ({"llama.attention.head_count": (4, 0)}, None),
        ({"llama.block_count": (4, 0)}, None),
        ({"llama.attention.head_count": (ARRAY, (5, [-1, 2]))}, None),
        ({"llama.embedding_length": (STRING, "wide")}, None),
    ],
)
def test_the_key_value_cache_is_sized_from_the_heads(
    tmp_path: Path, changes: dict[str, tuple[int, object] | None], elements: int | None
) -> None:
    assert read(tmp_path, build(changes)).kv_elements_per_token() == elements


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "gguf_not_gguf"),
        (b"GGUF", "gguf_not_gguf"),
        (b"PK\x03\x04" + bytes(60), "gguf_not_gguf"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "gguf_version"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "gguf_version"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), "gguf_too_large"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**40, 0), "gguf_too_large"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1), "gguf_truncated"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**60), "gguf_too_large"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 0) + bytes(8), "gguf_malformed"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "gguf_malformed"),
    ],
)
def test_what_is_not_a_gguf_is_refused_by_its_first_bytes(tmp_path: Path, data: bytes, code: str) -> None:
    assert refused(tmp_path, data).code == code


def test_big_endian_files_are_named_as_such(tmp_path: Path) -> None:
    assert "big endian" in refused(tmp_path, b"GGUF" + struct.pack(">IQQ", 3, 0, 0)).message


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"general.architecture": None}, "gguf_malformed"),
        ({"general.architecture": (4, 7)}, "gguf_malformed"),
        ({"general.alignment": (4, 24)}, "gguf_malformed"),
        ({"general.alignment": (4, 0)}, "gguf_malformed"),
        ({"general.alignment": (STRING, "32")}, "gguf_malformed"),
        ({"split.count": (2, 3)}, "gguf_split"),
        ({"general.name": (STRING, "a\0b")}, "gguf_malformed"),
        ({"general.name": (STRING, "x" * (gguf.MAX_STRING_BYTES + 1))}, "gguf_too_large"),
        ({"k" * 1025: (4, 1)}, "gguf_too_large"),
        ({"line\nbreak": (4, 1)}, "gguf_malformed"),
    ],
)
def test_metadata_outside_its_bounds_is_refused(
    tmp_path: Path, changes: dict[str, tuple[int, object] | None], code: str
) -> None:
    assert refused(tmp_path, build(changes)).code == code


def raw_pair(after_key: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + gguf_files.text("key") + after_key


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (raw_pair(struct.pack("<I", 99)), "gguf_malformed"),
        (raw_pair(struct.pack("<IIQ", 9, 9, 1) + bytes(40)), "gguf_malformed"),
        (raw_pair(struct.pack("<IIQ", 9, 4, 2**40)), "gguf_too_large"),
        (raw_pair(struct.pack("<IIQ", 9, 8, gguf.MAX_LISTED_STRINGS + 1)), "gguf_too_large"),
        (raw_pair(struct.pack("<IIQQ", 9, 8, 1, 2**50)), "gguf_too_large"),
        (raw_pair(struct.pack("<IIQ", 9, 10, 5000) + bytes(100)), "gguf_truncated"),
        (raw_pair(struct.pack("<IQ", 8, 2) + b"\xff\xfe"), "gguf_malformed"),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + gguf_files.pair("a", 4, 1) + gguf_files.pair("a", 4, 1),
            "gguf_malformed",
        ),
    ],
)
def test_values_that_llama_cpp_could_choke_on_are_refused(tmp_path: Path, data: bytes, code: str) -> None:
    assert refused(tmp_path, data).code == code


@pytest.mark.parametrize(
    ("tensor", "code"),
    [
        (("x", (64,), 4), "gguf_unsupported"),
        (("x", (33,), 3), "gguf_malformed"),
        (("x", (0,), 0), "gguf_malformed"),
        (("x", (2**40, 2**40), 0), "gguf_malformed"),
        (("x", (), 0), "gguf_malformed"),
        (("x", (1, 1, 1, 1, 1), 0), "gguf_malformed"),
        (("x" * 64, (1,), 0), "gguf_too_large"),
    ],
)
def test_impossible_tensors_are_refused(tmp_path: Path, tensor: tuple[str, tuple[int, ...], int], code: str) -> None:
    name, sizes, kind = tensor
    empty = build(tensors=())
    info = gguf_files.text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, 0)
    data = empty[:8] + struct.pack("<Q", 1) + empty[16 : read(tmp_path, empty).metadata_end] + info + bytes(4096)
    assert refused(tmp_path, data).code == code


def test_tensors_that_overlap_or_repeat_are_refused(tmp_path: Path) -> None:
    two = build(tensors=(("first", (8,), 0), ("again", (8,), 0)))
    assert "twice" in refused(tmp_path, two.replace(b"again", b"first")).message
    second = two.index(b"again") + 5 + 4 + 8 + 4
    assert "not where it must be" in refused(tmp_path, two[:second] + bytes(8) + two[second + 8 :]).message


def test_missing_weights_are_counted(tmp_path: Path) -> None:
    error = refused(tmp_path, build()[:-7])
    assert (error.code, "7 bytes" in error.message) == ("gguf_truncated", True)


def test_a_header_beyond_the_bound_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "MAX_HEADER_BYTES", 256)
    assert refused(tmp_path, build()).code == "gguf_too_large"


def test_a_file_that_is_not_there_or_no_file_says_so(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path, Path("/dev/null"), Path("nul\0.gguf")):
        with pytest.raises(GGUFError) as caught:
            read_header(path)
        assert caught.value.code in {"gguf_missing", "gguf_unreadable"}


def test_the_vocabulary_file_keeps_the_metadata_and_no_tensor(tmp_path: Path) -> None:
    source, target = gguf_files.write(tmp_path), tmp_path / "vocabulary.gguf"
    assert write_vocabulary_only(source, target) == read_header(source)
    copy = read_header(target)
    assert (copy.num_tensors, copy.values) == (0, read_header(source).values)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.gguf", "vocabulary.gguf"]


def test_a_refused_source_leaves_no_vocabulary_file(tmp_path: Path) -> None:
    source, target = tmp_path / "bad.gguf", tmp_path / "vocabulary.gguf"
    source.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(GGUFError):
        write_vocabulary_only(source, target)
    assert not target.exists()


def outcome(path: Path) -> str:
    """`parsed`, or the refusal's code; anything else escapes and fails the test."""
    try:
        header = read_header(path)
        header.summary()
    except GGUFError as error:
        assert error.message.endswith((".", "`"))
        return error.code
    return "parsed"


def test_damaged_files_are_each_parsed_or_refused_in_bounded_time_and_memory(tmp_path: Path) -> None:
    path, outcomes, slowest = tmp_path / "damaged.gguf", dict[str, int](), 0.0
    tracemalloc.start()
    try:
        for data in gguf_files.damaged(build(), seed=20, count=NUM_DAMAGED):
            path.write_bytes(data)
            began = time.perf_counter()
            result = outcome(path)
            slowest = max(slowest, time.perf_counter() - began)
            outcomes[result] = outcomes.get(result, 0) + 1
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(outcomes.values()) == NUM_DAMAGED >= 500
    assert {"gguf_truncated", "gguf_malformed", "gguf_too_large", "parsed"} <= set(outcomes)
    assert slowest < 2
    assert peak < 16 << 20


@settings(max_examples=200)
@given(st.binary(max_size=400))
def test_bytes_after_the_magic_never_crash_the_reader(tmp_path_factory: pytest.TempPathFactory, tail: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "random.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0" + tail)
    outcome(path)


def test_the_longest_lists_that_are_allowed_are_walked_in_time(tmp_path: Path) -> None:
    count = 500_000
    strings = struct.pack("<IIQ", 9, 8, count) + (struct.pack("<Q", 2) + b"ab") * count
    path = tmp_path / "long.gguf"
    path.write_bytes(raw_pair(strings))
    began = time.thread_time()
    assert outcome(path) == "gguf_malformed"  # it names no architecture, once all of it was walked
    assert time.thread_time() - began < 2

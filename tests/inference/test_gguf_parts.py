"""Models in several files: their names, one header of all, one digest, and the real model in three parts."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import pytest

from inference.gguf import header as gguf
from inference.gguf.header import GGUFError, read_header
from inference.gguf.parts import MAX_PARTS, name_of, parts_of, place_among, size_of
from inference.vetting.inspection import check_header, hash_file, inspect, stamp_of
from tests.inference import gguf_files


@pytest.mark.unit
@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("big-00001-of-00003.gguf", ("big", 1, 3)),
        ("big-00003-of-00003.gguf", ("big", 3, 3)),
        ("a-00001-of-00002-00002-of-00004.gguf", ("a-00001-of-00002", 2, 4)),
        ("big.gguf", None),
        ("big-00001-of-00001.gguf", None),
        ("big-00000-of-00003.gguf", None),
        ("big-00004-of-00003.gguf", None),
        ("big-1-of-3.gguf", None),
        (f"big-00001-of-{MAX_PARTS + 1:05d}.gguf", None),
        ("-00001-of-00003.gguf", None),
    ],
)
def test_a_name_says_which_part_it_is(name: str, place: tuple[str, int, int] | None) -> None:
    assert place_among(name) == place


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return gguf_files.write(tmp_path, "whole.gguf")


def test_the_parts_are_read_as_one_model(tmp_path: Path, whole: Path) -> None:
    first = gguf_files.split(whole, tmp_path, 2)
    one, several = read_header(whole), read_header(first)
    assert [each.name for each in parts_of(first)] == ["tiny-00001-of-00002.gguf", "tiny-00002-of-00002.gguf"]
    assert several.num_parts == 2 and several.shapes == one.shapes and several.tensor_types == one.tensor_types
    assert (several.num_tensors, several.num_parameters) == (one.num_tensors, one.num_parameters)
    assert several.tensor_bytes == one.tensor_bytes
    assert several.size_bytes == size_of(first) == sum(part.stat().st_size for part in parts_of(first))
    assert check_header(first).summary()["num_parts"] == 2


def test_the_digest_and_the_stamp_are_those_of_all_parts(tmp_path: Path, whole: Path) -> None:
    first = gguf_files.split(whole, tmp_path, 2)
    seen: list[tuple[int, int]] = []
    digest = hash_file(first, lambda done, total: seen.append((done, total)))
    assert digest == hashlib.sha256(b"".join(part.read_bytes() for part in parts_of(first))).hexdigest()
    assert seen[-1] == (size_of(first), size_of(first))
    before = stamp_of(first)
    second = parts_of(first)[1]
    second.write_bytes(second.read_bytes() + b"\0")
    assert stamp_of(first) != before
    second.unlink()
    assert stamp_of(first) == {}


def test_the_vocabulary_file_of_a_split_model_is_one_file(tmp_path: Path, whole: Path) -> None:
    first = gguf_files.split(whole, tmp_path, 2)
    gguf.write_vocabulary_only(first, tmp_path / "vocabulary.gguf")
    made = read_header(tmp_path / "vocabulary.gguf")
    assert made.values == read_header(whole).values and made.num_tensors == 0


def refused(path: Path) -> GGUFError:
    with pytest.raises(GGUFError) as caught:
        read_header(path)
    return caught.value


def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path, whole: Path) -> None:
    first = gguf_files.split(whole, tmp_path, 2)
    second = parts_of(first)[1]
    assert refused(second).code in ("gguf_malformed", "gguf_split")  # the second alone says nothing about the model

    renamed = tmp_path / "renamed.gguf"
    renamed.write_bytes(first.read_bytes())
    assert "and its name does not" in refused(renamed).message

    good = second.read_bytes()
    second.write_bytes(first.read_bytes())
    assert refused(first).code == "gguf_split"
    second.write_bytes(good[:-8])
    assert refused(first).code == "gguf_truncated"
    second.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**40, 0))
    assert refused(first).code == "gguf_too_large"
    second.unlink()
    assert refused(first).code == "gguf_missing" and second.name in refused(first).message


def test_a_whole_file_with_the_name_of_a_part_is_refused(tmp_path: Path, whole: Path) -> None:
    path = whole.rename(tmp_path / name_of("tiny", 1, 2))
    assert refused(path).code == "gguf_split"


def test_damage_anywhere_in_a_further_part_is_an_error_and_no_crash(tmp_path: Path, whole: Path) -> None:
    first = gguf_files.split(whole, tmp_path, 2)
    second = parts_of(first)[1]
    for data in gguf_files.damaged(second.read_bytes(), seed=7, count=150):
        second.write_bytes(data)
        try:
            assert read_header(first).num_parts == 2
        except GGUFError as error:
            assert error.code.startswith("gguf_")


@pytest.mark.model
def test_llama_cpp_loads_the_real_model_from_three_parts(tmp_path: Path, model_path: Path) -> None:
    first = gguf_files.split(model_path, tmp_path, 3, "smollm2")
    found = inspect(first)
    assert found.metadata["num_parts"] == 3 and found.size_bytes == size_of(first)
    assert found.metadata["trial"]["vocabulary_size"] == 49152

"""The adapters that come with llmsite, and the parts of the script that makes them which need no torch."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from inference.demo_adapters import lessons, train_lora
from inference.gguf.header import read_header

pytestmark = pytest.mark.unit
FOLDER = Path(train_lora.__file__).parent


def test_the_files_are_those_of_the_checksums() -> None:
    lines = [line.split("  ") for line in (FOLDER / "SHA256SUMS").read_text().splitlines()]
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in FOLDER.glob("*.gguf")}
    assert {name: digest for digest, name in lines} == found
    assert len(found) == 2


def test_the_readme_says_what_the_files_are() -> None:
    text = (FOLDER / "README.md").read_text()
    for path in FOLDER.glob("*.gguf"):
        assert f"`{path.name}`" in text
        header = read_header(path)
        assert (header.kind, header.num_tensors, header.decimal("adapter.lora.alpha")) == ("adapter", 240, 16.0)
        assert header.shapes["blk.29.ffn_down.weight.lora_a"] == (1536, 8)


def test_the_script_explains_itself_and_says_what_is_missing(tmp_path: Path) -> None:
    script = str(FOLDER / "train_lora.py")
    told = subprocess.run([sys.executable, script, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    for option in ("--texts", "--lessons", "--json-reply", "--base", "--rank", "--target"):
        assert option in told.stdout
    command = [sys.executable, script, "--base", "a.gguf", "--out", "b.gguf", "--json-reply"]
    wrong = subprocess.run([*command, "--steps", "0"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (wrong.returncode, wrong.stderr.strip()) == (1, "--steps must be more than 0")


def options(*words: str) -> train_lora.Settings:
    return train_lora.settings_of(train_lora.parser().parse_args(["--base", "a", "--out", "b", "--json-reply", *words]))


def test_settings_have_defaults_and_bounds() -> None:
    settings = options("--rank", "4", "--target", "attn_k", "--target", "attn_q")
    assert (settings.rank, settings.targets, settings.steps) == (4, ("attn_k", "attn_q"), 120)
    assert options().targets == train_lora.DEFAULT_TARGETS
    with pytest.raises(ValueError, match="--learning-rate must be more than 0"):
        options("--learning-rate", "-1")


def test_the_learning_rate_rises_and_falls() -> None:
    settings = options("--steps", "100", "--learning-rate", "1")
    rates = [train_lora.learning_rate(step, settings) for step in range(100)]
    assert rates[0] == pytest.approx(0.05)
    assert max(rates) == rates[train_lora.WARM_STEPS - 1]
    assert rates[-1] == pytest.approx(0.109)


def test_only_the_reply_of_a_lesson_is_learned() -> None:
    tokens, wanted = train_lora.lesson_sample([1, 2, 3], [4, 5])
    assert (tokens, wanted) == ([1, 2, 3, 4], [train_lora.IGNORED, train_lora.IGNORED, 4, 5])


def test_a_window_of_text_is_followed_by_its_next_token() -> None:
    chance = random.Random(1)
    for _ in range(50):
        tokens, wanted = train_lora.text_sample(list(range(100)), 10, chance)
        assert wanted == [token + 1 for token in tokens]
        assert len(tokens) == 10
    assert train_lora.text_sample([1, 2, 3], 10, chance) == ([1, 2], [2, 3])


def test_rows_are_padded_to_one_length() -> None:
    rows, wanted = train_lora.padded([([1, 2, 3], [2, 3, 4]), ([5], [6])], padding=0)
    assert rows == [[1, 2, 3], [5, 0, 0]]
    assert wanted == [[2, 3, 4], [6, train_lora.IGNORED, train_lora.IGNORED]]


def test_rows_of_a_query_are_put_in_the_order_of_the_file() -> None:
    rows = np.arange(8, dtype=np.float32).reshape(8, 1)  # two heads of four: halves 0 1 | 2 3 and 4 5 | 6 7
    assert train_lora.rope_order(rows, 2).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_matrices_have_the_names_and_shapes_that_llama_cpp_reads() -> None:
    a, b = np.ones((2, 8), np.float32), np.arange(16, dtype=np.float32).reshape(8, 2)
    made = train_lora.matrices_of(train_lora.gguf_name(3, "attn_q"), a, b, num_heads=2, num_kv_heads=1)
    assert list(made) == ["blk.3.attn_q.weight.lora_a", "blk.3.attn_q.weight.lora_b"]
    first, second = made.values()
    assert (first.shape, second.shape, first.dtype) == ((2, 8), (8, 2), np.float16)
    assert second[:, 0].tolist() == [0, 4, 2, 6, 8, 12, 10, 14]
    plain = train_lora.matrices_of(train_lora.gguf_name(3, "ffn_down"), a, b, num_heads=2, num_kv_heads=1)
    assert plain["blk.3.ffn_down.weight.lora_b"].tolist() == b.tolist()


def test_lessons_are_questions_with_answers_in_json() -> None:
    found = lessons.json_lessons()
    assert len(found) > 150
    assert len({lesson.prompt for lesson in found}) == len(found)
    assert all(set(json.loads(lesson.reply)) == {"topic", "reply"} for lesson in found)


def test_lessons_of_ones_own_are_read_with_the_line_at_fault(tmp_path: Path) -> None:
    path = tmp_path / "lessons.jsonl"
    path.write_text('{"prompt": "a", "reply": "b"}\n\n{"prompt": "c", "reply": "d"}\n')
    assert lessons.read_lessons(path) == [lessons.Lesson("a", "b"), lessons.Lesson("c", "d")]
    for text, said in (('{"prompt": "a"}', "line 1"), ("\n[]", "line 2"), ("{", "line 1"), ("", "no lesson")):
        path.write_text(text)
        with pytest.raises(ValueError, match=said):
            lessons.read_lessons(path)


def test_texts_are_cleaned_and_in_order(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no text"):
        lessons.read_texts(tmp_path)
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("licence *END* here\r\n\n\n\n  To   be,\n or not")
    assert lessons.read_texts(tmp_path) == ["here\n\nTo be,\nor not", "second"]

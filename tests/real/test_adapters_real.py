"""Adapters with the real model and real children: proof of effect, wrong bases, cut and damaged files."""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from accounts.models import Plan, Tenant
from inference.catalog import adapters, registry
from inference.gguf.header import read_header
from inference.models import Adapter, AdapterGrant
from inference.vetting import trial_adapter, trial_load
from inference.vetting.adapter_file import Base, check_adapter, inspect_adapter
from inference.vetting.inspection import RegistrationError
from inference.vetting.trial import Trial, TrialError
from llmsite import demo
from tests.inference import gguf_files
from tests.timing import Stopwatch

pytestmark = [pytest.mark.model, pytest.mark.integration]
SHAKESPEARE = demo.ADAPTER_FOLDER / "smollm2-135m-shakespeare.gguf"
JSON_REPLY = demo.ADAPTER_FOLDER / "smollm2-135m-json-reply.gguf"


@pytest.fixture
def base(model_path: Path) -> Base:
    return Base(path=model_path, digest="0" * 64)


@pytest.fixture
def _fresh() -> Iterator[None]:
    registry.forget()
    adapters.forget()
    yield
    registry.forget()
    adapters.forget()


def places_of_b(path: Path) -> list[tuple[int, int]]:
    """(offset in the file, bytes) of every B matrix; tensors follow one another, padded to 32 bytes."""
    header, found, offset = read_header(path), [], 0
    for name, shape in header.shapes.items():
        size = math.prod(shape) * 2
        if name.endswith(".lora_b"):
            found.append((header.data_offset + offset, size))
        offset += -(-size // 32) * 32
    return found


def with_b(folder: Path, fill: bytes) -> Path:
    """The Shakespeare adapter with every number of every B matrix replaced."""
    data = bytearray(SHAKESPEARE.read_bytes())
    for place, size in places_of_b(SHAKESPEARE):
        data[place : place + size] = fill * (size // len(fill))
    path = folder / "changed.gguf"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("path", [SHAKESPEARE, JSON_REPLY], ids=lambda path: path.stem)
def test_a_demo_adapter_moves_the_scores_and_leaves_nothing_behind(path: Path, base: Base) -> None:
    examined = inspect_adapter(path, base)
    assert (examined.facts.rank, examined.facts.alpha) == (8, 16.0)
    assert examined.facts.targets == ("attn_output", "attn_q", "attn_v", "ffn_down")
    report = examined.metadata["trial"]
    assert report["effect"] > 1.0
    assert report["residue"] == 0.0


@pytest.mark.django_db
@pytest.mark.usefixtures("_fresh")
def test_the_demo_registers_and_grants_both(tmp_path: Path) -> None:
    demo.make_demo(tmp_path / "demo.json", "http://127.0.0.1:8000", say=lambda _: None)
    grants = set(AdapterGrant.objects.values_list("tenant__name", "adapter__name", "position"))
    assert grants == {
        ("Alice's bakery", "shakespeare", 0),
        ("Bob's bookshop", "json-reply", 0),
        ("Bob's bookshop", "shakespeare", 1),
    }
    charlie = Tenant.objects.create(name="Charlie's", plan=Plan.objects.first())
    served = registry.every()[0]
    assert adapters.granted(charlie.pk, served) == ()
    bob = Tenant.objects.get(name="Bob's bookshop")
    both = adapters.choose(bob.pk, served, [("json-reply", 0.5), (1, 0.5)]).vector
    assert both == tuple((row.digest, 0.5) for row in Adapter.objects.order_by("digest"))


def test_an_adapter_of_zeros_has_no_effect(tmp_path: Path, base: Base) -> None:
    with pytest.raises(RegistrationError, match="was not trained") as caught:
        inspect_adapter(with_b(tmp_path, b"\0\0"), base)
    assert caught.value.code == "adapter_without_effect"


def test_an_adapter_whose_numbers_are_none_is_refused(tmp_path: Path, base: Base) -> None:
    with pytest.raises(RegistrationError, match="not numbers") as caught:
        inspect_adapter(with_b(tmp_path, b"\xff\x7f"), base)
    assert caught.value.code == "trial_failed"


def test_an_adapter_of_another_model_is_refused_by_its_shapes(tmp_path: Path, base: Base) -> None:
    tensors = (("blk.0.attn_q.weight.lora_a", (2048, 8), 0), ("blk.0.attn_q.weight.lora_b", (8, 2048), 0))
    with pytest.raises(RegistrationError, match="of 2048 × 2048, the base's is 576 × 576") as caught:
        inspect_adapter(gguf_files.write_adapter(tmp_path, tensors=tensors), base)
    assert caught.value.code == "adapter_wrong_base"
    with pytest.raises(RegistrationError) as caught:
        inspect_adapter(SHAKESPEARE, Base(path=gguf_files.write(tmp_path), digest=""))
    assert caught.value.code == "adapter_wrong_base"


def test_what_the_header_check_would_miss_the_child_refuses_too(tmp_path: Path, model_path: Path) -> None:
    tensors = (("blk.0.attn_q.weight.lora_a", (2048, 8), 0), ("blk.0.attn_q.weight.lora_b", (8, 2048), 0))
    wrong = gguf_files.write_adapter(tmp_path, tensors=tensors)
    with pytest.raises(TrialError, match="cannot apply it"):
        Trial().run_adapter(wrong, model_path)
    with pytest.raises(TrialError, match="cannot apply it"):
        Trial().run_adapter(model_path, model_path)


@pytest.mark.parametrize("kept", [0, 3, 23, 24, 100, 5_000, 20_000, 1_000_000, -1])
def test_a_truncated_adapter_is_refused(tmp_path: Path, base: Base, kept: int) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(SHAKESPEARE.read_bytes()[:kept])
    with pytest.raises(RegistrationError) as caught:
        inspect_adapter(path, base)
    assert caught.value.code in {"gguf_truncated", "gguf_not_gguf"}


def test_damaged_headers_end_in_a_reason_within_two_seconds(tmp_path: Path, model_path: Path) -> None:
    """Only the header reader looks at them here: 600 files, none of which may stop this process."""
    original = SHAKESPEARE.read_bytes()
    header = read_header(SHAKESPEARE)
    path = tmp_path / "damaged.gguf"
    outcomes = {"passed": 0, "refused": 0}
    for number, head in enumerate(gguf_files.damaged(original[: header.data_offset], seed=21, count=600)):
        path.write_bytes(head + original[header.data_offset : header.data_offset + 4096 * (number % 2)])
        watch = Stopwatch()
        try:
            check_adapter(path, model_path)
            outcomes["passed"] += 1
        except RegistrationError as error:
            assert error.message
            outcomes["refused"] += 1
        assert watch.seconds() < 2
    assert outcomes["refused"] == 600


def test_damage_that_the_reader_lets_pass_goes_to_the_child_and_no_further(tmp_path: Path, base: Base) -> None:
    chance = random.Random(22)
    header = read_header(SHAKESPEARE)
    codes = set()
    for _ in range(4):
        data = bytearray(SHAKESPEARE.read_bytes())
        for _ in range(400):
            place = chance.randrange(header.data_offset, len(data) - 2)
            data[place : place + 2] = struct.pack("<H", chance.choice((0x7C00, 0x7FFF, 0xFC00)))
        path = tmp_path / "damaged.gguf"
        path.write_bytes(data)
        with pytest.raises(RegistrationError) as caught:
            inspect_adapter(path, base, trial=Trial(wall_seconds=60))
        codes.add(caught.value.code)
    assert codes == {"trial_failed"}


def test_a_trial_that_takes_too_long_or_too_much_is_ended(model_path: Path) -> None:
    with pytest.raises(TrialError, match=r"within 0\.05 s"):
        Trial(wall_seconds=0.05).run_adapter(SHAKESPEARE, model_path)
    with pytest.raises(TrialError):
        Trial(overhead_bytes=64 << 20).run_adapter(SHAKESPEARE, model_path)


# The child's own work, in this process


def test_the_child_measures_the_adapter(model_path: Path) -> None:
    report = trial_adapter.examine(SHAKESPEARE, model_path)
    assert set(report) == {"effect", "residue"}
    assert report["effect"] > 1.0
    assert report["residue"] == 0.0


@pytest.mark.parametrize(
    ("function", "answer", "said"),
    [
        ("llama_adapter_lora_init", None, "cannot apply it"),
        ("llama_set_adapters_lora", -1, "cannot attach it"),
    ],
)
def test_the_child_names_what_llama_cpp_refuses(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, answer: object, said: str
) -> None:
    import llama_cpp

    monkeypatch.setattr(llama_cpp, function, lambda *_: answer)
    with pytest.raises(trial_load.Unfit, match=said):
        trial_adapter.examine(SHAKESPEARE, model_path)


def test_the_child_answers_what_it_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(trial_adapter, "examine", lambda path, base: asked.append((path, base)) or {"effect": 1.0})
    monkeypatch.setattr(
        trial_adapter, "answer_with", lambda examiner: asked.append(examiner({"path": "a", "base": "b"}))
    )
    trial_adapter.main()
    assert asked == [(Path("a"), Path("b")), {"effect": 1.0}]

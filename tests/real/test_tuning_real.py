"""optimize_model with the real model: written, scored, measured, activated, served with an adapter, reverted."""

from __future__ import annotations

import io
import json
import queue
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from django.core.management import call_command

from inference.catalog import adapter_rows, adapters, model_rows, registry
from inference.engine.types import Finished, GenerationRequest, SamplingParams, TokenEvent
from inference.gguf.header import read_header
from inference.models import Adapter, ServedModel
from inference.tuning.choice import Settings
from inference.tuning.formats import FORMATS, defaults
from inference.tuning.steps import NativeSteps, StepFailed
from inference.worker.hosted import HostedModel, load_backend
from llmsite import demo

pytestmark = [pytest.mark.model, pytest.mark.integration]
SHAKESPEARE = demo.ADAPTER_FOLDER / "smollm2-135m-shakespeare.gguf"


@pytest.fixture
def _fresh() -> Iterator[None]:
    registry.forget()
    adapters.forget()
    yield
    registry.forget()
    adapters.forget()


def native() -> NativeSteps:
    return NativeSteps(n_threads=2, n_gpu_layers=0, kv_type="f16", kv_bytes=1 << 28, measured_seconds=0.1)


def silent(_part: float) -> None:
    """Nobody watches."""


def call(name: str, *arguments: str) -> Any:
    output = io.StringIO()
    call_command(name, *arguments, "--json", stdout=output)
    return json.loads(output.getvalue())


def answer(adapter: str | None = None) -> tuple[str, list[str]]:
    """What the registry's default model is loaded from, and the text of twelve greedy tokens."""
    served = registry.default()
    assert served is not None
    events: queue.Queue[TokenEvent] = queue.Queue()

    def sink(found: Sequence[TokenEvent]) -> None:
        for event in found:
            events.put(event)

    model = HostedModel(served, load=load_backend, sink=sink)
    vector = ((Adapter.objects.get(name=adapter).digest, 1.0),) if adapter else ()
    try:
        model.load()
        model.submit(
            GenerationRequest(
                request_id="one",
                prompt=(504, 3575, 282, 4649, 314),  # The capital of France is
                max_tokens=12,
                sampling=SamplingParams(temperature=0.0),
                stop=(),
                deadline=time.monotonic() + 120,
                adapters=vector,
            )
        )
        texts = []
        while not isinstance(event := events.get(timeout=120), Finished):
            texts.append(getattr(event, "text", ""))
        assert event.error is None
        assert event.receipt.completion_tokens == 12
        return served.quantization, texts
    finally:
        model.unload()


@pytest.mark.django_db(transaction=True)  # the worker's code closes its thread's connection, and here it is this one
@pytest.mark.usefixtures("_fresh")
def test_a_variant_is_made_activated_served_with_an_adapter_and_reverted(model_path: Path, tmp_path: Path) -> None:
    row = model_rows.register(model_path, "smollm2", n_ctx=256, n_slots=2)
    adapter_rows.register(SHAKESPEARE, row, "shakespeare", visibility="shared")
    result = call(
        "optimize_model",
        "smollm2",
        *("--formats", "Q4_0", "--max-perplexity-increase", "1000", "--rounds", "1", "--seconds", "0.2"),
        *("--out", str(tmp_path / "out"), "--max-minutes", "8"),
    )
    [measured] = result["formats"]
    assert measured["size_bytes"] < result["source"]["size_bytes"]
    assert result["scored_tokens"] > 300
    assert -5 < measured["perplexity_increase_percent"] < 40
    assert all(measured[speed] > 1 for speed in ("prompt", "decode_1", "decode_8"))
    before = answer()
    name = _variant_of(row, result, tmp_path)
    assert call("activate_variant", "smollm2", name)["changed"] is True
    plain, styled = answer(), answer("shakespeare")
    assert (plain[0], styled[0]) == ("Q4_0", "Q4_0")
    assert plain[1] != styled[1]
    call("activate_variant", "smollm2", "--revert")
    assert answer() == before


def _variant_of(row: ServedModel, result: Any, folder: Path) -> str:
    """On a busy machine a format may not measure faster; then the same file is kept by hand."""
    if result["variant"] and result["chosen_format"]:
        return str(result["variant"]["name"])
    from inference.catalog import variants

    path = folder / "by-hand.gguf"
    native().quantize(Path(row.path), path, FORMATS["Q4_0"], 300 << 20, 120, silent)
    return variants.register(row, "by-hand", path, n_threads=1, flash_attention=None, measured={}).name


def test_formats_that_suit_the_demo_model_do_not_name_its_own(model_path: Path) -> None:
    header = read_header(model_path)
    names = [each.name for each in defaults(header)]
    assert header.quantization not in names
    assert {"Q4_0", "Q8_0", "IQ4_NL"} <= set(names)


def test_a_wide_format_changes_the_model_less_than_a_narrow_one(model_path: Path, tmp_path: Path) -> None:
    """Of the same windows: Q8_0 keeps what Q4_1 has, Q4_0 rounds it once more."""
    steps, found = native(), {}
    for name in ("Q8_0", "Q4_0"):
        told: list[float] = []
        steps.quantize(model_path, tmp_path / name, FORMATS[name], 400 << 20, 120, told.append)
        assert told == sorted(told)
        assert told[-1] == 1.0
        assert (tmp_path / name).stat().st_size <= FORMATS[name].most_bytes(read_header(model_path))
        found[name] = sum(steps.losses(tmp_path / name, 2, 120, silent))
    source = sum(steps.losses(model_path, 2, 120, silent))
    assert abs(found["Q8_0"] - source) < abs(found["Q4_0"] - source)


def test_a_file_that_would_grow_too_large_is_refused_and_one_that_is_none_too(model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match="refuses the format"):
        native().quantize(model_path, tmp_path / "x", FORMATS["Q8_0"], 1 << 20, 120, silent)
    (tmp_path / "text.gguf").write_text("this is no model")
    with pytest.raises(StepFailed):
        native().speed(tmp_path / "text.gguf", Settings(2), 60, silent)
    with pytest.raises(StepFailed, match="cannot load"):
        native().losses(tmp_path / "text.gguf", 2, 60, silent)

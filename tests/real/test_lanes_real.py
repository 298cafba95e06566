"""Lanes on the real model: the same tokens as alone, adapters that come and go, and one that crashes."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from inference.engine import AdapterVector, Decoding, EngineError, FinishReason, LlamaBackend, SamplingParams
from inference.engine.lanes import LaneRunner, run_in_lanes
from inference.engine.tokenizer import Tokenizer
from tests.engine.cast import EventLog, assert_well_formed, make_request

from .test_engine_adapters_real import FILES, GLASS, in_a_process_of_its_own, resident_mib
from .test_engine_real import PROMPTS, Run

pytestmark = pytest.mark.model

POET: AdapterVector = (("poet", 1.0),)
CLERK: AdapterVector = (("clerk", 1.0),)
GREEDY = SamplingParams(temperature=0.0, seed=42)
ENDLESS = SamplingParams(temperature=0.0, ignore_eos=True)
SLOTS = 8


@pytest.fixture
def log() -> EventLog:
    return EventLog()


def lanes_on(model_path: Path, log: EventLog, n_lanes: int = 2, **options: Any) -> LaneRunner:
    backend = LlamaBackend.load(model_path, n_ctx=options.pop("n_ctx", 512), n_slots=SLOTS, n_threads=2)
    runner = run_in_lanes(backend, n_lanes, sink=log, **options)
    assert isinstance(runner, LaneRunner)
    runner.start()
    for name, path in FILES.items():
        runner.load_adapter(name, path)
    return runner


Answers = Callable[[str, AdapterVector], tuple[int, ...]]


@pytest.fixture(scope="module")
def alone(model_path: Path, tokenizer: Tokenizer) -> Iterator[Answers]:
    """What a prompt gets under a vector when nothing else runs."""
    backend = LlamaBackend.load(model_path, n_ctx=512, n_slots=1, n_threads=2)
    for name, path in FILES.items():
        backend.load_adapter(name, path)

    def answer(text: str, vector: AdapterVector) -> tuple[int, ...]:
        run = Run(backend, tokenizer)
        run.add("r", text, adapters=vector, sampling=GREEDY, max_tokens=24)
        return run.finish().tokens("r")

    yield answer
    backend.free()


@pytest.mark.parametrize("vectors", [[POET, CLERK], [(), POET, CLERK]], ids=["two vectors", "three vectors"])
def test_eight_sequences_in_two_lanes_are_the_same_as_alone(
    model_path: Path, tokenizer: Tokenizer, log: EventLog, alone: Answers, vectors: list[AdapterVector]
) -> None:
    runner = lanes_on(model_path, log)
    try:
        vector_of = dict(zip(PROMPTS, vectors * len(PROMPTS), strict=False))
        wanted = {f"r{number}": alone(text, vector_of[text]) for number, text in enumerate(PROMPTS)}
        for number, text in enumerate(PROMPTS):
            prompt = tuple(tokenizer.encode(text, add_special=True))
            runner.submit(
                make_request(f"r{number}", prompt=prompt, max_tokens=24, adapters=vector_of[text], sampling=GREEDY)
            )
        log.wait_finished(*wanted, seconds=120)
        assert {name: log.tokens(name) for name in wanted} == wanted
        lanes = {last.receipt.slot_id // SLOTS for last in log.finished.values() if last.receipt.slot_id is not None}
        assert lanes == {0, 1}
        assert_well_formed(log.events)
    finally:
        runner.stop()


def test_requests_are_cancelled_in_the_lanes_that_they_asked_for(
    model_path: Path, tokenizer: Tokenizer, log: EventLog
) -> None:
    runner = lanes_on(model_path, log)
    prompt = tuple(tokenizer.encode(GLASS, add_special=True))
    try:
        for lane, vector in enumerate((POET, CLERK)):
            runner.submit(
                make_request(
                    f"r{lane}",
                    prompt=prompt,
                    max_tokens=450,
                    sampling=ENDLESS,
                    adapters=vector,
                    decoding=Decoding(slot_id=lane * SLOTS),
                )
            )
            log.wait_started(f"r{lane}")
        runner.cancel("r0")
        runner.cancel("r1")
        log.wait_finished("r0", "r1")
        assert {last.reason for last in log.finished.values()} == {FinishReason.CANCELLED}
        assert {name: last.receipt.slot_id // SLOTS for name, last in log.finished.items()} == {"r0": 0, "r1": 1}
    finally:
        runner.stop()


@pytest.mark.memory
def test_forty_adapters_come_and_go_while_both_lanes_run_and_memory_stays_flat(
    model_path: Path, tokenizer: Tokenizer
) -> None:
    sizes = in_a_process_of_its_own(run_adapters, model_path, tuple(tokenizer.encode(GLASS, add_special=True)))
    slope, _ = statistics.linear_regression(range(20), sizes[20:])
    adapter = FILES["clerk"].stat().st_size / 2**20
    assert slope < adapter / 2, f"MiB a cycle; one that was kept would be {adapter:.1f}: {sizes}"


def run_adapters(model_path: Path, prompt: tuple[int, ...]) -> list[float]:
    """Resident MiB of this process after each of forty cycles."""
    log = EventLog()
    runner = lanes_on(model_path, log, n_ctx=4096)
    try:
        for name, vector in (("base", ()), ("poet", POET)):
            runner.submit(make_request(name, prompt=prompt, max_tokens=4000, sampling=ENDLESS, adapters=vector))
            log.wait_started(name)
        sizes = []
        for cycle in range(40):
            runner.load_adapter(f"new {cycle}", FILES["clerk"])
            vector = ((f"new {cycle}", 1.0),)
            runner.submit(make_request(f"r{cycle}", prompt=prompt, max_tokens=4, adapters=vector))
            with pytest.raises(EngineError, match="uses adapter poet"):
                runner.unload_adapter("poet")
            log.wait_finished(f"r{cycle}", seconds=60)
            runner.unload_adapter(f"new {cycle}")
            sizes.append(resident_mib())
        assert not {"base", "poet"} & log.finished.keys()
        assert len({log.tokens(f"r{cycle}") for cycle in range(40)}) == 1
        assert runner.adapters == {"poet", "clerk"}
        runner.cancel("base")
        runner.cancel("poet")
        log.wait_finished("base", "poet")
    finally:
        runner.stop()
    return sizes


def test_a_lane_that_breaks_ends_all_and_the_model_can_be_loaded_again(
    model_path: Path, tokenizer: Tokenizer, log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    crashed = threading.Event()
    runner = lanes_on(model_path, log, on_crash=lambda _error: crashed.set())
    prompt = tuple(tokenizer.encode(GLASS, add_special=True))
    for name, vector in (("poet", POET), ("clerk", CLERK)):
        runner.submit(make_request(name, prompt=prompt, max_tokens=450, sampling=ENDLESS, adapters=vector))
        log.wait_started(name)

    def fail(*_arguments: object) -> list[int]:
        raise RuntimeError("llama_decode failed")

    monkeypatch.setattr(runner._lanes[1]._engine._backend, "_decode", fail)
    assert crashed.wait(20)
    assert {name: last.error for name, last in log.finished.items()} == dict.fromkeys(FILES, "engine_crashed")
    again = lanes_on(model_path, log)
    again.submit(make_request("again", prompt=prompt, adapters=POET))
    log.wait_finished("again")
    assert log.finished["again"].reason is not FinishReason.ERROR
    again.stop()
    runner.stop()


@pytest.mark.memory
def test_lanes_come_and_go_and_leave_no_memory_behind(model_path: Path) -> None:
    sizes = in_a_process_of_its_own(run_lanes, model_path)
    assert max(sizes[1:]) - sizes[0] < 24, f"a context of eight slots holds more: {sizes}"


def run_lanes(model_path: Path) -> list[float]:
    """Resident MiB of this process after each time."""
    sizes, log = [], EventLog()
    for _ in range(4):
        lanes_on(model_path, log, n_lanes=3).stop()
        sizes.append(resident_mib())
    return sizes

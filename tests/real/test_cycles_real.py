"""Models and adapters come and go while requests run: no crash, and memory stays where it was.

A short form runs with the suite; CYCLES=40 is the long one.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from inference.engine import EngineRunner, FinishReason, LlamaBackend, SamplingParams
from inference.engine.tokenizer import Tokenizer
from tests.engine.cast import EventLog, make_request

from .test_engine_adapters_real import FILES, resident_mib

pytestmark = [pytest.mark.model, pytest.mark.memory]

CYCLES = int(os.environ.get("CYCLES", "10"))
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


def test_models_are_loaded_and_unloaded_again_and_again_while_another_serves(model_path: Path) -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as own:  # its memory is nobody else's
        memory = own.submit(run_cycles, model_path).result()
    # The allocator's own pools fill up during the first cycles; one model that stayed would be 150 MiB.
    early, late = statistics.median(memory[CYCLES // 3 : CYCLES // 3 + 4]), statistics.median(memory[-4:])
    assert late - early < 30, f"resident MiB by cycle: {[round(each) for each in memory]}"


def run_cycles(model_path: Path) -> list[float]:
    """Resident MiB of this process after each cycle."""
    with_tokens = Tokenizer.load(model_path)
    prompt = tuple(with_tokens.encode("The capital of France is", add_special=True))
    with_tokens.free()
    steady = EventLog()
    staying = EngineRunner(LlamaBackend.load(model_path, n_ctx=2048, n_slots=1, n_threads=1), sink=steady)
    staying.start()
    answers, memory = set(), []
    for cycle in range(CYCLES):
        staying.submit(make_request(f"s{cycle}", prompt=prompt, max_tokens=40, sampling=GREEDY))
        log = EventLog()
        runner = EngineRunner(LlamaBackend.load(model_path, n_ctx=256, n_slots=2, n_threads=1), sink=log)
        runner.start()
        for name, path in FILES.items():
            runner.load_adapter(name, path)
        vectors = [(), *(((name, 1.0),) for name in FILES)]
        names = [f"r{cycle}-{number}" for number in range(len(vectors))]
        for name, vector in zip(names, vectors, strict=True):
            runner.submit(make_request(name, prompt=prompt, max_tokens=12, sampling=GREEDY, adapters=vector))
        log.wait_finished(*names)
        answers.add(tuple(log.tokens(name) for name in names))
        for name in FILES:
            runner.unload_adapter(name)
        runner.stop()
        steady.wait_finished(f"s{cycle}")
        memory.append(resident_mib())
    staying.stop()
    assert len(answers) == 1, "every cycle gives the same tokens"
    assert {steady.tokens(f"s{cycle}") for cycle in range(CYCLES)} == {steady.tokens("s0")}
    assert all(each.reason is FinishReason.LENGTH for each in steady.finished.values())
    return memory

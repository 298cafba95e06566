"""LoRA on the real model: a scale for everybody, in one batch with all others, and adapters that come and go."""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from inference import demo_adapters
from inference.engine import AdapterVector, EngineError, EngineRunner, LlamaBackend, SamplingParams
from inference.engine.tokenizer import Tokenizer
from tests.engine.cast import EventLog, make_request

from .test_engine_real import Run

pytestmark = pytest.mark.model

FOLDER = Path(demo_adapters.__file__).parent
FILES = {
    "poet": FOLDER / "smollm2-135m-shakespeare.gguf",
    "clerk": FOLDER / "smollm2-135m-json-reply.gguf",
}
GLASS = "Look in thy glass"
PLANET = "<|im_start|>user\nWhat is the largest planet?<|im_end|>\n<|im_start|>assistant\n"
GREEDY = SamplingParams(temperature=0.0, seed=42)


def in_a_process_of_its_own(measure: Callable[..., list[float]], *given: Any) -> list[float]:
    """What a function of a module says, in a process whose memory is nobody else's."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as own:
        return own.submit(measure, *given).result()


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


@pytest.fixture(scope="module")
def backend(model_path: Path) -> Iterator[LlamaBackend]:
    """Six slots, with both adapters loaded after the first steps."""
    backend = LlamaBackend.load(model_path, n_ctx=512, n_slots=6, n_threads=2)
    for digest, path in FILES.items():
        backend.load_adapter(digest, path)
    yield backend
    backend.free()


def serial(backend: LlamaBackend, tokenizer: Tokenizer, text: str, *vectors: AdapterVector) -> list[tuple[int, ...]]:
    tokens = []
    for vector in vectors:
        run = Run(backend, tokenizer)
        run.add("r", text, adapters=vector, sampling=GREEDY, parse_special=True)
        tokens.append(run.finish().tokens("r"))
    return tokens


def test_scale_0_is_the_base_model_token_for_token(backend: LlamaBackend, tokenizer: Tokenizer) -> None:
    base, zero, poet, again = serial(backend, tokenizer, GLASS, (), (("poet", 0.0),), (("poet", 1.0),), ())
    assert base == zero == again
    assert poet != base


def test_each_adapter_answers_in_its_own_style(backend: LlamaBackend, tokenizer: Tokenizer) -> None:
    base, poet = serial(backend, tokenizer, GLASS, (), (("poet", 1.0),))
    assert tokenizer.detokenize(poet).count("\n") > tokenizer.detokenize(base).count("\n")
    base, clerk = serial(backend, tokenizer, PLANET, (), (("clerk", 1.0),))
    assert tokenizer.detokenize(clerk).lstrip().startswith('{"topic"')
    assert "{" not in tokenizer.detokenize(base)


def test_fractional_scales_scales_above_1_and_pairs_are_all_different(
    backend: LlamaBackend, tokenizer: Tokenizer
) -> None:
    scales = [(("poet", scale),) for scale in (0.0, 0.3, 0.7, 1.0, 1.5, -0.5)]
    answers = serial(backend, tokenizer, GLASS, *scales, (("clerk", 0.5), ("poet", 0.5)))
    assert len(set(answers)) >= 5


def test_six_at_once_with_their_own_scales_are_the_same_token_for_token(
    backend: LlamaBackend, tokenizer: Tokenizer
) -> None:
    vectors: list[AdapterVector] = [(("poet", scale),) for scale in (0.0, 0.0, 0.3, 0.7, 1.0, 1.0)]
    expected = serial(backend, tokenizer, GLASS, *vectors)
    together = Run(backend, tokenizer)
    for number, vector in enumerate(vectors):
        together.add(f"r{number}", GLASS, adapters=vector, sampling=GREEDY, parse_special=True)
    together.finish()
    assert [together.tokens(f"r{number}") for number in range(6)] == expected
    assert expected[0] == expected[1]
    assert expected[4] == expected[5]
    stats = together.engine.stats()
    assert stats.num_switches < stats.num_steps / 2


@pytest.mark.parametrize("vector", [(("poet", 1.0),), (("poet", 0.5), ("clerk", 0.5))])
def test_six_of_one_vector_together_are_the_same_as_alone(
    backend: LlamaBackend, tokenizer: Tokenizer, vector: AdapterVector
) -> None:
    """A step of one token and a step of six take the same kernels: see lora_file.py."""
    texts = [GLASS, "Once upon a time", "The king said", "Dear Alice,", "O Romeo", "What is love?"]
    expected = []
    for text in texts:
        run = Run(backend, tokenizer)
        run.add("r", text, adapters=vector, sampling=GREEDY, max_tokens=48)
        expected.append(run.finish().tokens("r"))
    together = Run(backend, tokenizer)
    for number, text in enumerate(texts):
        together.add(f"r{number}", text, adapters=vector, sampling=GREEDY, max_tokens=48)
        together.step()
    together.finish()
    assert [together.tokens(f"r{number}") for number in range(6)] == expected


def test_an_unknown_adapter_and_a_file_that_is_none_are_refused(
    backend: LlamaBackend, tokenizer: Tokenizer, model_path: Path, tmp_path: Path
) -> None:
    run = Run(backend, tokenizer)
    with pytest.raises(EngineError) as caught:
        run.add("r", GLASS, adapters=(("nobody's", 1.0),))
    assert caught.value.code == "adapter_not_loaded"
    truncated = tmp_path / "truncated.gguf"
    truncated.write_bytes(FILES["poet"].read_bytes()[:100_000])
    (tmp_path / "text.gguf").write_text("no adapter")
    for path in (truncated, tmp_path / "text.gguf", tmp_path / "missing.gguf", model_path):
        with pytest.raises(EngineError) as caught:
            backend.load_adapter("new", path)
        assert caught.value.code == "adapter_file_invalid"
    assert backend.adapters == {"poet", "clerk"}


def test_sixteen_adapters_in_one_vector(backend: LlamaBackend, tokenizer: Tokenizer) -> None:
    names = [f"copy {number:02}" for number in range(16)]
    for name in names:
        backend.load_adapter(name, FILES["poet"])
    many, one = serial(backend, tokenizer, GLASS, tuple((name, 1 / 16) for name in names), (("poet", 1.0),))
    for name in names:
        backend.unload_adapter(name)
    assert many[:8] == one[:8]


@pytest.mark.memory
def test_forty_adapters_come_and_go_under_load_and_memory_stays_flat(model_path: Path, tokenizer: Tokenizer) -> None:
    sizes = in_a_process_of_its_own(run_adapters, model_path, tuple(tokenizer.encode(GLASS, add_special=True)))
    assert max(sizes[20:]) - max(sizes[:20]) < 8, f"resident MiB by cycle: {[round(each) for each in sizes]}"


def run_adapters(model_path: Path, prompt: tuple[int, ...]) -> list[float]:
    """Resident MiB of this process after each cycle."""
    log = EventLog()
    backend = LlamaBackend.load(model_path, n_ctx=4096, n_slots=3, n_threads=2)
    runner = EngineRunner(backend, sink=log)
    runner.start()
    endless = SamplingParams(temperature=0.0, ignore_eos=True)
    try:
        runner.submit(make_request("busy", prompt=prompt, max_tokens=4000, sampling=endless))
        sizes = []
        for cycle in range(40):
            name = ("poet", "clerk")[cycle % 2]
            runner.load_adapter(name, FILES[name])
            runner.submit(make_request(f"r{cycle}", prompt=prompt, max_tokens=4, adapters=((name, 1.0),)))
            log.wait_finished(f"r{cycle}", seconds=60)
            runner.unload_adapter(name)
            sizes.append(resident_mib())
        assert "busy" not in log.finished
        answers = {log.tokens(f"r{cycle}") for cycle in range(40)}
        assert len(answers) == 2
        runner.cancel("busy")
        log.wait_finished("busy")
    finally:
        runner.stop()
    return sizes

"""The engine on the real model: identical tokens in any company, exact limits, chunks, and files that are no model."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from inference.engine import (
    Delta,
    EngineError,
    EngineRunner,
    Finished,
    FinishReason,
    GenerationRequest,
    LlamaBackend,
    SamplingParams,
    SlotWork,
    Started,
    TokenEvent,
)
from inference.engine.engine import Engine
from inference.engine.tokenizer import Tokenizer
from tests.engine.cast import EventLog, assert_well_formed
from tests.timing import Stopwatch

pytestmark = pytest.mark.model

GREEDY = SamplingParams(temperature=0.0)
PROMPTS = (
    "The capital of France is",
    "Once upon a time",
    "def fibonacci(n):",
    "Water boils at",
    "The opposite of cold is",
    "1, 2, 3, 4,",
    "Dear Alice,",
    "My favourite colour is blue because",
)


@pytest.fixture(scope="module")
def backend(model_path: Path) -> Iterator[LlamaBackend]:
    """Eight slots of 512 tokens; engines come and go on it, one after the other."""
    backend = LlamaBackend.load(model_path, n_ctx=512, n_slots=8, n_threads=2)
    yield backend
    backend.free()


class Run:
    """An engine on the given backend, stepped by the test."""

    def __init__(self, backend: LlamaBackend, tokenizer: Tokenizer) -> None:
        self.engine = Engine(backend)
        self.tokenizer = tokenizer
        self.events: list[TokenEvent] = []

    def add(self, request_id: str, text: str, *, parse_special: bool = False, **fields: Any) -> None:
        prompt = tuple(self.tokenizer.encode(text, add_special=True, parse_special=parse_special))
        request = GenerationRequest(
            request_id=request_id, prompt=prompt, **{"max_tokens": 24, "sampling": GREEDY, **fields}
        )
        self.engine.check(request)
        self.engine.add(request, time.monotonic())

    def step(self) -> list[TokenEvent]:
        self.engine.step()
        events = self.engine.take_events()
        self.events += events
        return events

    def finish(self) -> Run:
        while self.engine.has_work:
            self.step()
        assert_well_formed(self.events)
        return self

    def tokens(self, request_id: str) -> tuple[int, ...]:
        own = [event for event in self.events if isinstance(event, Delta) and event.request_id == request_id]
        return sum((event.tokens for event in own), ())

    def text(self, request_id: str) -> str:
        own = [event for event in self.events if isinstance(event, Delta) and event.request_id == request_id]
        return "".join(event.text for event in own)

    def finished(self, request_id: str) -> Finished:
        return next(e for e in self.events if isinstance(e, Finished) and e.request_id == request_id)


def alone(backend: LlamaBackend, tokenizer: Tokenizer, text: str, **fields: Any) -> tuple[int, ...]:
    run = Run(backend, tokenizer)
    run.add("r", text, **fields)
    return run.finish().tokens("r")


PARAMS = {
    "greedy": GREEDY,
    "seeded": SamplingParams(seed=42, temperature=1.0),
    "penalties": SamplingParams(seed=1, repeat_penalty=1.3, presence_penalty=0.5, dry_multiplier=0.8),
    "mirostat 1": SamplingParams(seed=2, mirostat=1),
    "mirostat 2": SamplingParams(seed=3, mirostat=2),
    "everything": SamplingParams(
        seed=4,
        dynatemp_range=0.5,
        typical_p=0.9,
        top_n_sigma=2.0,
        xtc_probability=0.5,
        min_keep=2,
        frequency_penalty=0.2,
        logit_bias=((260, 2.0),),
        repeat_last_n=-1,
    ),
}


@pytest.mark.parametrize("sampling", PARAMS.values(), ids=PARAMS.keys())
def test_an_answer_alone_is_the_answer_among_eight(
    backend: LlamaBackend, tokenizer: Tokenizer, sampling: SamplingParams
) -> None:
    expected = [alone(backend, tokenizer, text, sampling=sampling) for text in PROMPTS]
    together = Run(backend, tokenizer)
    for index, text in enumerate(PROMPTS):
        together.add(f"r{index}", text, sampling=sampling)
        if index % 3 == 0:
            together.step()  # arrive at different times, so that prompts and answers mix
    together.finish()
    assert [together.tokens(f"r{index}") for index in range(len(PROMPTS))] == expected
    assert together.finished("r7").receipt.batch_sequences / together.finished("r7").receipt.num_steps > 4


def test_the_model_answers_with_the_text_of_its_tokens(backend: LlamaBackend, tokenizer: Tokenizer) -> None:
    run = Run(backend, tokenizer)
    run.add("r", "The capital of France is", max_tokens=8)
    run.finish()
    assert run.text("r").startswith(" Paris")
    assert run.text("r") == tokenizer.detokenize(run.tokens("r"))


def test_seeds_decide_and_are_reported(backend: LlamaBackend, tokenizer: Tokenizer) -> None:
    hot = {seed: SamplingParams(temperature=1.5, top_p=1.0, seed=seed) for seed in (1, 2)}
    answers = {seed: alone(backend, tokenizer, "Once upon a time", sampling=hot[seed]) for seed in hot}
    assert answers[1] != answers[2]
    run = Run(backend, tokenizer)
    run.add("r", "Once upon a time", sampling=SamplingParams(temperature=1.5, top_p=1.0))
    drawn = run.finish().finished("r").receipt.seed
    again = SamplingParams(temperature=1.5, top_p=1.0, seed=drawn)
    assert alone(backend, tokenizer, "Once upon a time", sampling=again) == run.tokens("r")


def test_a_used_slot_leaves_nothing_to_the_next_sequence(backend: LlamaBackend, tokenizer: Tokenizer) -> None:
    fresh = alone(backend, tokenizer, PROMPTS[3])
    alone(backend, tokenizer, "Charlie has written a much longer text than anybody else. " * 9)
    assert alone(backend, tokenizer, PROMPTS[3]) == fresh


def test_logit_bias_bans_and_forces_and_ignore_eos_never_ends(backend: LlamaBackend, tokenizer: Tokenizer) -> None:
    first = alone(backend, tokenizer, PROMPTS[0], max_tokens=1)
    banned = SamplingParams(temperature=0.0, logit_bias=((first[0], float("-inf")),))
    assert alone(backend, tokenizer, PROMPTS[0], max_tokens=1, sampling=banned) != first
    forced = SamplingParams(temperature=0.0, logit_bias=((500, 1000.0),))
    assert alone(backend, tokenizer, PROMPTS[0], max_tokens=3, sampling=forced) == (500, 500, 500)
    endless = SamplingParams(temperature=0.0, ignore_eos=True, logit_bias=((2, 1000.0),))
    run = Run(backend, tokenizer)
    run.add("r", PROMPTS[0], max_tokens=40, sampling=endless)
    assert run.finish().finished("r").reason is FinishReason.LENGTH
    ending = SamplingParams(temperature=0.0, logit_bias=((2, 1000.0),))
    assert alone(backend, tokenizer, PROMPTS[0], sampling=ending) == (2,)


def test_penalties_have_seen_the_prompt(backend: LlamaBackend, tokenizer: Tokenizer) -> None:
    text = "red red red red red red red red red"
    (word,) = alone(backend, tokenizer, text, max_tokens=1)
    assert tokenizer.detokenize([word]) == " red"
    against = SamplingParams(temperature=0.0, presence_penalty=100.0)
    assert alone(backend, tokenizer, text, max_tokens=1, sampling=against) != (word,)


def test_a_stop_string_of_several_tokens_is_not_in_the_text(backend: LlamaBackend, tokenizer: Tokenizer) -> None:
    run = Run(backend, tokenizer)
    run.add("r", "1, 2, 3, 4,", stop=(", 7",))
    run.finish()
    last = run.finished("r")
    assert (last.reason, last.stop_word, run.text("r")) == (FinishReason.STOP, ", 7", " 5, 6")


def test_the_context_limit_of_64_is_exact(model_path: Path, tokenizer: Tokenizer) -> None:
    backend = LlamaBackend.load(model_path, n_ctx=64, n_slots=2, n_threads=2)
    try:
        run = Run(backend, tokenizer)
        endless = SamplingParams(temperature=0.0, ignore_eos=True)
        text = "The capital of France is"
        run.add("r", text, max_tokens=1000, sampling=endless)
        num_prompt = len(tokenizer.encode(text, add_special=True))
        last = run.finish().finished("r")
        assert (last.reason, last.receipt.completion_tokens) == (FinishReason.LENGTH, 64 - num_prompt)
        with pytest.raises(EngineError, match="64 tokens"):
            run.add("long", "word " * 70)
    finally:
        backend.free()
        backend.free()


def test_a_long_prompt_is_computed_in_chunks_while_the_others_go_on(
    backend: LlamaBackend, tokenizer: Tokenizer
) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 40
    expected = alone(backend, tokenizer, text, max_tokens=8)
    run = Run(backend, tokenizer)
    endless = SamplingParams(temperature=0.0, ignore_eos=True)
    for index in range(2):
        run.add(f"talker{index}", PROMPTS[index], max_tokens=400, sampling=endless)
    run.step()
    run.add("reader", text, max_tokens=8)
    gaps = []
    while not run.tokens("reader"):
        watch = Stopwatch()
        events = run.step()
        gaps.append(watch.seconds())
        assert {"talker0", "talker1"} <= {event.request_id for event in events if isinstance(event, Delta)}
    assert len(gaps) >= 5
    assert statistics.median(gaps) < 0.4  # 0.1 s on a machine that does nothing else; 1.5 s without chunks
    for index in range(2):
        run.engine.cancel(f"talker{index}")
    assert run.finish().tokens("reader") == expected


def test_cancel_in_the_middle_of_a_prompt_frees_the_slot(model_path: Path, tokenizer: Tokenizer) -> None:
    log = EventLog()
    runner = EngineRunner(LlamaBackend.load(model_path, n_ctx=4096, n_slots=1, n_threads=2), sink=log)
    runner.start()
    try:
        prompt = tuple(tokenizer.encode("word " * 3500, add_special=True))
        runner.submit(GenerationRequest(request_id="long", prompt=prompt, max_tokens=5))
        log.wait_started("long")
        watch = Stopwatch()
        runner.cancel("long")
        log.wait_finished("long")
        assert watch.seconds() < 1.0
        last = log.finished["long"]
        assert (last.reason, last.receipt.completion_tokens) == (FinishReason.CANCELLED, 0)
        runner.submit(GenerationRequest(request_id="next", prompt=prompt[:5], max_tokens=3))
        log.wait_finished("next")
        assert log.finished["next"].reason is FinishReason.LENGTH
    finally:
        runner.stop()


def test_eight_clients_are_decoded_in_one_batch(model_path: Path, tokenizer: Tokenizer) -> None:
    log = EventLog()
    loaded: list[float] = []
    backend = LlamaBackend.load(model_path, n_ctx=256, n_slots=8, n_threads=None, progress=loaded.append)
    assert (loaded[0], loaded[-1]) == (0.0, 1.0)
    runner = EngineRunner(backend, sink=log)
    runner.start()
    prompt = tuple(tokenizer.encode("Once upon a time", add_special=True))
    names = [f"r{index}" for index in range(8)]
    for name in names:
        runner.submit(GenerationRequest(request_id=name, prompt=prompt, max_tokens=32))
    log.wait_finished(*names, seconds=60)
    assert runner.drain(1)
    runner.stop()
    means = [last.receipt.batch_sequences / last.receipt.num_steps for last in log.finished.values()]
    assert min(means) >= 4
    assert sum(isinstance(event, Started) for event in log.events) == 8
    stats = runner.stats()
    assert stats.num_decode_sequences / stats.num_decode_steps >= 4


def test_a_token_with_a_long_text_is_whole(backend: LlamaBackend) -> None:
    pieces = [backend.piece(token) for token in range(backend.n_vocab)]
    assert max(len(piece) for piece in pieces) > 64
    assert backend.piece(2) == b""  # a control token
    assert [token for token in range(backend.n_vocab) if backend.is_end(token)] == [0, 2, 4]


def test_freeing_a_backend_frees_the_samplers_of_open_slots(model_path: Path) -> None:
    backend = LlamaBackend.load(model_path, n_ctx=64, n_slots=2, n_threads=1)
    backend.open(0, (1, 2), GREEDY, 1)
    backend.close(1)
    backend.free()
    assert backend._samplers == {}


def test_the_cost_of_steps_is_measured_at_load(backend: LlamaBackend) -> None:
    points = backend.cost.points
    assert points[0][0] == 1
    assert all(seconds > 0 for _, seconds in points)
    assert backend.cost.seconds(16) > backend.cost.seconds(1)


@pytest.mark.parametrize("kv_type", ["q8_0", "q4_0"])
def test_a_quantized_kv_cache_serves(model_path: Path, tokenizer: Tokenizer, kv_type: str) -> None:
    backend = LlamaBackend.load(model_path, n_ctx=256, n_slots=2, n_threads=2, kv_type=kv_type)
    try:
        assert tokenizer.detokenize(alone(backend, tokenizer, PROMPTS[0], max_tokens=1)) == " Paris"
    finally:
        backend.free()


def test_a_context_beyond_the_training_is_cut(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import llama_cpp

    monkeypatch.setattr(llama_cpp, "llama_model_n_ctx_train", lambda model: 300)
    backend = LlamaBackend.load(model_path, n_ctx=1000, n_slots=1, n_threads=2)
    backend.free()
    assert backend.n_ctx == 300
    assert "served with 300" in caplog.text


def test_a_failed_step_is_an_exception(backend: LlamaBackend, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RuntimeError, match="llama_decode failed"):
        backend.execute([SlotWork(0, 0, [backend.n_vocab + 5], False)], ())
    assert "llama.cpp:" in caplog.text  # its own words are in our log


def test_a_sampler_that_llama_cpp_refuses_ends_that_sequence_alone(
    backend: LlamaBackend, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from inference.engine.llama import samplers

    monkeypatch.setitem(samplers.NATIVE_SAMPLERS, "top_k", lambda k: None)
    run = Run(backend, tokenizer)
    run.add("r", PROMPTS[0], sampling=SamplingParams())
    last = run.finish().finished("r")
    assert (last.reason, last.error) == (FinishReason.ERROR, "invalid_sampling")


def refusal(path: Path, **options: Any) -> EngineError:
    with pytest.raises(EngineError) as caught:
        LlamaBackend.load(path, **{"n_ctx": 256, "n_slots": 1, "n_threads": 1, **options})
    return caught.value


def test_a_missing_file_says_what_to_check(tmp_path: Path) -> None:
    error = refusal(tmp_path / "nothing.gguf")
    assert error.code == "model_file_missing"
    assert "check the path" in str(error)


def test_a_file_that_is_not_gguf_is_refused_before_llama_cpp_sees_it(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.gguf"
    garbage.write_bytes(bytes(range(256)) * 64)
    assert refusal(garbage).code == "model_file_invalid"
    assert "not a GGUF file" in str(refusal(garbage))


def test_a_directory_is_no_model_file(tmp_path: Path) -> None:
    assert refusal(tmp_path).code == "model_file_missing"


def test_a_damaged_gguf_file_gives_a_clear_error(model_path: Path, tmp_path: Path) -> None:
    """In a child: llama.cpp may abort on a file like this."""
    damaged = tmp_path / "damaged.gguf"
    with model_path.open("rb") as file:
        damaged.write_bytes(file.read(1_000_000))
    code = (
        "import sys; from inference.engine import EngineError, LlamaBackend\n"
        "try: LlamaBackend.load(sys.argv[1], n_ctx=64, n_slots=1, n_threads=1)\n"
        "except EngineError as error: print(error.code)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(damaged)], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "model_file_invalid"


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"n_ctx": 1}, "n_ctx"),
        ({"n_slots": 0}, "n_slots"),
        ({"n_slots": 100_000}, "n_slots"),
        ({"kv_type": "q5_7"}, "kv_type"),
        ({"kv_type": "q8_0", "flash_attention": False}, "flash"),
    ],
)
def test_wrong_options_are_named(model_path: Path, options: dict[str, Any], word: str) -> None:
    error = refusal(model_path, **options)
    assert error.code == "model_options_invalid"
    assert word in str(error)


@pytest.mark.parametrize(
    ("function", "result", "code"),
    [
        ("llama_init_from_model", None, "model_does_not_fit"),
        ("llama_n_ctx_seq", 16, "model_does_not_fit"),
        ("llama_model_load_from_file", None, "model_file_invalid"),
        ("llama_model_has_decoder", False, "model_file_invalid"),
    ],
)
def test_what_llama_cpp_refuses_is_a_clear_error(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, result: object, code: str
) -> None:
    import llama_cpp

    monkeypatch.setattr(llama_cpp, function, lambda *_: result)
    assert refusal(model_path).code == code


def test_an_unreadable_file_is_refused(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    error = refusal(model_path)
    assert error.code == "model_file_missing"
    assert "Permission denied" in str(error)


@pytest.mark.parametrize("part", [SlotWork(1, 0, [], True), SlotWork(1, 0, [5, 6], True, num_drafted=2)])
def test_a_part_without_a_token_of_its_own_reads_no_neighbours_scores(backend: LlamaBackend, part: SlotWork) -> None:
    with pytest.raises(RuntimeError, match="slot 1"):
        backend.execute([SlotWork(0, 0, [1, 2, 3], False), part], ())

"""Drafts on the real model: the same tokens with and without, whoever guesses and however wrong."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from inference import demo_adapters
from inference.catalog.served import snapshot
from inference.engine import EngineError, FinishReason, LlamaBackend, SamplingParams
from inference.engine.drafting import DraftPolicy, DraftSettings
from inference.engine.engine import Engine
from inference.engine.llama import DraftModel
from inference.engine.speculative import Ask, PromptLookup, Proposer
from inference.engine.tokenizer import Tokenizer
from inference.engine.types import Decoding, Receipt, Speculation
from inference.models import ServedModel
from inference.worker.hosted import HostedModel, load_backend
from tests.engine.cast import EventLog, Rehearsed, make_request

from .test_engine_real import GREEDY, Run

pytestmark = pytest.mark.model

SEEDED = SamplingParams(temperature=0.2, top_k=5, seed=4242)
PENALTIES = SamplingParams(seed=1, temperature=0.7, repeat_penalty=1.3, presence_penalty=0.5, dry_multiplier=0.8)
BOUNDS = [(1, 2), (1, 4), (4, 8), (4, 12), (8, 16)]
ECHO = "one two three four five six one two three four five six one two three"
LIFE = "I believe the meaning of life is"
POET = Path(demo_adapters.__file__).parent / "smollm2-135m-shakespeare.gguf"
GLASS = "Look in thy glass"


def always(num_min: int = 0, num_max: int = 16) -> DraftSettings:
    return DraftSettings(num_min=num_min, num_max=num_max, policy=DraftPolicy.ALWAYS)


@pytest.fixture(scope="module")
def backend(model_path: Path) -> Iterator[LlamaBackend]:
    backend = LlamaBackend.load(model_path, n_ctx=512, n_slots=2, n_threads=2, max_draft_tokens=32)
    backend.load_adapter("poet", POET)
    yield backend
    backend.free()


@pytest.fixture(scope="module")
def draft(model_path: Path, backend: LlamaBackend) -> Iterator[DraftModel]:
    """The same model as the one it guesses for: at temperature 0 it is always right."""
    draft = DraftModel.load(model_path, backend, n_threads=2)
    yield draft
    draft.free()


@pytest.fixture(params=["prompt lookup", "draft model"])
def proposer(request: pytest.FixtureRequest, draft: DraftModel) -> Proposer:
    return draft if request.param == "draft model" else PromptLookup()


def start(
    backend: LlamaBackend, tokenizer: Tokenizer, proposer: Proposer | None, settings: DraftSettings | None = None
) -> Run:
    run = Run(backend, tokenizer)
    run.engine = Engine(backend, proposer=proposer, draft_settings=settings or always())
    return run


def answer(
    backend: LlamaBackend,
    tokenizer: Tokenizer,
    text: str,
    proposer: Proposer | None = None,
    settings: DraftSettings | None = None,
    **fields: Any,
) -> tuple[tuple[int, ...], Receipt]:
    run = start(backend, tokenizer, proposer, settings)
    run.add("r", text, **fields)
    run.finish()
    return run.tokens("r"), run.finished("r").receipt


def rehearsed(tokenizer: Tokenizer, text: str, tokens: Sequence[int], *rates: float) -> Rehearsed:
    return Rehearsed({tuple(tokenizer.encode(text, add_special=True)): tokens}, *rates)


@cache
def plain(
    backend: LlamaBackend, tokenizer: Tokenizer, text: str, sampling: SamplingParams
) -> tuple[tuple[int, ...], Receipt]:
    """16 tokens without drafts."""
    return answer(backend, tokenizer, text, max_tokens=16, sampling=sampling)


@pytest.mark.parametrize(("num_min", "num_max"), BOUNDS)
@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_tokens_are_those_without_drafts(
    backend: LlamaBackend,
    tokenizer: Tokenizer,
    proposer: Proposer,
    num_min: int,
    num_max: int,
    sampling: SamplingParams,
) -> None:
    text = ECHO if isinstance(proposer, PromptLookup) else LIFE
    expected, without = plain(backend, tokenizer, text, sampling)
    settings = always(num_min, num_max)
    tokens, receipt = answer(backend, tokenizer, text, proposer, settings, max_tokens=16, sampling=sampling)
    assert tokens == expected
    assert without.drafted_tokens == 0
    assert 0 < receipt.accepted_tokens <= receipt.drafted_tokens
    assert receipt.num_steps < without.num_steps


@pytest.mark.parametrize("rates", [(0.0,), (1.0,), (0.8, 0.6, 0.3)])
@pytest.mark.parametrize("sampling", [GREEDY, SEEDED, PENALTIES], ids=["greedy", "seeded", "penalties"])
def test_forced_guesses_change_no_token(
    backend: LlamaBackend, tokenizer: Tokenizer, rates: tuple[float, ...], sampling: SamplingParams
) -> None:
    expected, _ = plain(backend, tokenizer, LIFE, sampling)
    forced = rehearsed(tokenizer, LIFE, expected, *rates)
    tokens, receipt = answer(backend, tokenizer, LIFE, forced, max_tokens=16, sampling=sampling)
    assert tokens == expected
    assert receipt.drafted_tokens > 0
    if len(rates) == 1:
        assert receipt.accepted_tokens == rates[0] * receipt.drafted_tokens


def test_penalties_see_what_they_would_without_drafts(
    backend: LlamaBackend, tokenizer: Tokenizer, draft: DraftModel
) -> None:
    expected, _ = answer(backend, tokenizer, ECHO, max_tokens=24, sampling=PENALTIES)
    tokens, receipt = answer(backend, tokenizer, ECHO, draft, max_tokens=24, sampling=PENALTIES)
    assert tokens == expected
    assert receipt.drafted_tokens > 0


def test_a_stop_string_ends_the_answer_where_it_would_without_drafts(
    backend: LlamaBackend, tokenizer: Tokenizer, draft: DraftModel
) -> None:
    runs = [start(backend, tokenizer, proposer) for proposer in (None, draft)]
    for run in runs:
        run.add("r", LIFE, max_tokens=64, stop=(".", "the"))
        run.finish()
    plain, drafted = runs
    assert drafted.text("r") == plain.text("r")
    assert drafted.tokens("r") == plain.tokens("r")
    assert drafted.finished("r").stop_word == plain.finished("r").stop_word


def test_a_draft_model_without_the_adapter_is_sometimes_right(
    backend: LlamaBackend, tokenizer: Tokenizer, draft: DraftModel
) -> None:
    vector = (("poet", 1.0),)
    expected, _ = answer(backend, tokenizer, GLASS, max_tokens=24, adapters=vector)
    tokens, receipt = answer(backend, tokenizer, GLASS, draft, max_tokens=24, adapters=vector)
    assert tokens == expected
    assert 0 < receipt.accepted_tokens < receipt.drafted_tokens


def test_a_full_context_is_never_overrun(model_path: Path, tokenizer: Tokenizer) -> None:
    """A prompt of 56 tokens and more in a slot of 64."""
    backend = LlamaBackend.load(model_path, n_ctx=64, n_slots=1, n_threads=2, max_draft_tokens=16)
    draft = DraftModel.load(model_path, backend, n_threads=2)
    text = "Hello " * 56
    try:
        expected, _ = answer(backend, tokenizer, text, max_tokens=64)
        assert 0 < len(expected) < 64
        forced = rehearsed(tokenizer, text, [*expected, 5, 5, 5], 1.0)
        for proposer in (PromptLookup(), draft, forced):
            tokens, receipt = answer(backend, tokenizer, text, proposer, max_tokens=64)
            assert tokens == expected
            assert receipt.prompt_tokens + receipt.completion_tokens == 64
        assert receipt.accepted_tokens == len(expected) - 2
    finally:
        draft.free()
        backend.free()


def test_shifts_change_no_token_and_drafts_go_on_behind_them(model_path: Path, tokenizer: Tokenizer) -> None:
    backend = LlamaBackend.load(model_path, n_ctx=64, n_slots=1, n_threads=2, max_draft_tokens=16)
    draft = DraftModel.load(model_path, backend, n_threads=2)
    endless = SamplingParams(temperature=0.0, ignore_eos=True)
    shifting = Decoding(context_shift=True, num_keep=4)
    fields: dict[str, Any] = {"max_tokens": 160, "sampling": endless, "decoding": shifting}
    try:
        expected, _ = answer(backend, tokenizer, LIFE, **fields)
        assert len(expected) == 160
        for proposer in (PromptLookup(), draft):
            tokens, receipt = answer(backend, tokenizer, LIFE, proposer, always(num_max=4), **fields)
            assert tokens == expected
            assert receipt.is_truncated
        assert receipt.accepted_tokens > 100
    finally:
        draft.free()
        backend.free()


def test_a_cancel_in_the_middle_of_drafts_disturbs_nobody(
    backend: LlamaBackend, tokenizer: Tokenizer, draft: DraftModel
) -> None:
    expected, _ = answer(backend, tokenizer, LIFE, max_tokens=32)
    run = start(backend, tokenizer, draft, always(0, 4))
    run.add("gone", ECHO, max_tokens=64)
    run.add("stays", LIFE, max_tokens=32)
    for _ in range(4):
        run.step()
    run.engine.cancel("gone")
    run.add("next", ECHO, max_tokens=32)
    run.finish()
    assert run.finished("gone").reason is FinishReason.CANCELLED
    assert run.tokens("stays") == expected
    assert run.tokens("next") == answer(backend, tokenizer, ECHO, max_tokens=32)[0]


@pytest.mark.parametrize("n_slots", [1, 2])
def test_two_requests_in_one_slot_and_in_two(model_path: Path, tokenizer: Tokenizer, n_slots: int) -> None:
    backend = LlamaBackend.load(model_path, n_ctx=256, n_slots=n_slots, n_threads=2, max_draft_tokens=16)
    draft = DraftModel.load(model_path, backend, n_threads=2)
    try:
        expected = [answer(backend, tokenizer, text, sampling=SEEDED)[0] for text in (LIFE, ECHO)]
        for proposer in (draft, PromptLookup()):
            run = start(backend, tokenizer, proposer)
            for name, text in (("a", LIFE), ("b", ECHO)):
                run.add(name, text, sampling=SEEDED)
            run.finish()
            assert [run.tokens("a"), run.tokens("b")] == expected
    finally:
        draft.free()
        backend.free()


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_a_second_turn_on_a_slot_that_saw_wrong_guesses_equals_one_from_scratch(
    backend: LlamaBackend, tokenizer: Tokenizer, rate: float
) -> None:
    expected, _ = answer(backend, tokenizer, LIFE, max_tokens=30)
    run = start(backend, tokenizer, rehearsed(tokenizer, LIFE, expected, rate))
    run.add("first", LIFE, max_tokens=30, cache_scope="alice")
    run.finish()
    turn = LIFE + tokenizer.detokenize(expected) + " Therefore"
    run.add("second", turn, max_tokens=30, cache_scope="alice")
    run.finish()
    assert run.finished("second").receipt.cached_tokens >= 30
    assert run.tokens("second") == answer(backend, tokenizer, turn, max_tokens=30)[0]


def test_a_request_without_drafts_costs_no_guess(
    backend: LlamaBackend, tokenizer: Tokenizer, draft: DraftModel
) -> None:
    off = Decoding(speculation=Speculation(num_max=0))
    tokens, receipt = answer(backend, tokenizer, LIFE, draft, decoding=off)
    assert tokens == answer(backend, tokenizer, LIFE)[0]
    assert receipt.drafted_tokens == 0


# The draft model itself


def guesses(draft: DraftModel, tokens: Sequence[int], num_max: int = 4, least: float = 0.0) -> list[int]:
    """What it says as soon as it has caught up."""
    while draft.num_behind(0, len(tokens)) > draft._catch_up_tokens:
        assert draft.propose([Ask(0, tokens, num_max, least)]) == [[]]
    return draft.propose([Ask(0, tokens, num_max, least)])[0]


def test_a_long_text_is_read_in_bounded_chunks(draft: DraftModel, tokenizer: Tokenizer) -> None:
    draft.open(0, 0)
    draft.open(1, 0)
    long, short = tokenizer.encode(ECHO * 6, add_special=True), tokenizer.encode(LIFE, add_special=True)
    asks = [Ask(0, long, 3), Ask(1, short, 3)]
    sizes = [0]
    while not (found := draft.propose(asks))[0]:
        sizes.append(len(draft._held[0]))
        assert len(sizes) < 100
    assert max(after - before for before, after in itertools.pairwise(sizes)) <= draft._catch_up_tokens
    assert len(found[0]) == len(found[1]) == 3


def test_guesses_depend_on_the_tokens_alone(draft: DraftModel, tokenizer: Tokenizer) -> None:
    """Not on wrong guesses, on another text before, or on what was forgotten."""
    draft.open(0, 0)
    tokens = tokenizer.encode(LIFE, add_special=True)
    fresh = guesses(draft, tokens)
    assert guesses(draft, tokens) == fresh
    guesses(draft, tokenizer.encode(ECHO, add_special=True))
    assert guesses(draft, tokens) == fresh
    draft.open(0, 3)
    assert guesses(draft, tokens) == fresh
    assert guesses(draft, [*tokens, *fresh[:2]], num_max=2) == fresh[2:]


def test_it_stops_where_it_is_not_sure(draft: DraftModel, tokenizer: Tokenizer) -> None:
    draft.open(0, 0)
    tokens = tokenizer.encode(LIFE, add_special=True)
    lengths = [len(guesses(draft, tokens, 8, least)) for least in (0.0, 0.3, 0.9, 1.0)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == 8
    assert lengths[-1] == 0


def test_a_shift_keeps_what_is_kept(draft: DraftModel, tokenizer: Tokenizer) -> None:
    draft.open(0, 0)
    tokens = tokenizer.encode(ECHO * 2, add_special=True)
    guesses(draft, tokens)
    draft.shift(0, 4, 8)
    shifted = tokens[:4] + tokens[12:]
    assert draft._held[0][: len(shifted)] == shifted
    assert draft.num_behind(0, len(shifted)) == 0
    assert len(guesses(draft, shifted)) == 4
    draft.shift(0, 4, 10_000)
    assert draft._held[0] == tokens[:4]
    assert len(guesses(draft, tokens)) == 4


def test_a_draft_model_of_another_vocabulary_is_refused(
    model_path: Path, backend: LlamaBackend, tmp_path: Path
) -> None:
    other = tmp_path / "other.gguf"
    shutil.copy(model_path, other)
    text = "Ġbelieve".encode()
    header = other.read_bytes()[: 4 << 20]
    with other.open("r+b") as file:
        file.seek(header.index(len(text).to_bytes(8, "little") + text) + 8)
        file.write(text.replace(b"believe", b"bolieve"))
    with pytest.raises(EngineError, match=r"another one: token .* is 'Ġbolieve', not 'Ġbelieve'") as caught:
        DraftModel.load(other, backend)
    assert caught.value.code == "draft_model_unfit"


def test_a_draft_model_that_is_no_file_is_refused(backend: LlamaBackend, tmp_path: Path) -> None:
    with pytest.raises(EngineError) as caught:
        DraftModel.load(tmp_path / "none.gguf", backend)
    assert caught.value.code == "model_file_missing"


# As a worker serves it


def test_a_worker_loads_the_model_and_who_guesses_for_it(
    model_path: Path, tokenizer: Tokenizer, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings.CONFIG, "engine", "llama")
    small = ServedModel(pk=2, name="small", path=str(model_path), digest="b" * 64)
    large = ServedModel(pk=1, name="large", path=str(model_path), digest="a" * 64, n_ctx=128, n_slots=1, n_threads=2)
    large.draft_kind, large.draft_model, large.draft_n_max, large.draft_policy = "model", small, 4, "always"
    log = EventLog()
    model = HostedModel(snapshot(large), load=load_backend, sink=log, read_adapters=lambda _served: [])
    try:
        prompt = tuple(tokenizer.encode(LIFE, add_special=True))
        model.load()
        model.submit(make_request("r", prompt=prompt, max_tokens=16))
        log.wait_finished("r", seconds=120)
        receipt, stats = log.finished["r"].receipt, model.stats()
        assert receipt.accepted_tokens == receipt.drafted_tokens > 0
        assert stats is not None
        assert stats.accepted_tokens_total == receipt.accepted_tokens
    finally:
        model.unload()

"""Drafts in the engine: the same tokens whoever guesses and however wrong, within every bound, and counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from inference.engine import (
    AdapterVector,
    CostCurve,
    Delta,
    EngineRunner,
    FakeBackend,
    Finished,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    SlotWork,
    Speculation,
    TokenEvent,
)
from inference.engine.backend import Abilities, Chosen
from inference.engine.drafting import DraftPolicy, DraftSettings
from inference.engine.engine import Engine
from inference.engine.fake_backend import PIECES, invented_answer
from inference.engine.speculative import Ask, PromptLookup, Proposer
from inference.engine.types import Decoding

from .cast import EventLog, HandClock, Rehearsed, assert_well_formed, make_request

BOUNDS = [(1, 2), (1, 4), (4, 8), (4, 12), (8, 16)]
RATES = [(0.0,), (1.0,), (0.5,), (1.0, 1.0, 0.0), (0.8, 0.6, 0.4, 0.2)]


class Watched(FakeBackend):
    """Keeps the work of every step; FakeBackend itself refuses what does not fit the slot."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.steps: list[list[SlotWork]] = []

    def execute(self, work: Sequence[SlotWork], adapters: AdapterVector) -> list[Chosen]:
        self.steps.append(list(work))
        return super().execute(work, adapters)

    @property
    def drafts(self) -> list[int]:
        return [part.num_drafted for step in self.steps for part in step if part.num_drafted]


def always(num_min: int = 0, num_max: int = 16) -> DraftSettings:
    return DraftSettings(num_min=num_min, num_max=num_max, policy=DraftPolicy.ALWAYS)


def run(engine: Engine, *requests: GenerationRequest, also: Callable[[int], None] = lambda _step: None) -> EventLog:
    """Add the requests, run to the end; `also` is called after every step."""
    log = EventLog()
    for request in requests:
        engine.check(request)
        engine.add(request, 0.0)
    for step in range(10_000):
        if not engine.has_work:
            break
        engine.step()
        also(step)
        log(engine.take_events())
    assert not engine.has_work
    assert_well_formed(log.events)
    return log


def requests(number: int = 3, **fields: Any) -> list[GenerationRequest]:
    return [
        make_request(f"r{index}", **{"prompt": (5, 6, index), "max_tokens": 40, **fields}) for index in range(number)
    ]


def rehearsed(wanted: Sequence[GenerationRequest], *rates: float, **options: Any) -> Rehearsed:
    answers = {}
    for each in wanted:
        seed = 0 if each.sampling.temperature <= 0 else each.sampling.seed or 0
        answers[each.prompt] = [invented_answer(each.prompt, seed, index) for index in range(400)]
    return Rehearsed(answers, *rates, **options)


def tokens_of(log: EventLog, wanted: Sequence[GenerationRequest]) -> list[tuple[int, ...]]:
    return [log.tokens(each.request_id) for each in wanted]


@pytest.mark.parametrize(("num_min", "num_max"), BOUNDS)
@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("is_free", [False, True])
def test_tokens_are_those_without_drafts(num_min: int, num_max: int, rates: tuple[float, ...], is_free: bool) -> None:
    wanted = requests(sampling=SamplingParams(temperature=0.2, top_k=5, seed=4242))
    expected = run(Engine(FakeBackend(2, 64)), *wanted)
    backend = Watched(2, 64)
    proposer = rehearsed(wanted, *rates, is_free=is_free)
    log = run(Engine(backend, proposer=proposer, draft_settings=always(num_min, num_max)), *wanted)
    assert tokens_of(log, wanted) == tokens_of(expected, wanted)
    assert [log.text(each.request_id) for each in wanted] == [expected.text(each.request_id) for each in wanted]
    assert all(num_min <= length <= num_max for length in backend.drafts)
    assert backend.drafts


def test_always_wrong_is_never_accepted_and_always_right_always_is() -> None:
    wanted = requests()
    for rate in (0.0, 1.0):
        engine = Engine(FakeBackend(2, 64), proposer=rehearsed(wanted, rate), draft_settings=always())
        log = run(engine, *wanted)
        for each in wanted:
            receipt = log.finished[each.request_id].receipt
            assert receipt.completion_tokens == 40
            assert receipt.drafted_tokens > 0
            assert receipt.accepted_tokens == (receipt.drafted_tokens if rate else 0)
            assert (receipt.num_steps < 10) == bool(rate)


def test_counts_are_kept_by_position() -> None:
    wanted = requests(1)
    engine = Engine(FakeBackend(1, 64), proposer=rehearsed(wanted, 1.0, 1.0, 0.0), draft_settings=always(num_max=4))
    log = run(engine, *wanted)
    stats, receipt = engine.stats(), log.finished["r0"].receipt
    assert stats.drafted_tokens_total == receipt.drafted_tokens
    assert stats.accepted_tokens_total == receipt.accepted_tokens == 2 * stats.num_drafts
    assert stats.accepted_per_position == (stats.num_drafts, stats.num_drafts, 0, 0)
    assert stats.completion_tokens_total == 40
    assert stats.draft_length > 0 or receipt.completion_tokens % 3


@pytest.mark.parametrize("n_ctx", [5, 9, 12, 64])
def test_drafts_never_overrun_the_slot(n_ctx: int) -> None:
    wanted = requests(2, max_tokens=1000)
    expected = run(Engine(FakeBackend(2, n_ctx)), *wanted)
    log = run(Engine(FakeBackend(2, n_ctx), proposer=rehearsed(wanted), draft_settings=always()), *wanted)
    assert tokens_of(log, wanted) == tokens_of(expected, wanted)
    assert log.finished["r0"].reason is FinishReason.LENGTH
    assert log.finished["r0"].receipt.completion_tokens == n_ctx - 3


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 7])
def test_no_guess_is_verified_that_the_answer_has_no_room_for(max_tokens: int) -> None:
    wanted = requests(1, max_tokens=max_tokens)
    backend = Watched(1, 64)
    log = run(Engine(backend, proposer=rehearsed(wanted), draft_settings=always()), *wanted)
    assert len(log.tokens("r0")) == max_tokens
    assert sum(backend.drafts) == log.finished["r0"].receipt.accepted_tokens == max(0, max_tokens - 2)


def test_a_prompt_that_is_being_read_has_no_draft() -> None:
    wanted = requests(1, prompt=tuple(range(1, 40)))
    backend = Watched(1, 128, max_step_tokens=16)
    run(Engine(backend, proposer=rehearsed(wanted), draft_settings=always()), *wanted)
    before = [step for step in backend.steps if step[0].start + len(step[0].tokens) <= 39]
    assert len(before) >= 3
    assert not any(part.num_drafted for step in before for part in step)


def test_a_step_verifies_no_more_than_the_backend_can() -> None:
    wanted = requests(4)
    backend = Watched(4, 64, max_draft_tokens=5)
    log = run(Engine(backend, proposer=rehearsed(wanted), draft_settings=always()), *wanted)
    per_step = [sum(part.num_drafted for part in step) for step in backend.steps]
    assert max(per_step) == 5
    assert tokens_of(log, wanted) == tokens_of(run(Engine(FakeBackend(4, 64)), *wanted), wanted)


def test_a_request_asks_for_less_than_the_model_is_served_with_and_not_for_more() -> None:
    for asked, longest in ((Speculation(num_max=2), 2), (Speculation(num_max=64), 6), (Speculation(num_max=0), 0)):
        wanted = requests(1, decoding=Decoding(speculation=asked))
        backend, proposer = Watched(1, 64), rehearsed(wanted)
        run(Engine(backend, proposer=proposer, draft_settings=always(num_max=6)), *wanted)
        assert max(backend.drafts, default=0) == longest
        assert bool(proposer.asked) == (longest > 0)


def test_a_draft_must_be_no_longer_than_the_longest() -> None:
    wanted = requests(1, decoding=Decoding(speculation=Speculation(num_min=9, num_max=4)))
    backend = Watched(1, 64)
    run(Engine(backend, proposer=rehearsed(wanted), draft_settings=always()), *wanted)
    assert set(backend.drafts) == {4}


def test_a_memory_that_cannot_forget_its_end_gets_no_drafts() -> None:
    wanted = requests(1)
    backend, proposer = Watched(1, 64, abilities=Abilities(trim=False)), rehearsed(wanted)
    engine = Engine(backend, proposer=proposer, draft_settings=always())
    assert len(run(engine, *wanted).tokens("r0")) == 40
    assert not backend.drafts
    assert not proposer.asked
    engine.free()
    assert proposer.is_freed


def test_an_answer_ends_in_the_middle_of_a_draft() -> None:
    wanted = requests(1)
    expected = run(Engine(FakeBackend(1, 64, answer_tokens=11)), *wanted)
    log = run(
        Engine(FakeBackend(1, 64, answer_tokens=11), proposer=rehearsed(wanted), draft_settings=always()), *wanted
    )
    assert log.tokens("r0") == expected.tokens("r0")
    assert log.finished["r0"].reason is FinishReason.EOS


def test_a_stop_string_in_the_middle_of_a_draft_ends_the_answer_there() -> None:
    plain = run(Engine(FakeBackend(1, 128)), *requests(1))
    word = PIECES[plain.tokens("r0")[6]].decode().strip()
    wanted = requests(1, stop=(word,))
    expected = run(Engine(FakeBackend(1, 128)), *wanted)
    log = run(Engine(FakeBackend(1, 128), proposer=rehearsed(wanted), draft_settings=always()), *wanted)
    assert log.text("r0") == expected.text("r0")
    assert log.tokens("r0") == expected.tokens("r0")
    assert log.finished["r0"].stop_word == word
    assert log.finished["r0"].receipt.completion_tokens == expected.finished["r0"].receipt.completion_tokens


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_a_slot_holds_no_wrong_guess_when_the_next_turn_reuses_it(rate: float) -> None:
    first = make_request("r0", prompt=tuple(range(1, 20)), max_tokens=17, cache_scope="alice")
    answer = run(Engine(FakeBackend(1, 128)), first).tokens("r0")
    second = make_request("r1", prompt=(*first.prompt, *answer, 7, 8, 9), max_tokens=20, cache_scope="alice")
    proposer = rehearsed([first, second], rate)
    engine = Engine(FakeBackend(1, 128), proposer=proposer, draft_settings=always())
    log = run(engine, first)
    again = run(engine, second)  # FakeBackend compares what the slot holds with the prompt
    assert log.tokens("r0") == answer
    assert again.tokens("r1") == run(Engine(FakeBackend(1, 128)), second).tokens("r1")
    assert again.finished["r1"].receipt.cached_tokens == len(first.prompt) + len(answer) - 1
    assert proposer.opened == [(0, 0), (0, len(first.prompt) + len(answer) - 1)]


@pytest.mark.parametrize("is_free", [False, True])
def test_guesses_that_are_right_before_and_after_a_shift_are_known_to_be(is_free: bool) -> None:
    backend = FakeBackend(1, 64)
    wanted = requests(1, max_tokens=200, decoding=Decoding(context_shift=True, num_keep=3, num_discard=29))

    class Knowing(Rehearsed):
        """Looks up how far the answer is, so that it is right whatever has been shifted."""

        def _guesses(self, ask: Ask) -> list[int]:
            place = backend._open[ask.slot_id].num_chosen
            return [invented_answer(wanted[0].prompt, 0, place + offset) for offset in range(ask.num_max)]

    proposer = Knowing({}, is_free=is_free)
    engine = Engine(backend, proposer=proposer, draft_settings=always(num_max=4))
    chances: list[float] = []
    log = run(engine, *wanted, also=lambda _step: chances.extend(engine.stats().draft_chances.values()))
    assert proposer.shifted == [(0, 3, 29)] * 5
    assert chances == sorted(chances)
    receipt = log.finished["r0"].receipt
    assert receipt.accepted_tokens == receipt.drafted_tokens > 150
    assert log.tokens("r0") == run(Engine(FakeBackend(1, 64)), *wanted).tokens("r0")


def test_a_cancel_in_the_middle_leaves_the_others_and_the_slot_in_order() -> None:
    wanted = requests(3)
    engine = Engine(FakeBackend(2, 64), proposer=rehearsed(wanted, 0.5), draft_settings=always())
    log = run(engine, *wanted, also=lambda step: engine.cancel("r0") if step == 4 else None)
    expected = run(Engine(FakeBackend(2, 64)), *wanted)
    assert log.finished["r0"].reason is FinishReason.CANCELLED
    assert log.tokens("r0") == expected.tokens("r0")[: len(log.tokens("r0"))]
    assert tokens_of(log, wanted[1:]) == tokens_of(expected, wanted[1:])
    assert not engine._drafter._live  # type: ignore[union-attr]


def test_a_draft_after_which_nothing_can_be_chosen_ends_the_answer_with_the_reason() -> None:
    class Stuck(FakeBackend):
        def execute(self, work: Sequence[SlotWork], adapters: AdapterVector) -> list[Chosen]:
            chosen = super().execute(work, adapters)
            return [
                Chosen(error="grammar_dead_end") if part.num_drafted else each
                for part, each in zip(work, chosen, strict=True)
            ]

    wanted = requests(1)
    engine = Engine(Stuck(1, 64), proposer=rehearsed(wanted), draft_settings=always())
    finished = run(engine, *wanted).finished["r0"]
    assert (finished.reason, finished.error) == (FinishReason.ERROR, "grammar_dead_end")
    assert finished.receipt.accepted_tokens == engine.stats().accepted_tokens_total == 0


def test_nobody_is_asked_where_nobody_guesses() -> None:
    wanted = requests(2)
    backend = Watched(2, 64)
    engine = Engine(backend)
    run(engine, *wanted)
    assert not backend.drafts
    assert engine.stats().num_drafts == 0


# As long as it pays


def adaptive(backend: FakeBackend, proposer: Proposer, clock: HandClock, **settings: Any) -> Engine:
    return Engine(backend, proposer=proposer, clock=clock, draft_settings=DraftSettings(**settings))


def slow(clock: HandClock, n_ctx: int = 512) -> Watched:
    """A step of n tokens takes n and a third times 3 ms: a wrong guess costs nearly as much as a token."""
    return Watched(1, n_ctx, 0.001, 0.003, sleep=clock.sleep)


@pytest.mark.parametrize("is_free", [False, True])
def test_guesses_that_never_come_true_are_soon_made_no_more(clock: HandClock, is_free: bool) -> None:
    wanted = requests(1, max_tokens=300)
    backend = slow(clock)
    run(adaptive(backend, rehearsed(wanted, 0.0, is_free=is_free), clock), *wanted)
    drafted = [sum(part.num_drafted for part in step) for step in backend.steps]
    assert sum(drafted[50:]) <= 6
    assert sum(drafted) < 40


@pytest.mark.parametrize("is_free", [False, True])
def test_guesses_that_come_true_are_made_again_when_a_text_changes(clock: HandClock, is_free: bool) -> None:
    """Half of the answer is guessed wrong, the rest right."""

    class Learner(Rehearsed):
        def _is_right(self, index: int, position: int) -> bool:
            return index > 600

    wanted = requests(1, max_tokens=1500)
    backend = Watched(1, 2048, 0.008, 0.001, sleep=clock.sleep)
    answers = {wanted[0].prompt: [invented_answer(wanted[0].prompt, 0, index) for index in range(1500)]}
    log = run(adaptive(backend, Learner(answers, is_free=is_free), clock), *wanted)
    receipt = log.finished["r0"].receipt
    assert receipt.accepted_tokens > 300
    assert receipt.num_steps < 1100
    early = [step[0].num_drafted for step in backend.steps if step[0].start < 500]
    assert sum(early[100:]) < 0.1 * len(early)


def test_what_one_sequence_taught_serves_the_next(clock: HandClock) -> None:
    wanted = requests(2, max_tokens=100)
    backend = slow(clock)
    engine = adaptive(backend, rehearsed(wanted, 0.0, is_free=True), clock)
    run(engine, wanted[0])
    num_steps = len(backend.steps)
    run(engine, wanted[1])
    assert not any(part.num_drafted for step in backend.steps[num_steps:] for part in step)


def test_acceptance_is_counted_by_adapter_vector(clock: HandClock) -> None:
    backend = Watched(2, 512, 0.008, 0.001, supports_adapters=True, sleep=clock.sleep)
    backend.load_adapter("poet", __file__)
    wanted = [
        make_request("base", prompt=(5, 6, 1), max_tokens=120),
        make_request("poet", prompt=(5, 6, 2), max_tokens=120, adapters=(("poet", 1.0),)),
    ]
    engine = adaptive(backend, rehearsed(wanted, 1.0), clock)
    log = run(engine, *wanted)
    base, poet = (log.finished[name].receipt for name in ("base", "poet"))
    assert base.drafted_tokens == base.accepted_tokens > 50
    assert poet.accepted_tokens < poet.drafted_tokens / 5
    run(engine, *wanted)
    again = engine.stats().drafted_tokens_total - base.drafted_tokens - poet.drafted_tokens
    assert again - base.drafted_tokens < poet.drafted_tokens / 2


def test_short_guesses_of_a_proposer_are_thrown_away() -> None:
    class Brief(Rehearsed):
        def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
            return [guesses[:3] for guesses in super().propose(asks)]

    wanted = requests(1)
    for is_free in (False, True):
        backend = Watched(1, 64)
        answers = {wanted[0].prompt: [invented_answer(wanted[0].prompt, 0, index) for index in range(40)]}
        engine = Engine(backend, proposer=Brief(answers, is_free=is_free), draft_settings=always(4, 8))
        assert len(run(engine, *wanted).tokens("r0")) == 40
        assert not backend.drafts


def test_prompt_lookup_serves_an_answer_that_repeats_itself() -> None:
    def chant(prompt: tuple[int, ...], seed: int, index: int) -> int:
        return 1 + index % 5

    wanted = requests(2)
    expected = run(Engine(FakeBackend(2, 64, answer=chant)), *wanted)
    log = run(Engine(FakeBackend(2, 64, answer=chant), proposer=PromptLookup(), draft_settings=always()), *wanted)
    assert tokens_of(log, wanted) == tokens_of(expected, wanted)
    assert log.finished["r0"].receipt.num_steps < 16


# On a thread


def test_a_runner_drafts_and_frees_who_guesses(start: Callable[..., EngineRunner], log: EventLog) -> None:
    wanted = requests(2)
    proposer = rehearsed(wanted)
    runner = start(FakeBackend(2, 64), proposer=proposer, draft_settings=always())
    for each in wanted:
        runner.submit(each)
    log.wait_finished("r0", "r1")
    assert runner.stats().accepted_tokens_total > 0
    runner.stop()
    assert proposer.is_freed


def test_a_broken_proposer_ends_the_sequences_with_an_error(start: Callable[..., EngineRunner], log: EventLog) -> None:
    class Broken(Rehearsed):
        def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
            raise RuntimeError("llama_decode of the draft model failed")

    crashes: list[BaseException] = []
    proposer = Broken({})
    runner = start(FakeBackend(1, 64), proposer=proposer, draft_settings=always(), on_crash=crashes.append)
    runner.submit(requests(1)[0])
    log.wait_finished("r0")
    runner.stop()
    events: list[TokenEvent] = log.of("r0")
    assert isinstance(events[-1], Finished)
    assert events[-1].reason is FinishReason.ERROR
    assert sum(len(event.tokens) for event in events if isinstance(event, Delta)) == 1
    assert crashes
    assert proposer.is_freed


def test_the_cost_of_guessing_is_part_of_what_pays(clock: HandClock) -> None:
    wanted = requests(1, max_tokens=100)
    for seconds, drafts in ((0.0, True), (1.0, False)):
        backend = Watched(1, 512, 0.01, 0.0001, sleep=clock.sleep)
        proposer = rehearsed(wanted, 1.0, cost=CostCurve(((1, seconds),)))
        run(adaptive(backend, proposer, clock), *wanted)
        assert bool(backend.drafts) == drafts

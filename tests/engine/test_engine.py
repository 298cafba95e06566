"""The engine step by step, on a fake backend and a clock in the test's hand: no thread, no sleep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.engine import (
    Delta,
    EngineError,
    FakeBackend,
    Finished,
    FinishReason,
    SamplingParams,
    SlotWork,
    Started,
    TokenEvent,
)
from inference.engine.backend import NOTHING, Chosen
from inference.engine.engine import Engine
from inference.engine.fake_backend import END, PIECES

from .cast import HandClock, assert_well_formed, make_request

pytestmark = pytest.mark.unit


def spelling(*words: str) -> Any:
    """An answer function that generates these pieces in turn, then the end."""
    tokens = [PIECES.index(word.encode()) for word in words]
    return lambda prompt, seed, index: tokens[index] if index < len(tokens) else END


class Bench:
    """An engine with its events collected."""

    def __init__(self, clock: HandClock, backend: FakeBackend | None = None, **options: Any) -> None:
        self.clock = clock
        self.backend = backend or FakeBackend(2, 64, sleep=clock.sleep)
        self.engine = Engine(self.backend, clock=clock, draw_seed=lambda: 11, **options)
        self.events: list[TokenEvent] = []

    def add(self, request_id: str = "r", **fields: Any) -> None:
        request = make_request(request_id, **fields)
        self.engine.check(request)
        self.engine.add(request, self.clock())

    def step(self) -> list[TokenEvent]:
        self.engine.step()
        events = self.engine.take_events()
        self.events += events
        return events

    def run(self) -> dict[str, Finished]:
        while self.engine.has_work:
            self.step()
        return self.finished

    @property
    def finished(self) -> dict[str, Finished]:
        return {event.request_id: event for event in self.events if isinstance(event, Finished)}

    def text(self, request_id: str = "r") -> str:
        return "".join(each.text for each in self.events if isinstance(each, Delta) and each.request_id == request_id)


@pytest.fixture
def bench(clock: HandClock) -> Bench:
    return Bench(clock)


def answering(clock: HandClock, *words: str, **options: Any) -> Bench:
    return Bench(clock, FakeBackend(2, 64, answer=spelling(*words), sleep=clock.sleep, **options))


def test_a_sequence_is_started_then_deltas_then_finished_once(bench: Bench) -> None:
    bench.add(max_tokens=3)
    bench.run()
    assert [type(event) for event in bench.events] == [Started, Delta, Delta, Delta, Finished]
    assert_well_formed(bench.events)


def test_started_and_the_first_token_of_a_short_prompt_come_in_one_step(bench: Bench) -> None:
    bench.add()
    assert [type(event) for event in bench.step()] == [Started, Delta]


def test_max_tokens_ends_with_length(bench: Bench) -> None:
    bench.add(max_tokens=5)
    last = bench.run()["r"]
    assert (last.reason, last.receipt.completion_tokens) == (FinishReason.LENGTH, 5)


def test_a_slots_context_limit_is_exact(bench: Bench) -> None:
    bench.add(prompt=tuple(range(8)), max_tokens=1000)
    last = bench.run()["r"]
    assert (last.reason, last.receipt.completion_tokens) == (FinishReason.LENGTH, 56)


def test_the_longest_prompt_that_fits_gets_one_token(bench: Bench) -> None:
    bench.add(prompt=tuple(range(63)), max_tokens=1000)
    assert bench.run()["r"].receipt.completion_tokens == 1


def test_an_end_token_ends_with_eos_and_is_counted_but_has_no_text(clock: HandClock) -> None:
    bench = answering(clock, " the", " river")
    bench.add(max_tokens=10)
    last = bench.run()["r"]
    assert (last.reason, last.receipt.completion_tokens, bench.text()) == (FinishReason.EOS, 3, " the river")


def test_a_stop_string_across_tokens_ends_with_stop_and_is_not_in_the_text(clock: HandClock) -> None:
    bench = answering(clock, " the", " river", " light", " of")
    bench.add(max_tokens=10, stop=("er li",))
    last = bench.run()["r"]
    assert (last.reason, last.stop_word, bench.text()) == (FinishReason.STOP, "er li", " the riv")
    assert last.receipt.completion_tokens == 3
    assert_well_formed(bench.events)


def test_the_token_that_completes_a_stop_string_wins_over_max_tokens(clock: HandClock) -> None:
    bench = answering(clock, " the", " river")
    bench.add(max_tokens=2, stop=("river",))
    assert bench.run()["r"].reason is FinishReason.STOP


def test_text_that_only_began_like_a_stop_string_is_delivered_at_the_end(clock: HandClock) -> None:
    bench = answering(clock, " the", " river")
    bench.add(max_tokens=2, stop=("river!",))
    bench.run()
    assert bench.text() == " the river"


def test_a_character_of_two_tokens_arrives_whole(clock: HandClock) -> None:
    tokens = [PIECES.index(b" \xe2\x82"), PIECES.index(b"\xac"), END]
    bench = Bench(clock, FakeBackend(1, 64, answer=lambda prompt, seed, index: tokens[index]))
    bench.add(max_tokens=9)
    bench.run()
    assert [event.text for event in bench.events if isinstance(event, Delta)] == [" ", "€", ""]


def test_the_held_text_of_a_cancelled_sequence_is_delivered(clock: HandClock) -> None:
    bench = answering(clock, " the", " river", " light")
    bench.add(max_tokens=10, stop=("river lights",))
    bench.step()
    bench.step()
    bench.engine.cancel("r")
    bench.step()
    assert bench.text() == " the river"
    assert bench.finished["r"].reason is FinishReason.CANCELLED
    assert_well_formed(bench.events)


def test_cancel_while_waiting_finishes_without_a_slot(bench: Bench) -> None:
    for name in "abc":
        bench.add(name)
    bench.step()
    bench.engine.cancel("c")
    bench.step()
    last = bench.finished["c"]
    assert (last.reason, last.receipt.slot_id, last.receipt.num_steps) == (FinishReason.CANCELLED, None, 0)


def test_cancel_is_idempotent_and_ignores_strangers(bench: Bench) -> None:
    bench.add()
    bench.engine.cancel("r")
    bench.engine.cancel("r")
    bench.engine.cancel("somebody else")
    bench.step()
    assert [type(event) for event in bench.events] == [Finished]


def test_cancel_between_two_prompt_chunks_frees_the_slot(clock: HandClock) -> None:
    bench = Bench(clock, FakeBackend(1, 1000, seconds_per_token=0.001, sleep=clock.sleep))
    bench.add("long", prompt=tuple(range(900)))
    bench.add("next")
    bench.step()
    assert "long" not in bench.finished
    bench.engine.cancel("long")
    bench.step()
    assert bench.finished["long"].reason is FinishReason.CANCELLED
    assert bench.finished["long"].receipt.completion_tokens == 0
    assert any(isinstance(event, Started) and event.request_id == "next" for event in bench.events)


def test_a_deadline_ends_a_generating_sequence_at_that_step(clock: HandClock) -> None:
    bench = Bench(clock, FakeBackend(1, 64, seconds_per_step=1.0, sleep=clock.sleep))
    bench.add(max_tokens=50, deadline=clock() + 3.5)
    last = bench.run()["r"]
    assert (last.reason, last.receipt.completion_tokens) == (FinishReason.DEADLINE, 4)


def test_a_deadline_ends_a_waiting_sequence(clock: HandClock) -> None:
    bench = Bench(clock, FakeBackend(1, 64, seconds_per_step=1.0, sleep=clock.sleep))
    bench.add("first", max_tokens=10)
    bench.add("patient", deadline=clock() + 100)
    bench.add("hasty", deadline=clock() + 2)
    bench.run()
    assert bench.finished["hasty"].reason is FinishReason.DEADLINE
    assert bench.finished["hasty"].receipt.slot_id is None
    assert bench.finished["hasty"].receipt.queue_seconds == pytest.approx(2.0)
    assert bench.finished["patient"].reason is FinishReason.LENGTH


def test_a_deadline_passes_between_prompt_chunks(clock: HandClock) -> None:
    bench = Bench(clock, FakeBackend(1, 1000, seconds_per_token=0.001, sleep=clock.sleep), step_seconds=0.1)
    bench.add(prompt=tuple(range(900)), deadline=clock() + 0.25)
    last = bench.run()["r"]
    assert (last.reason, last.receipt.completion_tokens, last.receipt.num_steps) == (FinishReason.DEADLINE, 0, 3)


def test_a_long_prompt_never_keeps_a_generating_neighbour_waiting(clock: HandClock) -> None:
    bench = Bench(clock, FakeBackend(2, 1000, seconds_per_token=0.001, sleep=clock.sleep), step_seconds=0.1)
    bench.add("talker", max_tokens=30)
    bench.step()
    bench.add("reader", prompt=tuple(range(900)), max_tokens=1)
    while "reader" not in bench.finished:
        before = clock()
        events = bench.step()
        assert clock() - before <= 0.1 + 1e-9
        assert any(event.request_id == "talker" for event in events)
    assert bench.finished["reader"].receipt.num_steps == 10


def test_chunks_shrink_on_a_machine_slower_than_measured_and_grow_back(clock: HandClock) -> None:
    slowness = [5.0]

    class Busy(FakeBackend):
        def execute(self, work: Sequence[SlotWork], adapters: Any) -> list[tuple[int, ...]]:
            clock.sleep((slowness[0] - 1) * self.cost.seconds(sum(len(part.tokens) for part in work)))
            return super().execute(work, adapters)

    def duration() -> float:
        before = clock()
        bench.step()
        return clock() - before

    bench = Bench(clock, Busy(1, 5000, seconds_per_token=0.001, sleep=clock.sleep), step_seconds=0.1)
    bench.add(prompt=tuple(range(4900)))
    assert duration() == pytest.approx(0.5)
    assert [duration() for _ in range(20)][-1] == pytest.approx(0.1, rel=0.1)
    slowness[0] = 1.0
    assert duration() < 0.03
    assert [duration() for _ in range(20)][-1] == pytest.approx(0.1, rel=0.1)


def test_receipts_count_what_was_executed(clock: HandClock) -> None:
    bench = Bench(clock, FakeBackend(2, 64, seconds_per_step=1.0, sleep=clock.sleep))
    bench.add("a", max_tokens=4)
    bench.step()
    bench.add("b", max_tokens=2)
    clock.sleep(0.5)
    bench.run()
    a, b = bench.finished["a"].receipt, bench.finished["b"].receipt
    assert (a.num_steps, a.batch_sequences, a.decode_steps, a.decode_batch_sequences) == (4, 6, 3, 5)
    assert (b.num_steps, b.batch_sequences, b.decode_steps, b.decode_batch_sequences) == (2, 4, 1, 2)
    assert (a.queue_seconds, a.prefill_seconds, a.decode_seconds) == (0.0, 1.0, 3.5)
    assert b.queue_seconds == 0.5
    assert (a.prompt_tokens, a.completion_tokens, a.slot_id, b.slot_id, a.seed) == (3, 4, 0, 1, 11)


def test_the_seed_of_the_request_is_used_and_reported(bench: Bench) -> None:
    bench.add(sampling=SamplingParams(seed=42))
    assert bench.run()["r"].receipt.seed == 42


def test_stats_count_steps_batches_and_tokens(clock: HandClock) -> None:
    bench = Bench(clock, FakeBackend(2, 64, seconds_per_token=1.0, sleep=clock.sleep), step_seconds=100.0)
    bench.add("a", max_tokens=3)
    bench.add("b", max_tokens=3)
    bench.add("c", max_tokens=1)
    bench.step()
    assert (bench.engine.stats().busy_slots, bench.engine.stats().num_waiting) == (2, 1)
    bench.run()
    stats = bench.engine.stats()
    assert (stats.num_slots, stats.busy_slots, stats.num_waiting, stats.num_steps) == (2, 0, 0, 4)
    assert (stats.num_batched_sequences, stats.num_decode_steps, stats.num_decode_sequences) == (7, 2, 4)
    assert (stats.prompt_tokens_total, stats.completion_tokens_total) == (9, 7)
    assert stats.prefill_seconds_total == pytest.approx(9.0)
    assert stats.decode_seconds_total == pytest.approx(4.0)
    assert stats.last_step_at == clock()
    assert stats.cost_curve.seconds(3) == pytest.approx(3.0)


def test_work_is_in_rising_order_of_slots(clock: HandClock) -> None:
    seen: list[list[int]] = []

    class Watched(FakeBackend):
        def execute(self, work: Sequence[SlotWork], adapters: Any) -> list[tuple[int, ...]]:
            seen.append([part.slot_id for part in work])
            return super().execute(work, adapters)

    bench = Bench(clock, Watched(3, 64))
    bench.add("a", max_tokens=2)
    bench.add("b", max_tokens=9)
    bench.add("c", max_tokens=9)
    bench.step()
    bench.step()
    bench.add("d", max_tokens=9)
    bench.run()
    assert seen[2] == [0, 1, 2]
    assert all(slots == sorted(slots) for slots in seen)


def test_tokens_of_a_verified_draft_are_committed_one_by_one(clock: HandClock) -> None:
    class Guessing(FakeBackend):
        def execute(self, work: Sequence[SlotWork], adapters: Any) -> list[Chosen]:
            return [Chosen((1, 2, END, 3)) if part.samples else NOTHING for part in work]

    bench = Bench(clock, Guessing(1, 64))
    bench.add(max_tokens=10)
    last = bench.run()["r"]
    assert (last.reason, last.receipt.completion_tokens) == (FinishReason.EOS, 3)
    assert [event.tokens for event in bench.events if isinstance(event, Delta)] == [(1, 2, END)]


@pytest.mark.parametrize("tokens", [(), (1, 2)])
def test_where_nothing_may_be_chosen_the_sequence_ends_with_what_it_has(
    tokens: tuple[int, ...], clock: HandClock
) -> None:
    """A grammar's dead end: the tokens before it are committed and counted, then the error ends it."""

    class Stuck(FakeBackend):
        def execute(self, work: Sequence[SlotWork], adapters: Any) -> list[Chosen]:
            return [Chosen(tokens, error="grammar_dead_end") if part.samples else NOTHING for part in work]

    bench = Bench(clock, Stuck(1, 64))
    bench.add(max_tokens=10)
    last = bench.run()["r"]
    assert (last.reason, last.error) == (FinishReason.ERROR, "grammar_dead_end")
    assert last.receipt.completion_tokens == len(tokens)
    assert last.receipt.accepted_tokens == 0
    assert_well_formed(bench.events)


def test_probabilities_come_with_the_tokens_that_were_committed(clock: HandClock) -> None:
    bench = Bench(clock, FakeBackend(1, 64, answer_tokens=4))
    bench.add(max_tokens=10, sampling=SamplingParams(num_probs=1))
    bench.run()
    deltas = [event for event in bench.events if isinstance(event, Delta)]
    assert all(tuple(each.token for each in event.probs) == event.tokens for event in deltas)
    assert b"".join(each.piece for event in deltas for each in event.probs).decode() == "".join(e.text for e in deltas)


def test_adapter_vectors_take_turns_on_a_backend_that_has_them(clock: HandClock) -> None:
    bench = Bench(clock, FakeBackend(2, 64, supports_adapters=True))
    bench.engine.load_adapter("poet", __file__)
    bench.add("a", adapters=(("poet", 1.0),))
    bench.add("b")
    bench.run()
    assert bench.finished["a"].receipt.batch_sequences == bench.finished["a"].receipt.num_steps
    assert_well_formed(bench.events)


def adapting(clock: HandClock, n_slots: int = 4, **options: Any) -> Bench:
    """A bench with the adapters poet and clerk loaded."""
    bench = Bench(clock, FakeBackend(n_slots, 256, supports_adapters=True, sleep=clock.sleep, **options))
    bench.engine.load_adapter("poet", __file__)
    bench.engine.load_adapter("clerk", __file__)
    return bench


def test_an_answer_depends_on_the_vector_and_not_on_those_beside_it(clock: HandClock) -> None:
    vectors = [(), (("poet", 0.0),), (("poet", 0.3),), (("poet", 1.0),), (("clerk", 1.0), ("poet", 1.0))]
    alone = []
    for vector in vectors:
        bench = adapting(clock)
        bench.add(adapters=vector, max_tokens=40)
        bench.run()
        alone.append(bench.text())
    assert alone[0] == alone[1]
    assert len(set(alone)) == 4
    together = adapting(clock, n_slots=5)
    for number, vector in enumerate(vectors):
        together.add(f"r{number}", adapters=vector, max_tokens=40)
    together.run()
    assert [together.text(f"r{number}") for number in range(5)] == alone


def test_vectors_that_do_the_same_share_a_batch(clock: HandClock) -> None:
    bench = adapting(clock)
    bench.add("a", adapters=(("clerk", 1.0), ("poet", 0.5)))
    bench.add("b", adapters=(("poet", 0.5), ("clerk", 1.0)))
    bench.run()
    receipt = bench.finished["a"].receipt
    assert receipt.batch_sequences == 2 * receipt.num_steps
    assert bench.engine.stats().num_switches == 1


def test_two_busy_vectors_switch_rarely_and_each_gets_its_first_token_at_once(clock: HandClock) -> None:
    bench = adapting(clock, seconds_per_step=0.01)
    for name, vector in {"a": (), "b": (("poet", 1.0),)}.items():
        bench.add(name, adapters=vector, max_tokens=128)
    bench.run()
    assert bench.engine.stats().num_switches <= 2 * 128 / 16 + 1
    assert max(each.receipt.prefill_seconds for each in bench.finished.values()) < 0.05


@pytest.mark.parametrize("vector", [(("poet", 1.0), ("poet", 0.5)), (("poet", float("nan")),)])
def test_a_vector_that_means_nothing_is_refused(clock: HandClock, vector: Any) -> None:
    with pytest.raises(EngineError) as caught:
        adapting(clock).add(adapters=vector)
    assert caught.value.code == "invalid_request"


def test_an_adapter_in_use_stays_and_an_idle_one_can_go(clock: HandClock) -> None:
    bench = adapting(clock)
    bench.add(adapters=(("poet", 1.0),))
    with pytest.raises(EngineError) as caught:
        bench.engine.unload_adapter("poet")
    assert caught.value.code == "adapter_in_use"
    bench.run()
    bench.engine.unload_adapter("poet")
    bench.engine.unload_adapter("poet")
    assert bench.engine.adapters == {"clerk"}
    with pytest.raises(EngineError) as caught:
        bench.add("late", adapters=(("poet", 1.0),))
    assert caught.value.code == "adapter_not_loaded"


def test_a_request_whose_adapter_went_before_it_came_ends_with_an_error(clock: HandClock) -> None:
    bench = adapting(clock)
    request = make_request(adapters=(("poet", 1.0),))
    bench.engine.check(request)
    bench.engine.unload_adapter("poet")
    bench.engine.add(request, clock())
    bench.run()
    bench.events += bench.engine.take_events()
    assert (bench.finished["r"].reason, bench.finished["r"].error) == (FinishReason.ERROR, "adapter_not_loaded")


def test_a_slot_that_cannot_be_opened_ends_that_sequence_alone(clock: HandClock) -> None:
    class Picky(FakeBackend):
        def open(
            self, slot_id: int, prompt: Sequence[int], sampling: SamplingParams, seed: int, num_cached: int = 0
        ) -> None:
            if prompt[0] == 9:
                raise EngineError("invalid_sampling", "no")
            super().open(slot_id, prompt, sampling, seed, num_cached)

    bench = Bench(clock, Picky(2, 64))
    bench.add("bad", prompt=(9,))
    bench.add("good")
    bench.run()
    assert (bench.finished["bad"].reason, bench.finished["bad"].error) == (FinishReason.ERROR, "invalid_sampling")
    assert bench.finished["good"].reason is FinishReason.LENGTH
    assert bench.engine.stats().busy_slots == 0


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"prompt": ()}, "invalid_request"),
        ({"max_tokens": -1}, "invalid_request"),
        ({"prompt": tuple(range(64))}, "prompt_too_long"),
        ({"prompt": (1, -1)}, "invalid_request"),
        ({"prompt": (1, 2**31)}, "invalid_request"),
        ({"adapters": (("poet", 1.0),)}, "adapters_not_supported"),
        ({"sampling": SamplingParams(top_k=2**40)}, "invalid_sampling"),
    ],
)
def test_a_request_that_could_never_be_served_is_refused(bench: Bench, fields: dict[str, Any], code: str) -> None:
    with pytest.raises(EngineError) as caught:
        bench.add(**fields)
    assert caught.value.code == code


def test_the_refusal_of_a_long_prompt_says_the_limit(bench: Bench) -> None:
    with pytest.raises(EngineError, match="64 tokens"):
        bench.add(prompt=tuple(range(70)))


def test_a_fake_answer_depends_on_the_prompt_and_the_seed_and_on_nothing_else(clock: HandClock) -> None:
    def generate(neighbours: int, prompt: tuple[int, ...], seed: int, temperature: float = 1.0) -> str:
        bench = Bench(clock, FakeBackend(4, 64))
        for index in range(neighbours):
            bench.add(f"n{index}", prompt=(index, 7))
        bench.add(prompt=prompt, sampling=SamplingParams(temperature=temperature, seed=seed), max_tokens=12)
        bench.run()
        return bench.text()

    alone = generate(0, (1, 2), 5)
    assert alone == generate(3, (1, 2), 5)
    assert alone != generate(0, (1, 3), 5)
    assert alone != generate(0, (1, 2), 6)
    assert generate(0, (1, 2), 5, temperature=0.0) == generate(0, (1, 2), 6, temperature=0.0)
    assert len(alone.split()) == 12


@given(
    st.lists(
        st.tuples(
            st.integers(1, 60),  # prompt tokens
            st.integers(1, 20),  # max_tokens
            st.sampled_from([None, 0.5, 5.0, 20.0]),  # deadline in seconds
            st.integers(0, 12),  # arrives before this step
            st.one_of(st.none(), st.integers(0, 25)),  # is cancelled before this step
            st.sampled_from([(), ("er",), ("the",)]),
        ),
        max_size=15,
    ),
    st.integers(1, 4),
)
def test_whatever_happens_every_sequence_finishes_once_and_nothing_leaks(
    requests: list[tuple[int, int, float | None, int, int | None, tuple[str, ...]]], n_slots: int
) -> None:
    clock = HandClock()
    backend = FakeBackend(
        n_slots, 64, seconds_per_step=0.1, seconds_per_token=0.005, answer_tokens=15, sleep=clock.sleep
    )
    bench = Bench(clock, backend)
    began = clock()
    for step in range(26):
        for index, (prompt, most, deadline, arrives, cancelled, stop) in enumerate(requests):
            if arrives == step:
                at = None if deadline is None else began + deadline
                bench.add(f"r{index}", prompt=tuple(range(prompt)), max_tokens=most, deadline=at, stop=stop)
            if cancelled == step:
                bench.engine.cancel(f"r{index}")
        bench.step()
    bench.run()
    assert bench.finished.keys() == {f"r{index}" for index in range(len(requests))}
    assert_well_formed(bench.events)
    stats = bench.engine.stats()
    assert (stats.busy_slots, stats.num_waiting) == (0, 0)
    receipts = [last.receipt for last in bench.finished.values()]
    assert stats.completion_tokens_total == sum(receipt.completion_tokens for receipt in receipts)
    assert stats.num_batched_sequences == sum(receipt.num_steps for receipt in receipts)
    assert stats.num_decode_sequences == sum(receipt.decode_steps for receipt in receipts)
    for last, (prompt, most, *_) in ((bench.finished[f"r{i}"], each) for i, each in enumerate(requests)):
        assert last.receipt.completion_tokens <= min(most, 64 - prompt)
        assert last.receipt.num_steps <= last.receipt.batch_sequences <= n_slots * last.receipt.num_steps

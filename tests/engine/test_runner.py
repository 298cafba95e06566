"""The engine's thread: inbox, cancel, crash, drain, stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from inference.engine import (
    Decoding,
    EngineError,
    EngineRunner,
    FakeBackend,
    Finished,
    FinishReason,
    GenerationRequest,
    SlotWork,
    Started,
    TokenEvent,
)
from tests.timing import PATIENCE_SECONDS, Stopwatch, wait_for

from .cast import EventLog, assert_well_formed, make_request

pytestmark = pytest.mark.unit

Start = Callable[..., EngineRunner]


class BreakingBackend(FakeBackend):
    """Fails at a given step, for good."""

    def __init__(self, *args: Any, fails_at: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self.steps_left = fails_at
        self.is_freed = False

    def execute(self, work: Sequence[SlotWork], adapters: Any) -> list[tuple[int, ...]]:
        self.steps_left -= 1
        if self.steps_left < 0:
            raise RuntimeError("the device is gone")
        return super().execute(work, adapters)

    def free(self) -> None:
        self.is_freed = True
        super().free()


def code_of(action: Callable[[], object]) -> str:
    with pytest.raises(EngineError) as caught:
        action()
    return caught.value.code


def test_200_waiting_requests_on_2_slots_all_finish_first_come_first_served(log: EventLog, start: Start) -> None:
    runner = start(FakeBackend(2, 64))
    names = [f"r{index}" for index in range(200)]
    for name in names:
        runner.submit(make_request(name))
    log.wait_finished(*names)
    started = [event.request_id for event in log.events if isinstance(event, Started)]
    assert started == names
    assert {last.reason for last in log.finished.values()} == {FinishReason.LENGTH}
    assert_well_formed(log.events)


def test_requests_from_many_threads_are_decoded_together(log: EventLog, start: Start) -> None:
    all_came = threading.Event()

    def first_step_waits(_seconds: float) -> None:
        all_came.wait(PATIENCE_SECONDS)

    runner = start(FakeBackend(8, 64, seconds_per_step=0.002, sleep=first_step_waits))
    names = [f"r{index}" for index in range(8)]
    threads = [threading.Thread(target=runner.submit, args=(make_request(name, max_tokens=30),)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    all_came.set()
    log.wait_finished(*names)
    for last in log.finished.values():
        assert last.receipt.batch_sequences / last.receipt.num_steps >= 4


def test_all_events_of_a_step_come_in_one_call(log: EventLog, start: Start) -> None:
    runner = start(FakeBackend(4, 64, seconds_per_step=0.02))
    names = [f"r{index}" for index in range(5)]
    for name in names:
        runner.submit(make_request(name, max_tokens=8))
    log.wait_finished(*names)
    assert len(log.calls) == runner.stats().num_steps
    assert max(len({event.request_id for event in call}) for call in log.calls) == 4


def test_an_idle_engine_sleeps_and_wakes_at_once(log: EventLog, start: Start) -> None:
    runner = start(FakeBackend(1, 64))
    time.sleep(0.05)
    assert runner._thread.ident is not None
    clock = time.pthread_getcpuclockid(runner._thread.ident)  # other tests' threads may be in this process
    used = time.clock_gettime(clock)
    time.sleep(0.2)
    assert time.clock_gettime(clock) - used < 0.1
    delays = []
    for index in range(30):
        watch = Stopwatch()
        runner.submit(make_request(f"r{index}", max_tokens=1))
        log.wait_finished(f"r{index}")
        delays.append(watch.seconds())
    assert sorted(delays)[len(delays) // 2] < 0.01
    assert runner.stats().num_steps == 30


def test_cancel_ends_a_running_request_before_its_next_step(log: EventLog, start: Start) -> None:
    runner = start(FakeBackend(1, 10_000, seconds_per_step=0.005))
    runner.submit(make_request("long", max_tokens=9000))
    log.wait_started("long")
    runner.cancel("long")
    runner.cancel("long")
    runner.cancel("nobody")
    log.wait_finished("long")
    assert log.finished["long"].reason is FinishReason.CANCELLED
    assert_well_formed(log.events)


def test_a_request_cancelled_before_the_engine_saw_it_still_finishes(log: EventLog) -> None:
    runner = EngineRunner(FakeBackend(1, 64), sink=log)
    runner.submit(make_request())
    runner.cancel("r")
    runner.start()
    log.wait_finished("r")
    runner.stop()
    assert [last.reason for last in log.finished.values()] == [FinishReason.CANCELLED]
    assert runner.stats().num_steps == 0


def accepts(runner: EngineRunner, request: GenerationRequest) -> bool:
    """The engine forgets an id just after the sink has seen its end."""
    try:
        runner.submit(request)
    except EngineError as error:
        assert error.code == "duplicate_request"
        return False
    return True


def test_an_id_is_refused_while_it_is_live(log: EventLog, start: Start) -> None:
    runner = start(FakeBackend(1, 10_000, seconds_per_step=0.005))
    runner.submit(make_request(max_tokens=9000))
    assert code_of(lambda: runner.submit(make_request())) == "duplicate_request"


def test_the_id_of_a_finished_request_may_come_again(log: EventLog, start: Start) -> None:
    runner = start(FakeBackend(1, 64))
    runner.submit(make_request())
    log.wait_finished("r")
    wait_for(lambda: accepts(runner, make_request()))
    wait_for(lambda: [type(event) for event in log.of("r")].count(Finished) == 2)
    assert [type(event) for event in log.of("r")[:6]] == [type(event) for event in log.of("r")[6:]]


def test_a_full_queue_refuses(log: EventLog) -> None:
    runner = EngineRunner(FakeBackend(1, 64), sink=log, max_waiting=2)
    for name in "abc":
        runner.submit(make_request(name))
    assert code_of(lambda: runner.submit(make_request("d"))) == "queue_full"
    runner.stop()


def test_an_impossible_request_is_refused_at_the_door(log: EventLog, start: Start) -> None:
    runner = start(FakeBackend(1, 64))
    assert code_of(lambda: runner.submit(make_request(prompt=tuple(range(64))))) == "prompt_too_long"
    assert code_of(lambda: runner.submit(make_request(adapters=(("poet", 1.0),)))) == "adapters_not_supported"
    assert log.events == []


def test_adapters_come_and_go_while_others_generate(log: EventLog, start: Start) -> None:
    runner = start(FakeBackend(2, 100_000, seconds_per_step=0.001, supports_adapters=True))
    runner.submit(make_request("busy", max_tokens=90_000))
    log.wait_started("busy")
    for number in range(20):
        runner.load_adapter("poet", __file__)
        runner.submit(make_request(f"r{number}", max_tokens=90_000, adapters=(("poet", 1.0),)))
        assert code_of(lambda: runner.unload_adapter("poet")) == "adapter_in_use"
        runner.cancel(f"r{number}")
        log.wait_finished(f"r{number}")
        runner.unload_adapter("poet")
        assert runner.adapters == frozenset()
    assert "busy" not in log.finished


def test_an_adapter_that_cannot_be_loaded_is_the_callers_error_alone(log: EventLog, start: Start) -> None:
    runner = start(FakeBackend(1, 64, supports_adapters=True))
    assert code_of(lambda: runner.load_adapter("poet", "/does/not/exist")) == "adapter_file_invalid"
    runner.submit(make_request())
    log.wait_finished("r")
    plain = start(FakeBackend(1, 64))
    assert code_of(lambda: plain.load_adapter("poet", __file__)) == "adapters_not_supported"


def test_a_stopped_engine_loads_no_adapter_and_leaves_nobody_waiting(log: EventLog, start: Start) -> None:
    runner = start(FakeBackend(1, 64, supports_adapters=True))
    runner.stop()
    assert code_of(lambda: runner.load_adapter("poet", __file__)) == "engine_stopped"
    unstarted = EngineRunner(FakeBackend(1, 64, supports_adapters=True), sink=log)
    codes: list[str] = []
    caller = threading.Thread(target=lambda: codes.append(code_of(lambda: unstarted.load_adapter("a", __file__))))
    caller.start()
    wait_for(lambda: unstarted._errands)
    unstarted.stop()
    caller.join(PATIENCE_SECONDS)
    assert codes == ["engine_stopped"]


def test_a_backend_that_breaks_while_loading_an_adapter_ends_the_engine(log: EventLog, start: Start) -> None:
    class Breaking(FakeBackend):
        def load_adapter(self, digest: str, path: object) -> None:
            raise RuntimeError("the device is gone")

    runner = start(Breaking(1, 64, supports_adapters=True))
    with pytest.raises(RuntimeError):
        runner.load_adapter("poet", __file__)
    assert code_of(lambda: runner.load_adapter("poet", __file__)) == "engine_stopped"


def test_a_broken_backend_ends_every_live_request_and_takes_no_more(log: EventLog) -> None:
    crashes: list[BaseException] = []
    seen_at_crash: list[int] = []

    def on_crash(crash: BaseException) -> None:
        crashes.append(crash)
        seen_at_crash.append(len(log.finished))

    backend = BreakingBackend(2, 64, 0.01, fails_at=5)
    runner = EngineRunner(backend, sink=log, on_crash=on_crash)
    names = [f"r{index}" for index in range(6)]
    for name in names:
        runner.submit(make_request(name, max_tokens=50))
    runner.start()
    log.wait_finished(*names)
    wait_for(lambda: bool(crashes))
    assert {(last.reason, last.error) for last in log.finished.values()} == {(FinishReason.ERROR, "engine_crashed")}
    assert (str(crashes[0]), seen_at_crash) == ("the device is gone", [6])
    assert code_of(lambda: runner.submit(make_request("late"))) == "engine_stopped"
    assert backend.is_freed
    assert runner.drain(0)
    assert_well_formed(log.events)


def test_a_sequence_that_was_getting_its_slot_when_the_engine_crashed_ends_too(
    log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise MemoryError

    runner = EngineRunner(FakeBackend(2, 64), sink=log)
    monkeypatch.setattr(runner._engine, "_fill", full)  # it is out of `waiting`, and not in `running` yet
    for name in ("a", "b"):
        runner.submit(make_request(name))
    runner.start()
    log.wait_finished("a", "b")
    assert {(last.reason, last.error) for last in log.finished.values()} == {(FinishReason.ERROR, "engine_crashed")}
    assert_well_formed(log.events)
    assert runner.drain(0)
    runner.stop()


def test_a_crash_without_anyone_to_tell_still_ends_the_requests(log: EventLog, start: Start) -> None:
    runner = start(BreakingBackend(1, 64, fails_at=0))
    runner.submit(make_request())
    log.wait_finished("r")
    assert log.finished["r"].error == "engine_crashed"


def test_an_on_crash_that_fails_is_logged(log: EventLog, start: Start, caplog: pytest.LogCaptureFixture) -> None:
    def on_crash(_: BaseException) -> None:
        raise LookupError("nobody there")

    runner = start(BreakingBackend(1, 64, fails_at=0), on_crash=on_crash)
    runner.submit(make_request())
    log.wait_finished("r")
    runner.stop()
    assert "on_crash has failed" in caplog.text


def test_a_sink_that_raises_is_a_crash_and_every_request_still_finishes() -> None:
    crashes: list[BaseException] = []
    log = EventLog()
    fails = iter([True])

    def sink(events: Sequence[TokenEvent]) -> None:
        if next(fails, False):
            raise ConnectionError("the stream is gone")
        log(events)

    runner = EngineRunner(FakeBackend(2, 64), sink=sink, on_crash=crashes.append)
    runner.submit(make_request("a", max_tokens=50))
    runner.submit(make_request("b", max_tokens=50))
    runner.start()
    log.wait_finished("a", "b")
    wait_for(lambda: bool(crashes))
    assert isinstance(crashes[0], ConnectionError)
    runner.stop()


def test_a_sink_that_never_works_does_not_keep_the_backend_from_being_freed(caplog: pytest.LogCaptureFixture) -> None:
    def sink(_: Sequence[TokenEvent]) -> None:
        raise ConnectionError("the stream is gone")

    backend = BreakingBackend(1, 64, fails_at=99)
    runner = EngineRunner(backend, sink=sink)
    runner.start()
    runner.submit(make_request(max_tokens=50))
    wait_for(lambda: backend.is_freed)
    runner.stop()
    assert "could not be closed cleanly" in caplog.text


def test_drain_lets_live_requests_finish_and_takes_no_more(log: EventLog, start: Start) -> None:
    runner = start(FakeBackend(1, 64, seconds_per_step=0.005))
    for name in "abc":
        runner.submit(make_request(name, max_tokens=5))
    assert runner.drain(10) is True
    assert {last.reason for last in log.finished.values()} == {FinishReason.LENGTH}
    assert len(log.finished) == 3
    assert code_of(lambda: runner.submit(make_request("late"))) == "engine_stopped"


def test_drain_gives_up_at_its_deadline_and_stop_ends_the_rest(log: EventLog, start: Start) -> None:
    runner = start(FakeBackend(1, 100_000, seconds_per_step=0.005))
    runner.submit(make_request("running", max_tokens=90_000))
    runner.submit(make_request("waiting", max_tokens=90_000))
    log.wait_started("running")
    began = time.monotonic()
    assert runner.drain(0.1) is False
    runner.stop()
    assert time.monotonic() - began < 20, "its answers would have taken minutes"
    assert {last.error for last in log.finished.values()} == {"worker_stopping"}
    assert len(log.finished) == 2
    assert_well_formed(log.events)


def test_stop_is_idempotent_and_ends_what_was_never_started(log: EventLog) -> None:
    runner = EngineRunner(FakeBackend(1, 64), sink=log)
    runner.submit(make_request())
    runner.stop()
    runner.stop()
    assert [(last.reason, last.error) for last in log.finished.values()] == [(FinishReason.ERROR, "worker_stopping")]
    assert code_of(lambda: runner.submit(make_request("late"))) == "engine_stopped"


def test_stop_from_the_sink_does_not_wait_for_itself() -> None:
    log = EventLog()

    def sink(events: Sequence[TokenEvent]) -> None:
        log(events)
        runner.stop()

    runner = EngineRunner(FakeBackend(1, 64), sink=sink)
    runner.start()
    runner.submit(make_request(max_tokens=50))
    log.wait_finished("r")
    runner.stop()
    assert log.finished["r"].error == "worker_stopping"


def test_a_slot_action_waits_for_the_request_that_runs_there(start: Any, log: EventLog) -> None:
    runner = start(FakeBackend(2, 512, 0.002))
    pinned: dict[str, Any] = {"cache_scope": "alice", "decoding": Decoding(slot_id=1)}
    runner.submit(make_request("long", max_tokens=20, **pinned))
    log.wait_started("long")
    assert len(runner.save_slot(("alice", 1), 10.0).tokens) == 22
    assert "long" in log.finished
    assert runner.erase_slot(("alice", 1), 10.0) == 22


def test_a_slot_action_gives_up_in_time_and_leaves_no_trace(start: Any, log: EventLog) -> None:
    runner = start(FakeBackend(1, 100_000, 0.005))
    runner.submit(make_request("long", max_tokens=90_000, cache_scope="alice"))
    log.wait_started("long")
    with pytest.raises(EngineError) as caught:
        runner.erase_slot(("alice", 0), 0.02)
    assert caught.value.code == "slot_busy"
    (report,) = runner.slots()
    assert (report.request_id, report.scope, report.number) == ("long", "alice", 0)
    runner.cancel("long")
    log.wait_finished("long")
    assert len(runner.save_slot(("alice", 0), 10.0).tokens) > 3


def test_an_engine_that_stops_answers_those_that_wait_for_a_slot(start: Any, log: EventLog) -> None:
    runner = start(FakeBackend(1, 512, 0.005))
    runner.submit(make_request("long", max_tokens=400, cache_scope="alice"))
    log.wait_started("long")
    errors: list[str] = []

    def erase() -> None:
        with pytest.raises(EngineError) as caught:
            runner.erase_slot(("alice", 0), 10.0)
        errors.append(caught.value.code)

    waiting = threading.Thread(target=erase)
    waiting.start()
    time.sleep(0.05)
    runner.stop()
    waiting.join(PATIENCE_SECONDS)
    assert errors == ["engine_stopped"]


def test_at_an_orderly_end_the_states_are_given_away(log: EventLog) -> None:
    kept: list[int] = []
    options: dict[str, Any] = {"state_bytes": 1 << 20}
    runner = EngineRunner(
        FakeBackend(2, 512),
        sink=log,
        keep_states=lambda states: kept.extend(len(each.tokens) for each in states),
        **options,
    )
    runner.start()
    runner.submit(make_request("r", prompt=tuple(range(100)), max_tokens=5, cache_scope="alice"))
    log.wait_finished("r")
    runner.stop()
    assert kept == [104]

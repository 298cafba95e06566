"""Lanes on fake backends: side by side, halted for adapters, and ending together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from inference.engine import (
    AdapterVector,
    Decoding,
    EngineError,
    EngineRunner,
    FakeBackend,
    FinishReason,
    SlotWork,
    Started,
)
from inference.engine.engine import Engine
from inference.engine.gate import StepGate
from inference.engine.lanes import LaneRunner, run_in_lanes
from inference.engine.state_store import StoredState
from tests.timing import PATIENCE_SECONDS, wait_for

from .cast import EventLog, assert_well_formed, make_request

pytestmark = pytest.mark.unit

A: AdapterVector = (("a", 1.0),)
B: AdapterVector = (("b", 1.0),)
C: AdapterVector = (("c", 1.0),)
SLOTS = 4

StartLanes = Callable[..., LaneRunner]


def fake(seconds_per_step: float = 0.002, n_ctx: int = 100_000, **options: Any) -> FakeBackend:
    return FakeBackend(SLOTS, n_ctx, seconds_per_step, supports_adapters=True, n_threads=2, **options)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    path = tmp_path / "adapter.gguf"
    path.write_bytes(b"GGUF")
    return path


@pytest.fixture
def start_lanes(log: EventLog, adapter: Path) -> Iterator[StartLanes]:
    """Two lanes with the adapters a, b and c."""
    runners = []

    def start(backend: FakeBackend | None = None, n_lanes: int = 2, **options: Any) -> LaneRunner:
        runner = run_in_lanes(backend or fake(), n_lanes, sink=log, **options)
        assert isinstance(runner, LaneRunner)
        runners.append(runner)
        runner.start()
        for name in "abc":
            runner.load_adapter(name, adapter)
        return runner

    yield start
    for runner in runners:
        runner.stop()


def code_of(action: Callable[[], object]) -> str:
    with pytest.raises(EngineError) as caught:
        action()
    return caught.value.code


def lane_of(log: EventLog, request_id: str) -> int:
    log.wait_started(request_id)
    [slot_id] = [event.slot_id for event in log.of(request_id) if isinstance(event, Started)]
    return slot_id // SLOTS


def endless(request_id: str, adapters: AdapterVector = (), **fields: Any) -> Any:
    return make_request(request_id, max_tokens=90_000, adapters=adapters, **fields)


def test_one_lane_is_the_plain_runner(log: EventLog) -> None:
    runner = run_in_lanes(fake(), 1, sink=log)
    assert type(runner) is EngineRunner
    runner.stop()


def test_two_vectors_run_side_by_side_and_slots_have_numbers_of_their_own(
    log: EventLog, start_lanes: StartLanes
) -> None:
    runner = start_lanes(fake(0.005))
    for number in range(4):
        runner.submit(endless(f"a{number}", A))
        runner.submit(endless(f"b{number}", B))
    names = [f"{letter}{number}" for letter in "ab" for number in range(4)]
    for name in names:
        log.wait_started(name)
    for name in names:
        runner.cancel(name)
    log.wait_finished(*names)
    assert {lane_of(log, f"a{number}") for number in range(4)} == {0}
    assert {lane_of(log, f"b{number}") for number in range(4)} == {1}
    assert {log.finished[name].receipt.slot_id for name in names} == set(range(2 * SLOTS))
    assert runner.stats().num_switches == 2, "each lane attached its vector once"
    assert_well_formed(log.events)


def test_answers_are_those_of_one_engine_whatever_the_lane(log: EventLog, start_lanes: StartLanes) -> None:
    vectors: list[AdapterVector] = [(), A, B, C, (("a", 0.5), ("b", 0.5))]
    runner, alone, backend = start_lanes(n_lanes=3), EventLog(), fake()
    backend._loaded |= {"a", "b", "c"}
    plain = EngineRunner(backend, sink=alone)
    plain.start()
    names = []
    for number, vector in enumerate(vectors * 4):
        request = make_request(f"r{number}", prompt=(number, 2, 3), max_tokens=20, adapters=vector)
        runner.submit(request)
        plain.submit(request)
        names.append(request.request_id)
    log.wait_finished(*names)
    alone.wait_finished(*names)
    plain.stop()
    assert [log.tokens(name) for name in names] == [alone.tokens(name) for name in names]


def test_threads_follow_the_work(log: EventLog, start_lanes: StartLanes) -> None:
    first = fake(0.005)
    backends = [first, first.sibling()]
    runner = LaneRunner(backends, sink=log)
    first._loaded |= {"a", "b"}
    runner.start()
    try:
        runner.submit(endless("a", A))
        log.wait_started("a")
        assert (backends[0].threads_now, backends[1].threads_now) == (2, 2)
        runner.submit(endless("b", B))
        log.wait_for(lambda: (backends[0].threads_now, backends[1].threads_now) == (1, 1))
        runner.cancel("a")
        log.wait_for(lambda: backends[1].threads_now == 2)
    finally:
        runner.stop()


def test_half_the_threads_make_prompt_chunks_half_as_long_at_once() -> None:
    """The cost curve was measured with all of them."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    backend = FakeBackend(1, 4096, 0.0, 0.002, n_threads=2, sleep=sleep)
    engine = Engine(backend, clock=lambda: now[0], step_seconds=0.1)
    engine.add(make_request(prompt=tuple(range(1, 400))), now[0])
    lasted = []
    for number in (2, 2, 1, 1, 1, 2, 2):
        if number != backend.threads_now:
            engine.share_threads(number, before=backend.threads_now)
        before = now[0]
        engine.step()
        lasted.append(now[0] - before)
    assert all(seconds == pytest.approx(0.1, rel=0.25) for seconds in lasted)


def test_a_request_returns_to_the_lane_that_holds_its_prefix(log: EventLog, start_lanes: StartLanes) -> None:
    runner = start_lanes()
    prompt = tuple(range(1, 301))
    runner.submit(endless("busy", B))
    log.wait_started("busy")
    runner.submit(make_request("first", prompt=prompt, adapters=A, cache_scope="alice"))
    log.wait_finished("first")
    assert lane_of(log, "first") == 1
    runner.cancel("busy")
    log.wait_finished("busy")
    runner.submit(make_request("again", prompt=prompt, adapters=A, cache_scope="alice"))
    runner.submit(make_request("bob's", prompt=prompt, adapters=C, cache_scope="bob"))
    log.wait_finished("again", "bob's")
    assert lane_of(log, "again") == 1
    assert log.finished["again"].receipt.cached_tokens == 299
    assert log.finished["bob's"].receipt.cached_tokens == 0


def test_a_pinned_slot_is_looked_for_in_its_lane(log: EventLog, start_lanes: StartLanes) -> None:
    runner = start_lanes()
    runner.submit(endless("a", A, decoding=Decoding(slot_id=SLOTS + 1)))
    assert lane_of(log, "a") == 1


def test_every_vector_beyond_the_lanes_gets_its_turns(log: EventLog, start_lanes: StartLanes) -> None:
    runner = start_lanes(fake(0.001))
    vectors: list[AdapterVector] = [(("a", scale),) for scale in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)]
    for number, vector in enumerate(vectors):
        runner.submit(make_request(f"r{number}", max_tokens=200, adapters=vector))
    log.wait_finished(*(f"r{number}" for number in range(8)))
    calls = [{event.request_id for event in call} for call in log.calls]
    for lane in range(2):  # each by itself: the thread of the other may be quicker meanwhile
        names = {f"r{number}" for number in range(8) if lane_of(log, f"r{number}") == lane}
        steps = [call for call in calls if call & names]
        for name in names:
            seen = [index for index, call in enumerate(steps) if name in call]
            gaps = [after - before for before, after in pairwise(seen)]
            assert max(gaps) <= 4 * 3 * 8, f"{name} was left out for long in {len(steps)} steps"


def test_cancel_and_deadline_end_a_request_in_any_lane(log: EventLog, start_lanes: StartLanes) -> None:
    runner = start_lanes()
    for name, vector in (("a", A), ("b", B)):
        runner.submit(endless(f"{name} cancelled", vector))
        runner.submit(endless(f"{name} late", vector, deadline=time.monotonic() + 0.2))
        runner.cancel(f"{name} cancelled")
    runner.cancel("nobody")
    log.wait_finished("a cancelled", "a late", "b cancelled", "b late")
    reasons = {name: last.reason for name, last in log.finished.items()}
    assert set(reasons.values()) == {FinishReason.CANCELLED, FinishReason.DEADLINE}
    log.wait_for(lambda: runner.stats().busy_slots == 0)
    runner.submit(make_request("a cancelled"))  # its id may come again
    log.wait_for(lambda: sum(1 for event in log.of("a cancelled") if type(event).__name__ == "Finished") == 2)


def test_an_id_that_is_live_in_any_lane_is_refused(log: EventLog, start_lanes: StartLanes) -> None:
    runner = start_lanes()
    runner.submit(endless("r", A))
    assert code_of(lambda: runner.submit(endless("r", B))) == "duplicate_request"
    assert code_of(lambda: runner.submit(make_request("x", prompt=()))) == "invalid_request"
    assert code_of(lambda: runner.submit(make_request("x", adapters=(("no", 1.0),)))) == "adapter_not_loaded"
    assert code_of(lambda: runner.unload_adapter("a")) == "adapter_in_use"
    assert code_of(lambda: runner.load_adapter("new", Path("/nowhere"))) == "adapter_file_invalid"
    assert runner.adapters == {"a", "b", "c"}
    runner.unload_adapter("c")
    assert runner.adapters == {"a", "b"}


class Watched(FakeBackend):
    """Notes when an adapter was loaded or unloaded during a step of any lane."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.under_way: list[int] = []
        self.clashes: list[str] = []

    def execute(self, work: Sequence[SlotWork], adapters: AdapterVector) -> Any:
        self.under_way.append(1)
        try:
            return super().execute(work, adapters)
        finally:
            self.under_way.pop()

    def load_adapter(self, digest: str, path: str | Path) -> None:
        time.sleep(0.002)
        super().load_adapter(digest, path)
        self.clashes += ["load"] * len(self.under_way)

    def unload_adapter(self, digest: str) -> None:
        time.sleep(0.002)
        super().unload_adapter(digest)
        self.clashes += ["unload"] * len(self.under_way)


def test_no_lane_computes_while_adapters_come_and_go(log: EventLog, start_lanes: StartLanes, adapter: Path) -> None:
    backend = Watched(SLOTS, 100_000, 0.001, supports_adapters=True)
    runner = start_lanes(backend)
    runner.submit(endless("a", A))
    runner.submit(endless("b", B))

    def cycle(name: str) -> None:
        for _ in range(20):
            runner.load_adapter(name, adapter)
            runner.unload_adapter(name)

    log.wait_started("b")
    steps = runner.stats().num_steps
    threads = [threading.Thread(target=cycle, args=(f"new {number}",)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    assert runner.stats().num_steps - steps >= 120, "a step of some lane between any two of them"
    assert backend.clashes == []
    assert not log.finished
    assert runner.adapters == {"a", "b", "c"}


def test_drain_waits_for_all_lanes_and_takes_nothing_more(log: EventLog, start_lanes: StartLanes) -> None:
    runner = start_lanes()
    runner.submit(make_request("a", max_tokens=50, adapters=A))
    runner.submit(endless("b", B))
    assert not runner.drain(0.3)
    assert code_of(lambda: runner.submit(make_request("c"))) == "engine_stopped"
    log.wait_finished("a")
    assert log.finished["a"].reason is FinishReason.LENGTH
    runner.cancel("b")
    assert runner.drain(PATIENCE_SECONDS)


def test_stop_ends_every_lane_and_frees_every_backend(log: EventLog) -> None:
    backends = [fake(), fake()]
    backends[1]._loaded = backends[0]._loaded = {"a", "b"}
    runner = LaneRunner(backends, sink=log)
    runner.start()
    runner.submit(endless("a", A))
    runner.submit(endless("b", B))
    log.wait_started("b")
    runner.stop()
    runner.stop()
    assert {last.error for last in log.finished.values()} == {"worker_stopping"}
    assert not backends[0]._open
    assert not backends[1]._open
    assert code_of(lambda: runner.load_adapter("x", Path("/nowhere"))) == "engine_stopped"
    assert code_of(lambda: runner.submit(make_request("late"))) == "engine_stopped"


def test_lanes_that_never_started_can_be_stopped(log: EventLog) -> None:
    runner = LaneRunner([fake(), fake()], sink=log)
    runner.submit(make_request("r"))
    runner.stop()
    assert log.finished["r"].error == "worker_stopping"


class Fragile(FakeBackend):
    """Fails in the steps that carry this vector."""

    def __init__(self, *args: Any, fails_with: AdapterVector, **options: Any) -> None:
        super().__init__(*args, **options)
        self._fails_with = fails_with
        self.freed: list[int] = []

    def execute(self, work: Sequence[SlotWork], adapters: AdapterVector) -> Any:
        if adapters == self._fails_with:
            raise RuntimeError("the device is gone")
        return super().execute(work, adapters)

    def load_adapter(self, digest: str, path: str | Path) -> None:
        if digest == "broken":
            raise RuntimeError("the device is gone")
        super().load_adapter(digest, path)

    def free(self) -> None:
        self.freed.append(1)
        super().free()


def test_the_crash_of_one_lane_is_the_crash_of_all(log: EventLog, start_lanes: StartLanes) -> None:
    backend = Fragile(SLOTS, 100_000, 0.002, supports_adapters=True, fails_with=B)
    crashes: list[tuple[BaseException, set[str]]] = []
    told = threading.Event()

    def on_crash(error: BaseException) -> None:
        crashes.append((error, set(log.finished)))
        told.set()

    runner = start_lanes(backend, n_lanes=3, on_crash=on_crash)
    runner.submit(endless("a", A))
    runner.submit(endless("c", C))
    log.wait_started("a")
    log.wait_started("c")
    runner.submit(endless("b", B))
    assert told.wait(20)
    assert {name: last.error for name, last in log.finished.items()} == dict.fromkeys("abc", "engine_crashed")
    assert [(str(error), done) for error, done in crashes] == [("the device is gone", {"a", "b", "c"})]
    assert len(backend.freed) == 3
    assert code_of(lambda: runner.submit(make_request("late"))) == "engine_stopped"
    assert code_of(lambda: runner.unload_adapter("a")) == "engine_stopped"
    runner.stop()


def test_all_lanes_crashing_at_once_are_reported_once(log: EventLog, start_lanes: StartLanes) -> None:
    backend = Fragile(SLOTS, 100_000, 0.0, supports_adapters=True, fails_with=(("a", 2.0),))
    crashes: list[BaseException] = []
    runner = start_lanes(backend, n_lanes=4, on_crash=crashes.append)
    for number in range(4):  # pinned, so that each lane has one
        decoding = Decoding(slot_id=number * SLOTS)
        try:
            runner.submit(endless(f"r{number}", (("a", 2.0),), decoding=decoding))
        except EngineError as error:
            assert error.code == "engine_stopped"
    log.wait_for(lambda: bool(crashes))
    runner.stop()
    assert len(crashes) == 1


def test_a_backend_that_breaks_while_it_loads_an_adapter_crashes_all(log: EventLog, start_lanes: StartLanes) -> None:
    crashes: list[BaseException] = []
    backend = Fragile(SLOTS, 100_000, 0.002, supports_adapters=True, fails_with=(("a", 2.0),))
    runner = start_lanes(backend, on_crash=crashes.append)
    runner.submit(endless("a", A))
    runner.submit(endless("b", B))
    with pytest.raises(RuntimeError):
        runner.load_adapter("broken", Path("/nowhere"))
    log.wait_finished("a", "b")
    assert {last.error for last in log.finished.values()} == {"engine_crashed"}
    runner.stop()
    assert len(crashes) == 1


def test_lanes_that_do_not_fit_are_refused_and_free_what_was_made(log: EventLog) -> None:
    class Large(Fragile):
        def sibling(self) -> FakeBackend:
            raise EngineError("model_does_not_fit", "no room")

    backend = Large(SLOTS, 64, fails_with=A)
    with pytest.raises(EngineError, match="1 of 3 lanes fit") as caught:
        run_in_lanes(backend, 3, sink=log)
    assert caught.value.code == "model_does_not_fit"
    assert backend.freed == [1]


def test_lanes_that_cannot_be_made_of_their_backends_free_all_of_them(log: EventLog) -> None:
    def broken() -> Iterator[StoredState]:
        raise OSError("the states cannot be read")
        yield

    backend = Fragile(SLOTS, 64, fails_with=A)
    with pytest.raises(OSError, match="cannot be read"):
        run_in_lanes(backend, 2, sink=log, states=broken())
    assert len(backend.freed) == 2


def test_stats_add_up(log: EventLog, start_lanes: StartLanes) -> None:
    runner = start_lanes()
    assert runner.stats().last_step_at is None
    runner.submit(make_request("a", prompt=(1, 2, 3), max_tokens=5, adapters=A))
    runner.submit(make_request("b", prompt=(1, 2, 3), max_tokens=5, adapters=B))
    log.wait_finished("a", "b")
    log.wait_for(lambda: runner.stats().busy_slots == 0)
    stats = runner.stats()
    assert (stats.num_slots, stats.num_adapters, stats.completion_tokens_total) == (2 * SLOTS, 3, 10)
    assert stats.prompt_tokens_total == 6
    assert stats.last_step_at is not None


def test_the_gate_lets_steps_pass_together_and_whoever_waited_goes_before_the_next_closer() -> None:
    gate, seen, go_on = StepGate(), [], threading.Event()

    def step(name: str) -> None:
        with gate.step():
            go_on.wait(PATIENCE_SECONDS)
            seen.append(name)

    def close() -> None:
        with gate.closed():
            seen.append("closed")
            time.sleep(0.02)
            seen.append("open")

    threads = []
    for target, name, waits in (
        (step, "step", lambda: gate._num_steps == 1),
        (step, "step", lambda: gate._num_steps == 2),  # both are in at once
        (close, None, lambda: gate._num_closers == 1),
        (close, None, lambda: gate._num_closers == 2),
        (step, "later step", lambda: gate._num_waiting == 1),
    ):
        threads.append(threading.Thread(target=target, args=[name] if name else []))
        threads[-1].start()
        wait_for(waits)
    go_on.set()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    assert seen == ["step", "step", "closed", "open", "later step", "closed", "open"]


def test_a_slot_of_any_lane_is_saved_restored_and_erased_by_its_number(log: EventLog, start_lanes: StartLanes) -> None:
    kept: list[StoredState] = []
    runner = start_lanes(state_bytes=1 << 20, keep_states=kept.extend)
    prompt = tuple(range(5, 205))
    runner.submit(endless("busy", A, cache_scope="alice"))
    lane_of(log, "busy")
    runner.submit(make_request("r", prompt=prompt, max_tokens=5, adapters=B, cache_scope="alice"))
    log.wait_finished("r")
    number = log.finished["r"].receipt.slot_id
    assert number is not None and number >= SLOTS
    assert ("alice", number) in {(each.scope, each.number) for each in runner.slots()}
    saved = runner.save_slot(("alice", number), 5.0)
    assert saved.tokens[: len(prompt)] == prompt and saved.adapters == B
    assert runner.erase_slot(("alice", number), 5.0) == len(saved.tokens)
    assert runner.save_slot(("alice", number), 5.0).tokens == ()
    runner.restore_slot(("alice", number), saved, 5.0)
    assert code_of(lambda: runner.save_slot(("alice", 2 * SLOTS), 5.0)) == "invalid_request"
    runner.submit(make_request("again", prompt=prompt, max_tokens=5, adapters=B, cache_scope="alice"))
    log.wait_finished("again")
    assert log.finished["again"].receipt.cached_tokens == len(prompt) - 1
    runner.stop()
    assert {(each.key, each.number) for each in kept} >= {(("alice", B), number)}


def test_states_of_an_earlier_life_go_back_to_their_lanes(log: EventLog, start_lanes: StartLanes) -> None:
    kept: list[StoredState] = []
    first = start_lanes(fake(n_ctx=1000, seconds_per_token=0.0005), state_bytes=1 << 20, keep_states=kept.extend)
    prompt = tuple(range(5, 205))
    for name, adapters in (("a", A), ("b", B)):
        first.submit(make_request(name, prompt=prompt, max_tokens=200, adapters=adapters, cache_scope="alice"))
    log.wait_finished("a", "b")
    first.stop()
    second = start_lanes(fake(n_ctx=1000, seconds_per_token=0.0005), state_bytes=1 << 20, states=kept)
    for name, adapters in (("a2", A), ("b2", B)):
        second.submit(make_request(name, prompt=prompt, max_tokens=5, adapters=adapters, cache_scope="alice"))
    log.wait_finished("a2", "b2")
    assert [log.finished[name].receipt.cached_tokens for name in ("a2", "b2")] == [len(prompt) - 1] * 2

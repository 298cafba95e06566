"""The worker without Celery: a fake engine, real Valkey, a real database."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from django.db import OperationalError

from accounts.models import QuotaPeriod, Reservation
from inference.catalog import registry
from inference.engine.fake_backend import FakeBackend
from inference.engine.lanes import LaneRunner
from inference.engine.types import Decoding, EngineError
from inference.models import Receipt, ServedModel
from inference.transport import doorbell
from inference.transport.completion_cache import completion_cache
from inference.transport.queue import ticket_key, ticket_queue
from inference.transport.stream import stream_key
from inference.upkeep.reaper import Reaper, cancel, cancel_where
from inference.worker import hosted
from inference.worker import worker as worker_module
from inference.worker.hosted import State
from tests.inference.flow import (
    admitted,
    events,
    fake_load,
    finish,
    principal_of,
    register,
    text_of,
    ticket,
    wait_for,
    worker,
)
from tests.timing import PATIENCE_SECONDS, Stopwatch

pytestmark = [pytest.mark.integration, pytest.mark.django_db(transaction=True)]


@pytest.fixture(autouse=True)
def bell(monkeypatch: pytest.MonkeyPatch, valkey: Any) -> list[str]:
    rung: list[str] = []
    monkeypatch.setattr(doorbell, "ring", lambda pool: rung.append(pool) or True)
    return rung


@pytest.fixture
def alice(cast: Any) -> Any:
    register()
    return principal_of(cast.alice, tokens_per_minute=100_000, concurrent_requests=100)


@pytest.fixture
def quick_beats(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(worker_module, "BEAT_SECONDS", 0.02)
    yield


def counters(tenant_id: int) -> tuple[int, int, int, int]:
    row = QuotaPeriod.objects.get(tenant_id=tenant_id, key=None)
    return row.used_tokens, row.reserved_tokens, row.used_requests, row.reserved_requests


def places(valkey: Any, tenant_id: int) -> int:
    return int(valkey.zcard(f"accounts:places:tenant:{tenant_id}"))


# From ticket to receipt


def test_a_ticket_becomes_text_a_receipt_and_an_exact_charge(alice: Any, valkey: Any) -> None:
    with worker(valkey, threads=2):
        sent = admitted(alice, stream=True).ticket
        last = finish(valkey, sent.request_id)
        assert (last["reason"], last["error"]) == ("length", None)
        assert last["receipt"]["completion_tokens"] == 16
        found = events(valkey, sent.request_id)
        assert found[0]["t"] == "started"
        assert sum(event.get("n", 0) for event in found) == 16
        assert places(valkey, alice.tenant_id) == 0
        wait_for(lambda: not valkey.exists("settlements"))
    assert counters(alice.tenant_id) == (26, 0, 1, 0)
    receipt = Receipt.objects.get()
    assert (receipt.charged_tokens, receipt.status, receipt.num_steps > 0) == (26, "completed", True)
    assert valkey.hgetall("settlements") == {}


def test_unused_tokens_a_minute_are_given_back(alice: Any, valkey: Any) -> None:
    with worker(valkey, threads=1, load=fake_load(answer_tokens=4)):
        sent = admitted(alice).ticket
        assert finish(valkey, sent.request_id)["reason"] == "eos"
        level = float(valkey.hget(f"accounts:tokens:tenant:{alice.tenant_id}", "level"))
    assert level == pytest.approx(100_000 - 15, abs=5)


def test_eight_at_once_are_decoded_in_one_batch(cast: Any, valkey: Any) -> None:
    register(n_slots=8)
    alice = principal_of(cast.alice)
    tickets = [admitted(alice, max_tokens=40).ticket for _ in range(8)]
    with worker(valkey, threads=8, load=fake_load(0.02)):
        for sent in tickets:
            finish(valkey, sent.request_id)
        wait_for(lambda: Receipt.objects.count() == 8)
    assert min(Receipt.objects.values_list("mean_batch_size", flat=True)) >= 4


def test_one_thread_serves_all_that_wait(alice: Any, valkey: Any) -> None:
    tickets = [admitted(alice).ticket for _ in range(10)]
    with worker(valkey) as host:
        host.serve()
        for sent in tickets:
            assert finish(valkey, sent.request_id)["reason"] == "length"


def test_no_ticket_is_taken_for_a_slot_that_is_not_free(cast: Any, valkey: Any) -> None:
    register(n_slots=2)
    alice = principal_of(cast.alice)
    tickets = [admitted(alice, max_tokens=240).ticket for _ in range(6)]
    with worker(valkey, threads=6, load=fake_load(0.02)):
        wait_for(lambda: ticket_queue().num_waiting("default") == 4)
        time.sleep(0.05)
        assert ticket_queue().num_waiting("default") == 4
        for sent in tickets:
            cancel(sent.request_id)
            finish(valkey, sent.request_id)


def test_a_hundred_requests_of_many_threads_end_once_each(cast: Any, valkey: Any) -> None:
    register(n_slots=8)
    alice = principal_of(cast.alice)
    tickets = [admitted(alice, max_tokens=8).ticket for _ in range(100)]
    with worker(valkey, threads=16):
        for sent in tickets:
            finish(valkey, sent.request_id, 20)
        wait_for(lambda: not valkey.exists("settlements"))
    ends = Counter(event["t"] for sent in tickets for event in events(valkey, sent.request_id))
    assert ends["finished"] == 100
    assert counters(alice.tenant_id) == (1800, 0, 100, 0)


def test_an_answer_is_kept_for_identical_requests_before_its_end_is_seen(alice: Any, valkey: Any) -> None:
    with worker(valkey, threads=1):
        sent = admitted(alice, use_cache=True).ticket
        finish(valkey, sent.request_id)
        assert sent.cache_key is not None
        kept = completion_cache().get(sent.cache_key, model_id="small")
    assert kept is not None
    assert kept.output == text_of(events(valkey, sent.request_id))


def test_a_request_that_the_engine_refuses_ends_with_its_reason(alice: Any, valkey: Any) -> None:
    with worker(valkey, threads=1, load=lambda served: FakeBackend(served.n_slots, 4)):
        sent = admitted(alice).ticket
        last = finish(valkey, sent.request_id)
        wait_for(lambda: not valkey.exists("settlements"))
    assert (last["reason"], last["error"]) == ("error", "prompt_too_long")
    assert counters(alice.tenant_id) == (0, 0, 0, 0)


# Deadlines


def test_a_ticket_taken_after_its_queue_deadline_is_not_generated(
    alice: Any, valkey: Any, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings.CONFIG, "queue_timeout_seconds", 0.01)
    sent = admitted(alice).ticket
    time.sleep(0.03)
    with worker(valkey, threads=1):
        assert finish(valkey, sent.request_id)["error"] == "queue_timeout"


def test_a_ticket_that_waits_too_long_is_ended_by_the_sweep(
    alice: Any, valkey: Any, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings.CONFIG, "queue_timeout_seconds", 0.01)
    sent = admitted(alice).ticket
    time.sleep(0.03)
    assert Reaper(ticket_queue()).sweep() == 1
    assert finish(valkey, sent.request_id)["error"] == "queue_timeout"
    assert counters(alice.tenant_id) == (0, 0, 0, 0)
    assert places(valkey, alice.tenant_id) == 0


def test_a_deadline_ends_a_running_request_and_charges_what_was_computed(
    alice: Any, valkey: Any, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings.CONFIG, "generation_timeout_seconds", 1.0)
    with worker(valkey, threads=1, load=fake_load(0.02)):
        sent = admitted(alice, max_tokens=200).ticket
        last = finish(valkey, sent.request_id)
        wait_for(lambda: Receipt.objects.exists())
    assert last["reason"] == "deadline"
    assert 0 < last["receipt"]["completion_tokens"] < 200
    assert counters(alice.tenant_id)[0] == 10 + last["receipt"]["completion_tokens"]


# Cancels


def test_cancelling_a_waiting_request_is_free_and_ends_it_at_once(alice: Any, valkey: Any) -> None:
    sent = admitted(alice).ticket
    assert cancel(sent.request_id) == "waiting"
    assert finish(valkey, sent.request_id)["reason"] == "cancelled"
    assert counters(alice.tenant_id) == (0, 0, 0, 0)
    assert places(valkey, alice.tenant_id) == 0
    assert Receipt.objects.get().status == "cancelled"
    assert cancel(sent.request_id) == "done"


def test_cancelling_a_running_request_frees_its_slot_and_charges_what_was_computed(alice: Any, valkey: Any) -> None:
    with worker(valkey, threads=1, load=fake_load(0.01)):
        sent = admitted(alice, max_tokens=240, stream=True).ticket
        wait_for(lambda: text_of(events(valkey, sent.request_id)))
        watch = Stopwatch()
        assert cancel(sent.request_id) == "running"
        last = finish(valkey, sent.request_id)
        assert watch.seconds() < 0.25
        wait_for(lambda: Receipt.objects.exists())
    assert last["reason"] == "cancelled"
    generated = last["receipt"]["completion_tokens"]
    assert 0 < generated < 240
    assert counters(alice.tenant_id) == (10 + generated, 0, 1, 0)
    assert sum(event.get("n", 0) for event in events(valkey, sent.request_id)) <= generated


def test_a_worker_tells_at_once_that_its_models_are_loaded(
    alice: Any, valkey: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "BEAT_SECONDS", 60.0)
    with worker(valkey):
        wait_for(lambda: [info for info in ticket_queue().workers() if info.info["models"][0]["state"] == "ready"])


def test_a_cancel_that_was_published_into_the_void_comes_with_the_heartbeat(
    alice: Any, valkey: Any, quick_beats: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module.WorkerHost, "_listen", lambda _: None)
    with worker(valkey, threads=1, load=fake_load(0.05)):
        sent = admitted(alice, max_tokens=240).ticket
        wait_for(lambda: valkey.hget(ticket_key(sent.request_id), "state") == b"leased")
        cancel(sent.request_id)
        assert finish(valkey, sent.request_id)["reason"] == "cancelled"


def test_a_cancel_that_overtakes_its_request_is_kept_for_it(alice: Any, valkey: Any) -> None:
    sent = admitted(alice).ticket
    with worker(valkey) as host:
        host._cancel(sent.request_id)
        host.serve()
        assert finish(valkey, sent.request_id)["reason"] == "cancelled"
        wait_for(lambda: not valkey.exists("settlements"))
    assert counters(alice.tenant_id) == (0, 0, 0, 0)


def test_revoking_ends_all_that_a_key_has_waiting_or_running(alice: Any, cast: Any, valkey: Any) -> None:
    bob = principal_of(cast.bob)
    with worker(valkey, threads=4, load=fake_load(0.01)):
        ours = [admitted(alice, max_tokens=240).ticket for _ in range(6)]
        other = admitted(bob, max_tokens=20).ticket
        assert cancel_where(key_id=alice.key_id) == 6
        assert {finish(valkey, sent.request_id)["reason"] for sent in ours} == {"cancelled"}
        assert finish(valkey, other.request_id)["reason"] == "length"


# Death, stalls, fencing


def test_a_worker_that_falls_silent_is_reaped_and_its_words_count_no_more(
    alice: Any, valkey: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()

    def stall(_: float) -> None:
        gate.wait(PATIENCE_SECONDS)

    monkeypatch.setattr(worker_module.WorkerHost, "_beat", lambda _: None)
    load = fake_load(0.01)
    with worker(
        valkey, threads=1, load=lambda served: FakeBackend(served.n_slots, served.n_ctx, 0.01, sleep=stall)
    ) as host:
        host.queue.beat(host.worker_id, "default", 4, {}, ttl_seconds=0.05)
        sent = admitted(alice, max_tokens=20, stream=True).ticket
        wait_for(lambda: valkey.hget(ticket_key(sent.request_id), "state") == b"leased")
        time.sleep(0.1)
        assert Reaper(ticket_queue()).sweep() == 1
        last = finish(valkey, sent.request_id)
        assert (last["reason"], last["error"]) == ("error", "worker_lost")
        assert counters(alice.tenant_id) == (0, 0, 0, 0)
        assert places(valkey, alice.tenant_id) == 0
        before = valkey.xlen(stream_key(sent.request_id))
        gate.set()  # it wakes up, generates on, and is refused
        wait_for(lambda: not host._live and not host._ended)
        assert valkey.xlen(stream_key(sent.request_id)) == before
        assert not valkey.exists("settlements")
    assert load is not None
    assert Receipt.objects.get().error_code == "worker_lost"
    assert counters(alice.tenant_id) == (0, 0, 0, 0)


def test_waiting_tickets_of_a_dead_worker_are_served_by_the_next(alice: Any, valkey: Any, bell: list[str]) -> None:
    tickets = [admitted(alice).ticket for _ in range(3)]
    bell.clear()
    with worker(valkey) as host:
        assert len(bell) >= 3  # it rings for what waits when it starts
        host.serve()
        for sent in tickets:
            assert finish(valkey, sent.request_id)["reason"] == "length"


def test_a_lease_whose_reply_was_lost_is_given_up(alice: Any, valkey: Any, quick_beats: None) -> None:
    with worker(valkey) as host:
        sent = admitted(alice).ticket
        host.queue.take("default", host.worker_id, [sent.model_id])
        wait_for(lambda: valkey.hget(ticket_key(sent.request_id), "state") == b"claimed")
        assert Reaper(ticket_queue()).sweep() == 1
    assert finish(valkey, sent.request_id)["error"] == "worker_lost"
    assert Reservation.objects.get().state == "released"


def test_a_lost_doorbell_is_rung_again_by_the_worker(
    alice: Any, valkey: Any, bell: list[str], quick_beats: None
) -> None:
    with worker(valkey):
        bell.clear()
        admitted(alice)
        bell.clear()
        wait_for(lambda: bell)


def test_a_worker_whose_bell_nobody_answers_ends(
    alice: Any, valkey: Any, quick_beats: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "STUCK_SECONDS", 0.1)
    stuck = threading.Event()
    with worker(valkey, on_stuck=stuck.set, num_threads=1):
        admitted(alice)
        assert stuck.wait(PATIENCE_SECONDS)


def test_a_worker_that_takes_no_lines_of_batches_ends_too(
    alice: Any, valkey: Any, quick_beats: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "STUCK_SECONDS", 0.1)
    stuck = threading.Event()
    with worker(valkey, on_stuck=stuck.set, num_threads=1):
        ticket_queue().put(ticket(model_id=ServedModel.objects.get().pk, is_batch=True))
        assert stuck.wait(PATIENCE_SECONDS / 3)


def test_a_worker_whose_threads_all_serve_is_not_stuck_though_slots_are_free(
    alice: Any, valkey: Any, quick_beats: None
) -> None:
    stuck = threading.Event()
    with worker(valkey, threads=1, num_threads=1, load=fake_load(0.02), on_stuck=stuck.set) as host:
        first, second = admitted(alice, max_tokens=100).ticket, admitted(alice, max_tokens=1).ticket
        wait_for(lambda: host._live)
        with pytest.MonkeyPatch.context() as impatient:  # while its thread serves; before and after, it may be late
            impatient.setattr(worker_module, "STUCK_SECONDS", 0.1)
            assert not stuck.wait(0.5)
        for sent in (first, second):
            assert finish(valkey, sent.request_id)["reason"] == "length"


def test_a_worker_whose_clock_is_wrong_serves_all_the_same(
    alice: Any, valkey: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for hours in (2, -2):
        wrong = SimpleNamespace(
            time=lambda ahead=hours * 3600: time.time() + ahead, monotonic=time.monotonic, sleep=time.sleep
        )
        with monkeypatch.context() as patched:
            patched.setattr(worker_module, "time", wrong)
            with worker(valkey, threads=1):
                last = finish(valkey, admitted(alice).ticket.request_id)
        assert (last["reason"], last["error"]) == ("length", None)


def test_garbage_on_its_channels_leaves_a_worker_that_hears(
    alice: Any, valkey: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with worker(valkey, threads=1, load=fake_load(0.02)) as host:
        sent = admitted(alice, max_tokens=200, stream=True).ticket
        wait_for(lambda: text_of(events(valkey, sent.request_id)))
        monkeypatch.setattr(worker_module, "BEAT_SECONDS", 3600.0)  # which would bring the cancel, too
        host._has_news.set()
        wait_for(lambda: not host._has_news.is_set())
        order = b'{"action":"save","model_id":1,"tenant_id":1,"wait_seconds":"long"}'
        for channel, garbage in (("cancel", b"\xff\xfe"), ("slot-actions", order), ("model-orders", b"[1]")):
            assert valkey.publish(f"{channel}:{host.worker_id}", garbage) == 1
        assert cancel(sent.request_id) == "running"
        assert finish(valkey, sent.request_id)["reason"] == "cancelled"
        host._has_news.set()


def test_a_model_that_is_loaded_serves_while_others_still_load(
    alice: Any, valkey: Any, bell: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    register("vast", is_default=False, digest="e" * 64)
    gate, hosts = threading.Event(), list[worker_module.WorkerHost]()

    def load(served: Any) -> FakeBackend:
        if served.name == "vast":
            gate.wait(PATIENCE_SECONDS)
        return FakeBackend(served.n_slots, served.n_ctx)

    def hosted_here(pool: str, **options: Any) -> worker_module.WorkerHost:
        hosts.append(made(pool, load=load, **options))
        return hosts[0]

    made = worker_module.WorkerHost
    monkeypatch.setattr(worker_module, "WorkerHost", hosted_here)
    monkeypatch.setattr(worker_module, "Stopper", lambda *_: SimpleNamespace(start=lambda: None, ask=lambda **_: None))
    monkeypatch.setattr(worker_module, "_pool_of", lambda _: "default")
    monkeypatch.setattr(worker_module, "_host", None)
    sent = admitted(alice).ticket
    starting = threading.Thread(
        target=worker_module.HostStep.start, args=[SimpleNamespace(), SimpleNamespace(concurrency=4)], daemon=True
    )
    bell.clear()
    starting.start()
    try:
        starting.join(PATIENCE_SECONDS / 3)
        assert not starting.is_alive(), "Celery's consumer would begin with the last of them"
        wait_for(lambda: hosts[0].num_slots)
        bell.clear()
        wait_for(lambda: bell)
        hosts[0].serve()
        assert finish(valkey, sent.request_id)["reason"] == "length"
        assert not gate.is_set()
    finally:
        gate.set()
        starting.join(PATIENCE_SECONDS)
        hosts[0].stop(0.0, 5.0)


def test_the_heart_beats_while_a_question_for_tickets_hangs(
    alice: Any, valkey: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with worker(valkey) as host:
        hangs, gate = threading.Event(), threading.Event()

        def hanging(*_: Any, **__: Any) -> None:
            hangs.set()
            gate.wait(PATIENCE_SECONDS)

        monkeypatch.setattr(host.queue, "take", hanging)
        taking = threading.Thread(target=host.serve, daemon=True)
        taking.start()
        assert hangs.wait(PATIENCE_SECONDS)
        beating = threading.Thread(target=host.beat, daemon=True)
        beating.start()
        beating.join(PATIENCE_SECONDS / 2)
        try:
            assert not beating.is_alive()
        finally:
            gate.set()
            taking.join(PATIENCE_SECONDS)


def test_a_request_that_its_engine_never_ends_is_ended_behind_its_deadline(
    alice: Any, valkey: Any, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings.CONFIG, "generation_timeout_seconds", 0.1)
    monkeypatch.setattr(worker_module, "NET_SECONDS", 0.1)
    gate = threading.Event()

    def load(served: Any) -> FakeBackend:
        return FakeBackend(served.n_slots, served.n_ctx, 0.01, sleep=lambda _: gate.wait() and None)

    with worker(valkey, threads=1, load=load) as host:
        sent = admitted(alice).ticket
        try:
            last = finish(valkey, sent.request_id)
            wait_for(lambda: not host._live)
        finally:
            gate.set()
        assert (last["reason"], last["error"]) == ("error", "engine_crashed")
        wait_for(lambda: not valkey.exists("settlements"))
    assert counters(alice.tenant_id) == (0, 0, 0, 0)


def test_requests_may_come_and_go_while_one_is_chosen_to_make_room(
    valkey: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, model = worker_module.WorkerHost("default", client=valkey), SimpleNamespace()
    lease = SimpleNamespace(ticket=SimpleNamespace(tenant_id=1))
    host._live = {name: SimpleNamespace(model=model, lease=lease) for name in "abc"}  # type: ignore[misc]
    monkeypatch.setattr(worker_module, "_can_be_parked", lambda _: bool(host._live.popitem()) and False)
    assert host._to_be_parked(model, 1) is None  # type: ignore[arg-type]
    assert host._live == {}


def test_redis_that_is_away_for_a_moment_loses_nothing(
    alice: Any, valkey: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with worker(valkey, threads=2, load=fake_load(0.01)) as host:
        sent = admitted(alice, max_tokens=60, stream=True).ticket
        wait_for(lambda: text_of(events(valkey, sent.request_id)))
        away = threading.Event()
        away.set()
        pipeline = host._writer._client.pipeline

        def failing(**options: Any) -> Any:
            if away.is_set():
                raise redis.ConnectionError("away")
            return pipeline(**options)

        monkeypatch.setattr(host._writer._client, "pipeline", failing)
        time.sleep(0.3)
        away.clear()
        assert finish(valkey, sent.request_id)["reason"] == "length"
        assert sum(event.get("n", 0) for event in events(valkey, sent.request_id)) == 60


# Stopping


def test_stopping_lets_short_requests_end_and_ends_long_ones_free_of_charge(cast: Any, valkey: Any) -> None:
    register(n_slots=4)
    alice = principal_of(cast.alice)
    short, long = admitted(alice, max_tokens=5).ticket, admitted(alice, max_tokens=240).ticket
    with worker(valkey, threads=4, load=fake_load(0.02)) as host:
        wait_for(lambda: long.request_id in host._live)  # and the short one, which came first, or it has ended
        watch = Stopwatch()
        host.stop(0.5)
        assert watch.seconds() < 2.5
        late = admitted(alice).ticket
    assert finish(valkey, short.request_id)["reason"] == "length"
    last = finish(valkey, long.request_id)
    assert (last["reason"], last["error"]) == ("error", "worker_stopping")
    assert counters(alice.tenant_id)[0] == 15
    assert ticket_queue().workers() == []
    assert ticket_queue().state(late.request_id).state == "waiting"  # type: ignore[union-attr]


def test_stopping_without_redis_is_over_in_bounded_time(
    alice: Any, valkey: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with worker(valkey, threads=1, load=fake_load(0.02)) as host:
        sent = admitted(alice, max_tokens=240, stream=True).ticket
        wait_for(lambda: text_of(events(valkey, sent.request_id)))

        def away(*_: Any, **__: Any) -> Any:
            raise redis.ConnectionError("away")

        monkeypatch.setattr(host._client, "pipeline", away)
        watch = Stopwatch()
        host.stop(0.0)
        assert watch.seconds() < worker_module.LATE_SECONDS


def test_whoever_stops_it_again_waits_for_its_end(alice: Any, valkey: Any) -> None:
    with worker(valkey, threads=1, load=fake_load(0.02)) as host:
        sent = admitted(alice, max_tokens=240).ticket
        wait_for(lambda: len(host._live) == 1)
        stopper = worker_module.Stopper(host, 0.3, end=lambda: None)
        stopper.start()
        stopper.ask()
        wait_for(host._stopping.is_set)
        host.stop(0.3)
        assert host._gone.is_set()
    assert finish(valkey, sent.request_id)["error"] == "worker_stopping"


# Models


def heartbeat(valkey: Any) -> dict[str, Any]:
    (info,) = wait_for(lambda: ticket_queue().workers())
    return {model["name"]: model for model in info.info["models"]}


def test_a_model_that_cannot_be_loaded_is_reported_and_the_others_serve(
    cast: Any, valkey: Any, quick_beats: None
) -> None:
    register()
    register("broken", is_default=False)
    alice = principal_of(cast.alice)

    def load(served: Any) -> FakeBackend:
        if served.name == "broken":
            raise EngineError("model_file_missing", "there is no file")
        return FakeBackend(served.n_slots, served.n_ctx)

    with worker(valkey, threads=2, load=load):
        sound, hopeless = admitted(alice).ticket, admitted(alice, model="broken").ticket
        assert finish(valkey, sound.request_id)["reason"] == "length"
        assert finish(valkey, hopeless.request_id)["error"] == "llm_unavailable"
        report = wait_for(lambda: (found := heartbeat(valkey)).get("broken", {}).get("error") and found)
    assert report["broken"]["state"] == "failed"
    assert "there is no file" in report["broken"]["error"]
    assert report["small"]["state"] == "ready"


def test_a_lazy_model_is_loaded_by_its_first_request(cast: Any, valkey: Any) -> None:
    register(load_mode="lazy")
    with worker(valkey, threads=1) as host:
        (model,) = host._all_models()
        assert model.state is State.UNLOADED
        sent = admitted(principal_of(cast.alice)).ticket
        assert finish(valkey, sent.request_id)["reason"] == "length"
        assert model.state is State.READY


def test_a_model_registered_at_run_time_is_loaded_and_a_removed_one_unloaded(cast: Any, valkey: Any) -> None:
    row = register()
    alice = principal_of(cast.alice)
    with worker(valkey, threads=1) as host:
        register("second", is_default=False)
        host.follow_registry()
        assert sorted(model.served.name for model in host._all_models()) == ["second", "small"]
        assert finish(valkey, admitted(alice, model="second").ticket.request_id)["reason"] == "length"
        ServedModel.objects.filter(pk=row.pk).delete()
        registry.forget()
        host.follow_registry()
        assert [model.served.name for model in host._all_models()] == ["second"]


def test_a_model_that_was_edited_is_replaced_when_it_is_idle(cast: Any, valkey: Any) -> None:
    row = register(n_ctx=256)
    alice = principal_of(cast.alice)
    with worker(valkey, threads=2, load=fake_load(0.05)) as host:
        sent = admitted(alice, max_tokens=30).ticket
        wait_for(lambda: host._live)
        ServedModel.objects.filter(pk=row.pk).update(n_ctx=64)
        registry.forget()
        host.follow_registry()
        (model,) = host._all_models()
        assert model.state is State.RETIRING
        assert finish(valkey, sent.request_id)["reason"] == "length"
        wait_for(model.is_idle)  # its engine lets go of a sequence a moment after the answer's last event
        host.follow_registry()
        wait_for(lambda: [(each.served.n_ctx, each.state) for each in host._all_models()] == [(64, State.READY)])
        assert finish(valkey, admitted(alice).ticket.request_id)["reason"] == "length"


def test_a_model_that_is_long_idle_is_unloaded_and_comes_back_when_asked(cast: Any, valkey: Any) -> None:
    register(keep_alive_seconds=0)
    loads: list[str] = []

    def load(served: Any) -> FakeBackend:
        loads.append(served.name)
        return FakeBackend(served.n_slots, served.n_ctx)

    with worker(valkey, threads=1, load=load) as host:
        (model,) = host._all_models()
        wait_for(lambda: model.state is State.UNLOADED)
        assert host.num_slots == 0
        sent = admitted(principal_of(cast.alice)).ticket
        assert finish(valkey, sent.request_id)["reason"] == "length"
        assert len(loads) == 2
        wait_for(lambda: model.state is State.UNLOADED)


def test_an_engine_that_crashes_fails_its_requests_and_is_loaded_anew(
    cast: Any, valkey: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    register()
    alice = principal_of(cast.alice)
    backends: list[FakeBackend] = []

    def load(served: Any) -> FakeBackend:
        def answer(prompt: tuple[int, ...], seed: int, index: int) -> int:
            return 1 // 0 if len(backends) == 1 and index == 3 else 5

        backends.append(FakeBackend(served.n_slots, served.n_ctx, answer=answer))
        return backends[-1]

    monkeypatch.setattr(hosted, "RETRY_SECONDS", 0.05)
    with worker(valkey, threads=1, load=load) as host:
        sent = admitted(alice).ticket
        last = finish(valkey, sent.request_id)
        assert (last["reason"], last["error"]) == ("error", "engine_crashed")
        time.sleep(0.1)
        host.follow_registry()
        assert finish(valkey, admitted(alice).ticket.request_id)["reason"] == "length"
        wait_for(lambda: Receipt.objects.count() == 2)
    assert len(backends) == 2
    assert counters(alice.tenant_id) == (26, 0, 1, 0)


def test_a_ticket_that_waited_for_a_swap_of_the_file_is_told_by_the_file_that_computed_it(
    cast: Any, valkey: Any
) -> None:
    row, alice = register(), principal_of(cast.alice)
    sent = admitted(alice, use_cache=True).ticket
    assert sent.cache_key is not None
    ServedModel.objects.filter(pk=row.pk).update(digest="e" * 64)
    registry.forget()
    with worker(valkey) as host:
        host.serve()
        assert finish(valkey, sent.request_id)["reason"] == "length"
        wait_for(lambda: Receipt.objects.exists())
    assert Receipt.objects.get().model_digest == "e" * 64
    assert completion_cache().get(sent.cache_key, model_id=sent.model_name) is None


def test_a_model_with_lanes_takes_no_more_tickets_than_slots_and_fails_as_one(
    cast: Any, valkey: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(n_slots=2, n_lanes=2)
    alice = principal_of(cast.alice)
    loads: list[FakeBackend] = []

    def load(served: Any) -> FakeBackend:
        def answer(prompt: tuple[int, ...], seed: int, index: int) -> int:
            return 1 // 0 if len(loads) == 1 and index == 3 else 5

        loads.append(FakeBackend(served.n_slots, served.n_ctx, 0.002 if not loads else 0.05, answer=answer))
        return loads[-1]

    monkeypatch.setattr(hosted, "RETRY_SECONDS", 0.05)
    with worker(valkey, threads=4, load=load) as host:
        last = finish(valkey, admitted(alice).ticket.request_id)
        assert (last["reason"], last["error"]) == ("error", "engine_crashed")
        time.sleep(0.1)
        host.follow_registry()
        [model] = host._all_models()
        assert isinstance(model.runner(), LaneRunner)
        assert (host.num_slots, model.report()["slots"]) == (2, 2)
        tickets = [admitted(alice, max_tokens=240).ticket for _ in range(6)]
        wait_for(lambda: host.queue.num_waiting("default") == 4)
        time.sleep(0.05)
        assert (model.num_busy, host.queue.num_waiting("default")) == (2, 4)
        for ticket in tickets:
            cancel(ticket.request_id)
            finish(valkey, ticket.request_id)
        assert finish(valkey, admitted(alice, max_tokens=4).ticket.request_id)["reason"] == "length"


def test_the_engine_of_the_configuration_is_loaded(cast: Any, settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    register()
    (served,) = registry.in_pool("default")
    monkeypatch.setattr(settings.CONFIG, "engine", "fake")
    assert isinstance(hosted.load_backend(served), FakeBackend)
    monkeypatch.setattr(settings.CONFIG, "engine", "llama")
    with pytest.raises(EngineError, match="nowhere"):
        hosted.load_backend(served)


# Celery's steps


def test_celery_starts_the_host_before_its_consumer_and_drains_it_before_its_pool(
    cast: Any, valkey: Any, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    register()
    monkeypatch.setattr(settings.CONFIG, "engine", "fake")
    monkeypatch.setattr(settings.CONFIG, "drain_seconds", 0.0)
    monkeypatch.setattr(worker_module, "_host", None)

    class Parent:
        class app:
            class conf:
                task_default_queue = "celery"

            class amqp:
                class queues:
                    consume_from = {"default": None}

        concurrency = 8

    step = worker_module.HostStep.__new__(worker_module.HostStep)
    step.stop(Parent)  # before it was started there is nothing to stop
    step.start(Parent)
    host = worker_module.current_host()
    assert host is not None
    assert (host.pool, wait_for(lambda: host.num_slots)) == ("default", 4)
    sent = admitted(principal_of(cast.alice)).ticket
    host.serve()
    assert finish(valkey, sent.request_id)["reason"] == "length"
    step.stop(Parent)
    step.close(Parent)
    assert ticket_queue().workers() == []


def test_a_worker_without_redis_takes_nothing_and_does_not_fall(cast: Any, valkey: Any, quick_beats: None) -> None:
    register()

    def away(*_: Any, **__: Any) -> Any:
        raise redis.ConnectionError("away")

    with worker(valkey) as host:
        with pytest.MonkeyPatch.context() as patched:
            for name in ("take", "beat", "num_waiting", "sign_off"):
                patched.setattr(host.queue, name, away)
            patched.setattr(host._client, "pubsub", away)
            host.serve()
            assert host._num_waiting() == 0
            time.sleep(0.1)
        sent = admitted(principal_of(cast.alice)).ticket
        host.serve()
        assert finish(valkey, sent.request_id)["reason"] == "length"


def test_a_worker_that_cannot_sign_off_still_stops(cast: Any, valkey: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    register()

    def away(*_: Any, **__: Any) -> Any:
        raise redis.ConnectionError("away")

    with worker(valkey) as host:
        monkeypatch.setattr(host.queue, "sign_off", away)
        host.stop(0.0)
    assert host._gone.is_set()


def test_the_registry_is_followed_again_after_the_database_was_away(
    cast: Any, valkey: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    register()
    monkeypatch.setattr(worker_module, "REGISTRY_SECONDS", 0.01)
    errors: list[Exception] = [ValueError("a defect"), OperationalError("locked")]
    reads: list[int] = []

    def read(pool: str) -> Any:
        reads.append(1)
        if errors and len(reads) > 1:
            raise errors.pop()
        return registry.in_pool(pool)

    with worker(valkey, read_registry=read):
        wait_for(lambda: len(reads) > 4)
    assert errors == []


def test_requests_for_one_busy_slot_do_not_keep_others_from_the_free_ones(cast: Any, alice: Any, valkey: Any) -> None:
    """Alice's leases that wait for her slot are more than the model has slots; Bob's ticket is taken all the same."""
    bob = principal_of(cast.bob, tokens_per_minute=100_000)
    with worker(valkey, threads=10, load=fake_load(0.05)):
        wanted: dict[str, Any] = {"decoding": Decoding(slot_id=1), "max_tokens": 200}
        pinned = [admitted(alice, **wanted).ticket.request_id for _ in range(5)]
        wait_for(lambda: ticket_queue().num_waiting("default") == 0)
        other = admitted(bob, max_tokens=2).ticket.request_id
        assert finish(valkey, other)["receipt"]["slot_id"] == 0
        ended = [name for name in pinned if any(event["t"] == "finished" for event in events(valkey, name))]
        assert ended == []
        for request_id in pinned:
            cancel(request_id)
            finish(valkey, request_id)

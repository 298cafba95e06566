"""The sweep's own life: its thread, what it waits for, what it does when things are away."""

from __future__ import annotations

import time
from typing import Any

import pytest
import redis
from django.db import OperationalError

from accounts.models import QuotaPeriod, Reservation
from inference import doorbell, reaper, settlement, tasks, worker
from inference.queue import Sweep, TicketQueue, ticket_queue
from inference.reaper import Reaper, cancel
from tests.inference.flow import admitted, finish, principal_of, register, wait_for

pytestmark = [pytest.mark.integration, pytest.mark.django_db(transaction=True)]


@pytest.fixture(autouse=True)
def bell(monkeypatch: pytest.MonkeyPatch, valkey: Any) -> list[str]:
    rung: list[str] = []
    monkeypatch.setattr(doorbell, "ring", lambda pool: rung.append(pool) or True)
    return rung


@pytest.fixture
def alice(cast: Any) -> Any:
    register()
    return principal_of(cast.alice)


def test_heartbeats_are_trusted_once_redis_has_answered_for_a_while(
    monkeypatch: pytest.MonkeyPatch, valkey: Any
) -> None:
    trusted: list[bool] = []

    def sweep(self: TicketQueue, *, most: int = 200, trust_heartbeats: bool = True) -> Sweep:
        trusted.append(trust_heartbeats)
        return Sweep((), ())

    monkeypatch.setattr(TicketQueue, "sweep", sweep)
    made = Reaper(ticket_queue())
    for now in (100.0, 102.9, 103.1):
        made.sweep(now)
    assert trusted == [False, False, True]


def test_the_thread_outlives_redis_and_the_database(alice: Any, monkeypatch: pytest.MonkeyPatch, valkey: Any) -> None:
    errors: list[Exception] = [redis.ConnectionError("away"), OperationalError("locked"), ValueError("a defect")]
    sweep = Reaper.sweep

    def failing(self: Reaper, now: float | None = None) -> int:
        if errors:
            raise errors.pop()
        return sweep(self, now)

    monkeypatch.setattr(Reaper, "sweep", failing)
    sent = admitted(alice).ticket
    valkey.zadd("waiting:default", {sent.request_id: 1})
    made = Reaper(ticket_queue(), every_seconds=0.01)
    made.start()
    assert finish(valkey, sent.request_id)["error"] == "queue_timeout"
    made.stop()
    assert errors == []


def test_the_reaper_of_the_process_starts_once_and_stops(valkey: Any) -> None:
    reaper.start()
    first = reaper._reaper
    reaper.start()
    assert reaper._reaper is first
    reaper.stop()
    reaper.stop()
    assert reaper._reaper is None


def test_reservations_that_outlived_their_time_are_released(alice: Any, valkey: Any) -> None:
    admitted(alice)
    valkey.flushdb()  # Redis forgot the ticket
    Reservation.objects.update(expires_at="2020-01-01T00:00:00Z")
    Reaper(ticket_queue()).sweep(100.0)
    assert Reservation.objects.get().state == "released"
    assert QuotaPeriod.objects.get(key=None).reserved_tokens == 0


def test_a_cancel_while_the_database_is_away_is_settled_later(
    alice: Any, monkeypatch: pytest.MonkeyPatch, valkey: Any
) -> None:
    sent = admitted(alice).ticket

    def away(_: Any) -> list[bool]:
        raise OperationalError("away")

    with monkeypatch.context() as patched:
        patched.setattr(settlement, "settle_many", away)
        assert cancel(sent.request_id) == "waiting"
    assert finish(valkey, sent.request_id)["reason"] == "cancelled"
    assert Reservation.objects.get().state == "open"
    assert settlement.settle_pending(valkey) == 1
    assert Reservation.objects.get().state == "released"


def test_the_sweep_rings_for_tickets_that_nobody_took(alice: Any, bell: list[str], valkey: Any) -> None:
    ticket_queue().beat("w1", "default", 4, {})
    admitted(alice)
    bell.clear()
    Reaper(ticket_queue()).sweep(100.0)
    assert bell == ["default"]


def test_an_unknown_request_cannot_be_cancelled(valkey: Any) -> None:
    assert cancel("nothing") is None


# Tasks


def test_the_sweep_task_does_what_the_reaper_does(alice: Any, valkey: Any) -> None:
    sent = admitted(alice).ticket
    valkey.zadd("waiting:default", {sent.request_id: 1})
    tasks.sweep()
    assert finish(valkey, sent.request_id)["error"] == "queue_timeout"


def test_a_doorbell_without_a_host_or_for_another_pool_does_nothing(
    monkeypatch: pytest.MonkeyPatch, valkey: Any
) -> None:
    served: list[str] = []

    class Host:
        pool = "default"

        def serve(self) -> None:
            served.append(self.pool)

    tasks.serve("default")
    monkeypatch.setattr(worker, "_host", Host())
    tasks.serve("large")
    tasks.serve(7)  # type: ignore[arg-type]
    assert served == []
    tasks.serve("default")
    assert served == ["default"]


def test_the_pool_of_a_worker_is_the_queue_that_it_was_started_with() -> None:
    class Parent:
        class app:
            class conf:
                task_default_queue = "celery"

            class amqp:
                class queues:
                    consume_from = {"large": None, "housekeeping": None}

    assert worker._pool_of(Parent) == "large"
    Parent.app.amqp.queues.consume_from = {"celery": None}
    assert worker._pool_of(Parent) == "default"


def test_a_doorbell_that_cannot_be_rung_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    from llmsite.celery import app

    def away(*_: Any, **__: Any) -> None:
        raise redis.ConnectionError("away")

    monkeypatch.setattr(app.producer_pool, "acquire", away)
    assert not doorbell.ring("default")


def test_a_doorbell_is_one_message_on_the_queue_of_its_pool(
    monkeypatch: pytest.MonkeyPatch, settings: Any, valkey: Any
) -> None:
    monkeypatch.undo()
    assert doorbell.ring("quiet")
    queue = f"{settings.CELERY_BROKER_TRANSPORT_OPTIONS['global_keyprefix']}quiet"
    assert wait_for(lambda: valkey.llen(queue)) == 1
    assert time.time() > 0

"""The sweep's own life: its thread, what it waits for, what it does when things are away."""

from __future__ import annotations

import socket
import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import redis
from django.db import OperationalError
from django.utils import timezone
from kombu.exceptions import OperationalError as OperationalErrorOfBroker

from accounts.ledger import quotas
from accounts.models import QuotaPeriod, Reservation
from inference import settlement, tasks
from inference.models import Receipt
from inference.transport import doorbell
from inference.transport.queue import ticket_queue
from inference.upkeep import reaper
from inference.upkeep.reaper import Reaper, cancel, leave
from inference.worker import worker
from tests.inference.flow import admitted, finish, principal_of, register, wait_for
from tests.timing import PATIENCE_SECONDS

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


@pytest.mark.parametrize("name", ["end_unserved", "settle"])
def test_its_threads_outlive_redis_and_the_database(
    alice: Any, monkeypatch: pytest.MonkeyPatch, valkey: Any, name: str
) -> None:
    errors: list[Exception] = [redis.ConnectionError("away"), OperationalError("locked"), ValueError("a defect")]
    round_of_work = getattr(Reaper, name)

    def failing(self: Reaper) -> Any:
        if errors:
            raise errors.pop()
        return round_of_work(self)

    monkeypatch.setattr(Reaper, name, failing)
    sent = admitted(alice).ticket
    valkey.zadd("waiting:default", {sent.request_id: 1})
    made = Reaper(ticket_queue(), every_seconds=0.01)
    made.start()
    assert finish(valkey, sent.request_id)["error"] == "queue_timeout"
    wait_for(lambda: Reservation.objects.get().state == "released")
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


def end(ticket: Any, valkey: Any, ended_at: float) -> None:
    """As append.lua files the outcome of a request."""
    outcome = settlement.Outcome(
        status="completed",
        finish_reason="length",
        charged_tokens=12,
        prompt_tokens=10,
        completion_tokens=2,
        num_steps=3,
        finished_at=ended_at,
    )
    valkey.hset("settlements", ticket.request_id, ticket.header() + b"\n" + outcome.to_bytes())
    valkey.zadd("unsettled", {ticket.request_id: ended_at})


def test_what_ended_in_a_long_outage_is_charged_though_its_reservation_ran_out(
    alice: Any, monkeypatch: pytest.MonkeyPatch, valkey: Any
) -> None:
    monkeypatch.setattr(settlement, "GROUP_SIZE", 2)
    tickets = [admitted(alice).ticket for _ in range(6)]
    Reservation.objects.update(expires_at=timezone.now() - timedelta(minutes=1))
    for ticket in tickets[:4]:
        end(ticket, valkey, time.time() - 600)
    end(tickets[4], valkey, time.time() + 600)  # its maker is about to settle it
    Reaper(ticket_queue()).sweep(100.0)
    states = dict(Reservation.objects.values_list("request_id", "state"))
    assert [states[ticket.request_id] for ticket in tickets] == ["settled"] * 4 + ["open", "released"]
    assert QuotaPeriod.objects.get(key=None).used_tokens == 48
    settlement.settle_pending(valkey)
    assert QuotaPeriod.objects.get(key=None).used_tokens == 60


def test_requests_are_ended_while_the_database_hangs(alice: Any, monkeypatch: pytest.MonkeyPatch, valkey: Any) -> None:
    ended, waiting = admitted(alice).ticket, admitted(alice).ticket
    hangs, gate = threading.Event(), threading.Event()

    def hanging(_: Any) -> list[bool]:
        hangs.set()
        gate.wait(PATIENCE_SECONDS)
        raise OperationalError("away")

    monkeypatch.setattr(settlement, "settle_many", hanging)
    end(ended, valkey, time.time() - 600)
    made = Reaper(ticket_queue(), every_seconds=0.01)
    made.start()
    try:
        assert hangs.wait(PATIENCE_SECONDS)
        valkey.zadd("waiting:default", {waiting.request_id: 1})
        assert finish(valkey, waiting.request_id, PATIENCE_SECONDS / 2)["error"] == "queue_timeout"
    finally:
        gate.set()
        made.stop()
    monkeypatch.undo()
    Reaper(ticket_queue()).sweep()
    assert set(Reservation.objects.values_list("state", flat=True)) == {"settled", "released"}


def test_the_receipt_of_what_could_not_be_charged_any_more_says_so(alice: Any, valkey: Any) -> None:
    ticket = admitted(alice).ticket
    quotas.release(ticket.request_id, "expired", timezone.now())
    end(ticket, valkey, time.time())
    settlement.settle_pending(valkey)
    receipt = Receipt.objects.get()
    assert (receipt.charged_tokens, receipt.completion_tokens) == (0, 2)
    assert QuotaPeriod.objects.get(key=None).used_tokens == 0


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


def test_who_leaves_a_waiting_request_does_not_wait_for_the_database(
    alice: Any, monkeypatch: pytest.MonkeyPatch, valkey: Any
) -> None:
    sent = admitted(alice).ticket

    def asked(*_: Any) -> list[bool]:
        raise AssertionError("the database was asked")

    with monkeypatch.context() as patched:
        patched.setattr(quotas, "settle_many", asked)
        leave(sent.request_id, "web")
    assert finish(valkey, sent.request_id)["reason"] == "cancelled"
    assert Reservation.objects.get().state == "open"
    Reaper(ticket_queue()).sweep(100.0)
    assert Reservation.objects.get().state == "released"
    assert Receipt.objects.get().status == "cancelled"


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


def test_who_rings_waits_seconds_for_a_broker_that_hangs_and_consumers_longer() -> None:
    from llmsite.celery import app

    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        with app.connection_for_write(url) as connection, pytest.raises(OperationalErrorOfBroker):
            connection.default_channel.client.ping()
    assert 1.9 < time.monotonic() - began < 10
    assert app.connection_for_read().transport_options["socket_timeout"] == 30
    assert app.producer_pool.connections.connection.transport_options["socket_timeout"] == 2


def test_a_doorbell_is_one_message_on_the_queue_of_its_pool(
    monkeypatch: pytest.MonkeyPatch, settings: Any, valkey: Any
) -> None:
    monkeypatch.undo()
    assert doorbell.ring("quiet")
    queue = f"{settings.CELERY_BROKER_TRANSPORT_OPTIONS['global_keyprefix']}quiet"
    assert wait_for(lambda: valkey.llen(queue)) == 1
    assert time.time() > 0


def test_who_leaves_while_redis_is_away_has_left_when_it_is_back(
    alice: Any, monkeypatch: pytest.MonkeyPatch, valkey: Any
) -> None:
    queue = ticket_queue()
    sent = admitted(alice).ticket

    def away(*_: Any, **__: Any) -> Any:
        raise redis.ConnectionError("away")

    with monkeypatch.context() as patched:
        patched.setattr(queue, "_leave", away)
        leave(sent.request_id, "web")
        with pytest.raises(redis.ConnectionError):
            Reaper(queue).sweep()
    assert queue.num_waiting("default") == 1
    Reaper(queue).sweep()
    assert finish(valkey, sent.request_id)["reason"] == "cancelled"
    assert Reservation.objects.get().state == "released"

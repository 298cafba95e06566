"""Garbage on Celery's queues, at the two places where it would end the consumer."""

from __future__ import annotations

from itertools import pairwise
from queue import Empty
from typing import Any

import pytest
import redis
from celery.worker.consumer import Consumer
from kombu import Connection
from kombu.transport import redis as transport
from kombu.utils import functional

from inference.transport.broker_guard import GuardedChannel, GuardedConsumer
from llmsite.celery import app

pytestmark = pytest.mark.unit


class Message:
    def __init__(self) -> None:
        self.is_rejected = False

    def reject_log_error(self, logger: Any, errors: Any) -> None:
        self.is_rejected = True


def handler(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> Any:
    def handle(_: Any) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(Consumer, "create_task_handler", lambda self: handle)
    return GuardedConsumer.create_task_handler(object.__new__(GuardedConsumer))


@pytest.mark.parametrize("error", [ValueError("too many values"), KeyError("task"), TypeError("unhashable")])
def test_a_message_that_cannot_be_handled_is_dropped(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    message = Message()
    handler(monkeypatch, error)(message)
    assert message.is_rejected


def test_a_sound_message_is_handled(monkeypatch: pytest.MonkeyPatch) -> None:
    message = Message()
    handler(monkeypatch, None)(message)
    assert not message.is_rejected


@pytest.mark.parametrize("error", [redis.ConnectionError("away"), OSError("closed")])
def test_a_broken_connection_is_left_to_celery(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    message = Message()
    with pytest.raises(type(error)):
        handler(monkeypatch, error)(message)
    assert not message.is_rejected


def channel(monkeypatch: pytest.MonkeyPatch, error: Exception) -> GuardedChannel:
    def read(self: Any, **_: Any) -> None:
        raise error

    monkeypatch.setattr(transport.Channel, "_brpop_read", read)
    return object.__new__(GuardedChannel)


@pytest.mark.parametrize("error", [ValueError("not JSON"), KeyError("properties"), TypeError("int")])
def test_an_entry_that_is_no_message_counts_as_none(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    with pytest.raises(Empty):
        channel(monkeypatch, error)._brpop_read()


def test_an_empty_queue_and_a_broken_connection_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Empty):
        channel(monkeypatch, Empty())._brpop_read()
    with pytest.raises(redis.ConnectionError):
        channel(monkeypatch, redis.ConnectionError("away"))._brpop_read()


def test_nothing_is_acknowledged_or_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(transport.Channel, "basic_consume", lambda self, queue, no_ack, *rest: seen.append(no_ack))
    made = object.__new__(GuardedChannel)
    made.basic_consume("default", False, print, "tag")
    made.basic_ack("tag")
    made.basic_reject("tag", requeue=True)
    assert seen == [True]


def test_a_broker_that_was_away_for_minutes_is_found_again_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, attempts = [0.0], list[float]()

    def connect(self: Any) -> str:
        attempts.append(clock[0])
        if len(attempts) < 30:
            raise ConnectionRefusedError("away")
        return "connected"

    monkeypatch.setattr(Connection, "_connection_factory", connect)
    monkeypatch.setattr(functional, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    consumer = object.__new__(GuardedConsumer)
    consumer.app, consumer.first_connection_attempt = app, False
    consumer.broker_connection_retry_attempt = 0
    consumer.connection_for_read()
    assert len(attempts) == 30
    assert max(after - before for before, after in pairwise(attempts)) <= 2

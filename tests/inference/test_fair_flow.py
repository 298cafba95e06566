"""Fair share through a worker: a tenant beside a flood, whose sequences make room and lose nothing."""

from __future__ import annotations

import math
from typing import Any

import orjson
import pytest

from accounts.models import Plan, QuotaPeriod
from inference.engine.types import SamplingParams
from inference.models import Receipt
from inference.transport import doorbell
from inference.transport.queue import TicketQueue
from inference.transport.stream import stream_key
from inference.upkeep.reaper import cancel
from tests.inference.flow import (
    admitted,
    events,
    fake_load,
    finish,
    principal_of,
    register,
    text_of,
    wait_for,
    worker,
)
from tests.timing import Stopwatch

pytestmark = [pytest.mark.integration, pytest.mark.django_db(transaction=True)]

STEP = 0.01
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(autouse=True)
def bell(monkeypatch: pytest.MonkeyPatch, valkey: Any) -> None:
    monkeypatch.setattr(doorbell, "ring", lambda pool: True)


def flood(principal: Any, number: int = 10, **changes: Any) -> list[str]:
    values: dict[str, Any] = {"max_tokens": 150, "stream": True, "sampling": GREEDY, **changes}
    return [admitted(principal, **values).ticket.request_id for _ in range(number)]


def first_text_at(valkey: Any, request_id: str) -> float:
    """Seconds after its admission."""
    watch = Stopwatch()
    wait_for(lambda: text_of(events(valkey, request_id)))
    return watch.seconds()


def event_at(valkey: Any, request_id: str, kind: str) -> float:
    """Milliseconds of the server's clock; infinite where it did not happen."""
    entries = valkey.xrange(stream_key(request_id))
    found = (int(number.split(b"-")[0]) for number, values in entries if orjson.loads(values[b"e"])["t"] == kind)
    return next(found, math.inf)


def test_a_short_request_beside_a_flood_is_served_at_once_and_the_flood_loses_nothing(cast: Any, valkey: Any) -> None:
    register(n_slots=4)
    alice, bob = principal_of(cast.alice), principal_of(cast.bob)
    streams = flood(alice)  # all of it is there before the first stream could end
    with worker(valkey, threads=12, load=fake_load(STEP)) as host:
        host.beat()
        wait_for(lambda: sum(bool(text_of(events(valkey, each))) for each in streams) >= 4)
        waits = []
        for _ in range(5):
            (short,) = flood(bob, 1, max_tokens=5)
            waits.append(first_text_at(valkey, short))
            finish(valkey, short)
        assert max(waits) < 0.5, "a stream of the flood takes 1.5 s"
        last = [finish(valkey, each, 30.0) for each in streams]
        wait_for(lambda: Receipt.objects.count() == 15)
        stats = host._all_models()[0].stats()
    assert stats is not None
    assert stats.num_parks >= 3
    assert [each["reason"] for each in last] == ["length"] * 10
    texts = {text_of(events(valkey, each)) for each in streams}
    assert len(texts) == 1, "the same prompt, and those that were parked answered as the others"
    used = QuotaPeriod.objects.get(tenant=cast.alice.tenant, key=None)
    assert (used.used_tokens, used.reserved_tokens) == (10 * 160, 0)


def test_in_fifo_order_it_waits_for_the_flood(cast: Any, valkey: Any, settings: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(settings.CONFIG, "queue_order", "fifo")
    register(n_slots=2)
    with worker(valkey, threads=6, load=fake_load(STEP)) as host:
        host.beat()
        streams = flood(principal_of(cast.alice), 4, max_tokens=60)
        wait_for(lambda: text_of(events(valkey, streams[1])))
        (short,) = flood(principal_of(cast.bob), 1, max_tokens=5)
        finish(valkey, short)
        assert all(any(event["t"] == "finished" for event in events(valkey, each)) for each in streams[:2])
        for each in streams:
            finish(valkey, each)


def test_a_model_that_keeps_no_states_lets_the_next_free_slot_decide(
    cast: Any, valkey: Any, settings: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(settings.CONFIG, "slot_memory_mb", 0)
    register(n_slots=2)
    streams = flood(principal_of(cast.alice), 8, max_tokens=100)
    with worker(valkey, threads=8, load=fake_load(STEP)) as host:
        host.beat()
        wait_for(lambda: text_of(events(valkey, streams[1])))
        (short,) = flood(principal_of(cast.bob), 1, max_tokens=5)
        seconds, microseconds = valkey.time()
        asked_at = 1000 * seconds + microseconds / 1000
        finish(valkey, short)
        began_at = event_at(valkey, short, "started")
        assert any(event_at(valkey, each, "finished") <= began_at for each in streams), "it waited for a slot"
        passed_by = [each for each in streams if asked_at < event_at(valkey, each, "started") < began_at]
        assert len(passed_by) <= 1, "and for the next one alone; the other slot may have become free beside it"
        stats = host._all_models()[0].stats()
        assert stats is not None
        assert stats.num_parks == 0
        for each in streams:
            cancel(each)
            finish(valkey, each)


def test_the_weight_and_cap_of_a_plan_come_with_each_ticket(cast: Any, valkey: Any) -> None:
    register()
    Plan.objects.filter(pk=cast.alice.tenant.plan_id).update(weight=250, max_slots=3)
    cast.alice.key.refresh_from_db()
    from accounts.identity.key_rows import principal_of as fresh

    cast.alice.key.tenant.plan.refresh_from_db()
    sent = admitted(fresh(cast.alice.key)).ticket
    share = valkey.hgetall(f"share:{sent.tenant_id}")
    assert (share[b"weight"], share[b"slots"], share[b"class"]) == (b"2.5", b"3", b"cast")


def test_a_plan_without_weight_is_refused_by_form_and_table() -> None:
    from django.core.exceptions import ValidationError
    from django.db import IntegrityError, transaction

    for wrong in ({"weight": 0}, {"weight": 10_001}, {"max_slots": 0}):
        with pytest.raises(ValidationError):
            Plan(name="odd", **wrong).full_clean()
        with pytest.raises(IntegrityError), transaction.atomic():
            Plan.objects.create(name="odd", **wrong)


def test_waits_are_counted_by_plan(cast: Any, valkey: Any) -> None:
    from prometheus_client import REGISTRY

    register()
    labels = {"pool": "default", "plan": "cast"}
    before = REGISTRY.get_sample_value("llm_fair_wait_seconds_count", labels) or 0
    with worker(valkey, threads=1):
        finish(valkey, admitted(principal_of(cast.alice)).ticket.request_id)
    assert REGISTRY.get_sample_value("llm_fair_wait_seconds_count", labels) == before + 1
    assert TicketQueue(valkey).num_waiting("default") == 0

"""A line of a batch that is asked for again: what was begun is found, what was lost begun anew, nothing paid twice."""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta
from typing import Any

import pytest
from django.db import IntegrityError, OperationalError
from django.utils import timezone

from accounts.ledger import prices
from accounts.ledger.audit import audit
from accounts.models import DayUsage, LedgerEntry, Price, QuotaPeriod, Reservation
from accounts.trail.refusals import Refusal
from inference import settlement
from inference.batches import book, files, redelivery
from inference.batches.models import Batch, StoredFile
from inference.batches.terms import BatchTerms
from inference.intake.admission import Admitted, admit
from inference.transport.holding import BATCH_KEPT_SECONDS, Hold
from inference.transport.queue import TicketQueue, batch_queue, ticket_key
from inference.transport.stream import stream_key
from inference.upkeep import reaper
from tests.inference import flow

pytestmark = pytest.mark.integration


@pytest.fixture
def terms(transactional_db: None, cast: Any, monkeypatch: pytest.MonkeyPatch) -> BatchTerms:
    from inference.transport import doorbell

    monkeypatch.setattr(doorbell, "ring", lambda pool: True)
    flow.register()
    principal = flow.principal_of(cast.alice)
    return BatchTerms(batch_id="batch_1", principal=principal, expires_at=time.time() + 3600)


def feed(terms: BatchTerms, request_id: str = "1-7", **changes: Any) -> Admitted:
    order = flow.order(use_cache=True, **changes)
    hold = Hold(keep_seconds=BATCH_KEPT_SECONDS)
    answer = admit(terms.principal, order, request_id=request_id, route="/v1/completions", batch=terms, hold=hold)
    assert isinstance(answer, Admitted)
    return answer


def used() -> int:
    """Tokens of Alice, with nothing reserved."""
    from accounts import redis_client

    settlement.settle_pending(redis_client.client())
    period = QuotaPeriod.objects.get(key=None)
    assert period.reserved_tokens == 0
    return int(period.used_tokens)


def die(queue: TicketQueue, worker_id: str) -> None:
    queue.sign_off(worker_id, flow.POOL)
    reaper.end_claims(queue.client, queue.sweep().claims)


def take(queue: TicketQueue, worker_id: str = "w") -> Any:
    queue.beat(worker_id, flow.POOL, 4, {})
    lease = queue.take(batch_queue(flow.POOL), worker_id, [feed_model()])
    assert lease is not None
    return lease


def feed_model() -> int:
    from inference.models import ServedModel

    return int(ServedModel.objects.get().pk)


def test_a_line_that_ends_with_its_batch_is_charged_when_the_rest_is_released(
    terms: BatchTerms, valkey: Any, cast: Any
) -> None:
    """Its outcome is still on its way to the ledger when the batch is finalized; the other line was never begun."""
    now, charged = timezone.now(), len(flow.PROMPT) + 3
    values = {"endpoint": "/v1/completions", "input_file_id": "file-1", "expires_at": now, "ends_as": "cancelled"}
    batch = Batch(id="batch_1", tenant=cast.alice.tenant, key=cast.alice.key, status="cancelling", **values)
    batch.save()
    ticket = feed(terms).ticket
    feed(terms, "1-8")
    outcome = settlement.Outcome(status="completed", finish_reason="length", charged_tokens=charged, num_steps=4)
    valkey.hset("settlements", "1-7", ticket.header() + b"\n" + outcome.to_bytes())  # as append.lua does
    valkey.zadd("unsettled", {"1-7": time.time()})
    book.finalize(batch, now)
    assert Reservation.objects.get(state="open").pk == "1-7"
    assert used() == charged


def test_a_line_that_waits_is_not_queued_twice(terms: BatchTerms, valkey: Any) -> None:
    queue = TicketQueue(valkey)
    first, again = feed(terms), feed(terms)
    assert first.ticket.request_id == again.ticket.request_id == "1-7"
    assert queue.num_waiting(batch_queue(flow.POOL)) == 1
    assert queue.num_waiting(flow.POOL) == 0
    assert Reservation.objects.count() == 1
    assert terms.request_ids == ["1-7"]


def test_an_answer_is_kept_for_days_and_found_again(terms: BatchTerms, valkey: Any) -> None:
    with flow.worker(valkey, threads=1):
        feed(terms)
        flow.finish(valkey, "1-7")
        text = flow.text_of(flow.events(valkey, "1-7"))
        assert valkey.ttl(stream_key("1-7")) > BATCH_KEPT_SECONDS - 60
        assert valkey.ttl(ticket_key("1-7")) > BATCH_KEPT_SECONDS - 60
        again = feed(terms)
        assert again.ticket.request_id == "1-7"
    assert flow.text_of(flow.events(valkey, "1-7")) == text
    assert used() == len(flow.PROMPT) + 16
    assert LedgerEntry.objects.filter(kind="settle").count() == 1


def test_a_line_whose_worker_died_is_begun_anew_and_paid_once(terms: BatchTerms, valkey: Any) -> None:
    queue = TicketQueue(valkey)
    feed(terms)
    take(queue, "w1")
    die(queue, "w1")
    assert flow.finish(valkey, "1-7")["error"] == "worker_lost"
    assert feed(terms).ticket.request_id == "1-7-r1"
    take(queue, "w2")
    die(queue, "w2")
    with flow.worker(valkey, threads=1):
        assert feed(terms).ticket.request_id == "1-7-r2"
        flow.finish(valkey, "1-7-r2")
        assert feed(terms).ticket.request_id == "1-7-r2"
    assert used() == len(flow.PROMPT) + 16
    assert terms.request_ids == ["1-7", "1-7-r1", "1-7-r2"]


def test_a_line_that_is_there_whenever_a_worker_dies_is_given_up(terms: BatchTerms, valkey: Any) -> None:
    queue = TicketQueue(valkey)
    for number in range(redelivery.MAX_LOSSES):
        feed(terms)
        take(queue, f"w{number}")
        die(queue, f"w{number}")
    with pytest.raises(Refusal) as caught:
        feed(terms)
    assert (caught.value.code, caught.value.retry_after) == ("worker_lost", None)
    assert used() == 0


def test_a_part_of_a_line_keeps_its_number(terms: BatchTerms, valkey: Any) -> None:
    queue = TicketQueue(valkey)
    feed(terms, "1-7.2")
    take(queue)
    die(queue, "w")
    assert feed(terms, "1-7.2").ticket.request_id == "1-7-r1.2"


def test_a_charge_whose_answer_redis_has_lost_is_given_back_once(terms: BatchTerms, valkey: Any) -> None:
    Price.objects.create(input_per_million=2, output_per_million=8, valid_from=timezone.now() - timedelta(days=1))
    prices._table = None
    with flow.worker(valkey, threads=1):
        feed(terms)
        flow.finish(valkey, "1-7")
        assert used() == len(flow.PROMPT) + 16
        valkey.delete(ticket_key("1-7"), stream_key("1-7"))
        assert redelivery.claim("1-7", terms) == ("1-7-r1", False)
        assert redelivery.claim("1-7", terms) == ("1-7-r1", False)
        assert used() == 0
        assert feed(terms).ticket.request_id == "1-7-r1"
        flow.finish(valkey, "1-7-r1")
    assert used() == len(flow.PROMPT) + 16
    (refund,) = LedgerEntry.objects.filter(kind="adjust")
    assert (refund.request_id, refund.used_tokens) == ("refund-1-7", -(len(flow.PROMPT) + 16))
    cost = len(flow.PROMPT) * 2000 + 16 * 8000
    assert refund.cost_nanos == -cost
    assert QuotaPeriod.objects.get(key=None).cost_nanos == cost
    assert sum(DayUsage.objects.values_list("cost_nanos", flat=True)) == cost
    assert audit().is_clean


def test_an_admission_that_was_cut_in_the_middle_is_gone_on_with(terms: BatchTerms, valkey: Any) -> None:
    """The web died between reservation and ticket: the reservation is used, not doubled."""
    feed(terms)
    TicketQueue(valkey).discard("1-7")
    assert Reservation.objects.get().state == "open"
    assert feed(terms).ticket.request_id == "1-7"
    assert Reservation.objects.count() == 1


def test_where_a_batch_ends_only_what_was_begun_is_found(terms: BatchTerms, valkey: Any) -> None:
    feed(terms)
    terms.only_begun = True
    assert feed(terms).ticket.request_id == "1-7"
    with pytest.raises(Refusal) as caught:
        feed(terms, "1-8")
    assert caught.value.code == "request_cancelled"
    assert Reservation.objects.count() == 1


def test_a_reservation_lasts_as_long_as_the_line_may_wait(terms: BatchTerms, valkey: Any) -> None:
    ticket = feed(terms).ticket
    assert ticket.queue_deadline_at == terms.expires_at
    assert Reservation.objects.get().expires_at.timestamp() > ticket.deadline_at > terms.expires_at
    assert valkey.ttl(ticket_key("1-7")) > 3600


def test_two_feeders_at_once_begin_a_line_once(terms: BatchTerms, valkey: Any) -> None:
    async def both() -> list[Admitted]:
        return list(await asyncio.gather(*(asyncio.to_thread(feed, terms) for _ in range(6))))

    found = asyncio.run(both())
    assert {each.ticket.request_id for each in found} == {"1-7"}
    assert TicketQueue(valkey).num_waiting(batch_queue(flow.POOL)) == 1
    assert Reservation.objects.count() == 1


def test_a_worker_takes_lines_last_and_leaves_slots_free(terms: BatchTerms, valkey: Any) -> None:
    for number in range(4):
        feed(terms, f"1-{number}")
    with flow.worker(valkey, load=flow.fake_load(5.0)) as host:
        flow.admitted(terms.principal, "interactive")
        assert host._take().lease.ticket.request_id == "interactive"  # type: ignore[union-attr]
        assert host._take().lease.ticket.request_id == "1-0"  # type: ignore[union-attr]
        assert host._take() is None, "two of four slots are taken"
        flow.admitted(terms.principal, "another")
        assert host._take().lease.ticket.request_id == "another"  # type: ignore[union-attr]
        assert host.queue.beat("w", flow.POOL, 4, {}).num_batch_waiting == 3
        host._live.clear()


def result(cast: Any, number: int = 1) -> StoredFile:
    now = timezone.now()
    return StoredFile(
        id="file-results",
        tenant=cast.alice.tenant,
        key=cast.alice.key,
        purpose=StoredFile.Purpose.BATCH_OUTPUT,
        filename="results.jsonl",
        size_bytes=number,
        created_at=now,
        expires_at=now + timedelta(days=1),
    )


def write(row: StoredFile, content: bytes) -> None:
    with files.scratch(row.tenant_id) as place:
        with files.create(place) as file:
            file.write(content)
        files.keep(place, row)


def test_results_are_there_though_the_reply_to_their_commit_was_lost(
    transactional_db: None, cast: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, save = result(cast), StoredFile.save

    def interrupted(self: StoredFile, **options: Any) -> None:
        save(self, **options)
        raise OperationalError("server closed the connection unexpectedly")

    with monkeypatch.context() as patched:
        patched.setattr(StoredFile, "save", interrupted)
        with pytest.raises(OperationalError):
            write(row, b"{}")
    with files.open_bytes(StoredFile.objects.get(pk=row.pk)) as file:
        assert file.read() == b"{}"


def test_a_second_feeder_that_writes_the_same_results_harms_nothing(transactional_db: None, cast: Any) -> None:
    write(result(cast), b"{}")
    with pytest.raises(IntegrityError):
        write(result(cast), b"{}")
    with files.open_bytes(StoredFile.objects.get()) as file:
        assert file.read() == b"{}"

"""What a request costs, and that the ledger hears of it exactly once."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import orjson
import pytest
from django.db import OperationalError

from accounts.models import LedgerEntry, QuotaPeriod, Reservation
from accounts.trail.refusals import Refusal
from inference import settlement
from inference.engine.types import Finished, FinishReason
from inference.engine.types import Receipt as EngineReceipt
from inference.models import Receipt
from inference.settlement import Outcome, Settler, completion_of, outcome_of, outcome_without_engine
from inference.transport.queue import TicketQueue, ticket_queue
from inference.transport.stream import end_claimed
from inference.transport.ticket import Ticket
from tests.inference.flow import admitted, principal_of, register, ticket, wait_for
from tests.timing import PATIENCE_SECONDS

NOW = 1_800_000_000.0


def end(reason: FinishReason, *, num_steps: int = 7, completion: int = 6, **changes: Any) -> Finished:
    receipt = EngineReceipt(
        prompt_tokens=10,
        completion_tokens=completion,
        num_steps=num_steps,
        batch_sequences=28,
        decode_steps=6,
        decode_batch_sequences=24,
        queue_seconds=0.5,
        seed=3,
    )
    return Finished("id", reason, receipt, **changes)


def price(finished: Finished, **changes: Any) -> Outcome:
    sent = ticket(created_at=NOW - 4, **changes)
    return outcome_of(sent, finished, worker="w1", now=NOW, leased_at=NOW - 3)


# The price


@pytest.mark.unit
@pytest.mark.parametrize("reason", [FinishReason.EOS, FinishReason.STOP, FinishReason.LENGTH])
def test_a_whole_answer_costs_prompt_and_output(reason: FinishReason) -> None:
    outcome = price(end(reason))
    assert (outcome.status, outcome.charged_tokens, outcome.is_charged) == ("completed", 16, True)


@pytest.mark.unit
@pytest.mark.parametrize("reason", [FinishReason.CANCELLED, FinishReason.DEADLINE])
def test_what_was_cut_off_costs_what_was_computed(reason: FinishReason) -> None:
    outcome = price(end(reason))
    assert (outcome.status, outcome.charged_tokens, outcome.is_charged) == ("cancelled", 16, True)
    assert outcome.finish_reason == reason.value


@pytest.mark.unit
@pytest.mark.parametrize("reason", [FinishReason.EOS, FinishReason.CANCELLED])
def test_an_answer_to_a_prompt_that_another_pays_for_costs_its_output(reason: FinishReason) -> None:
    outcome = price(end(reason), shares_prompt=True)
    assert (outcome.prompt_tokens, outcome.charged_tokens, outcome.is_charged) == (10, 6, True)


@pytest.mark.unit
def test_what_was_cut_off_before_its_first_step_is_free() -> None:
    outcome = price(end(FinishReason.CANCELLED, num_steps=0, completion=0))
    assert (outcome.charged_tokens, outcome.is_charged) == (0, False)


@pytest.mark.unit
@pytest.mark.parametrize("error", ["engine_crashed", "worker_stopping", None])
def test_failures_are_free(error: str | None) -> None:
    outcome = price(end(FinishReason.ERROR, error=error))
    assert (outcome.status, outcome.charged_tokens, outcome.is_charged) == ("failed", 0, False)
    assert outcome.error_code == (error or "error")


@pytest.mark.unit
@pytest.mark.parametrize("error", ["grammar_dead_end", "grammar_too_slow"])
def test_a_stream_that_its_own_grammar_ended_is_paid_for_and_no_other_answer(error: str) -> None:
    streamed = price(end(FinishReason.ERROR, error=error), stream=True)
    assert (streamed.status, streamed.charged_tokens, streamed.is_charged) == ("cancelled", 16, True)
    assert (streamed.finish_reason, streamed.error_code) == ("error", error)
    assert not price(end(FinishReason.ERROR, error=error)).is_charged


@pytest.mark.unit
@pytest.mark.parametrize(
    ("why", "status", "reason"),
    [
        ("cancelled", "cancelled", "cancelled"),
        ("worker_lost", "failed", "error"),
        ("queue_timeout", "failed", "error"),
    ],
)
def test_what_no_engine_ended_is_free(why: str, status: str, reason: str) -> None:
    outcome = outcome_without_engine(ticket(created_at=NOW - 4), why, now=NOW)
    assert (outcome.status, outcome.finish_reason, outcome.is_charged) == (status, reason, False)
    assert outcome.total_seconds == 4


@pytest.mark.unit
def test_the_receipt_tells_waiting_and_mean_batch_sizes() -> None:
    outcome = price(end(FinishReason.EOS))
    assert outcome.queue_seconds == 1.5
    assert outcome.total_seconds == 4
    assert (outcome.mean_batch_size, outcome.mean_decode_batch_size) == (4, 4)
    assert price(end(FinishReason.CANCELLED, num_steps=0)).mean_batch_size == 0


@pytest.mark.unit
def test_a_long_name_of_a_worker_fits_into_its_receipt() -> None:
    outcome = outcome_of(ticket(), end(FinishReason.EOS), worker="pod" * 30, now=NOW, leased_at=NOW)
    longest = Receipt._meta.get_field("worker").max_length
    assert len(outcome.worker) == longest


@pytest.mark.unit
def test_an_outcome_survives_the_way_through_bytes_and_later_versions() -> None:
    outcome = price(end(FinishReason.EOS))
    assert Outcome.parse(outcome.to_bytes()) == outcome
    later = orjson.dumps({**orjson.loads(outcome.to_bytes()), "new_field": 1})
    assert Outcome.parse(later) == outcome


@pytest.mark.unit
def test_only_whole_answers_are_kept_for_identical_requests() -> None:
    wanted = ticket(cache_key="1:ff")
    kept = completion_of(wanted, end(FinishReason.STOP, stop_word="."), "text")
    assert kept is not None
    assert (kept.output, kept.finish_reason, kept.stop_word, kept.completion_tokens) == ("text", "stop", ".", 6)
    assert completion_of(ticket(), end(FinishReason.EOS), "text") is None
    assert completion_of(wanted, end(FinishReason.EOS), "") is None
    assert completion_of(wanted, end(FinishReason.DEADLINE), "text") is None
    assert completion_of(ticket(cache_key="1:ff", clamped=True), end(FinishReason.LENGTH), "text") is None


# The ledger

database = pytest.mark.django_db(transaction=True)


@pytest.fixture
def held(cast: Any, valkey: Any) -> Ticket:
    """Alice has a request in the queue, with its reservation."""
    register()
    return admitted(principal_of(cast.alice)).ticket


def used(tenant_id: int) -> tuple[int, int, int, int]:
    period = QuotaPeriod.objects.get(tenant_id=tenant_id, key=None)
    return period.used_tokens, period.reserved_tokens, period.used_requests, period.reserved_requests


def outcome_for(sent: Ticket, reason: FinishReason = FinishReason.EOS, **changes: Any) -> Outcome:
    finished = end(reason, **changes)
    return outcome_of(sent, finished, worker="w1", now=time.time(), leased_at=time.time())


@pytest.mark.integration
@database
def test_settling_charges_releases_the_rest_and_writes_the_receipt(held: Ticket) -> None:
    assert used(held.tenant_id) == (0, 26, 0, 1)
    assert settlement.settle_many([(held, outcome_for(held))]) == [True]
    assert used(held.tenant_id) == (16, 0, 1, 0)
    receipt = Receipt.objects.get(request_id=held.request_id)
    assert (receipt.tenant_id, receipt.key_id, receipt.model) == (held.tenant_id, held.key_id, "small")
    assert (receipt.charged_tokens, receipt.completion_tokens, receipt.worker) == (16, 6, "w1")


@pytest.mark.integration
@database
def test_settling_twice_charges_once(held: Ticket) -> None:
    ended = (held, outcome_for(held))
    assert settlement.settle_many([ended]) == [True]
    assert settlement.settle_many([ended]) == [False]
    failed = (held, outcome_without_engine(held, "worker_lost", now=time.time()))
    assert settlement.settle_many([failed]) == [False]
    assert used(held.tenant_id) == (16, 0, 1, 0)
    assert LedgerEntry.objects.filter(request_id=held.request_id).exclude(kind="reserve").count() == 1
    assert Receipt.objects.get().status == "completed"


@pytest.mark.integration
@database
def test_a_failure_releases_the_reservation_and_is_on_record(held: Ticket) -> None:
    outcome = outcome_without_engine(held, "worker_lost", now=time.time())
    assert settlement.settle_many([(held, outcome)]) == [True]
    assert used(held.tenant_id) == (0, 0, 0, 0)
    assert Reservation.objects.get().state == "released"
    assert (Receipt.objects.get().status, Receipt.objects.get().error_code) == ("failed", "worker_lost")


def file_outcome(sent: Ticket, client: Any) -> Outcome:
    """The request ends in Redis, and its worker dies before it could settle."""
    lease = TicketQueue(client).take("default", "w1", [sent.model_id])
    assert lease is not None
    outcome = outcome_for(sent)
    assert end_claimed(client, lease, b'{"t":"finished"}', outcome.to_bytes())
    return outcome


@pytest.mark.integration
@database
def test_an_outcome_whose_maker_died_is_settled_from_redis(held: Ticket, valkey: Any) -> None:
    outcome = file_outcome(held, valkey)
    found = settlement.pending(valkey, held.request_id)
    assert found is not None
    assert found[0].request_id == held.request_id
    assert found[1] == outcome
    assert settlement.settle_pending(valkey, older_than_seconds=60) == 0
    assert settlement.settle_pending(valkey) == 1
    assert used(held.tenant_id) == (16, 0, 1, 0)
    assert settlement.settle_pending(valkey) == 0
    assert settlement.pending(valkey, held.request_id) is None


@pytest.mark.integration
@database
def test_an_outcome_stays_in_redis_while_the_database_is_away(
    held: Ticket, valkey: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file_outcome(held, valkey)

    def away(*_: Any, **__: Any) -> None:
        raise Refusal("service_unavailable", "away", retry_after=1)

    with monkeypatch.context() as patched, pytest.raises(Refusal):
        patched.setattr(settlement.quotas, "settle_many", away)
        settlement.settle_pending(valkey)
    assert settlement.settle_pending(valkey) == 1
    assert used(held.tenant_id) == (16, 0, 1, 0)


@pytest.mark.integration
@database
def test_an_outcome_that_cannot_be_read_is_struck_off(held: Ticket, valkey: Any) -> None:
    valkey.hset("settlements", "strange", b"not a ticket")
    valkey.zadd("unsettled", {"strange": 1})
    assert settlement.settle_pending(valkey) == 1
    assert valkey.exists("settlements", "unsettled") == 0


@pytest.mark.integration
@database
def test_the_settler_writes_what_comes_meanwhile_in_one_transaction(
    cast: Any, valkey: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(n_slots=64)
    tickets = [admitted(principal_of(cast.alice)).ticket for _ in range(20)]
    groups: list[int] = []
    settle_many = settlement.settle_many

    def counted(ended: Any) -> list[bool]:
        groups.append(len(ended))
        time.sleep(0.05)
        return settle_many(ended)

    monkeypatch.setattr(settlement, "settle_many", counted)
    settler = Settler(valkey)
    settler.start()
    for sent in tickets:
        settler.submit(sent, outcome_for(sent))
    assert settler.flush(5)
    settler.stop(2)
    assert sum(groups) == 20
    assert len(groups) <= 3
    assert used(tickets[0].tenant_id) == (320, 0, 20, 0)


@pytest.mark.integration
@database
def test_the_settler_waits_for_a_database_that_is_away(
    held: Ticket, valkey: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file_outcome(held, valkey)
    errors: list[Exception] = [OperationalError("locked"), Refusal("service_unavailable", "away", retry_after=1)]
    settle_many = settlement.settle_many

    def failing(ended: Any) -> list[bool]:
        if errors:
            raise errors.pop()
        return settle_many(ended)

    monkeypatch.setattr(settlement, "settle_many", failing)
    settler = Settler(valkey)
    settler.start()
    settler.submit(held, outcome_for(held))
    wait_for(lambda: not valkey.exists("settlements"))
    settler.stop(2)
    assert used(held.tenant_id) == (16, 0, 1, 0)


@pytest.mark.integration
@database
def test_a_group_that_fails_for_another_reason_is_left_in_redis(
    held: Ticket, valkey: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file_outcome(held, valkey)
    with monkeypatch.context() as patched:
        patched.setattr(settlement, "settle_many", lambda _: 1 / 0)
        settler = Settler(valkey)
        settler.start()
        settler.submit(held, outcome_for(held))
        assert settler.flush(2)
        settler.stop(2)
    assert settlement.settle_pending(ticket_queue().client) == 1


def refused_outcome(sent: Ticket) -> Ticket:
    """Its receipt is of a key that there is not, which the database sees at the end of the transaction."""
    return replace(sent, key_id=987_654_321)


@pytest.mark.integration
@database
def test_an_outcome_that_the_database_refuses_holds_up_nobody(cast: Any, valkey: Any) -> None:
    register()
    first, bad, last = [admitted(principal_of(cast.alice)).ticket for _ in range(3)]
    for sent in (first, refused_outcome(bad), last):
        valkey.hset("settlements", sent.request_id, sent.header() + b"\n" + outcome_for(sent).to_bytes())
        valkey.zadd("unsettled", {sent.request_id: time.time() - 60})
    assert settlement.settle_all_pending(valkey, older_than_seconds=settlement.ORPHAN_SECONDS) == 2
    assert used(first.tenant_id) == (32, 26, 2, 1)
    # it is kept, behind all others
    assert settlement.settle_all_pending(valkey, older_than_seconds=settlement.ORPHAN_SECONDS) == 0
    assert settlement.unsettled(valkey, [first.request_id, bad.request_id, last.request_id]) == {bad.request_id}
    assert float(valkey.zscore("unsettled", bad.request_id)) > time.time() + settlement.PUT_OFF_SECONDS / 2
    # and charged as soon as the database takes it
    valkey.hset("settlements", bad.request_id, bad.header() + b"\n" + outcome_for(bad).to_bytes())
    assert settlement.settle_pending(valkey) == 1
    assert used(first.tenant_id) == (48, 0, 3, 0)
    assert Receipt.objects.count() == 3


@pytest.mark.integration
@database
def test_the_settler_goes_on_behind_an_outcome_that_the_database_refuses(cast: Any, valkey: Any) -> None:
    register()
    bad, good = [admitted(principal_of(cast.alice)).ticket for _ in range(2)]
    settler = Settler(valkey)
    settler.submit(refused_outcome(bad), outcome_for(bad))
    settler.submit(good, outcome_for(good))
    settler.start()
    assert settler.flush(PATIENCE_SECONDS)
    settler.stop(2)
    assert used(good.tenant_id) == (16, 26, 1, 1)
    assert Receipt.objects.get().request_id == good.request_id


@pytest.mark.integration
@database
def test_one_process_at_a_time_settles_what_others_left(held: Ticket, valkey: Any) -> None:
    file_outcome(held, valkey)
    valkey.set("settling", 1)
    assert settlement.settle_all_pending(valkey) == 0
    assert used(held.tenant_id) == (0, 26, 0, 1)
    valkey.delete("settling")
    assert settlement.settle_all_pending(valkey) == 1
    assert used(held.tenant_id) == (16, 0, 1, 0)
    assert not valkey.exists("settling")

"""Tickets change hands in Valkey: exactly once, in order, fenced."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any

import pytest

from inference.transport.queue import QueueFull, QueueLengths, TicketQueue, ticket_key
from inference.transport.stream import end_claimed, stream_key
from inference.transport.ticket import Ticket
from tests.inference.flow import PROMPT, new_id, ticket, wait_for

pytestmark = pytest.mark.integration


@pytest.fixture
def queue(valkey: Any) -> TicketQueue:
    return TicketQueue(valkey)


def test_a_ticket_is_taken_with_its_prompt_and_once_only(queue: TicketQueue) -> None:
    sent = ticket()
    queue.put(sent)
    lease = queue.take("default", "w1", [1])
    assert lease is not None
    assert lease.ticket == sent
    assert lease.token == 1
    assert queue.take("default", "w2", [1]) is None


def test_the_prompt_leaves_redis_when_the_ticket_is_taken(queue: TicketQueue, valkey: Any) -> None:
    sent = ticket()
    queue.put(sent)
    assert valkey.hget(ticket_key(sent.request_id), "prompt") == sent.prompt_bytes()
    queue.take("default", "w1", [1])
    assert valkey.hget(ticket_key(sent.request_id), "prompt") is None


def test_putting_twice_queues_once(queue: TicketQueue) -> None:
    sent = ticket()
    queue.put(sent)
    queue.put(sent)
    assert queue.num_waiting("default") == 1


def test_tickets_of_all_tenants_are_taken_in_order_of_arrival(queue: TicketQueue) -> None:
    sent = [ticket(tenant_id=number % 3) for number in range(9)]
    for each in sent:
        queue.put(each)
    taken = [queue.take("default", "w1", [1]) for _ in sent]
    assert [lease.ticket.request_id for lease in taken if lease] == [each.request_id for each in sent]


def test_a_model_without_a_free_slot_does_not_hold_up_another(queue: TicketQueue) -> None:
    first, second = ticket(model_id=1), ticket(model_id=2)
    queue.put(first)
    queue.put(second)
    lease = queue.take("default", "w1", [2])
    assert lease is not None
    assert lease.ticket.request_id == second.request_id
    assert queue.take("default", "w1", [2]) is None
    assert queue.take("default", "w1", []) is None


def test_pools_do_not_mix(queue: TicketQueue) -> None:
    queue.put(ticket(pool="large"))
    assert queue.take("default", "w1", [1]) is None
    assert queue.num_waiting("large") == 1


def test_sixteen_threads_take_every_ticket_exactly_once(queue: TicketQueue) -> None:
    sent = [ticket(tenant_id=number % 5, model_id=number % 2) for number in range(300)]
    for each in sent:
        queue.put(each)
    taken: list[str] = []

    def take_all(worker_id: str) -> None:
        while (lease := queue.take("default", worker_id, [0, 1])) is not None:
            taken.append(lease.ticket.request_id)

    threads = [threading.Thread(target=take_all, args=(f"w{number}",)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert Counter(taken) == Counter(each.request_id for each in sent)


def test_tokens_rise_with_every_change_of_hands(queue: TicketQueue, valkey: Any) -> None:
    sent = ticket()
    queue.put(sent)
    lease = queue.take("default", "dead", [1])
    assert lease is not None
    queue.beat("dead", "default", 4, {}, ttl_seconds=0.01)
    time.sleep(0.05)
    (claim,) = queue.sweep().claims
    assert claim.lease.token > lease.token


# A full queue


def full_for(queue: TicketQueue, sent: Ticket, tenant: int | None, key: int | None = None) -> str:
    """Whose queue has no room for it; empty where it was queued."""
    try:
        queue.put(sent, lengths=QueueLengths(tenant, key))
    except QueueFull as full:
        return full.whose
    return ""


def test_a_keys_own_queue_counts_what_that_key_has_waiting(queue: TicketQueue) -> None:
    for _ in range(2):
        assert full_for(queue, ticket(key_id=2, quota_key_id=2), None) == ""
    first = ticket(key_id=1, quota_key_id=1)
    assert full_for(queue, first, 10, 2) == ""
    assert full_for(queue, ticket(key_id=3, quota_key_id=1), 10, 2) == ""
    assert full_for(queue, ticket(key_id=1, quota_key_id=1), 10, 2) == "key"
    assert queue.crowd("default", 1, 1, 1, QueueLengths(10, 2)).full == "key"
    assert full_for(queue, ticket(key_id=2, quota_key_id=2), 4, 9) == "tenant"
    queue.discard(first.request_id)
    assert full_for(queue, ticket(key_id=1, quota_key_id=1), 10, 2) == ""


def test_tickets_that_ran_out_while_the_site_stood_still_fill_no_queue(queue: TicketQueue, valkey: Any) -> None:
    for each in (ticket(), ticket()):
        assert full_for(queue, each, 2, 2) == ""
        valkey.delete(ticket_key(each.request_id))
    assert queue.crowd("default", 1, 1, 1, QueueLengths(2, 2)).full == ""
    assert valkey.smembers("queued:1") == valkey.smembers("queued:key:1") == set()
    for _ in range(2):
        assert full_for(queue, ticket(), 2, 2) == ""
    valkey.delete("counted:queued:1")
    assert full_for(queue, ticket(), 2, 2) == "tenant"


def test_a_tenant_may_wait_with_as_many_as_its_limit(queue: TicketQueue) -> None:
    queue.put(ticket(), lengths=QueueLengths(2))
    queue.put(ticket(), lengths=QueueLengths(2))
    assert full_for(queue, ticket(), 2)
    queue.put(ticket(tenant_id=2), lengths=QueueLengths(2))


def test_a_refused_ticket_leaves_no_trace(queue: TicketQueue, valkey: Any) -> None:
    refused = ticket()
    assert full_for(queue, refused, 0)
    assert valkey.keys("*") == []


def test_while_a_slot_is_free_nothing_waits_and_the_limit_does_not_bind(queue: TicketQueue) -> None:
    queue.beat("w1", "default", 2, {})
    queue.put(ticket(), lengths=QueueLengths(0))
    queue.put(ticket(), lengths=QueueLengths(0))
    assert full_for(queue, ticket(), 0)


def test_slots_of_a_dead_worker_are_not_free(queue: TicketQueue) -> None:
    queue.beat("w1", "default", 2, {}, ttl_seconds=0.01)
    time.sleep(0.05)
    assert full_for(queue, ticket(), 0)


# Cancel


def test_a_waiting_ticket_that_is_cancelled_is_claimed_by_the_caller(queue: TicketQueue) -> None:
    sent = ticket()
    queue.put(sent)
    state, claim = queue.cancel(sent.request_id)
    assert state == "waiting"
    assert claim is not None
    assert claim.why == "cancelled"
    assert claim.lease.ticket.request_id == sent.request_id
    assert queue.take("default", "w1", [1]) is None
    assert queue.num_waiting("default") == 0
    assert queue.cancel(sent.request_id) == ("done", None)


def test_cancelling_keeps_the_order_of_the_others(queue: TicketQueue) -> None:
    sent = [ticket(tenant_id=number) for number in (1, 2, 1)]
    for each in sent:
        queue.put(each)
    queue.cancel(sent[0].request_id)
    taken = [queue.take("default", "w1", [1]) for _ in range(2)]
    assert [lease.ticket.request_id for lease in taken if lease] == [each.request_id for each in sent[1:]]


def test_a_running_request_is_cancelled_through_its_worker(queue: TicketQueue, valkey: Any) -> None:
    sent = ticket()
    queue.put(sent)
    queue.take("default", "w1", [1])
    with valkey.pubsub(ignore_subscribe_messages=True) as pubsub:
        pubsub.subscribe("cancel:w1")
        pubsub.get_message(timeout=1)
        assert queue.cancel(sent.request_id) == ("running", None)
        message = wait_for(lambda: pubsub.get_message(timeout=1))
    assert message["data"].decode() == f"{sent.request_id} cancelled"
    assert queue.beat("w1", "default", 4, {}).cancels == {sent.request_id: "cancelled"}


def test_an_unknown_request_cannot_be_cancelled(queue: TicketQueue) -> None:
    assert queue.cancel(new_id()) == (None, None)


# State


def test_the_state_of_a_request_is_known_from_queue_to_end(queue: TicketQueue, valkey: Any) -> None:
    sent, behind = ticket(tenant_id=7, key_id=8), ticket()
    queue.put(sent)
    queue.put(behind)
    waiting = queue.state(sent.request_id)
    assert waiting is not None
    assert (waiting.state, waiting.tenant_id, waiting.key_id, waiting.position) == ("waiting", 7, 8, 0)
    assert abs(waiting.created_at - time.time()) < 2
    lease = queue.take("default", "w1", [1])
    assert lease is not None
    running = queue.state(sent.request_id)
    assert running is not None
    assert (running.state, running.position) == ("running", None)
    assert end_claimed(valkey, lease, b"{}", b"{}")
    done = queue.state(sent.request_id)
    assert done is not None
    assert done.state == "done"
    assert queue.state(new_id()) is None


def test_the_live_requests_of_a_key_and_of_a_tenant_can_be_listed(queue: TicketQueue, valkey: Any) -> None:
    ours, other = ticket(tenant_id=7, key_id=8), ticket(tenant_id=7, key_id=9)
    queue.put(ours)
    queue.put(other)
    assert queue.live_requests(key_id=8) == [ours.request_id]
    assert queue.live_requests(tenant_id=7) == sorted([ours.request_id, other.request_id])
    lease = queue.take("default", "w1", [1])
    assert lease is not None
    end_claimed(valkey, lease, b"{}", b"{}")
    assert queue.live_requests(tenant_id=7) == [other.request_id]


def test_a_discarded_ticket_was_never_there(queue: TicketQueue, valkey: Any) -> None:
    sent = ticket()
    queue.put(sent)
    assert queue.discard(sent.request_id)
    assert not queue.discard(sent.request_id)
    left = set(valkey.keys("*")) - {b"pools"}
    assert left == {b"had:default", b"share:1"}
    assert all(valkey.ttl(key) > 0 for key in left)


def test_a_ticket_that_was_taken_cannot_be_discarded(queue: TicketQueue) -> None:
    sent = ticket()
    queue.put(sent)
    queue.take("default", "w1", [1])
    assert not queue.discard(sent.request_id)


# Workers and the sweep


def test_a_worker_is_listed_while_it_beats(queue: TicketQueue) -> None:
    queue.beat("w1", "default", 4, {"host": "here", "models": []})
    (info,) = queue.workers()
    assert (info.worker_id, info.pool, info.info["host"]) == ("w1", "default", "here")
    queue.beat("w1", "default", 4, {"host": "here", "models": []}, ttl_seconds=0.01)
    time.sleep(0.05)
    assert queue.workers() == []


def test_leases_of_a_dead_worker_are_claimed_once(queue: TicketQueue, valkey: Any) -> None:
    sent = [ticket() for _ in range(5)]
    for each in sent:
        queue.put(each)
    for _ in sent[:3]:
        queue.take("default", "w1", [1])
    queue.beat("w1", "default", 4, {}, ttl_seconds=0.01)
    time.sleep(0.05)
    claims = queue.sweep().claims
    assert {claim.lease.ticket.request_id for claim in claims} == {each.request_id for each in sent[:3]}
    assert {claim.why for claim in claims} == {"worker_lost"}
    assert queue.sweep().claims == ()
    assert queue.num_waiting("default") == 2
    assert valkey.smembers("workers") == set()


def test_two_sweepers_never_claim_the_same(queue: TicketQueue) -> None:
    for _ in range(100):
        queue.put(ticket())
        queue.take("default", "w1", [1])
    queue.beat("w1", "default", 4, {}, ttl_seconds=0.01)
    time.sleep(0.05)
    claimed: list[str] = []

    def sweep() -> None:
        for _ in range(30):
            claimed.extend(claim.lease.ticket.request_id for claim in queue.sweep(most=7).claims)

    threads = [threading.Thread(target=sweep) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(claimed) == len(set(claimed)) == 100


@pytest.mark.parametrize("who", ["worker", "web", "sweep"])
def test_heartbeats_mean_nothing_for_a_while_whoever_is_heard_first(queue: TicketQueue, valkey: Any, who: str) -> None:
    queue.put(ticket())
    queue.beat("w1", "default", 4, {}, ttl_seconds=0.01)
    queue.take("default", "w1", [1])
    valkey.set("heard", time.time() - 1.1)
    if who == "worker":
        queue.beat("w2", "default", 4, {})
    elif who == "web":
        queue.beat_web("one")
    assert valkey.exists("doubted") == (who != "sweep")
    time.sleep(0.05)
    assert queue.sweep().claims == ()
    assert 2 <= valkey.pttl("doubted") / 1000 <= 3
    valkey.delete("doubted")
    assert len(queue.sweep().claims) == 1


def test_a_ticket_that_waited_too_long_is_claimed(queue: TicketQueue) -> None:
    now = time.time()
    late, patient = ticket(queue_deadline_at=now + 0.01, created_at=now), ticket()
    queue.put(late)
    queue.put(patient)
    time.sleep(0.05)
    (claim,) = queue.sweep().claims
    assert (claim.lease.ticket.request_id, claim.why) == (late.request_id, "queue_timeout")
    lease = queue.take("default", "w1", [1])
    assert lease is not None
    assert lease.ticket.request_id == patient.request_id


def test_a_claim_whose_claimer_died_is_claimed_again(queue: TicketQueue, valkey: Any) -> None:
    sent = ticket()
    queue.put(sent)
    _, first = queue.cancel(sent.request_id)
    assert first is not None
    assert queue.sweep().claims == ()
    valkey.zadd("claimed", {sent.request_id: time.time() - 60})
    (second,) = queue.sweep().claims
    assert second.why == "cancelled"
    assert not end_claimed(valkey, first.lease, b"{}", b"{}")
    assert end_claimed(valkey, second.lease, b"{}", b"{}")


def test_lost_doorbells_are_rung_again_where_slots_are_free(queue: TicketQueue) -> None:
    for _ in range(3):
        queue.put(ticket())
    assert queue.sweep().rings == ()
    queue.beat("w1", "default", 2, {})
    assert queue.sweep().rings == (("default", 2),)
    assert queue.sweep().rings == ()


def test_leases_that_a_worker_gives_up_are_claimed_at_once(queue: TicketQueue) -> None:
    sent = ticket()
    queue.put(sent)
    queue.take("default", "w1", [1])
    assert queue.beat("w1", "default", 4, {}).leases == {sent.request_id}
    queue.give_up("w1", [sent.request_id])
    (claim,) = queue.sweep().claims
    assert claim.why == "worker_lost"
    assert queue.beat("w1", "default", 4, {}).leases == frozenset()


def test_a_ticket_of_another_version_is_dropped_and_holds_up_nobody(queue: TicketQueue, valkey: Any) -> None:
    strange, sound = ticket(), ticket()
    queue.put(strange)
    queue.put(sound)
    valkey.hset(ticket_key(strange.request_id), "header", b'{"v":99}')
    lease = queue.take("default", "w1", [1])
    assert lease is not None
    assert lease.ticket.prompt == PROMPT
    assert queue.state(strange.request_id) is None
    assert queue.beat("w1", "default", 4, {}).leases == {sound.request_id}


def test_the_sweep_survives_tickets_that_nobody_can_read(queue: TicketQueue, valkey: Any) -> None:
    strange = ticket()
    queue.put(strange)
    queue.take("default", "w1", [1])
    valkey.hset(ticket_key(strange.request_id), "header", b"\xff")
    queue.beat("w1", "default", 4, {}, ttl_seconds=0.01)
    time.sleep(0.05)
    assert queue.sweep().claims == ()
    assert queue.state(strange.request_id) is None


def test_a_ticket_whose_hash_expired_is_skipped(queue: TicketQueue, valkey: Any) -> None:
    gone, here = ticket(), ticket()
    queue.put(gone)
    queue.put(here)
    valkey.delete(ticket_key(gone.request_id))
    lease = queue.take("default", "w1", [1])
    assert lease is not None
    assert lease.ticket.request_id == here.request_id


def test_signing_off_leaves_the_rest_to_the_sweep(queue: TicketQueue) -> None:
    queue.beat("w1", "default", 4, {})
    queue.put(ticket())
    queue.take("default", "w1", [1])
    queue.sign_off("w1", "default")
    assert queue.workers() == []
    assert len(queue.sweep().claims) == 1


# Nothing is left behind


def test_bells_that_nobody_answers_do_not_pile_up(queue: TicketQueue, valkey: Any, settings: Any) -> None:
    """Each request rings once, for as long as its pool has no worker, and for hours where one has hung."""
    bells = settings.CONFIG.broker_options["global_keyprefix"] + "default"
    queue.put(ticket())
    queue.beat("w1", "default", 4, {})
    valkey.lpush(bells, *range(1500))
    queue.sweep()
    assert valkey.llen(bells) == 1000
    queue.sign_off("w1", "default")
    queue.sweep()
    assert not valkey.exists(bells)
    valkey.set(bells, "garbage")
    queue.beat("w1", "default", 4, {})
    queue.sweep()  # nor does what somebody else has written there end the sweep


def test_the_lists_of_who_runs_what_end_where_the_site_stood_still(queue: TicketQueue, valkey: Any) -> None:
    """The hash of a ticket runs out while nobody sweeps; nothing else would ever take its id out of these."""
    queue.put(ticket())
    assert 0 < valkey.ttl("of:tenant:1") <= valkey.ttl("of:key:1")
    longest = valkey.ttl("of:key:1")
    assert longest >= valkey.ttl("queued:1") > 0
    now = time.time()
    queue.put(ticket(created_at=now, queue_deadline_at=now + 1, deadline_at=now + 1))
    assert valkey.ttl("of:tenant:1") >= longest - 2, "the longest counts"


def test_an_ended_request_leaves_only_its_stream_and_state_both_with_an_end(queue: TicketQueue, valkey: Any) -> None:
    sent = ticket()
    queue.put(sent)
    lease = queue.take("default", "w1", [1])
    assert lease is not None
    assert end_claimed(valkey, lease, b"{}", b"{}")
    left = {key.decode() for key in valkey.keys("*")} - {"pools", "settlements", "unsettled"}
    assert left == {ticket_key(sent.request_id), stream_key(sent.request_id), "had:default", "share:1"}
    assert all(valkey.ttl(key) > 0 for key in left)

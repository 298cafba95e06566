"""Whose ticket is next: weights, caps, groups and bounds, decided in Valkey by one script. Time is counted in takes."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from inference.transport.lua import script
from inference.transport.queue import Lease, Offer, Share, TicketQueue, ticket_key
from inference.transport.stream import end_claimed, stream_key
from inference.transport.ticket import Ticket
from tests.inference.flow import ticket

pytestmark = pytest.mark.integration

ALICE, BOB, CHARLIE = 1, 2, 3
PASSED_AT_MOST = 32
"""As take.lua has it."""
OUTPUT_COST = 2


@pytest.fixture
def queue(valkey: Any) -> TicketQueue:
    return TicketQueue(valkey)


def put(queue: TicketQueue, tenant_id: int, share: Share | None = None, **fields: Any) -> Ticket:
    sent = ticket(tenant_id=tenant_id, key_id=tenant_id, **fields)
    queue.put(sent, share=share or Share())
    return sent


def take(queue: TicketQueue, offer: Offer | None = None) -> Lease | None:
    return queue.take("default", "w1", offer or Offer(free=(1,)))


def taken(queue: TicketQueue) -> int:
    lease = take(queue)
    assert lease is not None
    return lease.ticket.tenant_id


def end(queue: TicketQueue, lease: Lease, computed: int = 0, generated: int = 0) -> bool:
    """As the worker's publisher ends it."""
    request_id = lease.ticket.request_id
    keys = [ticket_key(request_id), stream_key(request_id)]
    args = [request_id, lease.token, 0, 600, 100, b"{}", computed, generated, b"{}"]
    return bool(script(queue.client, "append")(keys=keys, args=args))


def had(queue: TicketQueue, tenant_id: int) -> float:
    return float(queue.client.zscore("had:default", tenant_id) or 0)


def beat(queue: TicketQueue, slots: int = 4, worker: str = "w1") -> None:
    queue.beat(worker, "default", slots, {}, ttl_seconds=600, model_slots={1: slots})


@dataclass
class Pool:
    """A pool of `slots` that serves tenants which always have something waiting; a token takes a tick."""

    queue: TicketQueue
    slots: int
    lengths: dict[int, tuple[int, int]]
    """Of each tenant: prompt tokens and answer tokens of its requests."""
    shares: dict[int, Share] = field(default_factory=dict)
    tokens: Counter[int] = field(default_factory=Counter)
    now: int = 0

    def run(self, ticks: int) -> None:
        beat(self.queue, self.slots)
        running: list[tuple[int, Lease]] = []
        for tenant_id in self.lengths:
            for _ in range(3):
                self._put(tenant_id)
        while self.now < ticks:
            while len(running) < self.slots and (lease := take(self.queue)) is not None:
                running.append((self.now + sum(self._length(lease)), lease))
                self._put(lease.ticket.tenant_id)
            running.sort(key=lambda each: each[0])
            self.now, lease = running.pop(0)
            prompt, answer = self._length(lease)
            assert end(self.queue, lease, prompt, answer)
            self.tokens[lease.ticket.tenant_id] += prompt + OUTPUT_COST * answer

    def _length(self, lease: Lease) -> tuple[int, int]:
        return self.lengths[lease.ticket.tenant_id]

    def _put(self, tenant_id: int) -> None:
        prompt, _ = self.lengths[tenant_id]
        fields = {"num_prompt_tokens": prompt, "prompt": tuple(range(prompt)), "max_tokens": 1000}
        put(self.queue, tenant_id, self.shares.get(tenant_id), **fields)


# Weighted tokens


def test_tenants_get_the_same_tokens_however_long_their_requests_are(queue: TicketQueue) -> None:
    pool = Pool(queue, 1, {ALICE: (20, 200), BOB: (10, 10), CHARLIE: (60, 20)})
    pool.run(12_000)
    assert max(pool.tokens.values()) / min(pool.tokens.values()) < 1.2


def test_a_plan_of_three_times_the_weight_gets_three_times_the_tokens(queue: TicketQueue) -> None:
    pool = Pool(queue, 1, {ALICE: (20, 40), BOB: (10, 60)}, {ALICE: Share(3.0), BOB: Share(1.0)})
    pool.run(15_000)
    assert pool.tokens[ALICE] / pool.tokens[BOB] == pytest.approx(3.0, rel=0.15)


@pytest.mark.parametrize("seed", range(4))
def test_who_always_waits_is_never_further_behind_than_the_longest_requests(queue: TicketQueue, seed: int) -> None:
    draw = random.Random(seed)
    lengths = {tenant: (draw.randint(5, 80), draw.randint(5, 120)) for tenant in (ALICE, BOB, CHARLIE)}
    shares = {tenant: Share(draw.choice([0.5, 1.0, 2.0])) for tenant in lengths}
    pool = Pool(queue, 1, lengths, shares)
    pool.run(4_000)
    weighted = [pool.tokens[tenant] / shares[tenant].weight for tenant in lengths]
    longest = max((prompt + OUTPUT_COST * 128) / shares[each].weight for each, (prompt, _) in lengths.items())
    assert max(weighted) - min(weighted) <= 3 * longest


def test_what_was_charged_in_advance_is_corrected_to_what_was_had(queue: TicketQueue) -> None:
    put(queue, ALICE, max_tokens=1000)
    lease = take(queue)
    assert lease is not None
    assert had(queue, ALICE) == 10 + OUTPUT_COST * 128  # a first answer is taken for one of this length
    end(queue, lease, 4, 30)
    assert had(queue, ALICE) == 4 + OUTPUT_COST * 30
    put(queue, ALICE, max_tokens=1000)
    take(queue)
    assert had(queue, ALICE) == 4 + OUTPUT_COST * 30 + 10 + OUTPUT_COST * 30


def test_who_was_fenced_off_corrects_nothing(queue: TicketQueue) -> None:
    put(queue, ALICE)
    lease = take(queue)
    assert lease is not None
    queue.give_up("w1", [lease.ticket.request_id])
    (claim,) = queue.sweep().claims
    assert end_claimed(queue.client, claim.lease, b"{}", b"{}")
    assert had(queue, ALICE) == 0  # a lost request was not had
    assert not end(queue, lease, 10, 16)
    assert not end(queue, claim.lease, 10, 16) or had(queue, ALICE) == 0


def test_an_idle_tenant_saves_nothing_up(queue: TicketQueue) -> None:
    for _ in range(60):
        put(queue, ALICE)
    assert [taken(queue) for _ in range(30)] == [ALICE] * 30
    for _ in range(30):
        put(queue, BOB)
    assert Counter(taken(queue) for _ in range(20))[BOB] in (10, 11)


def test_one_request_beside_a_thousand_goes_next(queue: TicketQueue) -> None:
    for _ in range(200):
        put(queue, ALICE)
    for _ in range(20):
        for _ in range(3):
            assert taken(queue) == ALICE
        put(queue, BOB)
        assert BOB in [taken(queue), taken(queue)]


def test_in_fifo_order_a_thousand_go_first(valkey: Any) -> None:
    queue = TicketQueue(valkey, order="fifo")
    for _ in range(50):
        put(queue, ALICE)
    put(queue, BOB)
    assert [taken(queue) for _ in range(51)] == [ALICE] * 50 + [BOB]


# Bounded wait


def test_a_ticket_waits_for_a_bounded_number_of_others_though_new_tenants_never_cease(queue: TicketQueue) -> None:
    for _ in range(20):
        put(queue, ALICE, max_tokens=1000)
    for _ in range(10):
        taken(queue)
    newcomers = iter(range(100, 10_000))
    for _ in range(5):
        put(queue, next(newcomers))
    place = 9  # of Alice's that wait before her last one, all older than anybody else's
    waited = 0
    while queue.client.zcard(f"queue:default:1:{ALICE}"):
        taken(queue)
        put(queue, next(newcomers))
        put(queue, next(newcomers))
        waited += 1
        assert waited <= PASSED_AT_MOST * (place + 1)
    assert waited > place  # it was not first come, first served


# Slots


def test_while_others_wait_nobody_holds_more_slots_than_its_share(queue: TicketQueue) -> None:
    beat(queue, 4)
    for _ in range(8):
        put(queue, ALICE, max_tokens=1)  # nearly for nothing: by what she has had she would always be next
    for _ in range(8):
        put(queue, BOB, max_tokens=1000)
    assert Counter(taken(queue) for _ in range(4)) == {ALICE: 2, BOB: 2}


def test_slots_that_nobody_else_wants_are_for_whoever_waits(queue: TicketQueue) -> None:
    beat(queue, 4)
    for _ in range(4):
        put(queue, ALICE)
    assert [taken(queue) for _ in range(4)] == [ALICE] * 4


def test_a_plan_may_cap_the_slots_of_its_tenants(queue: TicketQueue) -> None:
    beat(queue, 4)
    for _ in range(3):
        put(queue, ALICE, Share(slots=1))
    first = take(queue)
    assert first is not None
    assert take(queue) is None
    put(queue, BOB)
    assert taken(queue) == BOB
    end(queue, first)
    assert taken(queue) == ALICE


def test_what_its_own_cap_kept_a_tenant_from_is_no_credit(queue: TicketQueue) -> None:
    beat(queue, 8)
    for _ in range(20):
        put(queue, ALICE, Share(slots=1))
    taken(queue)
    for _ in range(12):
        put(queue, BOB)
    lease = take(queue)
    while lease is not None and queue.client.zcard(f"queue:default:1:{BOB}"):
        assert lease.ticket.tenant_id == BOB
        end(queue, lease, 10, 16)
        lease = take(queue)
    assert had(queue, ALICE) >= had(queue, BOB) - 2 * (10 + OUTPUT_COST * 128)


def test_slots_of_other_models_and_dead_workers_do_not_count(queue: TicketQueue) -> None:
    queue.beat("dead", "default", 100, {}, ttl_seconds=0.001, model_slots={1: 100})
    queue.beat("w1", "default", 6, {}, ttl_seconds=600, model_slots={1: 2, 2: 4})
    for _ in range(4):
        put(queue, ALICE, max_tokens=1)
        put(queue, BOB, max_tokens=1000)
    assert Counter(taken(queue) for _ in range(2)) == {ALICE: 1, BOB: 1}


# Groups of one adapter vector


def test_of_tenants_nearly_level_one_goes_first_whose_vector_runs_already(queue: TicketQueue) -> None:
    poet = {"adapters": (("a" * 64, 1.0),)}
    first = put(queue, ALICE)
    other = put(queue, BOB, **poet)
    lease = take(queue, Offer(free=(1,), groups=frozenset({other.group})))
    assert lease is not None
    assert lease.ticket.request_id == other.request_id
    lease = take(queue, Offer(free=(1,), groups=frozenset({other.group})))
    assert lease is not None
    assert lease.ticket.request_id == first.request_id


def test_a_group_goes_first_only_within_the_bound(queue: TicketQueue) -> None:
    poet = {"adapters": (("a" * 64, 1.0),)}
    for _ in range(30):
        last = put(queue, BOB, **poet)
        put(queue, ALICE)
    order = []
    for _ in range(30):
        lease = take(queue, Offer(free=(1,), groups=frozenset({last.group})))
        assert lease is not None
        order.append(lease.ticket.tenant_id)
    assert order[0] == BOB
    assert Counter(order)[ALICE] >= 8


# Making room


@pytest.fixture
def full(queue: TicketQueue) -> Iterator[list[Lease]]:
    """Alice holds all four slots of the only worker."""
    beat(queue, 4)
    for _ in range(4):
        put(queue, ALICE)
    leases = [take(queue) for _ in range(4)]
    yield [lease for lease in leases if lease is not None]


PARKABLE = Offer(parkable=frozenset({(1, ALICE)}))


def test_a_tenant_below_its_share_goes_where_one_above_it_is_parked(queue: TicketQueue, full: list[Lease]) -> None:
    put(queue, ALICE)
    put(queue, BOB)
    put(queue, BOB)
    put(queue, BOB)
    found = [take(queue, PARKABLE) for _ in range(3)]
    assert [(lease.ticket.tenant_id, lease.parks) for lease in found if lease] == [(BOB, ALICE), (BOB, ALICE)]
    assert found[2] is None  # Bob has his half


def test_nobody_is_parked_for_its_own_tenant(queue: TicketQueue, full: list[Lease]) -> None:
    put(queue, ALICE)
    assert take(queue, PARKABLE) is None


def test_nobody_is_parked_while_another_worker_has_a_free_slot(queue: TicketQueue, full: list[Lease]) -> None:
    beat(queue, 2, "w2")
    put(queue, BOB)
    assert take(queue, PARKABLE) is None


def test_a_tenant_at_its_share_is_not_parked(queue: TicketQueue) -> None:
    beat(queue, 2)
    put(queue, ALICE)
    put(queue, BOB)
    taken(queue), taken(queue)
    put(queue, CHARLIE)
    everybody = frozenset({(1, ALICE), (1, BOB)})
    assert take(queue, Offer(parkable=everybody)) is None


def test_a_capped_tenant_gets_no_more_by_parking(queue: TicketQueue, full: list[Lease]) -> None:
    put(queue, BOB, Share(slots=1))
    put(queue, BOB, Share(slots=1))
    assert take(queue, PARKABLE) is not None
    assert take(queue, PARKABLE) is None


# What is seen of it


def test_a_lease_says_how_long_it_waited_and_under_which_plan(queue: TicketQueue) -> None:
    put(queue, ALICE, Share(name="free"))
    lease = take(queue)
    assert lease is not None
    assert lease.share_name == "free"
    assert 0 <= lease.waited_seconds < 5


def test_the_heartbeat_brings_the_longest_wait_and_the_lag(queue: TicketQueue) -> None:
    put(queue, ALICE)
    put(queue, ALICE)
    taken(queue)
    put(queue, BOB)
    pulse = queue.beat("w1", "default", 4, {})
    assert 0 <= pulse.oldest_seconds < 5
    assert pulse.lag_tokens == had(queue, ALICE) - had(queue, BOB) > 0


def test_what_was_had_is_forgotten_of_tenants_that_are_idle(queue: TicketQueue) -> None:
    put(queue, ALICE)
    lease = take(queue)
    assert lease is not None
    end(queue, lease, 1, 1)
    for _ in range(3):
        put(queue, BOB)
        taken(queue)
    queue.sweep()
    assert queue.client.zscore("had:default", ALICE) is None
    assert had(queue, BOB) > 0

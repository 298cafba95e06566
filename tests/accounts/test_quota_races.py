"""Many threads, one quota: never a token too many, nothing left held (RELIABILITY R1)."""

from __future__ import annotations

import random
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from django.db import IntegrityError, connections

from accounts.identity import issuing
from accounts.ledger import quotas
from accounts.ledger.quotas import ReleaseOrder
from accounts.limits.precedence import Limits
from accounts.models import LedgerEntry, Plan, QuotaPeriod
from accounts.trail.refusals import Refusal
from tests.accounts.quota_cast import NOW, assert_proven, counters, reserve_order, settle_order, tenant_period
from tests.conftest import Customer, make_customer

pytestmark = [pytest.mark.integration, pytest.mark.django_db(transaction=True)]

NUM_CLIENTS = 64


def in_threads(work: Callable[[int], Any], number: int = NUM_CLIENTS) -> list[Any]:
    """All at once; each thread closes its connection."""
    start = threading.Barrier(number)

    def run(index: int) -> Any:
        start.wait(10)
        try:
            return work(index)
        finally:
            connections.close_all()

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(run, range(number)))


def new_customer() -> Customer:
    plan, _ = Plan.objects.get_or_create(name="races")
    return make_customer(f"Alice's {uuid.uuid4().hex[:8]}", plan)


@pytest.mark.parametrize("seeds", [range(10), range(10, 20)], ids=["seeds 0-9", "seeds 10-19"])
def test_sixty_four_requests_of_fifty_never_pass_a_thousand(seeds: range) -> None:
    for seed in seeds:
        one_race(seed)
    assert_proven()


def one_race(seed: int) -> None:
    alice, dice = new_customer(), random.Random(seed)
    outputs = [dice.randrange(1, 41) for _ in range(NUM_CLIENTS)]
    ends = [dice.random() for _ in range(NUM_CLIENTS)]
    delivered: list[int] = []

    def request(index: int) -> str:
        order = reserve_order(alice, 10, 40)
        try:
            held = quotas.reserve(order)
        except Refusal as refusal:
            return refusal.code
        if ends[index] < 0.1:
            assert quotas.release(order.request_id, "cancelled in the queue", NOW)
            return "released"
        output = min(outputs[index], held.max_tokens)
        delivered.append(10 + output)
        settlements = [settle_order(order.request_id, 10, output)] * (2 if ends[index] > 0.9 else 1)
        assert quotas.settle_many(settlements)[0]
        return "settled"

    codes = set(in_threads(request))
    used, reserved, requests, open_requests = counters(tenant_period(alice))
    assert used == sum(delivered) <= 1000
    assert (reserved, open_requests, requests) == (0, 0, len(delivered))
    assert codes <= {"settled", "released", "quota_reserved", "quota_exhausted"} and "settled" in codes
    ledger = LedgerEntry.objects.filter(tenant_period__tenant=alice.tenant)
    assert sum(ledger.values_list("used_tokens", flat=True)) == used
    assert max(ledger.exclude(tenant_committed_after=None).values_list("tenant_committed_after", flat=True)) <= 1000


def test_all_that_fits_is_granted() -> None:
    alice = new_customer()

    def request(_index: int) -> bool:
        try:
            quotas.reserve(reserve_order(alice, 10, 40, all_or_nothing=True))
        except Refusal as refusal:
            assert refusal.code == "quota_reserved"
            return False
        return True

    assert sum(in_threads(request)) == 20
    assert counters(tenant_period(alice)) == (0, 1000, 0, 20)
    assert_proven()


def test_many_tenants_at_once_do_not_wait_for_ever() -> None:
    customers = [new_customer() for _ in range(8)]

    def request(index: int) -> int:
        dice, charged = random.Random(index), 0
        for _ in range(4):
            chosen = dice.sample(customers, 3)
            orders = [reserve_order(who, 5, 5, tenant_limits=Limits()) for who in chosen]
            quotas.reserve_many(orders)
            dice.shuffle(orders)
            quotas.settle_many([settle_order(order.request_id, 5, 1) for order in orders])
            charged += 6 * len(orders)
        return charged

    charged = sum(in_threads(request, 16))
    assert sum(QuotaPeriod.objects.filter(key=None).values_list("used_tokens", flat=True)) == charged
    assert_proven()


def test_one_settlement_wins_of_sixty_four() -> None:
    alice = new_customer()
    order = reserve_order(alice)
    quotas.reserve(order)

    def end(index: int) -> bool:
        if index % 2:
            return quotas.release(order.request_id, "worker_lost", NOW)
        return quotas.settle(settle_order(order.request_id))

    assert sum(in_threads(end)) == 1
    assert_proven()


def test_the_first_requests_of_a_month_open_one_period() -> None:
    alice = new_customer()
    in_threads(lambda _index: quotas.reserve(reserve_order(alice, 1, 1)))
    assert QuotaPeriod.objects.filter(tenant=alice.tenant, key=None).count() == 1
    assert QuotaPeriod.objects.filter(key=alice.key).count() == 1


def test_a_poisoned_order_does_not_harm_its_group() -> None:
    alice, bob = new_customer(), new_customer()
    taken = reserve_order(bob)
    quotas.reserve(taken)

    def request(index: int) -> str:
        try:
            if index % 8:
                quotas.reserve(reserve_order(alice, 1, 1))
            else:
                quotas.reserve(reserve_order(alice, 1, 1, request_id=taken.request_id))
        except IntegrityError:
            return "poison"
        return "held"

    answers = in_threads(request)
    assert answers == ["held" if index % 8 else "poison" for index in range(NUM_CLIENTS)]
    assert counters(tenant_period(alice)) == (0, 2 * 56, 0, 56)
    assert_proven()


def test_rotating_a_key_does_not_renew_its_quota() -> None:
    alice = new_customer()
    quotas.settle(settle_order(_held(alice, Limits(monthly_tokens=50))))
    successor, _ = issuing.rotate(alice.key)
    answer = quotas.reserve_many(
        [reserve_order(alice, key_id=successor.quota_key_id, key_limits=Limits(monthly_tokens=30))]
    )
    assert isinstance(answer[0], Refusal) and answer[0].code == "quota_exhausted"


def _held(who: Customer, key_limits: Limits) -> str:
    order = reserve_order(who, key_limits=key_limits)
    quotas.reserve(order)
    return order.request_id


def test_threads_share_transactions(monkeypatch: Any) -> None:
    alice, sizes = new_customer(), []
    real = quotas._transaction
    quotas.reserve(reserve_order(alice, 1, 1))

    def counted(works: Any) -> Any:
        sizes.append(len(works))
        return real(works)

    monkeypatch.setattr(quotas, "_transaction", counted)
    in_threads(lambda _index: quotas.reserve(reserve_order(alice, 1, 1, tenant_limits=Limits())))
    assert sum(sizes) == NUM_CLIENTS
    assert len(sizes) < NUM_CLIENTS / 2, sizes


def test_two_sweeps_release_once() -> None:
    alice = new_customer()
    for _ in range(10):
        quotas.reserve(reserve_order(alice, 1, 1))
    assert sum(in_threads(lambda _index: quotas.sweep_expired(reserve_order(alice).expires_at), 4)) == 10
    assert_proven()


def test_nothing_of_charlie_is_moved() -> None:
    alice, charlie = new_customer(), new_customer()
    in_threads(lambda _index: quotas.reserve(reserve_order(alice, 1, 1)), 8)
    assert not QuotaPeriod.objects.filter(tenant=charlie.tenant).exists()
    assert quotas.settle_many([ReleaseOrder(request_id="nobody", reason="", now=NOW)]) == [False]

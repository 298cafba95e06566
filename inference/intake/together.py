"""Several orders of one HTTP request: all of them are prepared, and have their tokens a minute and their quota, before
the first of them runs; or the request is refused, and nothing is held or charged. Places are taken one by one, as they
become free: a request may have more answers than its tenant has places.

Blocking, on admission threads. Lines of batches take as they go: each line is asked for again until it is answered.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from django.conf import settings

from accounts.identity.principals import Principal
from accounts.ledger import quotas
from accounts.ledger.allotment import ChargeOrder, Held, Order
from accounts.ledger.quotas import ReleaseOrder
from accounts.limits import throttling
from accounts.trail.refusals import Refusal
from inference.batches.terms import BatchTerms
from inference.intake import admission, dry_run
from inference.intake.admission import Admitted, CachedAnswer, Prepared
from inference.orders import GenerateOrder
from inference.transport.holding import Hold

PROLONG_EVERY_SECONDS = 1.0


class Together:
    """The orders of one request. One that shares its prompt does so with the nearest before it that does not."""

    def __init__(
        self,
        principal: Principal,
        orders: Sequence[GenerateOrder],
        request_id: str,
        route: str,
        hold: Hold,
        batch: BatchTerms | None = None,
    ) -> None:
        """batch: that the request is a line of. hold: for each of the orders."""
        self.principal, self.orders, self.request_id, self.route = principal, list(orders), request_id, route
        self._hold, self._batch = hold, batch
        self._created_at = time.time()
        self._prepared: list[Prepared] = []
        self._is_unpaid = False
        """The last order that was to pay for a prompt has its answer from the cache, which computes none."""
        self._lock = threading.Lock()
        self._held: dict[int, Held] = {}
        """What is held for orders that have no ticket yet."""
        self.is_clamped = False
        """The quota has less output than they asked for."""
        self._is_closed = False
        self._prolonged_at = 0.0

    def admit(self, number: int) -> Admitted | CachedAnswer:
        """Number 0 first. Raises Refusal; that of number 0 leaves nothing held, charged or queued."""
        if number == 0:
            self._begin()
        with self._lock:
            held = self._held.pop(number, None)
            if self._is_closed:
                raise Refusal("request_cancelled", "The request was cancelled.")
        try:
            self._prolong()
            return admission.take(
                self.principal,
                self._prepared[number],
                request_id=self._id(number),
                route=self.route,
                created_at=time.time() if number else self._created_at,
                parent_id=self.request_id,
                batch=self._batch,
                hold=self._hold,
                held=held,
            )
        except BaseException:
            if held is not None:
                self._put_back(number, held)
            if number == 0:
                self.close("refused")
            raise

    def close(self, reason: str = "cancelled") -> None:
        """Give back what is held for orders that have no ticket. Idempotent."""
        self.give_back(self.end(), reason)

    def end(self) -> dict[int, Held]:
        """Nothing more is admitted: what is to be given back. At once, on any thread."""
        with self._lock:
            held, self._held, self._is_closed = self._held, {}, True
        return held

    def give_back(self, held: dict[int, Held], reason: str = "cancelled") -> None:
        """A cached answer was charged when it was found."""
        numbers = [number for number in held if self._prepared[number].cached is None]
        if not numbers:
            return
        principal, now = self.principal, datetime.now(UTC)
        tokens = sum(self._prepared[number].num_tokens for number in numbers)
        throttling.leave(principal.tenant_id, principal.quota_key_id, self._id(min(numbers)))  # see _take_all
        throttling.give_back_tokens(principal.tenant_id, principal.quota_key_id, tokens)
        releases = [ReleaseOrder(request_id=self._id(each), reason=reason, now=now) for each in numbers]
        admission.quietly(quotas.release_many, releases)

    def _begin(self) -> None:
        if dry_run.is_on():
            dry_run.end_with_all(self._prepare, range(len(self.orders)))
        for number in range(len(self.orders)):
            self._prepared.append(self._prepare(number))
        if self._batch is None:
            self._take_all()

    def _prepare(self, number: int) -> Prepared:
        order, payer = self.orders[number], None
        if order.shares_prompt and self._is_unpaid:
            order = self.orders[number] = replace(order, shares_prompt=False)
        elif order.shares_prompt and self._prepared:
            payer = self._prepared[max(each for each in range(number) if not self.orders[each].shares_prompt)]
        try:
            prepared = admission.prepare(self.principal, order, batch=self._batch, payer=payer)
        except dry_run.Found as found:
            if not order.shares_prompt:
                self._is_unpaid = found.wanted[-1].is_cached
            raise
        if not order.shares_prompt:
            self._is_unpaid = prepared.cached is not None
        return prepared

    def _take_all(self) -> None:
        computed = [number for number, each in enumerate(self._prepared) if each.cached is None]
        with ExitStack() as undo:
            if computed:
                tokens, first = sum(self._prepared[number].num_tokens for number in computed), self._id(computed[0])
                served = self._prepared[computed[0]].served
                admission.enter(self.principal, served, first, tokens, self.orders[0].stream)
                undo.callback(admission.give_back_place, self.principal, first, tokens)
            all_or_nothing = any(order.all_or_nothing for order in self.orders)
            held = admission.reserve(self._orders_of_quota, all_or_nothing)
            undo.pop_all()
        self._held = dict(enumerate(held))
        self.is_clamped = any(each.clamped for each in held)
        self._prolonged_at = time.monotonic()

    def _orders_of_quota(self, all_or_nothing: bool) -> list[Order]:
        seconds = _seconds()
        orders = [
            admission.reserve_order(self.principal, each, self._id(number), seconds, all_or_nothing)
            if each.cached is None
            else self._charge(number, each)
            for number, each in enumerate(self._prepared)
        ]
        now = orders[0].now
        return [replace(order, now=now) for order in orders]

    def _charge(self, number: int, prepared: Prepared) -> ChargeOrder:
        return admission.cached_order(
            self.principal, prepared, self._id(number), self.route, self.request_id, self._created_at
        )

    def _prolong(self) -> None:
        """Those that still wait for their turn may wait as long again."""
        if not self._held or time.monotonic() - self._prolonged_at < PROLONG_EVERY_SECONDS:
            return
        margin = settings.CONFIG.drain_seconds + admission.RESERVATION_MARGIN_SECONDS
        quotas.prolong(
            [self._id(number) for number in list(self._held)],
            datetime.now(UTC) + timedelta(seconds=_seconds() + margin),
        )
        self._prolonged_at = time.monotonic()

    def _put_back(self, number: int, held: Held) -> None:
        with self._lock:
            if not self._is_closed:
                self._held[number] = held
                return
        self.give_back({number: held})

    def _id(self, number: int) -> str:
        return f"{self.request_id}.{number}"


def _seconds() -> float:
    """An order waits while others run, and then for a place; each of it takes one generation's time at most."""
    return 3 * settings.CONFIG.generation_timeout_seconds

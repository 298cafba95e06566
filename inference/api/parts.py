"""Several orders of one HTTP request, computed side by side; each has its own ledger entry, receipt and cache entry.

The first is admitted in the hop, so what is wrong with all of them is known before anything runs; the rest follow from
the event loop, as places become free. Of orders that share a prompt one pays for it, and is admitted before the others,
which copy what it has computed. For every dialect.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from django.conf import settings

from accounts.principals import Principal
from accounts.refusals import Refusal
from inference import admission
from inference.admission import Admitted, CachedAnswer
from inference.api import cancelling
from inference.api.following import Collected, collect, ending_of_cached
from inference.api.hop import shared_hop
from inference.orders import GenerateOrder

PASSING = frozenset({"too_many_concurrent_requests", "queue_full", "quota_reserved"})
WAIT_FOR_ROOM_SECONDS = 0.25
MAX_AT_ONCE = 16
"""Orders of one request that are admitted at once; tighter where the key's places are fewer."""


def completions(order: GenerateOrder, number: int) -> list[GenerateOrder]:
    """As many orders of one prompt, of which the first pays for it. A given seed is counted up, as llama.cpp does."""
    first, others = replace(order, is_batch=order.is_batch or number > 1), range(1, number)
    seed = order.sampling.seed
    if seed is None:
        return [first, *(replace(first, shares_prompt=True) for _ in others)]
    seeds = [replace(order.sampling, seed=(seed + index) % 2**32) for index in others]
    return [first, *(replace(first, shares_prompt=True, sampling=sampling) for sampling in seeds)]


@dataclass(frozen=True, slots=True)
class Part:
    """One order's answer."""

    collected: Collected
    cached: bool
    shares_prompt: bool = False


@dataclass(frozen=True, slots=True)
class Parts:
    """The orders of one request. One that shares its prompt does so with the nearest before it that does not."""

    principal: Principal
    orders: Sequence[GenerateOrder]
    request_id: str
    route: str

    def admit(self, number: int, *, pays: bool = False) -> Admitted | CachedAnswer:
        """Blocking. pays: for its own prompt, whatever the order says. Raises Refusal."""
        order = self.orders[number]
        return admission.admit(
            self.principal,
            replace(order, shares_prompt=False) if pays else order,
            request_id=f"{self.request_id}.{number}",
            route=self.route,
            parent_id=self.request_id,
        )

    async def run(self, first: Admitted | CachedAnswer) -> list[Part]:
        """All answers in the order of the orders; `first` is that of number 0. Raises Refusal.

        One that fails ends the others; those that had finished are in the completion cache, and free when tried again.
        """
        entrance = Entrance(self, first)
        tasks = [asyncio.ensure_future(self._one(number, entrance)) for number in range(len(self.orders))]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _one(self, number: int, entrance: Entrance) -> Part:
        async with entrance.enter(number) as answer:
            if isinstance(answer, CachedAnswer):
                found = answer.completion
                return Part(Collected(found.output, ending_of_cached(found)), cached=True)
            collected = await collect(answer.ticket.request_id)
            return Part(collected, cached=False, shares_prompt=answer.ticket.shares_prompt)


class Entrance:
    """Admits the orders of one request as places become free. Made and used on the event loop."""

    def __init__(self, parts: Parts, first: Admitted | CachedAnswer) -> None:
        self._parts, self._first = parts, first
        self._places = asyncio.Semaphore(min(MAX_AT_ONCE, parts.principal.limit("concurrent_requests") or MAX_AT_ONCE))
        loop = asyncio.get_running_loop()
        self._is_computed: dict[int, asyncio.Future[bool]] = {
            number: loop.create_future() for number, order in enumerate(parts.orders) if not order.shares_prompt
        }

    @asynccontextmanager
    async def enter(self, number: int) -> AsyncIterator[Admitted | CachedAnswer]:
        """Hold a place while the answer comes; it is cancelled if the block is left before. Raises Refusal."""
        payer = max(each for each in self._is_computed if each <= number)
        pays = number == payer or not await asyncio.shield(self._is_computed[payer])
        async with self._places:
            answer = self._first if number == 0 else await self._admit_when_there_is_room(number, pays)
            if number == payer:
                # An answer from the completion cache computes no prompt: then the others pay for their own.
                self._is_computed[payer].set_result(isinstance(answer, Admitted))
            if isinstance(answer, CachedAnswer):
                yield answer
                return
            with cancelling.unless_finished(answer.ticket.request_id):
                yield answer

    async def _admit_when_there_is_room(self, number: int, pays: bool) -> Admitted | CachedAnswer:
        """The tenant's other requests may hold its places for a while: a batch that has begun waits for them."""
        give_up_at = time.monotonic() + settings.CONFIG.queue_timeout_seconds
        while True:
            try:
                return await shared_hop().run(lambda: self._parts.admit(number, pays=pays), abandon=drop)
            except Refusal as refusal:
                if refusal.code not in PASSING or time.monotonic() > give_up_at:
                    raise
                await asyncio.sleep(WAIT_FOR_ROOM_SECONDS)


def drop(answer: Admitted | CachedAnswer) -> None:
    """Undo an admission whose client has gone."""
    if isinstance(answer, Admitted):
        cancelling.cancel(answer.ticket.request_id)

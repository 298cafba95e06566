"""Several orders of one HTTP request, computed side by side; each has its own ledger entry, receipt and cache entry.

The first is admitted in the hop, so what is wrong with all of them is known before anything runs; the rest follow from
the event loop, as places become free. For every dialect.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Part:
    """One order's answer."""

    collected: Collected
    cached: bool


@dataclass(frozen=True, slots=True)
class Parts:
    """The orders of one request."""

    principal: Principal
    orders: Sequence[GenerateOrder]
    request_id: str
    route: str

    def admit(self, number: int) -> Admitted | CachedAnswer:
        """Blocking. Raises Refusal."""
        return admission.admit(
            self.principal,
            self.orders[number],
            request_id=f"{self.request_id}.{number}",
            route=self.route,
            parent_id=self.request_id,
        )

    async def run(self, first: Admitted | CachedAnswer) -> list[Part]:
        """All answers in the order of the orders; `first` is that of number 0. Raises Refusal.

        One that fails ends the others; those that had finished are in the completion cache, and free when tried again.
        """
        places = asyncio.Semaphore(min(MAX_AT_ONCE, self.principal.limit("concurrent_requests") or MAX_AT_ONCE))
        tasks = [
            asyncio.ensure_future(self._one(number, None if number else first, places))
            for number in range(len(self.orders))
        ]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _one(self, number: int, answer: Admitted | CachedAnswer | None, places: asyncio.Semaphore) -> Part:
        async with places:
            if answer is None:
                answer = await self._admit_when_there_is_room(number)
            if isinstance(answer, CachedAnswer):
                found = answer.completion
                return Part(Collected(found.output, ending_of_cached(found)), cached=True)
            request_id = answer.ticket.request_id
            with cancelling.unless_finished(request_id):
                return Part(await collect(request_id), cached=False)

    async def _admit_when_there_is_room(self, number: int) -> Admitted | CachedAnswer:
        """The tenant's other requests may hold its places for a while: a batch that has begun waits for them."""
        give_up_at = time.monotonic() + settings.CONFIG.queue_timeout_seconds
        while True:
            try:
                return await shared_hop().run(lambda: self.admit(number), abandon=drop)
            except Refusal as refusal:
                if refusal.code not in PASSING or time.monotonic() > give_up_at:
                    raise
                await asyncio.sleep(WAIT_FOR_ROOM_SECONDS)


def drop(answer: Admitted | CachedAnswer) -> None:
    """Undo an admission whose client has gone."""
    if isinstance(answer, Admitted):
        cancelling.cancel(answer.ticket.request_id)

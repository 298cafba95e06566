"""Several orders of one HTTP request, computed side by side; each has its own ledger entry, receipt and cache entry.

The first is admitted in the hop, so what is wrong with any of them is known, and their tokens and quota are taken,
before anything runs (intake/together.py); the rest follow from the event loop, as places become free. Of orders that
share a prompt one pays for it, and is admitted before the others, which copy what it has computed. For every dialect.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import partial

from django.conf import settings

from accounts.trail import refusal_log
from accounts.trail.refusals import Refusal
from inference.api import cancelling
from inference.api.following import Collected, collect, ending_of_cached
from inference.api.hop import shared_hop
from inference.intake.admission import Admitted, CachedAnswer
from inference.intake.together import Together
from inference.orders import GenerateOrder

Drop = Callable[[Admitted | CachedAnswer], None]
PASSING = frozenset({"too_many_concurrent_requests", "too_many_concurrent_streams", "queue_full", "quota_reserved"})
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
    clamped: bool = False
    grammar: str | None = None


class Parts:
    """The answers of one request's orders."""

    def __init__(self, together: Together) -> None:
        self._together = together

    @property
    def orders(self) -> Sequence[GenerateOrder]:
        return self._together.orders

    @property
    def route(self) -> str:
        return self._together.route

    def admit(self, number: int) -> Admitted | CachedAnswer:
        """Blocking. Raises Refusal."""
        return self._together.admit(number)

    def abandon(self, first: Admitted | CachedAnswer) -> None:
        """The client has gone before the answer could come. Blocking."""
        leave(first)
        self._together.close()

    def drop(self, first: Admitted | CachedAnswer) -> None:
        """Undo the admission. Blocking."""
        drop(first)
        self._together.close()

    @property
    def is_clamped(self) -> bool:
        """Whether any of them was given less output than it asked for, as far as it is known."""
        return self._together.is_clamped

    def limit(self, name: str) -> int | None:
        """Of the principal."""
        return self._together.principal.limit(name)

    def note(self, refusal: Refusal) -> None:
        """For `explain`: an answer after the first was refused."""
        asked = self._together
        refusal_log.note(refusal, request_id=asked.request_id, route=asked.route, principal=asked.principal)

    def close_soon(self) -> None:
        """No more of them will be admitted. From the event loop."""
        if held := self._together.end():
            shared_hop().send(partial(self._together.give_back, held))

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
            self.close_soon()

    async def _one(self, number: int, entrance: Entrance) -> Part:
        async with entrance.enter(number) as answer:
            if isinstance(answer, CachedAnswer):
                found = answer.completion
                return Part(Collected(found.output, ending_of_cached(found)), cached=True, grammar=answer.grammar)
            collected = await collect(answer.ticket.request_id)
            ticket = answer.ticket
            return Part(
                collected,
                cached=False,
                shares_prompt=ticket.shares_prompt,
                clamped=answer.clamped,
                grammar=answer.grammar,
            )


class Entrance:
    """Admits the orders of one request as places become free. Made and used on the event loop."""

    def __init__(self, parts: Parts, first: Admitted | CachedAnswer) -> None:
        self._parts, self._first = parts, first
        self._places = asyncio.Semaphore(_num_at_once(parts))
        loop = asyncio.get_running_loop()
        self._is_computed: dict[int, asyncio.Future[bool]] = {
            number: loop.create_future() for number, order in enumerate(parts.orders) if not order.shares_prompt
        }

    @asynccontextmanager
    async def enter(self, number: int) -> AsyncIterator[Admitted | CachedAnswer]:
        """Hold a place while the answer comes; it is cancelled if the block is left before. Raises Refusal."""
        payer = max(each for each in self._is_computed if each <= number)
        if number != payer:
            await asyncio.shield(self._is_computed[payer])
        async with self._places:
            answer = self._first if number == 0 else await self._admit_when_there_is_room(number)
            if number == payer:
                self._is_computed[payer].set_result(True)
            if isinstance(answer, CachedAnswer):
                yield answer
                return
            with cancelling.unless_finished(answer.ticket.request_id, is_batch=answer.ticket.is_batch):
                yield answer

    async def _admit_when_there_is_room(self, number: int) -> Admitted | CachedAnswer:
        """The tenant's other requests may hold its places for a while: a request that has begun waits for them, for as
        long as any of them may take. What it computes until then it pays."""
        give_up_at = time.monotonic() + settings.CONFIG.generation_timeout_seconds
        while True:
            try:
                return await shared_hop().run(lambda: self._parts.admit(number), abandon=drop)
            except Refusal as refusal:
                if refusal.code not in PASSING or time.monotonic() > give_up_at:
                    self._parts.note(refusal)
                    raise
                await asyncio.sleep(WAIT_FOR_ROOM_SECONDS)


def _num_at_once(parts: Parts) -> int:
    """No more than the tenant and its key have places for: they would wait for each other."""
    names = ["concurrent_requests", *(["concurrent_streams"] if parts.orders[0].stream else [])]
    return min(MAX_AT_ONCE, *(parts.limit(name) or MAX_AT_ONCE for name in names))


def drop(answer: Admitted | CachedAnswer) -> None:
    """Undo an admission. A batch comes back for its own, and one more reader of what others have asked for leaves it by
    himself (replaying.py): who leaves twice takes another along."""
    if isinstance(answer, Admitted) and not answer.ticket.is_batch and not answer.is_replay:
        cancelling.cancel(answer.ticket.request_id)


@contextmanager
def dropped_on_error(answer: Admitted | CachedAnswer, undo: Drop = drop) -> Iterator[None]:
    """For what is still to be done in the hop once an answer is admitted. undo: the Parts' own drop, if any."""
    try:
        yield
    except BaseException:
        undo(answer)
        raise


def leave(answer: Admitted | CachedAnswer) -> None:
    """The client has gone before the answer could come."""
    if isinstance(answer, Admitted) and not answer.ticket.is_batch:
        cancelling.leave(answer.ticket.request_id)

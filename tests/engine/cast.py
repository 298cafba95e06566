"""What engine tests stand on: a log of events, a clock in the test's hand, and short ways to say "a request"."""

from __future__ import annotations

import threading
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from inference.engine import (
    CostCurve,
    Delta,
    Finished,
    GenerationRequest,
    SamplingParams,
    Started,
    TokenEvent,
)
from inference.engine.speculative import Ask
from tests.timing import PATIENCE_SECONDS


class EventLog:
    """A sink that keeps everything, and waits for requests to finish."""

    def __init__(self) -> None:
        self.calls: list[tuple[TokenEvent, ...]] = []
        self._changed = threading.Condition()

    def __call__(self, events: Sequence[TokenEvent]) -> None:
        with self._changed:
            self.calls.append(tuple(events))
            self._changed.notify_all()

    @property
    def events(self) -> list[TokenEvent]:
        return [event for call in self.calls for event in call]

    def of(self, request_id: str) -> list[TokenEvent]:
        return [event for event in self.events if event.request_id == request_id]

    def text(self, request_id: str) -> str:
        return "".join(event.text for event in self.of(request_id) if isinstance(event, Delta))

    def tokens(self, request_id: str) -> tuple[int, ...]:
        return sum((event.tokens for event in self.of(request_id) if isinstance(event, Delta)), ())

    @property
    def finished(self) -> dict[str, Finished]:
        return {event.request_id: event for event in self.events if isinstance(event, Finished)}

    def wait_for(self, condition: Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        with self._changed:
            while not self._changed.wait_for(condition, timeout=0.02):  # it may be about other things than events
                assert time.monotonic() < deadline, f"it did not happen: {self.finished}"

    def wait_finished(self, *request_ids: str, seconds: float = PATIENCE_SECONDS) -> None:
        self.wait_for(lambda: set(request_ids) <= self.finished.keys(), seconds)

    def wait_started(self, request_id: str, seconds: float = PATIENCE_SECONDS) -> None:
        self.wait_for(lambda: any(isinstance(event, Started) for event in self.of(request_id)), seconds)


class HandClock:
    """Monotonic seconds that pass only when the test, or the fake backend's sleep, says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def make_request(request_id: str = "r", **fields: Any) -> GenerationRequest:
    """A short greedy request unless the fields say otherwise."""
    defaults: dict[str, Any] = {
        "prompt": (1, 2, 3),
        "max_tokens": 4,
        "sampling": SamplingParams(temperature=0.0),
    }
    return GenerationRequest(request_id=request_id, **{**defaults, **fields})


def assert_well_formed(events: Sequence[TokenEvent]) -> None:
    """Every sequence: Started, Delta*, Finished in this order; Finished exactly once; receipts agree with deltas."""
    by_request: dict[str, list[TokenEvent]] = defaultdict(list)
    for event in events:
        by_request[event.request_id].append(event)
    for own in by_request.values():
        kinds = [type(event) for event in own]
        assert kinds.count(Finished) == 1
        assert kinds[-1] is Finished
        assert kinds.count(Started) <= 1
        assert Started not in kinds[1:]
        if Delta in kinds:
            assert kinds[0] is Started
        last = own[-1]
        assert isinstance(last, Finished)
        assert last.receipt.completion_tokens == sum(len(event.tokens) for event in own if isinstance(event, Delta))


class Rehearsed:
    """A proposer that was told the answers, by prompt, and guesses them right as often as the test wants.

    rates: of each position in a draft, how often its guess is right; the last counts for all behind it. Which ones are
    right depends on nothing but the place in the answer. asked: every ask, as (slot, number of tokens, num_max).
    """

    def __init__(
        self,
        answers: Mapping[tuple[int, ...], Sequence[int]],
        *rates: float,
        is_free: bool = False,
        cost: CostCurve | None = None,
        num_behind: int = 0,
    ) -> None:
        self._answers = answers
        self._rates = rates or (1.0,)
        self.is_free = is_free
        self.cost = cost or CostCurve()
        self.asked: list[tuple[int, int, int]] = []
        self.opened: list[tuple[int, int]] = []
        self.shifted: list[tuple[int, int, int]] = []
        self.is_freed = False
        self._num_behind = num_behind

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        self.asked += [(ask.slot_id, len(ask.tokens), ask.num_max) for ask in asks]
        return [self._guesses(ask) for ask in asks]

    def _guesses(self, ask: Ask) -> list[int]:
        tokens = tuple(ask.tokens)
        prompt = max((each for each in self._answers if tokens[: len(each)] == each), key=len, default=None)
        if prompt is None:
            return []
        index = len(tokens) - len(prompt)
        coming = self._answers[prompt][index : index + ask.num_max]
        return [
            token if self._is_right(index + position, position) else token + 1 for position, token in enumerate(coming)
        ]

    def _is_right(self, index: int, position: int) -> bool:
        rate = self._rates[min(position, len(self._rates) - 1)]
        return zlib.crc32(f"{index} {position}".encode()) / 2**32 < rate

    def num_behind(self, slot_id: int, num_tokens: int) -> int:
        return self._num_behind

    def open(self, slot_id: int, num_kept: int) -> None:
        self.opened.append((slot_id, num_kept))

    def shift(self, slot_id: int, num_keep: int, num_discard: int) -> None:
        self.shifted.append((slot_id, num_keep, num_discard))

    def free(self) -> None:
        self.is_freed = True

"""What engine tests stand on: a log of events, a clock in the test's hand, and short ways to say "a request"."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from inference.engine import (
    Delta,
    Finished,
    GenerationRequest,
    SamplingParams,
    Started,
    TokenEvent,
)


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

    def wait_for(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, timeout=seconds), f"it did not happen: {self.finished}"

    def wait_finished(self, *request_ids: str, seconds: float = 20.0) -> None:
        self.wait_for(lambda: set(request_ids) <= self.finished.keys(), seconds)

    def wait_started(self, request_id: str, seconds: float = 20.0) -> None:
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

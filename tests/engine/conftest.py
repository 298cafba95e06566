"""Fixtures of the engine tests; what they are made of is in cast.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from inference.engine import Backend, EngineRunner

from .cast import EventLog, HandClock


@pytest.fixture
def log() -> EventLog:
    return EventLog()


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def start(log: EventLog) -> Iterator[Callable[..., EngineRunner]]:
    """Start a runner on a backend, and stop it after the test."""
    runners = []

    def start_runner(backend: Backend, **options: Any) -> EngineRunner:
        runner = EngineRunner(backend, sink=log, **options)
        runners.append(runner)
        runner.start()
        return runner

    yield start_runner
    for runner in runners:
        runner.stop()

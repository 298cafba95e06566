"""What is read in an answer, piece by piece: its text, and the calls of tools in it. Data, and how it adds up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Content:
    """Text of the answer; never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStarted:
    """A call of a tool. index counts from 0, the id is its own."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsDelta:
    """More of the JSON text of that call's arguments; never empty."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnded:
    """Its arguments are a whole JSON object."""

    index: int


@dataclass(frozen=True, slots=True)
class CallBroken:
    """It was none: cut, or no JSON. Only where calls are told eagerly. Its text follows as Content."""

    index: int


Event = Content | CallStarted | ArgumentsDelta | CallEnded | CallBroken


@dataclass(frozen=True, slots=True)
class Call:
    """A whole call. arguments is the text of a JSON object."""

    id: str
    name: str
    arguments: str


def collect(events: Iterable[Event]) -> tuple[str, tuple[Call, ...]]:
    """The text and the whole calls that events add up to."""
    content: list[str] = []
    started: dict[int, CallStarted] = {}
    arguments: dict[int, list[str]] = {}
    calls: list[Call] = []
    for event in events:
        match event:
            case Content():
                content.append(event.text)
            case CallStarted():
                started[event.index], arguments[event.index] = event, []
            case ArgumentsDelta():
                arguments[event.index].append(event.text)
            case CallEnded():
                call = started[event.index]
                calls.append(Call(call.id, call.name, "".join(arguments[event.index])))
            case CallBroken():
                pass
    return "".join(content), tuple(calls)

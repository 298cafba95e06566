"""Which models are in a worker's memory, and which one goes for another: a plan over numbers, and nothing else. Pure.

model_keeper.py looks, plans and acts; here is the policy. Models are wanted in the order in which their requests came.
What is idle goes first, least recently used before others; a busy model is never unloaded: it takes no more requests
after a while, and goes once it is idle.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

MIN_PATIENCE_SECONDS = 1.0
MAX_PATIENCE_SECONDS = 30.0


class Place(StrEnum):
    """Where a model is."""

    OUT = "out"
    COMING = "coming"
    IN = "in"
    GOING = "going"
    """It takes no requests any more, and is unloaded once it is idle."""


class Want(StrEnum):
    """Why a model that is out is to come in."""

    EAGER = "eager"
    """It is loaded where there is room, and takes the place of none."""
    ORDER = "order"
    TICKET = "ticket"


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """One model as it is now. Times are seconds on one clock.

    num_bytes: what it needs at most. num_waiting: its requests that wait for a slot, here. unload_at: idle from then on
    it goes; infinite for one that stays. wanted_at: since when. patience: how long one that wants its place waits while
    it works.
    """

    id: int
    num_bytes: int
    place: Place
    is_busy: bool = False
    num_waiting: int = 0
    used_at: float = 0.0
    loaded_at: float = 0.0
    unload_at: float = math.inf
    is_pinned: bool = False
    is_dismissed: bool = False
    want: Want | None = None
    wanted_at: float = math.inf
    patience: float = MIN_PATIENCE_SECONDS

    @property
    def is_idle(self) -> bool:
        return not self.is_busy and not self.num_waiting

    @property
    def occupies(self) -> int:
        return 0 if self.place is Place.OUT else self.num_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be done now.

    unload: (model, why), all of them idle. retire: they take no requests from now on. load: the one that comes in next.
    waiting: wanted models for which there is no room yet. left_out: eager ones for which there is none.
    """

    unload: tuple[tuple[int, str], ...] = ()
    retire: tuple[int, ...] = ()
    load: int | None = None
    waiting: tuple[int, ...] = ()
    left_out: tuple[int, ...] = ()


def patience(load_seconds: float) -> float:
    """How long somebody waits for a place while another works there: what a change of places costs, twice."""
    return min(max(MIN_PATIENCE_SECONDS, 2 * load_seconds), MAX_PATIENCE_SECONDS)


def obstacle(model: Resident, models: Iterable[Resident], budget: float) -> str | None:
    """Why it can never come in as things are, for the operator; None where it can."""
    if model.num_bytes > budget:
        return f"it needs {_megabytes(model.num_bytes)}, and models may have {_megabytes(budget)} (MODEL_MEMORY_MB)"
    pinned = sum(each.occupies for each in models if each.is_pinned and each.id != model.id)
    if model.place is Place.OUT and model.num_bytes > budget - pinned:
        return (
            f"it needs {_megabytes(model.num_bytes)}, and of the {_megabytes(budget)} for models (MODEL_MEMORY_MB) "
            f"pinned ones hold {_megabytes(pinned)}"
        )
    return None


def has_room(model: Resident, models: Sequence[Resident], budget: float) -> bool:
    """Whether it could come in now, if idle models made room."""
    idle = sum(each.num_bytes for each in _victims(models) if each.is_idle)
    return model.num_bytes <= _free(models, budget) + idle


def plan(models: Sequence[Resident], budget: float, now: float) -> Plan:
    """One look at all models. Models with an obstacle are not to be wanted."""
    unload = {each.id: why for each in models if (why := _why_to_go(each, now))}
    staying = [each for each in models if each.id not in unload]
    retire = [each.id for each in models if each.place is Place.IN and each.is_dismissed and each.is_busy]
    waiting: list[int] = []
    left_out: list[int] = []
    load: int | None = None
    wanted = [each for each in models if each.place is Place.OUT and each.want]
    for model in sorted(wanted, key=lambda each: each.wanted_at):
        # What is unloaded now is free with the next look.
        if load is not None:
            waiting.append(model.id)
        elif model.num_bytes <= _free(models, budget):
            load = model.id
        elif model.want is Want.EAGER:
            left_out.append(model.id)
        else:
            waiting.append(model.id)
            if len(waiting) == 1:  # only the first has others make room
                _make_room(model, staying, budget, now, unload, retire)
    return Plan(
        unload=tuple(unload.items()), retire=tuple(retire), load=load, waiting=tuple(waiting), left_out=tuple(left_out)
    )


def _why_to_go(model: Resident, now: float) -> str | None:
    if model.place is Place.GOING and not model.is_busy:
        return "operator" if model.is_dismissed else "memory"
    if model.place is not Place.IN:
        return None
    if model.is_dismissed and not model.is_busy:
        return "operator"
    if not model.is_pinned and model.is_idle and now >= model.unload_at:
        return "idle"
    return None


def _make_room(
    model: Resident,
    staying: Sequence[Resident],
    budget: float,
    now: float,
    unload: dict[int, str],
    retire: list[int],
) -> None:
    """Idle models go if they are enough; those that work are asked to end once the patience is over."""
    going = sum(each.num_bytes for each in staying if each.place is Place.GOING)
    missing = model.num_bytes - _free(staying, budget) - going
    idle = [each for each in _victims(staying) if each.is_idle]
    working = [
        each
        for each in _victims(staying)
        if not each.is_idle and now - max(model.wanted_at, each.loaded_at) >= max(model.patience, each.patience)
    ]
    if missing <= 0 or sum(each.num_bytes for each in (*idle, *working)) < missing:
        return
    for each in (*idle, *working):
        if missing <= 0:
            return
        missing -= each.num_bytes
        if each.is_idle:
            unload[each.id] = "memory"
        else:
            retire.append(each.id)


def _victims(models: Sequence[Resident]) -> list[Resident]:
    """Who may have to go, least recently used first."""
    found = [each for each in models if each.place is Place.IN and not each.is_pinned]
    return sorted(found, key=lambda each: each.used_at)


def _free(models: Iterable[Resident], budget: float) -> float:
    return budget - sum(each.occupies for each in models)


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.0f} MB"

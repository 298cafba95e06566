"""The order of a run: write the formats, score them, measure them in turns, choose; tune the best; measure it again.

Knows no Django and no llama.cpp: steps and clock come in. A format that fails is told of and the others go on; when
time runs out, what was measured by then decides.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from inference.gguf.header import Header
from inference.gguf.parts import size_of
from inference.tuning import choice
from inference.tuning.choice import MIN_GAIN, Measured, Settings
from inference.tuning.formats import Format
from inference.tuning.steps import StepFailed, Steps

SOURCE = "source"
LEAST_WINDOWS, MOST_WINDOWS = 2, 16
"""Pieces of the passage."""
PASSAGE_SHARE = 0.3
"""Of the time, for scoring the passage with all files."""
QUANTIZE_SHARE = 0.5
"""Of the time that is left, at most, for writing one format."""
FILE_BYTES_MARGIN = 2


Watch = Callable[[str, float, int, int], None]
"""Hears how far a run is: what is done now, its part from 0.0 to 1.0, steps done, steps in all."""


class NotMeasured(Exception):
    """A run that found nothing out; the message says why and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What to look for. most_increase: of the perplexity, in percent; least_gain: of the speed, as a factor. Seconds
    are wall seconds of the whole run."""

    source: Path
    header: Header
    formats: Sequence[Format]
    settings: Settings
    usable_cpus: int
    kv_type: str
    folder: Path
    most_increase: float
    rounds: int
    seconds: float
    least_gain: float = MIN_GAIN
    tunes_settings: bool = True
    """Whether other numbers of threads and flash attention are tried."""


@dataclass(slots=True, kw_only=True)
class Found:
    """What a run measured. `format` and `path` are None where no file was faster; `gain` too if no settings are."""

    source: Measured
    candidates: list[Measured] = field(default_factory=list)
    tried: dict[Settings, Measured] = field(default_factory=dict)
    """Settings that were tried for the best file."""
    format: Format | None = None
    path: Path | None = None
    settings: Settings
    gain: float | None = None
    """Of the chosen file with the chosen settings over the source as it is served, measured last."""
    notes: list[str] = field(default_factory=list)

    @property
    def format_name(self) -> str:
        return self.format.name if self.format else SOURCE


class Search:
    def __init__(self, order: Order, steps: Steps, watch: Watch, clock: Callable[[], float] = time.monotonic) -> None:
        self.order, self.steps = order, steps
        self._watch, self._clock = watch, clock
        self._deadline = clock() + order.seconds
        self._done = 0
        self._windows = MOST_WINDOWS
        self._total = 2 + len(order.formats) * 2 + order.rounds * (len(order.formats) + 1)
        self._files: dict[str, Path] = {SOURCE: order.source}

    def run(self) -> Found:
        """Raises NotMeasured where not even the source can be measured."""
        order = self.order
        found = Found(
            source=Measured(SOURCE, size_of(order.source)),
            candidates=[Measured(each.name) for each in order.formats],
            settings=order.settings,
        )
        self._load(found.source)
        self._score(found.source)
        if found.source.problem:
            raise NotMeasured(f"The model itself could not be measured: {found.source.problem}.")
        for each, candidate in zip(order.formats, found.candidates, strict=True):
            self._write(each, candidate)
        for candidate in found.candidates:
            self._score(candidate)
        self._measure({each.name: each for each in [found.source, *found.candidates]}, self._at_settings_of_now)
        if not found.source.speeds:
            raise NotMeasured(f"The model's speed was not measured: {found.source.problem or self._too_late()}.")
        self._choose(found)
        if order.tunes_settings:
            self._tune(found)
        self._confirm(found)
        return found

    # Steps

    def _left(self) -> float:
        return self._deadline - self._clock()

    def _too_late(self) -> str:
        return "the time ran out: allow more with --max-minutes, or name fewer --formats"

    def _step(self, what: str, candidate: Measured, work: Callable[[Callable[[float], None]], None]) -> None:
        """Do one step of a candidate; what goes wrong is the candidate's problem."""
        self._watch(what, 0.0, self._done, self._total)
        try:
            if self._left() <= 0:
                raise StepFailed(self._too_late())
            work(lambda part: self._watch(what, part, self._done, self._total))
        except StepFailed as error:
            candidate.problem = str(error)
        finally:
            self._done += 1

    def _write(self, into: Format, candidate: Measured) -> None:
        target = self.order.folder / f"{into.name}.gguf"
        most = FILE_BYTES_MARGIN * into.most_bytes(self.order.header)

        def work(tell: Callable[[float], None]) -> None:
            self.steps.quantize(self.order.source, target, into, most, QUANTIZE_SHARE * self._left(), tell)
            candidate.size_bytes = target.stat().st_size
            self._files[into.name] = target

        self._step(f"writing {into.name}", candidate, work)
        if candidate.problem:
            target.unlink(missing_ok=True)

    def _score(self, candidate: Measured) -> None:
        """All on as much of the passage as the source leaves time for."""
        if candidate.problem:
            self._done += 1
            return

        def work(tell: Callable[[float], None]) -> None:
            candidate.losses = self.steps.losses(self._files[candidate.name], self._windows, self._left(), tell)

        self._step(f"perplexity of {candidate.name}", candidate, work)

    def _load(self, source: Measured) -> None:
        """See that the source loads, and how long one window of the passage takes."""
        begun = self._clock()

        def work(tell: Callable[[float], None]) -> None:
            self.steps.losses(self.order.source, 1, self._left(), tell)

        self._step("loading the source", source, work)
        each = max(1e-3, self._clock() - begun)
        files = 1 + len(self.order.formats)
        self._windows = max(LEAST_WINDOWS, min(MOST_WINDOWS, int(PASSAGE_SHARE * self.order.seconds / (files * each))))

    def _at_settings_of_now(self, name: str) -> tuple[Path, Settings]:
        return self._files[name], self.order.settings

    def _measure(
        self, arms: Mapping[str, Measured], what: Callable[[str], tuple[Path, Settings]], of: str = ""
    ) -> None:
        """Rounds over all arms, each beginning with another, so that a machine that drifts favours none."""
        names = [name for name, each in arms.items() if not each.problem]
        for number in range(self.order.rounds):
            for place in range(len(names)):
                name = names[(number + place) % len(names)]
                self._measure_one(name, arms[name], number, what, of)
        for each in arms.values():
            if each.speeds and each.problem == self._too_late():
                each.problem = ""  # the rounds that it has count

    def _measure_one(
        self, name: str, arm: Measured, number: int, what: Callable[[str], tuple[Path, Settings]], of: str
    ) -> None:
        if arm.problem:
            self._done += 1
            return
        path, settings = what(name)

        def work(tell: Callable[[float], None]) -> None:
            arm.speeds[number] = self.steps.speed(path, settings, self._left(), tell)

        self._step(f"round {number + 1} of {self.order.rounds}: speed of {of}{name}", arm, work)

    # Decisions

    def _choose(self, found: Found) -> None:
        bounds = self.order.most_increase, self.order.least_gain
        best = choice.winner(found.candidates, found.source, *bounds)
        if best is not None:
            found.format = next(each for each in self.order.formats if each.name == best.name)
            found.path = self._files[best.name]
        for candidate in found.candidates:
            candidate.problem = choice.objection(candidate, found.source, *bounds)

    def _tune(self, found: Found) -> None:
        """One knob after the other, each against the best so far."""
        self._try(found, choice.thread_choices(found.settings, self.order.usable_cpus))
        self._try(found, choice.flash_choices(found.settings, self.order.kv_type))

    def _try(self, found: Found, offered: Sequence[Settings]) -> None:
        if not offered or self._left() <= 0:
            return
        path = found.path or self.order.source
        known = {str(each): each for each in (found.settings, *offered)}
        arms = {name: Measured(name) for name in known}
        self._total += self.order.rounds * len(arms)
        self._measure(arms, lambda name: (path, known[name]), f"{found.format_name}, ")
        measured = {known[name]: arm for name, arm in arms.items()}
        found.tried |= measured
        found.settings = choice.better(measured, found.settings)

    def _confirm(self, found: Found) -> None:
        """The choice against the source as it is served: what only looked faster is not kept."""
        if found.path is None and found.settings == self.order.settings:
            return
        path, settings = found.path or self.order.source, found.settings
        ways = {"the choice": (path, settings), "the source": (self.order.source, self.order.settings)}
        arms = {name: Measured(name) for name in ways}
        self._total += self.order.rounds * len(arms)
        self._measure(arms, ways.__getitem__)
        found.gain = choice.gain(arms["the choice"], arms["the source"])
        if found.gain is None or found.gain < self.order.least_gain:
            found.notes.append(
                "What was chosen could not be measured once more: nothing is kept; allow more with --max-minutes."
                if found.gain is None
                else f"Measured again, the choice was {found.gain:.2f} times as fast as the source: nothing is kept."
            )
            found.format = found.path = None
            found.settings = self.order.settings

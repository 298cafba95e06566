"""From a Study to what is shown of it: figures of each arm, ratios round by round, and targets. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from inference.bench.digest import Target
from inference.bench.figures import Spread, percentile, ratio
from inference.bench.servers.study import NOT_AVAILABLE, Cell, Study
from inference.bench.servers.workloads import ALIKE, AS_IT_COMES, PEER, PYTHON, Q4_0, Q8_0, SIDE, Workload

LOOKUP = f", {ALIKE}"
AS_COMES = f", {AS_IT_COMES}"
NOT_MEASURED = "not measured"

PAIRS = (
    (SIDE, PEER),
    (SIDE, PYTHON),
    (SIDE + LOOKUP, PEER + LOOKUP),
    (SIDE + LOOKUP, PEER + AS_COMES),
    (SIDE + LOOKUP, SIDE),
    (PEER + LOOKUP, PEER),
)
"""Arms that are compared where a workload has both."""

Figure = Callable[[Cell], float]


def tokens_a_second(cell: Cell) -> float:
    return cell.tokens_a_second


def decoded_a_second(cell: Cell) -> float:
    return cell.decoded_a_second


def longest_wait(cell: Cell) -> float:
    return max(cell.waits)


def median_wait(cell: Cell) -> float:
    return percentile(cell.waits, 0.5)


def late_wait(cell: Cell) -> float:
    return percentile(cell.waits, 0.95)


def long_wait(cell: Cell) -> float:
    return max(cell.long_waits)


def longest_gap(cell: Cell) -> float:
    return max(cell.gaps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """A ratio that is promised: `ours` by `theirs` of one workload."""

    workload: str
    text: str
    figure: Figure
    bound: float
    at_least: bool = True
    stretch: float | None = None
    ours: str = SIDE
    theirs: str = PEER

    def holds(self, measured: float, bound: float) -> bool:
        return measured >= bound if self.at_least else measured <= bound


SPEED = "tokens a second by llama-server's"
WAIT = "longest wait for a first token by llama-server's"
PROMISES: tuple[Promise, ...] = (
    Promise(workload="one", text=f"1 stream: {SPEED}", figure=tokens_a_second, bound=1.0),
    Promise(workload="eight", text=f"8 streams: {SPEED}", figure=tokens_a_second, bound=1.0, stretch=1.05),
    Promise(workload="shared", text=f"one system prompt: {SPEED}", figure=tokens_a_second, bound=2.5),
    Promise(workload="shared", text=f"one system prompt: {WAIT}", figure=longest_wait, bound=0.25, at_least=False),
    Promise(workload="adapters", text=f"3 adapter vectors: {SPEED}", figure=tokens_a_second, bound=1.3),
    Promise(workload="adapters", text=f"3 adapter vectors: {WAIT}", figure=longest_wait, bound=0.3, at_least=False),
    Promise(
        workload="long",
        text="a long prompt arrives: longest gap of the running streams by llama-server's",
        figure=longest_gap,
        bound=0.5,
        at_least=False,
    ),
    *(
        Promise(
            workload=f"{kind}-{variant}",
            text=f"{variant.upper()}, {words}: tokens a second of a stream, prompt lookup on by off",
            figure=decoded_a_second,
            bound=bound,
            ours=SIDE + LOOKUP,
            theirs=SIDE,
        )
        for variant in (Q8_0, Q4_0)
        for kind, words, bound in (("copied", "text repeats", 1.3), ("fresh", "nothing repeats", 0.98))
    ),
    *(
        Promise(
            workload=f"{kind}-{variant}",
            text=f"{variant.upper()}, {words}, prompt lookup on: tokens a second of a stream by llama-server's",
            figure=decoded_a_second,
            bound=1.0,
            ours=SIDE + LOOKUP,
            theirs=PEER + LOOKUP,
        )
        for variant in (Q8_0, Q4_0)
        for kind, words in (("copied", "text repeats"), ("fresh", "nothing repeats"))
    ),
    Promise(workload="chats", text=f"chats of 4 turns: {SPEED}", figure=tokens_a_second, bound=1.2),
    Promise(
        workload="optimized",
        text=f"Q4_0 beside the shipped file, 8 streams: {SPEED}",
        figure=tokens_a_second,
        bound=1.5,
        stretch=1.8,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One arm of one workload over the rounds. Waits and the gap in milliseconds."""

    title: str
    arm: str
    speed: Spread | None
    stream_speed: Spread | None
    wait_p50: Spread | None
    wait_p95: Spread | None
    wait_max: Spread | None
    gap_max: Spread | None
    cached_share: float | None
    """Of the prompts' tokens, those that were not computed again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """llmsite's figures by a peer's, round by round; below 1 is better for waits and gaps."""

    title: str
    workload: str
    ours: str
    theirs: str
    speed: Spread | None
    wait_p50: Spread | None
    wait_max: Spread | None
    gap_max: Spread | None
    same_texts: str


def compare(study: Study, workload: str, ours: str, theirs: str, figure: Figure) -> Spread | None:
    return ratio(
        [figure(cell) for cell in study.of(workload, ours)], [figure(cell) for cell in study.of(workload, theirs)]
    )


def targets(study: Study) -> list[Target]:
    """Those of the workloads that were asked for."""
    names = {workload.name for workload in study.workloads}
    return [_target(study, promise) for promise in PROMISES if promise.workload in names]


def _target(study: Study, promise: Promise) -> Target:
    sign = "at least" if promise.at_least else "at most"
    stretch = f" (stretch {promise.stretch:g})" if promise.stretch else ""
    text = f"{promise.text}: {sign} {promise.bound:g}{stretch}"
    if LOOKUP in promise.ours and not study.of(promise.workload, promise.ours):
        return Target(text=text, measured=NOT_AVAILABLE, met=None)
    found = compare(study, promise.workload, promise.ours, promise.theirs, promise.figure)
    if found is None:
        return Target(text=text, measured=NOT_MEASURED, met=None)
    return Target(
        text=text,
        measured=found.show(2),
        met=promise.holds(found.median, promise.bound),
        stretch_met=promise.holds(found.median, promise.stretch) if promise.stretch else None,
    )


def rows(study: Study) -> list[Row]:
    found = []
    for workload in study.workloads:
        for arm in workload.arms:
            if cells := study.of(workload.name, arm.name):
                found.append(_row(workload.title, arm.name, cells, lambda cell: cell.waits))
                if cells[0].long_waits:
                    found.append(
                        _row(workload.title, f"{arm.name}: the long prompt", cells, lambda cell: cell.long_waits)
                    )
    return found


def _row(title: str, arm: str, cells: Sequence[Cell], waits: Callable[[Cell], list[float]]) -> Row:
    def over(figure: Figure) -> Spread | None:
        return Spread.of([figure(cell) for cell in cells])

    is_long = waits(cells[0]) is cells[0].long_waits
    return Row(
        title=title,
        arm=arm,
        speed=None if is_long else over(tokens_a_second),
        stream_speed=None if is_long else over(decoded_a_second),
        wait_p50=over(lambda cell: percentile(waits(cell), 0.5) * 1000),
        wait_p95=over(lambda cell: percentile(waits(cell), 0.95) * 1000),
        wait_max=over(lambda cell: max(waits(cell)) * 1000),
        gap_max=None if is_long else over(lambda cell: longest_gap(cell) * 1000),
        cached_share=_cached_share(cells),
    )


def _cached_share(cells: Sequence[Cell]) -> float | None:
    prompts = sum(sum(cell.prompt_tokens) for cell in cells)
    return sum(sum(cell.cached_tokens) for cell in cells) / prompts if prompts else None


def ratios(study: Study) -> list[Ratio]:
    return [
        _ratio(study, workload, ours, theirs)
        for workload in study.workloads
        for ours, theirs in _pairs(workload)
        if study.of(workload.name, ours) and study.of(workload.name, theirs)
    ]


def _pairs(workload: Workload) -> list[tuple[str, str]]:
    names = {arm.name for arm in workload.arms}
    return [pair for pair in PAIRS if names.issuperset(pair)]


def _ratio(study: Study, workload: Workload, ours: str, theirs: str) -> Ratio:
    def by(figure: Figure) -> Spread | None:
        return compare(study, workload.name, ours, theirs, figure)

    return Ratio(
        title=workload.title,
        workload=workload.name,
        ours=ours,
        theirs=theirs,
        speed=by(decoded_a_second if workload.letter == "f" else tokens_a_second),
        wait_p50=by(median_wait),
        wait_max=by(longest_wait),
        gap_max=by(longest_gap),
        same_texts=_same_texts(study.of(workload.name, ours), study.of(workload.name, theirs)),
    )


def _same_texts(ours: Sequence[Cell], theirs: Sequence[Cell]) -> str:
    pairs = [pair for a, b in zip(ours, theirs, strict=True) for pair in zip(a.digests, b.digests, strict=True)]
    return f"{sum(a == b for a, b in pairs)} of {len(pairs)}"

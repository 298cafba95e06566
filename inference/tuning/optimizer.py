"""Brings a search from its row to its table: a thread of each web process, or a command that waits for one.

The work itself is done by children (steps.py); this thread waits, writes down how far they are, and hears within a
second that the search was cancelled or that the process is to end. Whatever ends it, the row says so, and what was
written is gone but for the file that is kept.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from django.utils import timezone

from accounts.trail import audit_log
from inference.catalog import variants
from inference.catalog.model_memory import KV_BYTES
from inference.gguf.header import Header
from inference.imports.rounds import Rounds, Stopped
from inference.models import ModelVariant, ServedModel
from inference.tuning import choice, desk, formats, machine, report
from inference.tuning.choice import Settings
from inference.tuning.models import Optimization
from inference.tuning.search import Found, NotMeasured, Order, Search, Watch
from inference.tuning.steps import NativeSteps, Steps
from inference.tuning.workshop import WorkshopError, keep, workshop
from inference.vetting.inspection import RegistrationError, check_header, is_unchanged

NOTE_SECONDS = 1.0
"""How often progress is written down while a step goes on."""
KEEPING = "keeping the choice"


def work(row: Optimization, stop: threading.Event, watch: Watch | None = None) -> None:
    """Bring one search to its end, and `row` with it. One whose folder is still in use waits, unless a command sees to
    it. Raises Stopped, KeyboardInterrupt or what nobody foresaw; the row has ended then, too."""
    who = audit_log.Actor(row.asked_by_kind, row.asked_by)
    with audit_log.acting(lambda: who), _ending(row):
        base = row.base_model
        if base is None:
            raise RegistrationError("model_not_found", "The model was removed meanwhile.")
        header = check_header(Path(base.path))
        if not is_unchanged(Path(base.path), base.digest, base.metadata):
            raise RegistrationError(
                "file_changed", f"{base.path} is not the file that was registered: register_model reads it again."
            )
        notes = machine.busyness(machine.describe())
        chosen = formats.named(row.formats) if row.formats else formats.defaults(header)
        with workshop(Path(row.folder), formats.total_bytes(chosen, header)) as own, _ending(row):
            desk.begin(row)
            tell = Progress(row, stop, watch)
            order = _order(row, base, header, chosen, own)
            found = Search(order, steps_for(base, header, row.seconds), tell).run()
            _keep(row, base, order, found, notes, tell)


@contextmanager
def _ending(row: Optimization) -> Iterator[None]:
    """What goes wrong in the block ends the search, while its folder is still locked if the block is within that."""
    try:
        yield
    except desk.Over:
        row.state = Optimization.State.CANCELLED  # as far as is known here
    except WorkshopError as error:
        if error.code != "already_running" or row.is_attended:  # else one that was cancelled is just leaving
            desk.fail(row, error.code, error.message)
    except RegistrationError as error:
        desk.fail(row, error.code, error.message)
    except NotMeasured as error:
        desk.fail(row, "not_measured", str(error))
    except OSError as error:
        desk.fail(row, "state_unwritable", f"The files cannot be written or read: {error}.")
    except BaseException:
        desk.fail(row, "interrupted", "It was interrupted before it was done: nothing is kept. Start anew.")
        raise


class Progress:
    """What a search says of itself, written down when a step begins and once a second."""

    def __init__(self, row: Optimization, stop: threading.Event, watch: Watch | None) -> None:
        self._row, self._stop, self._watch = row, stop, watch
        self._noted_at = 0.0
        self._done = self._total = 0

    def __call__(self, what: str, part: float, done: int, total: int) -> None:
        """Raises desk.Over or Stopped."""
        if self._stop.is_set():
            raise Stopped
        self._done, self._total = done, total
        if self._watch is not None:
            self._watch(what, part, done, total)
        now = time.monotonic()
        if what != self._row.step or now - self._noted_at >= NOTE_SECONDS:
            self._noted_at = now
            desk.note(self._row, step=what[:200], part=part, steps_done=min(done, total), steps_total=total)

    def of_bytes(self, done: int, total: int) -> None:
        """While the file that was chosen is read once more."""
        self(KEEPING, done / max(1, total), self._total, self._total)


def _order(
    row: Optimization, base: ServedModel, header: Header, chosen: tuple[formats.Format, ...], own: Path
) -> Order:
    cpus = choice.usable_cpus()
    return Order(
        source=Path(base.path),
        header=header,
        formats=chosen,
        settings=Settings(base.n_threads or cpus),
        usable_cpus=cpus,
        kv_type=base.kv_type,
        folder=own,
        most_increase=row.max_perplexity_increase,
        least_gain=1 + row.min_gain / 100,
        rounds=row.rounds,
        seconds=60 * row.max_minutes,
        tunes_settings=row.tunes_settings,
    )


def steps_for(base: ServedModel, header: Header, seconds: float) -> Steps:
    """seconds: of each speed that is measured, at least."""
    elements = header.kv_elements_per_token() or 0
    return NativeSteps(
        n_threads=choice.usable_cpus(),
        n_gpu_layers=base.n_gpu_layers,
        kv_type=base.kv_type,
        kv_bytes=int(elements * choice.SPEED_CONTEXT * choice.NUM_SEQUENCES * KV_BYTES[base.kv_type]),
        measured_seconds=seconds,
    )


def _keep(row: Optimization, base: ServedModel, order: Order, found: Found, notes: list[str], tell: Progress) -> None:
    """The best as a file in its place and a variant, in the transaction that ends the search. What cannot be registered
    is not left; where nothing is better the table alone is kept. Raises RegistrationError, desk.Over or Stopped."""

    def finish(variant: ModelVariant | None) -> None:
        desk.finish(row, report.as_json(base.name, order, found, variant, [*notes, *found.notes]))

    if found.gain is None or found.notes:
        finish(None)
        return
    path, is_new = order.source, False
    try:
        if found.path is not None:
            path, is_new = keep(found.path, Path(row.folder), base.name, tell.of_bytes)
        variants.register(
            base,
            found.format.name.lower() if found.format else "tuned",
            path,
            n_threads=found.settings.n_threads if found.settings.n_threads != base.n_threads else None,
            flash_attention=found.settings.flash_attention,
            measured=report.measured_json(found),
            progress=tell.of_bytes,
            then=finish,
        )
    except BaseException:
        if is_new:
            path.unlink(missing_ok=True)
        raise


# The thread of the web


class Optimizer(Rounds):
    """Looks for a search that is asked for and does it, one at a time."""

    def __init__(self) -> None:
        super().__init__({"optimizations": self.measure_due})

    def measure_due(self) -> None:
        """One round."""
        desk.end_the_dead(timezone.now())
        if (row := desk.due()) is not None:
            work(row, self.stopping)


_optimizer: Optimizer | None = None


def start() -> None:
    """The optimizer of this process; the web calls it when it starts. Idempotent."""
    global _optimizer
    if _optimizer is None:
        _optimizer = Optimizer()
        _optimizer.start()


def stop() -> None:
    global _optimizer
    optimizer, _optimizer = _optimizer, None
    if optimizer is not None:
        optimizer.stop()


def wake() -> None:
    """Look now, where this process has an optimizer."""
    if _optimizer is not None:
        _optimizer.wake()

"""Fetches and checks imports: two daemon threads of each web process, or a command that waits for one.

What it knows is in the row and on the disk, and an import is held by a lock that ends with its process: a web that is
started again goes on where the last one was, and so does any other web that shares the folder.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial

from django.utils import timezone

from inference.imports import checking, desk, quarantine
from inference.imports.fetching import Wanted, bytes_at, fetch, persistently, probe
from inference.imports.models import ModelImport
from inference.imports.rounds import Rounds, Stopped
from inference.vetting.inspection import RegistrationError
from inference.vetting.trial import Trial

logger = logging.getLogger(__name__)

SWEEP_SECONDS = 60.0
TRANSFERS, CHECKS = "import-transfers", "import-checks"
"""The threads' names."""
NOTE_SECONDS = 1.0
"""How often progress is written down."""
LOOK_AT_DISK_BYTES = 64 << 20

Watch = Callable[[ModelImport], None]
"""Called as often as progress is written down, for whoever shows it."""


class Progress:
    """What a transfer or a check says of itself, written down once a second with its rate."""

    def __init__(self, row: ModelImport, field: str, stop: threading.Event, watch: Watch | None) -> None:
        self._row, self._field, self._stop, self._watch = row, field, stop, watch
        self._noted_at = time.monotonic()
        self._noted = getattr(row, field)
        self._rate = 0.0

    def __call__(self, done: int) -> None:
        """Raises desk.Over or Stopped."""
        if self._stop.is_set():
            raise Stopped
        now = time.monotonic()
        if (seconds := now - self._noted_at) < NOTE_SECONDS:
            return
        rate = max(0, done - self._noted) / seconds
        self._rate = rate if not self._rate else 0.7 * self._rate + 0.3 * rate
        self._noted_at, self._noted = now, done
        desk.note(self._row, **{self._field: done}, bytes_per_second=self._rate)
        if self._watch is not None:
            self._watch(self._row)


def work(row: ModelImport, stop: threading.Event, *, watch: Watch | None = None, trial: Trial | None = None) -> None:
    """Bring one import to its end; whoever calls it holds it. Raises Stopped or DatabaseError: it goes on later."""
    if desk.is_to_be_fetched(row):
        fetch_files(row, stop, watch)
    if row.is_open:
        check_files(row, stop, watch, trial)


def fetch_files(row: ModelImport, stop: threading.Event, watch: Watch | None = None) -> None:
    """All files of an import, onto the disk; it is queued then, or refused."""
    with _ending(row):
        Transfer(row, stop, watch).run()


def check_files(
    row: ModelImport, stop: threading.Event, watch: Watch | None = None, trial: Trial | None = None
) -> None:
    """The gates; the import is ready then, or refused."""
    with _ending(row):
        checking.check(row, Progress(row, "checked_bytes", stop, watch), trial)


@contextlib.contextmanager
def _ending(row: ModelImport) -> Iterator[None]:
    """What goes wrong in the block ends the import."""
    try:
        yield
    except desk.Over:
        row.state = ModelImport.State.CANCELLED  # as far as is known here
        quarantine.remove(row.pk)
    except RegistrationError as error:
        _refuse(row, error)
    except OSError as error:  # the disk, since the network's have become reasons
        logger.exception("the import %s met an error of the disk", row.pk)
        _refuse(row, RegistrationError("state_unwritable", f"The files cannot be written or read: {error}."))


def _refuse(row: ModelImport, error: RegistrationError) -> None:
    try:
        desk.refuse(row, error)
    except desk.Over:
        quarantine.remove(row.pk)


class Transfer:
    """All files of one import by their addresses: sizes first, then room, then bytes."""

    def __init__(self, row: ModelImport, stop: threading.Event, watch: Watch | None) -> None:
        self._row, self._stop = row, stop
        self._policy, self._place = desk.policy(), quarantine.make_folder(row.pk)
        self._wanted = [Wanted(**each) for each in row.files]
        self._tell, self._room = Progress(row, "received_bytes", stop, watch), Room()

    def run(self) -> None:
        """Raises RegistrationError, desk.Over, Stopped or OSError."""
        for wanted in self._wanted:
            if wanted.size is None:
                self._persistently(partial(probe, wanted, self._policy))
                desk.note(self._row, files=[asdict(each) for each in self._wanted])
        self._look_for_room()
        done = 0
        for wanted in self._wanted:
            target = self._place / wanted.name
            self._persistently(partial(fetch, wanted, target, self._policy, partial(self._tick, done)))
            done += bytes_at(target)
        desk.note(self._row, state=ModelImport.State.QUEUED, received_bytes=done, total_bytes=done)

    def _look_for_room(self) -> None:
        sizes, have = [each.size for each in self._wanted], quarantine.received(self._row.pk)
        total = None if None in sizes else sum(size for size in sizes if size is not None)
        quarantine.check_size(total or 0)
        quarantine.check_room((total or 0) - have, desk.promised(but=self._row.pk))
        desk.note(self._row, total_bytes=total, received_bytes=have)

    def _tick(self, before: int, done: int) -> None:
        self._room.see(before + done)
        self._tell(before + done)

    def _persistently(self, step: Callable[[], None]) -> None:
        persistently(step, partial(quarantine.received, self._row.pk), self._pause)

    def _pause(self, seconds: float) -> None:
        desk.note(self._row)
        if self._stop.wait(seconds):
            raise Stopped


class Room:
    """Looks at the bounds now and then while bytes come: a server may send more than it said, others write, too."""

    def __init__(self) -> None:
        self._looked_at = 0

    def see(self, have: int) -> None:
        """Raises RegistrationError."""
        quarantine.check_size(have)
        if have - self._looked_at > LOOK_AT_DISK_BYTES:
            self._looked_at = have
            quarantine.check_disk(0)


class Importer(Rounds):
    """Looks for what is due until it is stopped. Transfers have a thread of their own: they may take hours, and checks
    of other files do not wait for them."""

    def __init__(self, *, trial: Trial | None = None) -> None:
        super().__init__({TRANSFERS: self.fetch_due, CHECKS: self.check_due})
        self._trial = trial
        self._swept_at = time.monotonic()

    def fetch_due(self) -> None:
        """One round of transfers."""
        for row in desk.due().filter(desk.TO_BE_FETCHED):
            with quarantine.held(row.pk) as is_ours:
                if is_ours and self._is_still(row, fetched=False):
                    fetch_files(row, self.stopping)
            self.wake(CHECKS)

    def check_due(self) -> None:
        """One round of checks; once a minute what is left over is swept."""
        for row in desk.due().exclude(desk.TO_BE_FETCHED):
            with quarantine.held(row.pk) as is_ours:
                if is_ours and self._is_still(row, fetched=True):
                    check_files(row, self.stopping, trial=self._trial)
        if time.monotonic() - self._swept_at > SWEEP_SECONDS:
            self._swept_at = time.monotonic()
            if number := desk.sweep(timezone.now()):
                logger.info("imports: %d swept", number)

    def _is_still(self, row: ModelImport, *, fetched: bool) -> bool:
        """Whoever had it a moment ago may have brought it further. To be checked, its bytes must be on this machine."""
        row.refresh_from_db()
        if not row.is_open or desk.is_to_be_fetched(row) is fetched:
            return False
        return not fetched or quarantine.received(row.pk) > 0


_importer: Importer | None = None


def start() -> None:
    """The importer of this process; the web calls it when it starts. Idempotent."""
    global _importer
    if _importer is None:
        _importer = Importer()
        _importer.start()


def stop() -> None:
    global _importer
    importer, _importer = _importer, None
    if importer is not None:
        importer.stop()


def wake() -> None:
    """Look now, where this process has an importer."""
    if _importer is not None:
        _importer.wake()

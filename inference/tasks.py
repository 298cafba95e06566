"""The Celery tasks: thin doors into the worker and the sweep. Task threads only wait and move events.

Imported by worker and beat, never by the web, which sends them by name (doorbell.py).
"""

from __future__ import annotations

import logging

from celery import shared_task

from inference.transport import broker_guard
from inference.transport.doorbell import SERVE
from inference.transport.queue import ticket_queue
from inference.upkeep import reaper
from inference.worker import worker
from llmsite.celery import app

logger = logging.getLogger(__name__)

SWEEP = "inference.sweep"

app.steps["worker"].add(worker.HostStep)
broker_guard.install(app)


@shared_task(name=SERVE, ignore_result=True)
def serve(pool: str) -> None:
    """A doorbell: serve tickets until none is left that has a free slot."""
    host = worker.current_host()
    if host is None or host.pool != pool:
        logger.warning("a doorbell for another pool was dropped")
        return
    host.serve()


_sweeper: reaper.Reaper | None = None


@shared_task(name=SWEEP, ignore_result=True)
def sweep() -> None:
    """What the web's reaper does, for installations whose web is away. Safe to run anywhere, any number of times."""
    global _sweeper
    if _sweeper is None:
        _sweeper = reaper.Reaper(ticket_queue())
    _sweeper.sweep()

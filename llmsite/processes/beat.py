"""Celery's beat without Django: it knows the broker and a table of jobs, so it stays small.

Two of them are harmless: every job is idempotent. `python -m llmsite.processes.beat`.
"""

from __future__ import annotations

import contextlib
import logging
import logging.config
import os
import signal
import sys
import threading
from typing import Any

from llmsite.config import Config, ConfigError, get_config
from llmsite.logs import logging_config

HOUSEKEEPING_QUEUE = "housekeeping"
"""Consumed by every worker beside its pool's queue."""
MOST_WAITING = 3
SWEEP_SECONDS = 5
SCHEDULE: dict[str, dict[str, Any]] = {
    "sweep": {
        "task": "inference.sweep",
        "schedule": SWEEP_SECONDS,
        # a job that nobody took before the next one is due is not worth keeping
        "options": {"queue": HOUSEKEEPING_QUEUE, "expires": SWEEP_SECONDS},
    },
}

log = logging.getLogger("llmsite.beat")


def make_scheduler() -> type[Any]:
    """A scheduler that holds its peace while nobody takes the jobs: Redis must not fill up where no worker lives."""
    from celery.beat import PersistentScheduler

    class PatientScheduler(PersistentScheduler):
        def apply_async(self, entry: Any, producer: Any = None, advance: bool = True, **kwargs: Any) -> Any:
            waiting = producer.channel.queue_declare(HOUSEKEEPING_QUEUE).message_count if producer else 0
            if waiting < MOST_WAITING:
                return super().apply_async(entry, producer=producer, advance=advance, **kwargs)
            if advance:
                self.reserve(entry)
            return None

    return PatientScheduler


def make_app(config: Config) -> Any:
    """A Celery application that can ring and nothing else: no tasks, no settings module."""
    os.environ.pop("DJANGO_SETTINGS_MODULE", None)  # Celery would load all of Django
    from celery import Celery

    app = Celery("llmsite-beat", set_as_current=True)
    app.conf.update(
        broker_url=config.broker_url,
        broker_transport_options=config.broker_options,
        broker_connection_retry_on_startup=True,
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        timezone="UTC",
        beat_schedule=SCHEDULE,
        beat_max_loop_interval=SWEEP_SECONDS,
        worker_hijack_root_logger=False,
    )
    return app


def main() -> int:
    try:
        config = get_config()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 78
    logging.config.dictConfig(logging_config(config.log_level, config.log_format))
    from celery import beat

    folder = config.state / "beat"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    service = beat.Service(
        make_app(config),
        max_interval=SWEEP_SECONDS,
        schedule_filename=str(folder / "schedule"),
        scheduler_cls=make_scheduler(),
    )

    def stop(number: int, frame: object) -> None:
        # not from the handler itself: it may interrupt the thread that holds the lock of the event
        threading.Thread(target=service.stop, kwargs={"wait": False}, daemon=True).start()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    with contextlib.suppress(KeyboardInterrupt):
        service.start()
    return 0


if __name__ == "__main__":
    sys.exit(main())

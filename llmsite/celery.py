"""The Celery application: the doorbell between web and worker, and the few jobs that beat rings.

Messages carry no content, only which pool or job is due; tickets wait in Redis (inference/transport/queue.py).
"""

from __future__ import annotations

import os
from typing import Any

from celery import Celery

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "llmsite.settings")

PRODUCER_TIMEOUT_SECONDS = 2.0


class Application(Celery):
    """Who rings waits no longer for a broker that hangs; consumers wait for messages, and keep their own time limit."""

    def connection_for_write(self, url: str | None = None, **options: Any) -> Any:
        timeout = {"socket_timeout": PRODUCER_TIMEOUT_SECONDS, **(options.pop("transport_options", None) or {})}
        return super().connection_for_write(url, transport_options=timeout, **options)


app = Application("llmsite")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks(["inference"])

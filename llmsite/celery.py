"""The Celery application: the doorbell between web and worker, and the few jobs that beat rings.

Messages carry no content, only which pool or job is due; tickets wait in Redis (inference/queue.py).
"""

from __future__ import annotations

import os

from celery import Celery

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "llmsite.settings")

app = Celery("llmsite")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks(["inference"])

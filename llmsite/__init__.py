"""Wiring: configuration, URL table, ASGI and Celery entry points, and the processes that `manage.py up` runs."""

"""The row of a model or adapter on its way in; part of inference/models.py, which Django reads. desk.py writes it.

Its bytes are in quarantine (quarantine.py) until they have passed every check; the row stays as the record.
"""

from __future__ import annotations

from django.db import models
from django.db.models import Q
from django.utils import timezone


class ModelImport(models.Model):
    """One file, or all parts of one model. `files` is what of it comes from where (fetching.py's Wanted)."""

    class Kind(models.TextChoices):
        MODEL = "model", "Model"
        ADAPTER = "adapter", "Adapter"

    class State(models.TextChoices):
        RECEIVING = "receiving", "Receiving"
        QUEUED = "queued", "Waiting for its checks"
        READING = "reading", "Reading its header"
        HASHING = "hashing", "Hashing"
        LOADING = "loading", "Loading on trial"
        READY = "ready", "Ready"
        REFUSED = "refused", "Refused"
        CANCELLED = "cancelled", "Cancelled"

    kind = models.CharField(max_length=8, choices=Kind.choices, default=Kind.MODEL)
    name = models.CharField(max_length=100, help_text="What requests will call it.")
    base_model = models.ForeignKey(
        "inference.ServedModel", on_delete=models.SET_NULL, null=True, blank=True, related_name="+"
    )
    url = models.CharField(max_length=2000, blank=True, help_text="Empty: it is uploaded.")
    sha256 = models.CharField(max_length=64, blank=True, help_text="What its SHA-256 must be.")
    visibility = models.CharField(max_length=8, blank=True)
    replaces = models.BooleanField(default=False, help_text="Whether it may take the place of one with its name.")
    is_default = models.BooleanField(default=False)
    state = models.CharField(max_length=9, choices=State.choices, default=State.RECEIVING)
    problem_code = models.CharField(max_length=64, blank=True)
    problem = models.TextField(blank=True, help_text="Why it was refused.")
    files = models.JSONField(default=list)
    total_bytes = models.BigIntegerField(null=True, help_text="None until it is known.")
    received_bytes = models.BigIntegerField(default=0)
    checked_bytes = models.BigIntegerField(default=0, help_text="Of them hashed.")
    bytes_per_second = models.FloatField(default=0.0, help_text="Of what comes, over the last seconds.")
    digest = models.CharField(max_length=64, blank=True, help_text="SHA-256, once it is ready.")
    asked_by_kind = models.CharField(max_length=16)
    asked_by = models.CharField(max_length=150)
    is_attended = models.BooleanField(default=False, help_text="A command sees to it, and the web does not.")
    num_checks = models.PositiveSmallIntegerField(default=0, help_text="How often its checks were begun.")
    created_at = models.DateTimeField(default=timezone.now)
    updated_at = models.DateTimeField(default=timezone.now, help_text="When somebody last did something for it.")

    OPEN = (State.RECEIVING, State.QUEUED, State.READING, State.HASHING, State.LOADING)

    class Meta:
        verbose_name = "import"
        ordering = ["-id"]
        indexes = [
            models.Index(
                fields=["id"],
                condition=Q(state__in=["receiving", "queued", "reading", "hashing", "loading"]),
                name="model_import_open",
            )
        ]

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"

    @property
    def is_open(self) -> bool:
        return self.state in self.OPEN

    @property
    def is_upload(self) -> bool:
        return not self.url

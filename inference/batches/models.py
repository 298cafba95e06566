"""The rows of stored files, batches and their lines; part of inference/models.py, which Django reads.

files.py writes StoredFile, book.py the others. A line's answer lives in its row until the batch ends, then in a file.
"""

from __future__ import annotations

from django.db import models
from django.db.models import F, Q
from django.utils import timezone

from accounts.models import APIKey, Tenant

MAX_CUSTOM_ID = 512


class StoredFile(models.Model):
    """A file that a tenant uploaded, or that a batch wrote for it. Its bytes are in the state folder (files.py)."""

    class Purpose(models.TextChoices):
        BATCH = "batch", "Input of batches"
        BATCH_OUTPUT = "batch_output", "Output of a batch"

    id = models.CharField(max_length=40, primary_key=True)
    tenant = models.ForeignKey(Tenant, on_delete=models.PROTECT, related_name="files", db_index=False)
    key = models.ForeignKey(APIKey, on_delete=models.PROTECT, related_name="+", help_text="That stored it.")
    purpose = models.CharField(max_length=16, choices=Purpose.choices)
    filename = models.CharField(max_length=255, help_text="As the tenant calls it; no path comes from it.")
    size_bytes = models.BigIntegerField()
    created_at = models.DateTimeField(default=timezone.now)
    expires_at = models.DateTimeField(db_index=True, help_text="After it the file is removed.")

    class Meta:
        ordering = ["-created_at", "-id"]
        indexes = [models.Index(fields=["tenant", "-created_at", "-id"], name="file_by_tenant")]

    def __str__(self) -> str:
        return self.id


class Batch(models.Model):
    """Requests in a file. Its counts are those of its lines, moved in the same transactions."""

    class Status(models.TextChoices):
        VALIDATING = "validating", "Validating"
        FAILED = "failed", "Failed"
        IN_PROGRESS = "in_progress", "In progress"
        FINALIZING = "finalizing", "Finalizing"
        COMPLETED = "completed", "Completed"
        EXPIRED = "expired", "Expired"
        CANCELLING = "cancelling", "Cancelling"
        CANCELLED = "cancelled", "Cancelled"

    id = models.CharField(max_length=40, primary_key=True)
    tenant = models.ForeignKey(Tenant, on_delete=models.PROTECT, related_name="batches", db_index=False)
    key = models.ForeignKey(
        APIKey, on_delete=models.PROTECT, related_name="+", help_text="Its lines are charged to it."
    )
    endpoint = models.CharField(max_length=64)
    input_file_id = models.CharField(max_length=40)
    output_file_id = models.CharField(max_length=40, blank=True)
    error_file_id = models.CharField(max_length=40, blank=True)
    completion_window = models.CharField(max_length=8, default="24h")
    metadata = models.JSONField(null=True, blank=True)
    status = models.CharField(max_length=12, choices=Status.choices, default=Status.VALIDATING)
    ends_as = models.CharField(
        max_length=12,
        choices=Status.choices,
        blank=True,
        help_text="The status once its files are written.",
    )
    errors = models.JSONField(default=list, blank=True, help_text="Why it failed as a whole.")
    num_lines = models.PositiveIntegerField(default=0)
    num_completed = models.PositiveIntegerField(default=0)
    num_failed = models.PositiveIntegerField(default=0)
    output_seconds = models.PositiveIntegerField(null=True, blank=True, help_text="How long its results are kept.")
    idempotency_record = models.CharField(max_length=80, blank=True, editable=False)
    """Of the Idempotency-Key that it was created with; empty without one."""
    idempotency_print = models.CharField(max_length=64, blank=True, editable=False)
    """Of the body."""
    created_at = models.DateTimeField(default=timezone.now)
    expires_at = models.DateTimeField()
    in_progress_at = models.DateTimeField(null=True, blank=True)
    finalizing_at = models.DateTimeField(null=True, blank=True)
    completed_at = models.DateTimeField(null=True, blank=True)
    failed_at = models.DateTimeField(null=True, blank=True)
    expired_at = models.DateTimeField(null=True, blank=True)
    cancelling_at = models.DateTimeField(null=True, blank=True)
    cancelled_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        verbose_name_plural = "batches"
        ordering = ["-created_at", "-id"]
        indexes = [
            models.Index(fields=["tenant", "-created_at", "-id"], name="batch_by_tenant"),
            models.Index(
                fields=["created_at"],
                condition=Q(status__in=["validating", "in_progress", "finalizing", "cancelling"]),
                name="batch_open",
            ),
        ]
        constraints = [
            models.CheckConstraint(
                condition=Q(num_lines__gte=F("num_completed") + F("num_failed")), name="batch_counts_its_lines"
            ),
            models.UniqueConstraint(
                fields=["tenant", "idempotency_record"],
                condition=~Q(idempotency_record=""),
                name="batch_once_per_idempotency_key",
            ),
        ]

    def __str__(self) -> str:
        return self.id


class BatchLine(models.Model):
    """One request of a batch: where it is in the input file, and its answer as a line of a result file."""

    class State(models.TextChoices):
        WAITING = "waiting", "Not answered"
        COMPLETED = "completed", "Completed"
        FAILED = "failed", "Failed"

    batch = models.ForeignKey(Batch, on_delete=models.CASCADE, related_name="lines", db_index=False)
    number = models.PositiveIntegerField(help_text="In the input file, from 1.")
    custom_id = models.CharField(max_length=MAX_CUSTOM_ID)
    offset = models.BigIntegerField()
    size_bytes = models.PositiveIntegerField()
    state = models.CharField(max_length=10, choices=State.choices, default=State.WAITING)
    answer = models.TextField(blank=True, help_text="JSON without the end of the line.")

    class Meta:
        ordering = ["batch", "number"]
        constraints = [
            models.UniqueConstraint(fields=["batch", "number"], name="batch_line_once"),
            models.UniqueConstraint(fields=["batch", "custom_id"], name="batch_line_one_custom_id"),
        ]
        indexes = [
            models.Index(fields=["batch", "number"], condition=Q(state="waiting"), name="batch_line_waiting"),
        ]

    def __str__(self) -> str:
        return f"{self.batch_id} {self.number}"

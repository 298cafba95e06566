"""The row of a search for the fastest file and settings; part of inference/models.py, which Django reads.

desk.py writes it. While it runs it says how far it is; then it stays as the record, with the table that was measured.
"""

from __future__ import annotations

from typing import Any

from django.core.exceptions import ValidationError
from django.core.validators import MaxValueValidator, MinValueValidator
from django.db import models
from django.db.models import Q
from django.utils import timezone

from inference.tuning import formats

BOUNDS: dict[str, tuple[float, float]] = {
    "max_perplexity_increase": (0, 1000),
    "min_gain": (-90, 1000),
    "max_minutes": (0.1, 600),
    "rounds": (1, 9),
    "seconds": (0.1, 30),
}
"""Of the numbers that a search is asked with; the form and the command have the same."""


def within(name: str) -> list[Any]:
    low, high = BOUNDS[name]
    return [MinValueValidator(low), MaxValueValidator(high)]


def check_formats(text: str) -> None:
    try:
        formats.named(text)
    except ValueError as error:
        raise ValidationError(f"{error}.") from error


class Optimization(models.Model):
    """One search. At most one runs in the whole installation: two would measure each other."""

    class State(models.TextChoices):
        RUNNING = "running", "Running"
        DONE = "done", "Measured"
        FAILED = "failed", "Failed"
        CANCELLED = "cancelled", "Cancelled"

    base_model = models.ForeignKey("inference.ServedModel", on_delete=models.SET_NULL, null=True, related_name="+")
    name = models.CharField(max_length=100, editable=False, help_text="The model's, when it was asked for.")
    formats = models.CharField(max_length=200, blank=True, validators=[check_formats])
    max_perplexity_increase = models.FloatField(default=3.0, validators=within("max_perplexity_increase"))
    min_gain = models.FloatField(default=3.0, validators=within("min_gain"))
    max_minutes = models.FloatField(default=20.0, validators=within("max_minutes"))
    rounds = models.PositiveSmallIntegerField(default=3, validators=within("rounds"))
    seconds = models.FloatField(default=1.0, validators=within("seconds"))
    tunes_settings = models.BooleanField(default=True)
    folder = models.CharField(max_length=1000, help_text="Where the file is written.")
    state = models.CharField(max_length=9, choices=State.choices, default=State.RUNNING)
    step = models.CharField(max_length=200, blank=True, help_text="What is done now.")
    part = models.FloatField(default=0.0, help_text="Of that step, 0 to 1.")
    steps_done = models.PositiveIntegerField(default=0)
    steps_total = models.PositiveIntegerField(default=0, help_text="As far as is known.")
    problem_code = models.CharField(max_length=64, blank=True)
    problem = models.TextField(blank=True, help_text="Why it failed.")
    result = models.JSONField(null=True, help_text="What was measured, as the command's --json has it.")
    asked_by_kind = models.CharField(max_length=16)
    asked_by = models.CharField(max_length=150)
    is_attended = models.BooleanField(default=False, help_text="A command sees to it, and the web does not.")
    host = models.CharField(max_length=255, blank=True, help_text="The machine that measures.")
    created_at = models.DateTimeField(default=timezone.now)
    started_at = models.DateTimeField(null=True)
    updated_at = models.DateTimeField(default=timezone.now, help_text="When somebody last worked on it.")

    class Meta:
        ordering = ["-id"]
        constraints = [
            models.UniqueConstraint(fields=["state"], condition=Q(state="running"), name="optimization_one_runs")
        ]

    def __str__(self) -> str:
        return f"optimization of {self.name}"

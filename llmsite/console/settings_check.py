"""The console's page of what is wrong with the installation: what `manage.py doctor` and `check --deploy` say.

The same looks (llmsite/doctor.py), from within the web process: so they are those of this machine, with the settings
that really are in force. llama.cpp is asked in a child. For those who run the installation and those who audit it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from django.contrib import admin
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.views.decorators.http import require_GET

from llmsite import doctor
from llmsite.console.reach import may_inspect
from llmsite.doctor import Finding

TONES = {"error": "is-bad", "warning": "is-warning", "ok": ""}
ICONS = {"error": "error", "warning": "warning", "ok": "check_circle"}


@dataclass(frozen=True, slots=True)
class Row:
    finding: Finding
    tone: str
    icon: str


@require_GET
def page(request: HttpRequest) -> HttpResponse:
    if not may_inspect(request.user):
        raise PermissionDenied
    found = list(doctor.examine())
    deployed = list(doctor.look_at_system_checks(deployed=True))
    context = {
        **admin.site.each_context(request),
        "title": "Settings check",
        "parts": [
            ("What manage.py doctor says", list(_rows(found))),
            ("What manage.py check --deploy says", list(_rows(deployed))),
        ],
        "num_errors": sum(each.level == "error" for each in [*found, *deployed]),
    }
    return render(request, "console/settings_check.html", context)


def _rows(findings: list[Finding]) -> Iterator[Row]:
    """Errors first."""
    for level in TONES:
        yield from (Row(each, TONES[level], ICONS[level]) for each in findings if each.level == level)

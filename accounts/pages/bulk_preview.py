"""What an action of a list is about to change, shown before it is done: whenever more than one row is chosen. Each row
with whose it is, and with what goes on there at this moment where its admin class says so (`running_now`).

Put around the actions of every page by role_admin.py. Django shows what is deleted by itself. Up to MOST_SHOWN rows are
named, and it is they that are changed, whatever else the list holds by then; of more, all that the list's filter finds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.contrib.admin.utils import model_ngettext
from django.db.models import Model, QuerySet
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.utils.safestring import SafeString

from accounts.pages import console

MOST_SHOWN = 100
PREVIEWED = "previewed"

OWNERS = ("tenant", "owner")
"""Fields that say whose a row is."""

Action = Callable[[Any, HttpRequest, QuerySet[Any]], HttpResponse | None]


def previewed(action: Action, name: str, title: str) -> Action:
    """The action, behind its page. Keeps its attributes: Django reads the permissions that it asks for there."""

    @functools.wraps(action)
    def asked(model_admin: Any, request: HttpRequest, queryset: QuerySet[Any]) -> HttpResponse | None:
        if PREVIEWED in request.POST:
            return action(model_admin, request, queryset)
        owners = [name for name in OWNERS if name in {each.name for each in queryset.model._meta.fields}]
        rows = list(queryset.select_related(*owners)[: MOST_SHOWN + 1] if owners else queryset[: MOST_SHOWN + 1])
        if len(rows) < 2:
            return action(model_admin, request, queryset)
        return _page(model_admin, request, queryset, rows, name, title)

    return asked


def _page(
    model_admin: Any, request: HttpRequest, queryset: QuerySet[Any], rows: list[Model], name: str, title: str
) -> HttpResponse:
    """A form that sends the same choice again, now for good, to the same address with its filters."""
    goes_on = len(rows) > MOST_SHOWN
    number = queryset.count() if goes_on else len(rows)
    opts = model_admin.opts
    page = f"{opts.app_label}_{opts.model_name}"
    context = {
        **model_admin.admin_site.each_context(request),
        "title": title,
        "opts": opts,
        "number": number,
        "kind": model_ngettext(opts, number),
        "rows": _shown(model_admin, page, rows[:MOST_SHOWN]),
        "chosen": request.POST.getlist(ACTION_CHECKBOX_NAME) if goes_on else [str(row.pk) for row in rows],
        "num_more": number - MOST_SHOWN if goes_on else 0,
        "checkbox": ACTION_CHECKBOX_NAME,
        "action": name,
        "field": PREVIEWED,
        "select_across": int(goes_on and request.POST.get("select_across") == "1"),
    }
    return TemplateResponse(request, "accounts/bulk_preview.html", context)


def _shown(model_admin: Any, page: str, rows: list[Any]) -> list[tuple[SafeString, str, str]]:
    """(link, whose it is, what goes on there)"""
    ask = getattr(model_admin, "running_now", None)
    now = ask(rows) if ask else {}
    return [
        (
            console.link(console.change_page(page, row.pk), row),
            ", ".join(str(owner) for name in OWNERS if (owner := getattr(row, name, None)) is not None),
            now.get(row.pk, ""),
        )
        for row in rows
    ]

"""The console's stylesheet and sidebar: what an operator reaches for, in that order.

Called by django-unfold on every page. A link is there for whoever may see its list.
"""

from __future__ import annotations

from typing import Any

from django.http import HttpRequest
from django.templatetags.static import static
from django.urls import reverse

GROUPS: tuple[tuple[str, tuple[tuple[str, str, str, str], ...]], ...] = (
    (
        "Customers",
        (
            ("accounts", "tenant", "Tenants", "apartment"),
            ("accounts", "apikey", "API keys", "key"),
            ("accounts", "plan", "Plans", "tune"),
        ),
    ),
    (
        "Models",
        (
            ("inference", "servedmodel", "Served models", "deployed_code"),
            ("inference", "modelvariant", "Variants", "speed"),
            ("inference", "adapter", "Adapters", "extension"),
            ("inference", "defaultvector", "Default adapters", "tune"),
        ),
    ),
    (
        "Usage",
        (
            ("inference", "receipt", "Receipts", "receipt_long"),
            ("accounts", "quotaperiod", "Quota periods", "calendar_month"),
            ("accounts", "ledgerentry", "Ledger", "menu_book"),
            ("accounts", "reservation", "Reservations", "hourglass_top"),
        ),
    ),
    ("Console", (("auth", "user", "Users", "person"), ("auth", "group", "Groups", "group"))),
)
"""(title, ((application, model, title, icon), ...))"""


def sidebar(request: HttpRequest) -> list[dict[str, Any]]:
    """UNFOLD["SIDEBAR"]["navigation"]."""
    home = {"title": "Dashboard", "icon": "dashboard", "link": reverse("admin:index")}
    groups = [{"title": title, "separator": True, "items": _items(request, items)} for title, items in GROUPS]
    return [{"items": [home]}, *(group for group in groups if group["items"])]


def _items(request: HttpRequest, items: tuple[tuple[str, str, str, str], ...]) -> list[dict[str, Any]]:
    return [
        {"title": title, "icon": icon, "link": reverse(f"admin:{application}_{model}_changelist")}
        for application, model, title, icon in items
        if request.user.has_perm(f"{application}.view_{model}")
        or request.user.has_perm(f"{application}.change_{model}")
    ]


def favicon(request: HttpRequest) -> str:
    """The href in UNFOLD["SITE_FAVICONS"]."""
    return static("llmsite/favicon.svg")


def stylesheet(request: HttpRequest) -> str:
    """UNFOLD["STYLES"]."""
    return static("llmsite/console.css")

"""The console's stylesheet and sidebar: what an operator reaches for, in that order.

Called by django-unfold on every page. A link is there for whoever may see its list.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django.http import HttpRequest
from django.templatetags.static import static
from django.urls import reverse

from llmsite.console.reach import may_inspect

GROUPS: tuple[tuple[str, tuple[tuple[str, str, str, str], ...]], ...] = (
    (
        "Customers",
        (
            ("accounts", "tenant", "Tenants", "apartment"),
            ("accounts", "membership", "Members", "badge"),
            ("accounts", "apikey", "API keys", "key"),
            ("accounts", "plan", "Plans", "tune"),
            ("accounts", "limitrule", "Limits for a time", "schedule"),
            ("accounts", "quotaraise", "Quota raises", "approval"),
            ("accounts", "price", "Prices", "sell"),
        ),
    ),
    (
        "Models",
        (
            ("inference", "servedmodel", "Served models", "deployed_code"),
            ("inference", "modelimport", "Imports", "upload_file"),
            ("inference", "modelvariant", "Variants", "speed"),
            ("inference", "optimization", "Optimizations", "timer"),
            ("inference", "adapter", "Adapters", "extension"),
            ("inference", "adapteralias", "Aliases", "alt_route"),
            ("inference", "defaultvector", "Default adapters", "tune"),
        ),
    ),
    (
        "Usage",
        (
            ("inference", "receipt", "Receipts", "receipt_long"),
            ("inference", "batch", "Batches", "stacks"),
            ("inference", "storedfile", "Stored files", "draft"),
            ("accounts", "refusedrequest", "Refusals", "block"),
            ("accounts", "dayusage", "Usage by day", "bar_chart"),
            ("accounts", "statement", "Statements", "request_quote"),
            ("accounts", "quotaalert", "Quota alerts", "notifications"),
            ("accounts", "quotaperiod", "Quota periods", "calendar_month"),
            ("accounts", "ledgerentry", "Ledger", "menu_book"),
            ("accounts", "reservation", "Reservations", "hourglass_top"),
        ),
    ),
    (
        "Console",
        (
            ("auth", "user", "Users", "person"),
            ("accounts", "staffrole", "Roles", "shield_person"),
            ("auth", "group", "Groups", "group"),
            ("accounts", "auditentry", "Audit log", "history"),
        ),
    ),
)
"""(title, ((application, model, title, icon), ...))"""


def sidebar(request: HttpRequest) -> list[dict[str, Any]]:
    """UNFOLD["SIDEBAR"]["navigation"]."""
    home = {"title": "Dashboard", "icon": "dashboard", "link": reverse("admin:index")}
    playground = {"title": "Playground", "icon": "chat", "link": reverse("console-playground")}
    now = _page("Requests now", "bolt", "console-live-requests", lambda user: user.has_perm("inference.view_receipt"))
    slots = _page("Slots", "view_module", "console-slots", may_inspect)
    check = _page("Settings check", "fact_check", "console-settings", may_inspect)
    groups = [{"title": title, "separator": True, "items": _items(request, items)} for title, items in GROUPS]
    return [{"items": [home, playground, now, slots, check]}, *(group for group in groups if group["items"])]


def _page(title: str, icon: str, name: str, may_see: Callable[[Any], bool]) -> dict[str, Any]:
    """An entry for those who may see the page."""
    return {"title": title, "icon": icon, "link": reverse(name), "permission": lambda request: may_see(request.user)}


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


def script(request: HttpRequest) -> str:
    """UNFOLD["SCRIPTS"]: what pages do; their own text has no script (llmsite/console/door.py)."""
    return static("llmsite/console.js")

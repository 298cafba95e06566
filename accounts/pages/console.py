"""How the console's pages show numbers, links, bars and moments; used by the admin modules and the dashboard.

Pure: no query, no clock. Everything that is interpolated is escaped by format_html. The classes are styled in
llmsite/static/llmsite/console.css.
"""

from __future__ import annotations

from datetime import datetime
from urllib.parse import urlencode

from django.urls import reverse
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString

NEARLY_SPENT = 90
"""Percent of a quota from which its bar warns."""
SHORT_ID = 8
NO_BREAK_SPACE = "\u00a0"


def whole(number: int | None) -> str:
    """With thousands separators; a limit that is absent is unlimited."""
    return "unlimited" if number is None else f"{number:,}"


def seconds(value: float) -> str:
    """A duration, to the millisecond below ten seconds."""
    text = f"{value * 1000:,.0f} ms" if value < 1 else f"{value:,.2f} s" if value < 10 else f"{value:,.1f} s"
    return text.replace(" ", NO_BREAK_SPACE)


def moment(value: datetime | None, otherwise: str = "-") -> SafeString | str:
    """To the minute on the page, to the microsecond under the pointer."""
    if value is None:
        return otherwise
    text = f"{value:%Y-%m-%d %H:%M}"
    return format_html('<time class="console-nowrap" title="{}">{}</time>', value.isoformat(), text)


def clock(value: datetime) -> SafeString:
    """As `moment`, with seconds: for rows that follow each other quickly."""
    text = f"{value:%Y-%m-%d %H:%M:%S}"
    return format_html('<time class="console-nowrap" title="{}">{}</time>', value.isoformat(), text)


def listing(page: str, **filters: object) -> str:
    """The address of a list, such as listing("accounts_apikey", tenant__id__exact=3)."""
    query = f"?{urlencode(filters)}" if filters else ""
    return reverse(f"admin:{page}_changelist") + query


def change_page(page: str, pk: object) -> str:
    return reverse(f"admin:{page}_change", args=[pk])


def link(url: str, text: object) -> SafeString:
    return format_html('<a class="console-link" href="{}">{}</a>', url, text)


def links(*pairs: tuple[str, str]) -> SafeString:
    """(address, text) pairs side by side."""
    return format_html(
        '<span class="console-links">{}</span>', format_html_join(" ", "{}", ((link(*p),) for p in pairs))
    )


def code(text: str) -> SafeString:
    return format_html('<code class="console-code">{}</code>', text)


def short_id(request_id: str) -> SafeString:
    """The beginning of a request's id; the whole of it under the pointer."""
    text = request_id if len(request_id) <= SHORT_ID else f"{request_id[:SHORT_ID]}…"
    return format_html('<code class="console-code" title="{}">{}</code>', request_id, text)


def percent(used: int, limit: int | None) -> int | None:
    """Part of a quota that is spent, 0 to 100; None where it is unlimited. A quota of 0 is spent."""
    if limit is None:
        return None
    return 100 if limit <= 0 else max(0, min(100, used * 100 // limit))


def quota_bar(used: int, limit: int | None, without: str = "unlimited") -> SafeString:
    """`used of limit` above a bar; `without` stands beside what has no limit."""
    part = percent(used, limit)
    text = f"{used:,}" if limit is None else f"{used:,} of {limit:,}"
    if part is None:
        return format_html('<div class="console-quota"><span>{}</span><small>{}</small></div>', text, without)
    tone = "console-bar-spent" if part >= 100 else "console-bar-nearly" if part >= NEARLY_SPENT else ""
    return format_html('<div class="console-quota"><span>{}</span>{}</div>', text, bar(part, f"{part} % used", tone))


def bar(part: float, label: str, tone: str = "") -> SafeString:
    """A part of a hundred as a bar: SVG, as a strict content policy allows no style of its own in the page."""
    return format_html(
        '<svg class="console-bar {}" role="img" aria-label="{}"><rect width="100%" height="100%" rx="3"/>'
        '<rect class="console-bar-part" width="{}%" height="100%" rx="3"/></svg>',
        tone,
        label,
        round(max(0.0, min(100.0, part)), 1),
    )


def labelled_bar(text: str, part: float) -> SafeString:
    """A text above the bar that shows it."""
    return format_html('<div class="console-quota"><span>{}</span>{}</div>', text, bar(part, text))


def size(num_bytes: float) -> str:
    """Bytes in the unit that suits them."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:,.1f}{NO_BREAK_SPACE}{unit}"
    return f"{num_bytes / 1e3:,.0f}{NO_BREAK_SPACE}kB"


def megabytes(num_bytes: int) -> str:
    """Bytes in one unit, where a column compares them."""
    return f"{num_bytes / 1e6:,.0f} MB"


def short(number: float) -> str:
    """A number for an axis: 1,200 is 1.2k."""
    for letter, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= factor:
            return f"{number / factor:.3g}{letter}"
    return f"{number:.3g}"

"""Every list that the console and the API have, each way that it offers: pages, searches, filters, orders.

What is asked of the console comes from the registry of its pages, so a new one is measured without being named here.
Names do not depend on the rows that are there: the same name among few and among many rows is the same question.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import urlencode

from django.contrib import admin
from django.contrib.admin.utils import quote
from django.contrib.admin.views.main import ChangeList
from django.contrib.auth.models import User
from django.db.models import Model
from django.test import RequestFactory
from django.urls import get_resolver, reverse

from accounts.models import APIKey, Tenant
from inference.bench.lists.rows import Filled
from inference.models import Receipt

MOST_CHOICES = 3
"""Of one filter."""
ABSENT = "no-row-has-this"
SUPERUSER, OWNER, OWNER_OF_LITTLE, TENANT_KEY, OPERATOR_KEY = "superuser", "owner", "owner of little", "key", "operator"


@dataclass(frozen=True, slots=True)
class Address:
    """One question: `who` asks for `path`."""

    name: str
    who: str
    path: str


def every(filled: Filled, now: datetime) -> list[Address]:
    return [*of_console(filled), *of_tenants_keys(filled, now), *of_operators(filled)]


# The console


def of_console(filled: Filled) -> Iterator[Address]:
    for query in ("", "?by=model&days=90", "?by=adapter&show=cost&days=90"):
        yield Address(f"dashboard {query}", SUPERUSER, reverse("admin:index") + query)
    yield Address("requests now", SUPERUSER, reverse("console-live-requests"))
    yield Address("playground", SUPERUSER, reverse("console-playground"))
    for model, page in sorted(admin.site._registry.items(), key=lambda each: each[0]._meta.label):
        yield from _of_list(model, page, filled)
        yield from _of_rows(model, page)
    for who, user in ((OWNER, filled.owner_of_largest), (OWNER_OF_LITTLE, filled.owner_of_smallest)):
        yield Address(f"dashboard of {who}", who, reverse("admin:index"))
        for model in admin.site._registry:
            if user.has_perm(f"{model._meta.app_label}.view_{model._meta.model_name}"):
                yield Address(f"{model._meta.label} of {who}", who, _url(model, "changelist"))


def _url(model: type[Model], page: str, *args: Any) -> str:
    return reverse(f"admin:{model._meta.app_label}_{model._meta.model_name}_{page}", args=args)


def _of_list(model: type[Model], page: Any, filled: Filled) -> Iterator[Address]:
    url, label = _url(model, "changelist"), model._meta.label
    changes = _opened(model, page, filled.superuser)

    def asked(name: str, **query: Any) -> Address:
        return Address(f"{label} {name}", SUPERUSER, f"{url}?{urlencode(query)}")

    yield Address(label, SUPERUSER, url)
    yield asked("last page", p=changes.paginator.num_pages)
    for lookup in changes.search_fields:
        for name, term in (("what is there", _value(model, lookup)), ("nothing", ABSENT)):
            yield asked(f"search {lookup}: {name}", q=term)
    for number, column in enumerate(changes.list_display):
        if changes.get_ordering_field(column) and number in _sortable(changes):
            yield asked(f"by {column}", o=number)
            yield asked(f"by {column}, descending", o=f"-{number}")
    for title, query in _filters(changes, filled):
        yield asked(f"where {title}", **query)


def _opened(model: type[Model], page: Any, user: User) -> ChangeList:
    request = RequestFactory().get(_url(model, "changelist"))
    request.user = user
    opened: ChangeList = page.get_changelist_instance(request)
    return opened


def _sortable(changes: ChangeList) -> set[int]:
    """Columns whose heading is a link."""
    allowed = changes.sortable_by
    return {number for number, name in enumerate(changes.list_display) if allowed is None or name in allowed}


def _value(model: type[Model], lookup: str) -> str:
    """What the middle row has there, as a person would type it."""
    path = lookup.lstrip("^=@")
    for ending in ("__exact", "__iexact", "__startswith", "__istartswith", "__contains", "__icontains"):
        path = path.removesuffix(ending)
    rows = model._default_manager.order_by("pk").exclude(**{path: None})
    ids = list(rows.values_list("pk", flat=True)[:100])
    return str(rows.filter(pk=ids[len(ids) // 2]).values_list(path, flat=True)[0]) if ids else ABSENT


def _filters(changes: ChangeList, filled: Filled) -> Iterator[tuple[str, dict[str, Any]]]:
    for spec in changes.filter_specs:
        parameter = next(name for name in spec.expected_parameters() if name)
        for number, value in enumerate(_choices(spec, changes, filled)):
            yield f"{parameter}, choice {number}", {parameter: value}


def _choices(spec: Any, changes: ChangeList, filled: Filled) -> list[Any]:
    """The last choices of a filter, which are the rare ones; rows of the largest tenant and of the smallest."""
    field = getattr(spec, "field", None)
    related = getattr(field, "remote_field", None)
    if related is not None and related.model is Tenant:
        return [filled.largest.pk, filled.smallest.pk]
    if related is not None:
        rows = related.model._default_manager.order_by("pk").values_list("pk", flat=True)
        return list(rows[:1])
    if (found := getattr(spec, "lookup_choices", None)) is not None:
        values = [each[0] if isinstance(each, tuple) else each for each in found]
    else:
        values = [value for value, _ in getattr(field, "flatchoices", ())] or [1, 0]  # yes and no
    return values[-MOST_CHOICES:]


def _of_rows(model: type[Model], page: Any) -> Iterator[Address]:
    """A row's page and its history, the page for a new one, and the choices that its fields offer."""
    pk = model._default_manager.order_by("pk").values_list("pk", flat=True).first()
    if pk is not None:
        yield Address(f"{model._meta.label} page", SUPERUSER, _url(model, "change", quote(pk)))
        yield Address(f"{model._meta.label} history", SUPERUSER, _url(model, "history", quote(pk)))
    request = RequestFactory().get("/")
    request.user = User(is_superuser=True, is_active=True)
    if page.has_add_permission(request):
        yield Address(f"{model._meta.label} new", SUPERUSER, _url(model, "add"))
    for name in page.autocomplete_fields:
        for term in ("", "0001", ABSENT):
            about = {"app_label": model._meta.app_label, "model_name": model._meta.model_name, "field_name": name}
            path = f"{reverse('admin:autocomplete')}?{urlencode({**about, 'term': term})}"
            yield Address(f"{model._meta.label} choices of {name}: {term or 'all'}", SUPERUSER, path)


# The API


def of_tenants_keys(filled: Filled, now: datetime) -> Iterator[Address]:
    month = f"{now:%Y-%m}"
    receipt = Receipt.objects.filter(tenant=filled.largest).values_list("pk", flat=True).first()
    for path in (
        "/v1/models",
        "/v1/me",
        "/v1/me/usage",
        "/v1/me/usage?group_by=day",
        "/v1/me/usage?group_by=model,day&format=csv",
        "/v1/me/statements",
        "/v1/me/refusals?limit=200",
        "/v1/files?limit=100",
        "/v1/batches?limit=100",
    ):
        yield Address(path, TENANT_KEY, path)
    yield Address("statement of this month", TENANT_KEY, f"/v1/me/statements/{month}")
    yield Address("statement of this month as CSV", TENANT_KEY, f"/v1/me/statements/{month}?format=csv")
    yield Address("one request", TENANT_KEY, f"/v1/requests/{receipt}")


REPORTS = (
    "/v1/admin/usage",
    "/v1/admin/logs",
    "/v1/admin/logs?offset={deep}",
    "/v1/admin/logs?tenant={largest}",
    "/v1/admin/logs?tenant={smallest}",
    "/v1/admin/logs?api_key={key}",
    "/v1/admin/logs?status=failed",
    "/v1/admin/logs?model_id=model-0",
    "/v1/admin/logs?model_id=no-such-model",
    "/v1/admin/logs?route=/v1/generate",
    "/v1/admin/stats",
    "/v1/admin/stats?window_days=365",
    "/v1/admin/reports/summary",
    "/v1/organization/usage/completions?start_time={start}&limit=31",
    "/v1/organization/usage/completions?start_time={start}&limit=1&group_by=project_id",
    "/v1/organization/usage/embeddings?start_time={start}",
    "/v1/organization/costs?start_time={start}",
)
DEEP = 99_000
"""Nearly as far as an offset goes."""


def of_operators(filled: Filled) -> Iterator[Address]:
    """Every list of a viewset by its name in the URL table, and the reports."""
    for name in sorted(str(each) for each in get_resolver().reverse_dict if str(each).endswith("-list")):
        path = reverse(name)
        yield Address(path, OPERATOR_KEY, path)
        yield Address(f"{path} deep", OPERATOR_KEY, f"{path}?limit=200&offset={DEEP}")
    words = {
        "deep": DEEP,
        "largest": filled.largest.name,
        "smallest": filled.smallest.name,
        "key": APIKey.objects.filter(tenant=filled.largest).order_by("pk").values_list("public_id", flat=True)[0],
        "start": int(datetime.now().astimezone().timestamp()) - 30 * 86400,
    }
    for path in REPORTS:
        yield Address(path, OPERATOR_KEY, path.format(**words).replace(" ", "%20"))

"""Lists of the console that open like short ones, however many rows there are: for every page (role_admin.py).

Nothing counts a whole table, and nothing counts choices of filters. A search goes along an index.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from django.contrib import admin
from django.core.paginator import Page, Paginator
from django.db.models import QuerySet
from django.http import HttpRequest

if TYPE_CHECKING:
    PaginatorBase = Paginator[Any]
    AdminBase = admin.ModelAdmin[Any]
else:
    PaginatorBase, AdminBase = Paginator, object

MOST_COUNTED = 10_000
MOST_FOUND = 1000
"""Rows that a search finds, the newest of them."""


class UncountedPaginator(PaginatorBase):
    """Counts to MOST_COUNTED and no further, so that a list of a million rows opens like a short one."""

    @cached_property
    def count(self) -> int:
        rows = self.object_list
        return rows.order_by()[:MOST_COUNTED].count() if isinstance(rows, QuerySet) else len(rows)

    def page(self, number: Any) -> Any:
        """Its keys, then its rows: what is sorted and passed over is narrow, and nothing is joined to it."""
        if not isinstance(self.object_list, QuerySet):
            return super().page(number)
        number = self.validate_number(number)
        first = (number - 1) * self.per_page
        keys = list(self.object_list.values_list("pk", flat=True)[first : first + self.per_page])
        return Page(self.object_list.filter(pk__in=keys), number, self)


class LongList(AdminBase):
    """Stands before a ModelAdmin in the order of its methods."""

    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER
    paginator = UncountedPaginator
    list_per_page = 50

    def get_changelist_instance(self, request: HttpRequest) -> Any:
        """Whose page offers to show all where something is left out, and not always because nothing is counted."""
        page = super().get_changelist_instance(request)
        if not page.query and not page.has_active_filters:
            page.full_result_count = page.result_count
        return page

    def get_search_results(self, request: HttpRequest, queryset: QuerySet[Any], search_term: str) -> Any:
        """Looks once: to count what was found and to show a page of it would be to search twice."""
        found, repeats = super().get_search_results(request, queryset, search_term)
        if not search_term:
            return found, repeats
        newest = list(found.order_by("-pk").values_list("pk", flat=True).distinct()[:MOST_FOUND])
        return queryset.filter(pk__in=newest), False

"""Pages of the operator's lists: limit 1 to 200, offset, and a total that never counts more than it must."""

from __future__ import annotations

from typing import Any, TypeVar

from django.db.models import Model, QuerySet
from rest_framework import serializers
from rest_framework.pagination import BasePagination
from rest_framework.request import Request
from rest_framework.response import Response

Row = TypeVar("Row", bound=Model)
MAX_COUNTED = 100_000
"""`total` stops here: counting a ledger of millions for every page would cost more than the page."""


class PageQuery(serializers.Serializer[Any]):
    """The query parameters of a list; out of range is a 422, not a silent clamp."""

    limit = serializers.IntegerField(min_value=1, max_value=200, default=50)
    offset = serializers.IntegerField(min_value=0, max_value=MAX_COUNTED, default=0)


def read_query(form: type[serializers.Serializer[Any]], request: Request) -> dict[str, Any]:
    """Raises rest_framework's ValidationError."""
    query = form(data=request.query_params.dict())
    query.is_valid(raise_exception=True)
    values: dict[str, Any] = query.validated_data
    return values


def total_of(rows: QuerySet[Any]) -> int:
    return rows.order_by()[:MAX_COUNTED].count()


def slice_of(rows: QuerySet[Row], offset: int, limit: int) -> list[Row]:
    """A page in the order of the rows: its keys, then its rows, so that nothing is joined to what is passed over."""
    keys = list(rows.values_list("pk", flat=True)[offset : offset + limit])
    return list(rows.filter(pk__in=keys))


class Pages(BasePagination):
    """{"results", "total", "limit", "offset"}."""

    total = 0
    page: dict[str, Any]

    def paginate_queryset(self, queryset: Any, request: Request, view: Any = None) -> list[Any]:
        self.page = read_query(PageQuery, request)
        self.total = total_of(queryset)
        return slice_of(queryset, self.page["offset"], self.page["limit"])

    def get_paginated_response(self, data: Any) -> Response:
        return Response({"results": data, "total": self.total, **self.page})

    def get_paginated_response_schema(self, schema: dict[str, Any]) -> dict[str, Any]:
        number = {"type": "integer"}
        properties = {
            "results": schema,
            "total": {**number, "description": f"At most {MAX_COUNTED}."},
            "limit": number,
            "offset": number,
        }
        return {"type": "object", "required": list(properties), "properties": properties}

    def get_schema_operation_parameters(self, view: Any) -> list[dict[str, Any]]:
        return [
            {
                "name": "limit",
                "in": "query",
                "required": False,
                "schema": {"type": "integer", "minimum": 1, "maximum": 200, "default": 50},
            },
            {
                "name": "offset",
                "in": "query",
                "required": False,
                "schema": {"type": "integer", "minimum": 0, "maximum": MAX_COUNTED, "default": 0},
            },
        ]

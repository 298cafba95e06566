"""GET /v1/me/usage, /v1/me/statements, /v1/me/refusals: what a tenant used, what it cost, and what was refused it.

From the caller's own tenant alone. Sums come from the days' sums, so the answers cost a fixed number of queries.
"""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any

from django.http import HttpResponse
from django.utils import timezone
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, extend_schema
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from rest_framework.request import Request

from accounts.ledger import statements
from accounts.ledger.usage import GROUPS, grouped, usage
from accounts.models import DayUsage, RefusedRequest, Statement, Tenant
from accounts.trail import refusal_log
from accounts.trail.refusals import Refusal
from inference import settlement
from inference.api.async_view import AsyncAPIView, json_response
from inference.api.native.schemas import UsageReply

MAX_DAYS = 400
MAX_MONTHS = 240
CSV = (200, "text/csv")
FORMAT = OpenApiParameter("format", str, enum=["json", "csv"])


def _split(value: object) -> object:
    return [part for part in value.split(",") if part] if isinstance(value, str) else value


class UsageQuery(BaseModel):
    """The query of GET /v1/me/usage."""

    model_config = ConfigDict(extra="forbid")

    since: date | None = Field(None, alias="from")
    until: date | None = Field(None, alias="to")
    group_by: Annotated[list[str], BeforeValidator(_split)] = Field([], max_length=len(GROUPS))
    key: str | None = Field(None, max_length=12)
    format: str = Field("json", pattern="^(json|csv)$")

    @model_validator(mode="after")
    def _is_a_window(self) -> UsageQuery:
        for name in self.group_by:
            if name not in GROUPS:
                raise ValueError(f"group_by takes {', '.join(GROUPS)}")
        self.until = self.until or timezone.now().date()
        self.since = self.since or self.until.replace(day=1)
        if not 0 <= (self.until - self.since).days <= MAX_DAYS:
            raise ValueError(f"from and to are days in this order, {MAX_DAYS} days apart at most")
        return self


class UsageView(AsyncAPIView):
    """Quota, totals and alerts of this moment; with a window or `group_by`, what was used in it."""

    route = "/v1/me/usage"
    scopes = ("usage",)

    @extend_schema(
        operation_id="me_usage",
        summary="The key's own usage",
        parameters=[
            OpenApiParameter("from", OpenApiTypes.DATE, description="First day (UTC); the first of the month of `to`."),
            OpenApiParameter("to", OpenApiTypes.DATE, description="Last day (UTC); today."),
            OpenApiParameter("group_by", str, description=f"Some of {', '.join(GROUPS)}, separated by commas."),
            OpenApiParameter("key", str, description="Of one key alone, by its public id."),
            FORMAT,
        ],
        responses={200: UsageReply, CSV: OpenApiTypes.STR},
    )
    def get(self, request: Request) -> HttpResponse:
        principal = self.admit_to_view()
        query = UsageQuery.model_validate(request.query_params.dict())
        remaining = self.request_rate.remaining if self.request_rate else None
        settlement.catch_up()
        assert query.since is not None and query.until is not None
        rows, is_cut = grouped(principal.tenant_id, query.since, query.until, query.group_by, key=query.key)
        if query.format == "csv":
            return csv_response(statements.table(rows[0] if rows else query.group_by, rows), "usage.csv")
        window = {
            "from": query.since,
            "to": query.until,
            "group_by": query.group_by,
            "rows": rows,
            "truncated": is_cut,
        }
        return json_response({**usage(principal, timezone.now()), "rpm_remaining": remaining, "window": window})


class StatementReply(BaseModel):
    """One month (UTC). `closed`: it was kept and does not change any more."""

    object: str
    tenant: str
    month: str
    status: str
    closed_at: str | None
    currency: str
    requests: int
    tokens: int
    cost: str
    lines: list[dict[str, Any]] | None = None


class StatementList(BaseModel):
    object: str
    data: list[dict[str, Any]]


class StatementsView(AsyncAPIView):
    """The months in which the tenant used something, the latest first."""

    route = "/v1/me/statements"
    scopes = ("usage",)

    @extend_schema(operation_id="me_statements", summary="Months and their state", responses=StatementList)
    def get(self, request: Request) -> HttpResponse:
        principal = self.admit_to_view()
        kept = dict(Statement.objects.filter(tenant_id=principal.tenant_id).values_list("month", "created_at"))
        days = (
            DayUsage.objects.filter(tenant_id=principal.tenant_id).order_by().values_list("day", flat=True).distinct()
        )
        months = sorted({day.replace(day=1) for day in days}, reverse=True)[:MAX_MONTHS]
        data = [
            {
                "month": f"{month:%Y-%m}",
                "status": "closed" if month in kept else "open",
                "closed_at": kept.get(month),
                "url": f"/v1/me/statements/{month:%Y-%m}",
            }
            for month in months
        ]
        return json_response({"object": "list", "data": data})


class StatementView(AsyncAPIView):
    """What was used in a month, and what it costs; as JSON or CSV."""

    route = "/v1/me/statements/{month}"
    scopes = ("usage",)

    @extend_schema(
        operation_id="me_statement",
        summary="One month",
        parameters=[FORMAT],
        responses={200: StatementReply, CSV: OpenApiTypes.STR},
    )
    def get(self, request: Request, month: str) -> HttpResponse:
        principal = self.admit_to_view()
        try:
            first = statements.month_of(month)
        except ValueError:
            raise Refusal("not_found", "There is no such month: write it as 2026-11.") from None
        settlement.catch_up()
        tenant = Tenant.objects.get(pk=principal.tenant_id)
        facts = statements.statement(tenant, first, timezone.now())
        if request.query_params.get("format") == "csv":
            return csv_response(statements.as_csv(facts), f"statement-{month}.csv")
        return json_response(facts)


class RefusalList(BaseModel):
    object: str
    data: list[dict[str, Any]]


class RefusalsView(AsyncAPIView):
    """The tenant's requests that were refused last, with the limit that bound."""

    route = "/v1/me/refusals"
    scopes = ("usage",)

    @extend_schema(
        operation_id="me_refusals",
        summary="What was refused, and why",
        parameters=[OpenApiParameter("limit", int)],
        responses=RefusalList,
    )
    def get(self, request: Request) -> HttpResponse:
        principal = self.admit_to_view()
        query = RefusalsQuery.model_validate(request.query_params.dict())
        rows = RefusedRequest.objects.filter(tenant_id=principal.tenant_id).order_by("-created_at", "-pk")
        return json_response({"object": "list", "data": [refusal_log.as_json(row) for row in rows[: query.limit]]})


class RefusalsQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    limit: int = Field(50, ge=1, le=200)


def csv_response(text: str, name: str) -> HttpResponse:
    return HttpResponse(
        text,
        content_type="text/csv; charset=utf-8",
        headers={"Content-Disposition": f'attachment; filename="{name}"'},
    )

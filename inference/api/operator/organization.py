"""GET /v1/organization/usage/completions, /embeddings and /v1/organization/costs, in OpenAI's shape, for operators.

A tenant is what OpenAI calls a project, `proj_` and its row number; a key's id is its public id. Times are in Unix
seconds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Literal

from django.conf import settings
from django.http import HttpResponse
from django.utils import timezone
from drf_spectacular.utils import OpenApiParameter, extend_schema
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from rest_framework.request import Request

from accounts.ledger import buckets
from accounts.ledger.buckets import DAY, HOUR, Question, Result
from accounts.ledger.prices import NANOS
from inference import settlement
from inference.api.async_view import json_response
from inference.api.openai.base import OpenAIView

MAX_TIME = 4_102_444_800
PROJECT = "proj_"
PAGE = "page_"
MAX_ROW = 2**63 - 1
Names = Annotated[list[Annotated[str, Field(max_length=200)]], Field(max_length=100)]


def _projects(value: object) -> object:
    """proj_7 is the tenant in row 7."""
    return [int(each.removeprefix(PROJECT)) for each in value] if isinstance(value, list) else value


class PageQuery(BaseModel):
    """What all three take. Lists are sent as name[]=a&name[]=b, as name=a&name=b, or separated by commas."""

    model_config = ConfigDict(extra="forbid")
    most: ClassVar[dict[str, tuple[int, int]]] = {"1d": (7, 31), "1h": (24, 168)}
    """By width: stretches of a page unless it says, and at most."""

    start_time: int = Field(ge=0, le=MAX_TIME)
    end_time: int | None = Field(None, ge=0, le=MAX_TIME)
    bucket_width: Literal["1d", "1h"] = "1d"
    limit: int | None = Field(None, ge=1)
    page: str | None = Field(None, pattern=r"^page_[0-9]{1,12}$")
    project_ids: Annotated[list[Annotated[int, Field(ge=0, le=MAX_ROW)]], BeforeValidator(_projects)] = Field(
        [], max_length=100
    )

    @model_validator(mode="after")
    def _is_bounded(self) -> PageQuery:
        if self.limit is not None and self.limit > self.most[self.bucket_width][1]:
            raise ValueError(f"limit is at most {self.most[self.bucket_width][1]} for {self.bucket_width}")
        if self.end_time is not None and self.end_time <= self.start_time:
            raise ValueError("end_time must be after start_time")
        return self


class UsageQuery(PageQuery):
    """Users, batches and tiers are not told apart: a question about them is refused, rather than answered with all."""

    group_by: list[Literal["project_id", "api_key_id", "model"]] = []
    models: Names = []
    api_key_ids: Names = []


class CostsQuery(PageQuery):
    most: ClassVar[dict[str, tuple[int, int]]] = {"1d": (7, 180)}

    bucket_width: Literal["1d"] = "1d"
    group_by: list[Literal["project_id", "line_item", "api_key_id"]] = []
    api_key_ids: Names = []


class BucketPage(BaseModel):
    """OpenAI's page of buckets, each with its results."""

    object: Literal["page"]
    data: list[dict[str, Any]]
    has_more: bool
    next_page: str | None


def parameters(form: type[PageQuery]) -> list[OpenApiParameter]:
    lists = {"group_by", "models", "api_key_ids", "project_ids"}
    return [
        OpenApiParameter(
            name,
            int if name in {"start_time", "end_time", "limit"} else str,
            required=name == "start_time",
            many=name in lists,
        )
        for name in form.model_fields
    ]


class OrganizationView(OpenAIView, ABC):
    """A page of stretches of time."""

    scopes = ("operator",)
    tag = "operator"
    query_form: ClassVar[type[PageQuery]] = UsageQuery
    operation: ClassVar[str | None] = None

    def answer(self, request: Request) -> HttpResponse:
        self.admit_to_view()
        query = self.query_form.model_validate(_values(request))
        settlement.catch_up()
        question, left = self.question(query)
        stretches = buckets.results(question)
        data = [
            {
                "object": "bucket",
                "start_time": int(moment.timestamp()),
                "end_time": int((moment + question.width).timestamp()),
                "results": [self.result(each) for each in found],
            }
            for moment, found in stretches
        ]
        end = question.start + len(stretches) * question.width
        next_page = f"{PAGE}{int(end.timestamp())}" if left > len(stretches) else None
        return json_response(
            {"object": "page", "data": data, "has_more": next_page is not None, "next_page": next_page}
        )

    def question(self, query: PageQuery) -> tuple[Question, int]:
        """With the number of stretches that are left, those of this page included."""
        width = DAY if query.bucket_width == "1d" else HOUR
        first = int(query.page.removeprefix(PAGE)) if query.page else query.start_time
        start = buckets.floor(datetime.fromtimestamp(min(first, MAX_TIME), UTC), width)
        end = timezone.now() if query.end_time is None else datetime.fromtimestamp(query.end_time, UTC)
        left = max(0, -(-(end - start) // width))
        number = min(left, query.limit or query.most[query.bucket_width][0])
        question = Question(
            start=start,
            width=width,
            number=number,
            group_by=tuple(getattr(query, "group_by", ())),
            operation=self.operation,
            models=tuple(getattr(query, "models", ())),
            keys=tuple(getattr(query, "api_key_ids", ())),
            tenants=tuple(query.project_ids),
        )
        return question, left

    @abstractmethod
    def result(self, found: Result) -> dict[str, Any]:
        """One line of a bucket."""


def _values(request: Request) -> dict[str, Any]:
    """Lists in the three ways in which clients write them."""
    lists = {"group_by", "models", "api_key_ids", "project_ids"}
    found: dict[str, Any] = {}
    for name, values in request.query_params.lists():
        plain = name.removesuffix("[]")
        found[plain] = [part for value in values for part in value.split(",")] if plain in lists else values[-1]
    return found


def _names(found: Result) -> dict[str, Any]:
    """Null for what was not asked for."""
    tenant = found.names.get("project_id")
    return {
        "project_id": None if tenant is None else f"{PROJECT}{tenant}",
        "user_id": None,
        "api_key_id": found.names.get("api_key_id"),
        "model": found.names.get("model"),
    }


class CompletionsUsageView(OrganizationView):
    """Tokens and requests of completions, chats and generations."""

    route = "/v1/organization/usage/completions"
    operation = "completions"

    @extend_schema(
        operation_id="organization_usage_completions", parameters=parameters(UsageQuery), responses=BucketPage
    )
    def get(self, request: Request) -> HttpResponse:
        return self.answer(request)

    def result(self, found: Result) -> dict[str, Any]:
        return {
            "object": "organization.usage.completions.result",
            "input_tokens": found.sums["prompt_tokens"],
            "output_tokens": found.sums["completion_tokens"],
            "input_cached_tokens": found.sums["cached_tokens"],
            "input_audio_tokens": 0,
            "output_audio_tokens": 0,
            "num_model_requests": found.sums["requests"],
            **_names(found),
            "batch": None,
            "service_tier": None,
        }


class EmbeddingsUsageView(OrganizationView):
    """Tokens and requests of embeddings."""

    route = "/v1/organization/usage/embeddings"
    operation = "embeddings"

    @extend_schema(
        operation_id="organization_usage_embeddings", parameters=parameters(UsageQuery), responses=BucketPage
    )
    def get(self, request: Request) -> HttpResponse:
        return self.answer(request)

    def result(self, found: Result) -> dict[str, Any]:
        return {
            "object": "organization.usage.embeddings.result",
            "input_tokens": found.sums["prompt_tokens"],
            "num_model_requests": found.sums["requests"],
            **_names(found),
        }


class CostsView(OrganizationView):
    """What it costs, by day; a line item is a model."""

    route = "/v1/organization/costs"
    query_form = CostsQuery

    @extend_schema(operation_id="organization_costs", parameters=parameters(CostsQuery), responses=BucketPage)
    def get(self, request: Request) -> HttpResponse:
        return self.answer(request)

    def result(self, found: Result) -> dict[str, Any]:
        names = _names(found)
        return {
            "object": "organization.costs.result",
            "amount": {"value": found.sums["cost_nanos"] / NANOS, "currency": settings.CONFIG.currency.lower()},
            "line_item": found.names.get("line_item"),
            "project_id": names["project_id"],
            "api_key_id": names["api_key_id"],
        }

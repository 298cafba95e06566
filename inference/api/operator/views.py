"""The operator's viewsets. Rows change through the rooms that own them: issuing, quotas, registry.

Nothing that has a ledger is deleted: tenants are suspended, keys are revoked.
"""

from __future__ import annotations

from typing import Any

from django.db.models import QuerySet
from django.http import HttpResponse
from django.utils import timezone
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework import mixins, viewsets
from rest_framework.decorators import action
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.serializers import BaseSerializer

from accounts.identity import issuing
from accounts.ledger import adjusting
from accounts.limits import limit_rules, raises
from accounts.limits.approval import RaiseError
from accounts.models import APIKey, LedgerEntry, LimitRule, Plan, Price, QuotaPeriod, QuotaRaise, RefusedRequest, Tenant
from accounts.trail import audit_log
from accounts.trail.refusals import Refusal
from inference import settlement
from inference.api import cancelling
from inference.api.errors import field_error, validation_refusal
from inference.api.operator import reports
from inference.api.operator.base import OperatorView, registration_refusal
from inference.api.operator.paging import Pages, read_query
from inference.api.operator.serializers import (
    AdjustForm,
    BatchSerializer,
    IssuedKeySerializer,
    IssueForm,
    KeySerializer,
    LedgerSerializer,
    LimitRuleSerializer,
    PeriodSerializer,
    PlanSerializer,
    PriceSerializer,
    QuotaRaiseSerializer,
    RefusedSerializer,
    RegisterForm,
    RotateForm,
    ServedModelSerializer,
    TenantSerializer,
)
from inference.batches import book
from inference.batches.models import Batch
from inference.catalog import model_rows
from inference.models import ServedModel
from inference.vetting.inspection import RegistrationError

PARAMETERS = {"text": OpenApiParameter("format", str, enum=["text", "json", "md"])}


class PlanViewSet(OperatorView, viewsets.ModelViewSet[Plan]):
    """Plans of limits. A plan that tenants use cannot be deleted (409)."""

    queryset = Plan.objects.order_by("name")
    serializer_class = PlanSerializer
    pagination_class = Pages
    http_method_names = ["get", "post", "patch", "delete"]


class TenantViewSet(
    OperatorView,
    mixins.CreateModelMixin,
    mixins.RetrieveModelMixin,
    mixins.UpdateModelMixin,
    mixins.ListModelMixin,
    viewsets.GenericViewSet[Tenant],
):
    """Tenants. PATCH {"status": "suspended"} closes all keys of one; set quotas in limit_overrides."""

    queryset = Tenant.objects.select_related("plan").order_by("name")
    serializer_class = TenantSerializer
    pagination_class = Pages
    http_method_names = ["get", "post", "patch"]

    def perform_update(self, serializer: BaseSerializer[Tenant]) -> None:
        tenant = serializer.save()
        if tenant.status == Tenant.Status.SUSPENDED:
            cancelling.cancel_all(tenant_id=tenant.pk)


class KeyViewSet(
    OperatorView,
    mixins.RetrieveModelMixin,
    mixins.UpdateModelMixin,
    mixins.ListModelMixin,
    viewsets.GenericViewSet[APIKey],
):
    """API keys. Their text is in the answer of POST and of rotate, once."""

    queryset = APIKey.objects.select_related("tenant__plan").order_by("-id")
    serializer_class = KeySerializer
    pagination_class = Pages
    http_method_names = ["get", "post", "patch", "delete"]

    @extend_schema(request=IssueForm, responses={201: IssuedKeySerializer})
    def create(self, request: Request) -> Response:
        """Issue a key."""
        form = IssueForm(data=request.data)
        form.is_valid(raise_exception=True)
        try:
            key, text = issuing.issue(**form.validated_data)
        except issuing.IssuingError as error:
            raise validation_refusal([field_error(("expires_at",), str(error), "invalid")]) from error
        return _issued(key, text)

    @extend_schema(request=RotateForm, responses={201: IssuedKeySerializer})
    @action(detail=True, methods=["post"])
    def rotate(self, request: Request, pk: str = "") -> Response:
        """Issue a successor with the same rights and the same quota."""
        form = RotateForm(data=request.data)
        form.is_valid(raise_exception=True)
        try:
            key, text = issuing.rotate(self.get_object(), form.validated_data["overlap_seconds"])
        except issuing.IssuingError as error:
            raise Refusal("conflict", str(error)) from error
        return _issued(key, text)

    @extend_schema(request=None, responses=KeySerializer)
    @action(detail=True, methods=["post"])
    def revoke(self, request: Request, pk: str = "") -> Response:
        """End the key now, with what it has running."""
        return Response(KeySerializer(self._revoke()).data)

    @extend_schema(responses={204: None})
    def destroy(self, request: Request, pk: str = "") -> Response:
        """As revoke: the row stays, its ledger needs it."""
        self._revoke()
        return Response(status=204)

    def _revoke(self) -> APIKey:
        key = self.get_object()
        issuing.revoke(key)
        cancelling.cancel_all(key_id=key.pk)
        return key


def _issued(key: APIKey, text: str) -> Response:
    return Response({**KeySerializer(key).data, "key": text}, status=201)


class QuotaViewSet(
    OperatorView, mixins.RetrieveModelMixin, mixins.ListModelMixin, viewsets.GenericViewSet[QuotaPeriod]
):
    """Usage by period: of a tenant where `key` is null, else of one key."""

    queryset = QuotaPeriod.objects.select_related("tenant", "key").order_by("-starts_at", "-id")
    serializer_class = PeriodSerializer
    pagination_class = Pages

    @extend_schema(request=AdjustForm, responses={200: PeriodSerializer(many=True)})
    @action(detail=False, methods=["post"])
    def adjust(self, request: Request) -> Response:
        """Correct what was used in the current period; negative numbers give back."""
        form = AdjustForm(data=request.data)
        form.is_valid(raise_exception=True)
        order, now = form.validated_data, timezone.now()
        tenant = order["tenant"]
        try:
            adjusting.adjust(
                tenant,
                order.get("key"),
                tokens=order["tokens"],
                requests=order["requests"],
                cost=order["cost"],
                reason=order["reason"],
                now=now,
            )
        except ValueError as error:
            raise Refusal("conflict", str(error)) from error
        rows = self.get_queryset().filter(tenant=tenant, starts_at__lte=now, ends_at__gt=now)[:200]
        return Response(PeriodSerializer(rows, many=True).data)


class PriceViewSet(
    OperatorView,
    mixins.CreateModelMixin,
    mixins.DestroyModelMixin,
    mixins.ListModelMixin,
    viewsets.GenericViewSet[Price],
):
    """Prices of a million tokens. A change is a new row with a later `valid_from`; what was settled keeps its cost."""

    queryset = Price.objects.order_by("model", "-valid_from")
    serializer_class = PriceSerializer
    pagination_class = Pages


class LimitRuleViewSet(
    OperatorView,
    mixins.CreateModelMixin,
    mixins.DestroyModelMixin,
    mixins.ListModelMixin,
    viewsets.GenericViewSet[LimitRule],
):
    """Other values of limits for a time. Of several in force at once the one that was made last counts."""

    queryset = LimitRule.objects.select_related("plan", "tenant", "key").order_by("-id")
    serializer_class = LimitRuleSerializer
    pagination_class = Pages

    def perform_create(self, serializer: BaseSerializer[LimitRule]) -> None:
        rule = LimitRule(**serializer.validated_data)
        limit_rules.save(rule)
        serializer.instance = rule


class QuotaRaiseViewSet(
    OperatorView,
    mixins.CreateModelMixin,
    mixins.RetrieveModelMixin,
    mixins.ListModelMixin,
    viewsets.GenericViewSet[QuotaRaise],
):
    """More tokens a month than QUOTA_APPROVAL_TOKENS: one key asks, another one approves."""

    queryset = QuotaRaise.objects.select_related("tenant").order_by("-id")
    serializer_class = QuotaRaiseSerializer
    pagination_class = Pages

    def perform_create(self, serializer: BaseSerializer[QuotaRaise]) -> None:
        serializer.instance = raises.ask(**serializer.validated_data)

    @extend_schema(request=None, responses=QuotaRaiseSerializer)
    @action(detail=True, methods=["post"])
    def approve(self, request: Request, pk: str = "") -> Response:
        """In force at once. 409 for what the same key asked, and for what was decided before."""
        return self._decide(approve=True)

    @extend_schema(request=None, responses=QuotaRaiseSerializer)
    @action(detail=True, methods=["post"])
    def refuse(self, request: Request, pk: str = "") -> Response:
        """Say no. 409 for what was decided before."""
        return self._decide(approve=False)

    def _decide(self, *, approve: bool) -> Response:
        try:
            row = raises.decide(self.get_object().pk, approve=approve)
        except RaiseError as error:
            raise Refusal("conflict", str(error.message)) from error
        return Response(QuotaRaiseSerializer(row).data)


class RefusalViewSet(OperatorView, mixins.ListModelMixin, viewsets.GenericViewSet[RefusedRequest]):
    """Requests that were refused, newest first; read-only."""

    queryset = RefusedRequest.objects.select_related("tenant", "key").order_by("-id")
    serializer_class = RefusedSerializer
    pagination_class = Pages


class LedgerViewSet(OperatorView, mixins.ListModelMixin, viewsets.GenericViewSet[LedgerEntry]):
    """Movements of quota, newest first; read-only."""

    queryset = LedgerEntry.objects.order_by("-id")
    serializer_class = LedgerSerializer
    pagination_class = Pages


class ServedModelViewSet(OperatorView, viewsets.ModelViewSet[ServedModel]):
    """Served models. POST registers a file by its path on the server: it is hashed, read and loaded for a trial."""

    queryset = ServedModel.objects.select_related("draft_model").prefetch_related("granted_tenants").order_by("name")
    serializer_class = ServedModelSerializer
    pagination_class = Pages
    http_method_names = ["get", "post", "patch", "delete"]

    def get_queryset(self) -> QuerySet[ServedModel]:
        return ServedModel.objects.select_related("draft_model").prefetch_related("granted_tenants").order_by("name")

    @extend_schema(request=RegisterForm, responses={201: ServedModelSerializer})
    def create(self, request: Request) -> Response:
        """Register a file, or register it anew under the same name."""
        form = RegisterForm(data=request.data)
        form.is_valid(raise_exception=True)
        values = dict(form.validated_data)
        row = _register(values.pop("path"), values.pop("name"), values)
        return Response(ServedModelSerializer(row).data, status=201)

    @extend_schema(request=ServedModelSerializer, responses=ServedModelSerializer)
    def partial_update(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        """Change options; the file stays."""
        row = self.get_object()
        form = ServedModelSerializer(row, data=request.data, partial=True)
        form.is_valid(raise_exception=True)
        return Response(ServedModelSerializer(_register(row.path, row.name, dict(form.validated_data))).data)

    @extend_schema(responses={204: None})
    def destroy(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        """Forget a model; its file and its receipts stay."""
        model_rows.remove([self.get_object().pk])
        return Response(status=204)


def _register(path: str, name: str, options: dict[str, Any]) -> ServedModel:
    default = options.pop("is_default", None)
    try:
        return model_rows.register(path, name, default=default or None, **options)
    except RegistrationError as error:
        raise registration_refusal(error) from error


class BatchViewSet(OperatorView, mixins.RetrieveModelMixin, mixins.ListModelMixin, viewsets.GenericViewSet[Batch]):
    """Batches of all tenants, newest first."""

    queryset = Batch.objects.select_related("tenant", "key").order_by("-created_at", "-id")
    serializer_class = BatchSerializer
    pagination_class = Pages

    @extend_schema(request=None, responses=BatchSerializer)
    @action(detail=True, methods=["post"])
    def cancel(self, request: Request, pk: str = "") -> Response:
        """Begin nothing more of it; what runs may end. 409 where it has ended."""
        batch = self.get_object()
        if not book.cancel(batch.pk, timezone.now()):
            raise Refusal("conflict", f"A batch that is {batch.status} cannot be cancelled.")
        audit_log.acted(batch, {"status": (batch.status, Batch.Status.CANCELLING)})
        batch.refresh_from_db()
        return Response(BatchSerializer(batch).data)


class UsageView(OperatorView):
    """Usage of every key that was used."""

    @extend_schema(responses=reports.UsageRows, operation_id="admin_usage")
    def get(self, request: Request) -> Response:
        settlement.catch_up()
        return Response({"results": reports.usage_by_key()})


class LogsView(OperatorView):
    """Receipts, newest first."""

    @extend_schema(parameters=[reports.LogQuery], responses=reports.LogPage, operation_id="admin_logs")
    def get(self, request: Request) -> Response:
        query = read_query(reports.LogQuery, request)
        settlement.catch_up()
        return Response(reports.log_page(query))


class StatsView(OperatorView):
    """Totals of a window of days, and by model."""

    @extend_schema(parameters=[reports.StatsQuery], responses=OpenApiTypes.OBJECT, operation_id="admin_stats")
    def get(self, request: Request) -> Response:
        query = read_query(reports.StatsQuery, request)
        settlement.catch_up()
        return Response(reports.stats(query["window_days"], timezone.now()))


class SummaryView(OperatorView):
    """The stats as text, JSON or Markdown."""

    @extend_schema(
        parameters=[reports.SummaryQuery],
        responses={200: OpenApiTypes.OBJECT, (200, "text/plain"): str, (200, "text/markdown"): str},
        operation_id="admin_summary",
    )
    def get(self, request: Request) -> Response | HttpResponse:
        query = read_query(reports.SummaryQuery, request)
        found = reports.stats(query["window_days"], timezone.now())
        if query["format"] == "json":
            return Response(found)
        if query["format"] == "md":
            return HttpResponse(reports.as_markdown(found), content_type="text/markdown; charset=utf-8")
        return HttpResponse(reports.as_text(found), content_type="text/plain; charset=utf-8")

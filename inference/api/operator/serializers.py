"""Forms of the operator's API. Secrets are in none of them: a key's text is added once, by the view that issued it."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any, TypeVar

from django.core.exceptions import ValidationError as ModelValidationError
from django.db.models import Model
from rest_framework import serializers

from accounts.identity import origins
from accounts.limits.precedence import LIMIT_NAMES, MAX_LIMIT
from accounts.models import (
    APIKey,
    LedgerEntry,
    LimitRule,
    Plan,
    Price,
    QuotaPeriod,
    QuotaRaise,
    RefusedRequest,
    Scope,
    Tenant,
    validate_allowed,
    validate_limits,
    validate_origins,
)
from inference.batches.models import Batch
from inference.catalog import model_rows
from inference.models import Receipt, ServedModel

MAX_PATH = 1000
ALLOWED = ("allowed_models", "allowed_adapters")
Form = serializers.Serializer[Any]
Row = TypeVar("Row", bound=Model)


def _valid(value: Any, validate: Callable[[object], None]) -> Any:
    """The value, or the row's own objection in the serializer's form."""
    try:
        validate(value)
    except ModelValidationError as error:
        raise serializers.ValidationError(list(error.messages)) from error
    return value


class LimitsField(serializers.JSONField):
    """{"requests_per_minute": 60}: names of limits with null or a whole number."""

    def to_internal_value(self, data: Any) -> Any:
        return _valid(super().to_internal_value(data), validate_limits)


class NamesField(serializers.JSONField):
    """["small"]: a list of names; null is every one."""

    def to_internal_value(self, data: Any) -> Any:
        return _valid(super().to_internal_value(data), validate_allowed)


class OriginsField(serializers.ListField):
    """["https://app.example.org"], or ["*"]."""

    def to_internal_value(self, data: Any) -> Any:
        return _valid(super().to_internal_value(data), validate_origins)


def limit_field() -> serializers.IntegerField:
    return serializers.IntegerField(min_value=0, max_value=MAX_LIMIT, allow_null=True, required=False)


class WritesWhatIsGiven(serializers.ModelSerializer[Row]):
    """A PATCH writes the fields that it names and no others: what was read with them may have changed since. A key that
    was revoked meanwhile stays so."""

    def update(self, instance: Row, validated_data: dict[str, Any]) -> Row:
        for name, value in validated_data.items():
            setattr(instance, name, value)
        instance.save(update_fields=list(validated_data))
        return instance


class PlanSerializer(WritesWhatIsGiven[Plan]):
    class Meta:
        model = Plan
        fields = [
            "id",
            "name",
            "role",
            *LIMIT_NAMES,
            *ALLOWED,
            "redis_outage_policy",
            "weight",
            "max_slots",
            "created_at",
        ]
        read_only_fields = ["created_at"]

    def get_fields(self) -> dict[str, serializers.Field[Any, Any, Any, Any]]:
        return {**super().get_fields(), **{name: limit_field() for name in LIMIT_NAMES}}


class TenantSerializer(WritesWhatIsGiven[Tenant]):
    plan = serializers.SlugRelatedField(slug_field="name", queryset=Plan.objects.all())
    limit_overrides = LimitsField(required=False)
    allowed_origins = OriginsField(
        child=serializers.CharField(max_length=origins.MAX_ORIGIN_LENGTH),
        max_length=origins.MAX_ORIGINS,
        required=False,
        help_text="Web pages that browsers let ask with the tenant's keys; `*` alone: all.",
    )

    class Meta:
        model = Tenant
        own = ["id", "name", "status", "plan", "limit_overrides", *ALLOWED, "quota_anchor_day"]
        fields = [*own, "response_days", "allowed_origins", "created_at"]
        read_only_fields = ["created_at"]


class KeySerializer(WritesWhatIsGiven[APIKey]):
    """What may be known of a key after it was issued."""

    tenant = serializers.SlugRelatedField[Tenant](slug_field="name", read_only=True)
    key_prefix = serializers.CharField(source="display", read_only=True)
    role = serializers.CharField(source="tenant.plan.role", read_only=True)
    disabled = serializers.SerializerMethodField()
    limit_overrides = LimitsField(required=False)

    class Meta:
        model = APIKey
        fields = [
            "id",
            "public_id",
            "key_prefix",
            "name",
            "tenant",
            "role",
            "scopes",
            "limit_overrides",
            *ALLOWED,
            "disabled",
            "created_at",
            "expires_at",
            "revoked_at",
            "last_used_at",
        ]
        read_only_fields = ["public_id", "scopes", "created_at", "revoked_at", "last_used_at"]

    def get_disabled(self, key: APIKey) -> bool:
        return key.revoked_at is not None


class QuotaRaiseSerializer(serializers.ModelSerializer[QuotaRaise]):
    tenant = serializers.SlugRelatedField(slug_field="name", queryset=Tenant.objects.all())
    monthly_tokens = serializers.IntegerField(min_value=0, max_value=MAX_LIMIT, allow_null=True)

    class Meta:
        model = QuotaRaise
        decided = ["state", "asked_by", "asked_at", "decided_by", "decided_at"]
        fields = ["id", "tenant", "monthly_tokens", "ends_at", "reason", *decided]
        read_only_fields = decided


class IssueForm(Form):
    """POST /v1/admin/keys."""

    tenant = serializers.SlugRelatedField(slug_field="name", queryset=Tenant.objects.all())
    name = serializers.CharField(max_length=100)
    scopes = serializers.ListField(
        child=serializers.ChoiceField(choices=Scope.choices), min_length=1, max_length=len(Scope), required=False
    )
    limits = LimitsField(required=False)
    allowed_models = NamesField(required=False, allow_null=True)
    allowed_adapters = NamesField(required=False, allow_null=True)
    expires_at = serializers.DateTimeField(required=False, allow_null=True)


class IssuedKeySerializer(KeySerializer):
    """The only answer that holds a key's text."""

    key = serializers.CharField(read_only=True, help_text="Shown this once; it is kept nowhere.")

    class Meta(KeySerializer.Meta):
        fields = [*KeySerializer.Meta.fields, "key"]


class RotateForm(Form):
    overlap_seconds = serializers.IntegerField(
        min_value=0, max_value=90 * 86400, default=0, help_text="Time for which the old key still works."
    )


class PeriodSerializer(serializers.ModelSerializer[QuotaPeriod]):
    tenant = serializers.SlugRelatedField[Tenant](slug_field="name", read_only=True)
    key = serializers.SlugRelatedField[APIKey](slug_field="public_id", read_only=True, allow_null=True)

    class Meta:
        model = QuotaPeriod
        fields = [
            "id",
            "tenant",
            "key",
            "starts_at",
            "ends_at",
            "used_tokens",
            "reserved_tokens",
            "used_requests",
            "reserved_requests",
        ]
        read_only_fields = fields


class AdjustForm(Form):
    """A correction by hand; it becomes a ledger entry with its reason."""

    tenant = serializers.SlugRelatedField(slug_field="name", queryset=Tenant.objects.all())
    key = serializers.SlugRelatedField(slug_field="public_id", queryset=APIKey.objects.all(), required=False)
    tokens = serializers.IntegerField(min_value=-MAX_LIMIT, max_value=MAX_LIMIT, default=0)
    requests = serializers.IntegerField(min_value=-MAX_LIMIT, max_value=MAX_LIMIT, default=0)
    cost = serializers.DecimalField(
        max_digits=18, decimal_places=9, default=Decimal(0), help_text="In the currency; negative is a credit."
    )
    reason = serializers.CharField(max_length=200)

    def validate(self, attrs: dict[str, Any]) -> dict[str, Any]:
        key = attrs.get("key")
        if key is not None and key.tenant_id != attrs["tenant"].pk:
            raise serializers.ValidationError({"key": "This key belongs to another tenant."})
        return attrs


class PriceSerializer(serializers.ModelSerializer[Price]):
    """Of a million tokens, from a moment on."""

    class Meta:
        model = Price
        fields = [
            "id",
            "model",
            "valid_from",
            "input_per_million",
            "cached_input_per_million",
            "output_per_million",
            "created_at",
        ]
        read_only_fields = ["created_at"]


class LimitRuleSerializer(serializers.ModelSerializer[LimitRule]):
    """Another value of a limit for a time, of a plan, a tenant or a key: one of them."""

    plan = serializers.SlugRelatedField(
        slug_field="name", queryset=Plan.objects.all(), required=False, allow_null=True, default=None
    )
    tenant = serializers.SlugRelatedField(
        slug_field="name", queryset=Tenant.objects.all(), required=False, allow_null=True, default=None
    )
    key = serializers.SlugRelatedField(
        slug_field="public_id", queryset=APIKey.objects.all(), required=False, allow_null=True, default=None
    )
    value = serializers.IntegerField(min_value=0, max_value=MAX_LIMIT, allow_null=True)

    class Meta:
        model = LimitRule
        fields = [
            "id",
            "plan",
            "tenant",
            "key",
            "limit",
            "value",
            "starts_at",
            "ends_at",
            "recurrence",
            "daily_from",
            "daily_until",
            "last_days",
            "reason",
            "created_at",
        ]
        read_only_fields = ["created_at"]


class RefusedSerializer(serializers.ModelSerializer[RefusedRequest]):
    """Why a request was refused."""

    tenant = serializers.SlugRelatedField[Tenant](slug_field="name", read_only=True, allow_null=True)
    key = serializers.SlugRelatedField[APIKey](slug_field="public_id", read_only=True, allow_null=True)

    class Meta:
        model = RefusedRequest
        fields = [
            "request_id",
            "tenant",
            "key",
            "route",
            "code",
            "limit",
            "bound_to",
            "value",
            "frees_at",
            "message",
            "num_more",
            "created_at",
        ]
        read_only_fields = fields


class LedgerSerializer(serializers.ModelSerializer[LedgerEntry]):
    class Meta:
        model = LedgerEntry
        fields = [
            "id",
            "kind",
            "request_id",
            "tenant_period",
            "key_period",
            "reserved_tokens",
            "used_tokens",
            "reserved_requests",
            "used_requests",
            "model",
            "adapters",
            "operation",
            "prompt_tokens",
            "cached_tokens",
            "completion_tokens",
            "cost_nanos",
            "reason",
            "created_at",
        ]
        read_only_fields = fields


OPTION_FIELDS = [*model_rows.OPTIONS, "granted_tenants"]


class ServedModelSerializer(serializers.ModelSerializer[ServedModel]):
    aliases = serializers.ListField(child=serializers.CharField(max_length=100), max_length=32, required=False)
    capabilities = serializers.DictField(child=serializers.BooleanField(), required=False)
    granted_tenants = serializers.SlugRelatedField(
        slug_field="name", queryset=Tenant.objects.all(), many=True, required=False
    )
    draft_model = serializers.SlugRelatedField(
        slug_field="name", queryset=ServedModel.objects.all(), required=False, allow_null=True
    )
    notes = serializers.CharField(max_length=10_000, required=False, allow_blank=True)
    keep_alive_seconds = serializers.IntegerField(min_value=0, max_value=10**9, required=False, allow_null=True)

    class Meta:
        model = ServedModel
        fields = [
            "id",
            "name",
            "path",
            "is_default",
            *OPTION_FIELDS,
            "chat_facts",
            "digest",
            "size_bytes",
            "metadata",
            "created_at",
        ]
        read_only_fields = ["name", "path", "chat_facts", "digest", "size_bytes", "metadata", "created_at"]


class RegisterForm(ServedModelSerializer):
    """POST /v1/admin/models: a file on the server's disk, by path."""

    name = serializers.CharField(max_length=100)
    path = serializers.CharField(max_length=MAX_PATH)

    class Meta(ServedModelSerializer.Meta):
        fields = ["name", "path", "is_default", *OPTION_FIELDS]
        read_only_fields = []


class LoadForm(Form):
    model_id = serializers.CharField(
        max_length=100, required=False, allow_null=True, help_text="A name or alias; absent is the default model."
    )


class PinForm(LoadForm):
    pinned = serializers.BooleanField(default=True, help_text="false: it may be unloaded again.")


class LoadedModelSerializer(Form):
    """A model as the workers have it."""

    id = serializers.CharField()
    default = serializers.BooleanField()
    load_mode = serializers.CharField()
    pinned = serializers.BooleanField()
    loaded = serializers.BooleanField()
    state = serializers.CharField(help_text="ready, loading, waiting, retiring, unloaded, failed, off or missing")
    progress = serializers.FloatField(allow_null=True)
    load_seconds = serializers.FloatField(allow_null=True, help_text="Expected time of a load.")
    memory_bytes = serializers.IntegerField(help_text="Estimated, all of it.")
    error = serializers.CharField(allow_blank=True)


class LoadReplySerializer(Form):
    """What is asked for happens soon: `models` says how far it is."""

    ok = serializers.BooleanField()
    already_loaded = serializers.BooleanField()
    default_model = serializers.CharField(allow_null=True)
    models = LoadedModelSerializer(many=True)


class ReceiptSerializer(serializers.ModelSerializer[Receipt]):
    """One line of the log: no prompt and no output, because a receipt holds none."""

    tenant = serializers.SlugRelatedField[Tenant](slug_field="name", read_only=True)
    api_key = serializers.CharField(source="key.public_id", read_only=True)
    latency_ms = serializers.SerializerMethodField()

    class Meta:
        model = Receipt
        fields = [
            "request_id",
            "parent_id",
            "tenant",
            "api_key",
            "model",
            "adapters",
            "aliases",
            "route",
            "status",
            "finish_reason",
            "error_code",
            "cached",
            "prompt_tokens",
            "cached_tokens",
            "completion_tokens",
            "drafted_tokens",
            "accepted_tokens",
            "charged_tokens",
            "queue_seconds",
            "prefill_seconds",
            "decode_seconds",
            "total_seconds",
            "latency_ms",
            "num_steps",
            "mean_batch_size",
            "mean_decode_batch_size",
            "seed",
            "worker",
            "created_at",
            "finished_at",
        ]
        read_only_fields = fields

    def get_latency_ms(self, receipt: Receipt) -> float:
        return round(receipt.total_seconds * 1000, 2)


class BatchSerializer(serializers.ModelSerializer[Batch]):
    """How far a batch is; nothing of what is in it."""

    tenant = serializers.SlugRelatedField[Tenant](slug_field="name", read_only=True)
    key = serializers.SlugRelatedField[APIKey](slug_field="public_id", read_only=True)

    class Meta:
        model = Batch
        fields = [
            "id",
            "tenant",
            "key",
            "endpoint",
            "status",
            "num_lines",
            "num_completed",
            "num_failed",
            "created_at",
            "expires_at",
            "completed_at",
        ]

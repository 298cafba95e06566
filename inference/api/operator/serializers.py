"""Forms of the operator's API. Secrets are in none of them: a key's text is added once, by the view that issued it."""

from __future__ import annotations

from typing import Any

from django.core.exceptions import ValidationError as ModelValidationError
from rest_framework import serializers

from accounts.limits import LIMIT_NAMES, MAX_LIMIT
from accounts.models import APIKey, LedgerEntry, Plan, QuotaPeriod, Scope, Tenant, validate_limits
from inference.models import Receipt, ServedModel

MAX_PATH = 1000
Form = serializers.Serializer[Any]


class LimitsField(serializers.JSONField):
    """{"requests_per_minute": 60}: names of limits with null or a whole number."""

    def to_internal_value(self, data: Any) -> Any:
        value = super().to_internal_value(data)
        try:
            validate_limits(value)
        except ModelValidationError as error:
            raise serializers.ValidationError(list(error.messages)) from error
        return value


def limit_field() -> serializers.IntegerField:
    return serializers.IntegerField(min_value=0, max_value=MAX_LIMIT, allow_null=True, required=False)


class PlanSerializer(serializers.ModelSerializer[Plan]):
    class Meta:
        model = Plan
        fields = ["id", "name", "role", *LIMIT_NAMES, "created_at"]
        read_only_fields = ["created_at"]

    def get_fields(self) -> dict[str, serializers.Field[Any, Any, Any, Any]]:
        return {**super().get_fields(), **{name: limit_field() for name in LIMIT_NAMES}}


class TenantSerializer(serializers.ModelSerializer[Tenant]):
    plan = serializers.SlugRelatedField(slug_field="name", queryset=Plan.objects.all())
    limit_overrides = LimitsField(required=False)

    class Meta:
        model = Tenant
        fields = ["id", "name", "status", "plan", "limit_overrides", "quota_anchor_day", "created_at"]
        read_only_fields = ["created_at"]


class KeySerializer(serializers.ModelSerializer[APIKey]):
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
            "disabled",
            "created_at",
            "expires_at",
            "revoked_at",
            "last_used_at",
        ]
        read_only_fields = ["public_id", "scopes", "created_at", "revoked_at", "last_used_at"]

    def get_disabled(self, key: APIKey) -> bool:
        return key.revoked_at is not None


class IssueForm(Form):
    """POST /v1/admin/keys."""

    tenant = serializers.SlugRelatedField(slug_field="name", queryset=Tenant.objects.all())
    name = serializers.CharField(max_length=100)
    scopes = serializers.ListField(
        child=serializers.ChoiceField(choices=Scope.choices), min_length=1, max_length=len(Scope), required=False
    )
    limits = LimitsField(required=False)
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
    reason = serializers.CharField(max_length=200)

    def validate(self, attrs: dict[str, Any]) -> dict[str, Any]:
        key = attrs.get("key")
        if key is not None and key.tenant_id != attrs["tenant"].pk:
            raise serializers.ValidationError({"key": "This key belongs to another tenant."})
        return attrs


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
            "prompt_tokens",
            "cached_tokens",
            "completion_tokens",
            "reason",
            "created_at",
        ]
        read_only_fields = fields


OPTION_FIELDS = [
    "aliases",
    "visibility",
    "granted_tenants",
    "pool",
    "n_ctx",
    "n_slots",
    "n_lanes",
    "n_threads",
    "n_gpu_layers",
    "kv_type",
    "context_shift",
    "draft_kind",
    "draft_model",
    "draft_n_min",
    "draft_n_max",
    "draft_p_min",
    "draft_policy",
    "load_mode",
    "keep_alive_seconds",
    "capabilities",
    "chat_template",
    "notes",
]


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

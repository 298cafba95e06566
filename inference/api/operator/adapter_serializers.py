"""Forms of the operator's API for adapters, their aliases, and variants of models."""

from __future__ import annotations

from rest_framework import serializers

from accounts.models import Tenant
from inference.api.operator.serializers import MAX_PATH, Form
from inference.catalog.version_figures import MAX_HOURS
from inference.models import MAX_SCALE, Adapter, AdapterAlias, ModelVariant, ServedModel


def model_field() -> serializers.SlugRelatedField[ServedModel]:
    return serializers.SlugRelatedField(slug_field="name", queryset=ServedModel.objects.all())


def tenant_field() -> serializers.SlugRelatedField[Tenant]:
    return serializers.SlugRelatedField(slug_field="name", queryset=Tenant.objects.all())


class AdapterSerializer(serializers.ModelSerializer[Adapter]):
    """`granted`: tenant → its id of the adapter in llama.cpp's dialect."""

    model = serializers.CharField(source="base_model.name", read_only=True)
    default_scale = serializers.FloatField(min_value=-MAX_SCALE, max_value=MAX_SCALE, required=False)
    owner = serializers.SlugRelatedField(
        slug_field="name", queryset=Tenant.objects.all(), required=False, allow_null=True
    )
    granted = serializers.SerializerMethodField()

    class Meta:
        model = Adapter
        options = ["default_scale", "owner", "visibility", "enabled"]
        facts = ["digest", "size_bytes", "rank", "alpha", "targets", "task_name", "prompt_prefix", "metadata"]
        fields = ["id", "name", "model", "path", *options, *facts, "granted", "created_at"]
        read_only_fields = ["name", "path", *facts, "created_at"]

    def get_granted(self, row: Adapter) -> dict[str, int]:
        return {grant.tenant.name: grant.position for grant in row.grants.all()}


class RegisterAdapterForm(AdapterSerializer):
    """POST /v1/admin/adapters: a file on the server's disk, by path."""

    model = model_field()  # type: ignore[assignment]  # written here, read there
    name = serializers.CharField(max_length=64)
    path = serializers.CharField(max_length=MAX_PATH)

    class Meta(AdapterSerializer.Meta):
        fields = ["name", "model", "path", *AdapterSerializer.Meta.options]
        read_only_fields: list[str] = []
        validators: list[object] = []  # the same name again registers another file under it


class GrantForm(Form):
    tenant = tenant_field()


class VariantSerializer(serializers.ModelSerializer[ModelVariant]):
    """`stale`: made of another file than the model has now."""

    model = serializers.CharField(source="base_model.name")
    stale = serializers.SerializerMethodField()

    class Meta:
        model = ModelVariant
        fields = [
            "id",
            "name",
            "model",
            "is_active",
            "stale",
            "path",
            "digest",
            "size_bytes",
            "n_threads",
            "flash_attention",
            "measured",
            "created_at",
        ]
        read_only_fields = fields

    def get_stale(self, row: ModelVariant) -> bool:
        return row.source_digest != row.base_model.digest


class AliasSerializer(serializers.ModelSerializer[AdapterAlias]):
    """Names of adapters of the model; `share` is in percent."""

    model = serializers.CharField(source="base_model.name", read_only=True)
    target = serializers.CharField(source="target.name", max_length=64)
    canary = serializers.CharField(source="canary.name", max_length=64, allow_null=True, required=False)
    share = serializers.IntegerField(min_value=0, max_value=100, required=False)
    previous = serializers.CharField(source="previous.name", read_only=True, allow_null=True)

    class Meta:
        model = AdapterAlias
        fields = ["id", "name", "model", "target", "canary", "share", "previous", "created_at", "updated_at"]
        read_only_fields = ["name", "created_at", "updated_at"]


class ForceForm(Form):
    force = serializers.BooleanField(
        default=False, help_text="Also where tenants that may use the version of now may not use the new one."
    )


class AliasChangeForm(ForceForm):
    """PATCH: what is absent stays. canary null ends the trial."""

    target = serializers.CharField(max_length=64, required=False)
    canary = serializers.CharField(max_length=64, required=False, allow_null=True)
    share = serializers.IntegerField(min_value=0, max_value=100, required=False)


class AliasForm(AliasChangeForm):
    """POST /v1/admin/aliases."""

    model = model_field()
    name = serializers.CharField(max_length=64)
    target = serializers.CharField(max_length=64)


class CompareQuery(Form):
    hours = serializers.IntegerField(min_value=1, max_value=MAX_HOURS, default=24, help_text="Back from now.")


class VersionFiguresSerializer(Form):
    """One version, of the requests that came by the alias."""

    version = serializers.CharField()
    requests = serializers.IntegerField()
    completed = serializers.IntegerField()
    cancelled = serializers.IntegerField()
    failed = serializers.IntegerField()
    failed_percent = serializers.FloatField(allow_null=True)
    first_token_p50_seconds = serializers.FloatField(allow_null=True)
    first_token_p95_seconds = serializers.FloatField(allow_null=True)
    tokens_per_second = serializers.FloatField(allow_null=True)


class ComparisonSerializer(Form):
    alias = serializers.CharField()
    hours = serializers.IntegerField()
    versions = VersionFiguresSerializer(many=True)

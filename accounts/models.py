"""The rows of the month's clock: plans, tenants, members, keys, quota periods, reservations, the ledger.

accounts/quotas.py alone writes periods, reservations and ledger entries; the ledger is append-only.
"""

from __future__ import annotations

from datetime import datetime

from django.conf import settings
from django.core.exceptions import ValidationError
from django.core.validators import MaxValueValidator, MinValueValidator
from django.db import models
from django.db.models import F, Q
from django.utils import timezone

from accounts.limits import LIMIT_NAMES, Limits, validate_overrides


def validate_limits(value: object) -> None:
    """Limits.overridden's rules, as a form error."""
    try:
        validate_overrides(value)
    except ValueError as error:
        raise ValidationError(str(error)) from error


class Role(models.TextChoices):
    ADMIN = "admin", "Admin"
    STANDARD = "standard", "Standard"
    FREE = "free", "Free"


def limit_field(help_text: str) -> models.BigIntegerField[int | None, int | None]:
    return models.BigIntegerField(
        null=True,
        blank=True,
        validators=[MinValueValidator(0), MaxValueValidator(10**15)],
        help_text=f"{help_text} Empty: unlimited. 0: none at all.",
    )


class Plan(models.Model):
    """A named set of limits that tenants share."""

    name = models.CharField(max_length=64, unique=True)
    role = models.CharField(max_length=16, choices=Role.choices, default=Role.STANDARD)
    requests_per_minute = limit_field("Requests a minute, refused ones included.")
    tokens_per_minute = limit_field("Prompt and output tokens a minute, reserved at admission.")
    concurrent_requests = limit_field("Requests running or waiting at once.")
    queue_length = limit_field("Requests waiting for a slot at once.")
    monthly_tokens = limit_field("Prompt and output tokens a period.")
    monthly_requests = limit_field("Requests a period.")
    max_context = limit_field("Prompt and output tokens of one request together.")
    max_output = limit_field("Output tokens of one request.")
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        ordering = ["name"]

    def __str__(self) -> str:
        return self.name

    @property
    def limits(self) -> Limits:
        return Limits(**{name: getattr(self, name) for name in LIMIT_NAMES})


class Tenant(models.Model):
    """A customer: owns keys, quota and usage."""

    class Status(models.TextChoices):
        ACTIVE = "active", "Active"
        SUSPENDED = "suspended", "Suspended"

    name = models.CharField(max_length=100, unique=True)
    status = models.CharField(max_length=16, choices=Status.choices, default=Status.ACTIVE)
    plan = models.ForeignKey(Plan, on_delete=models.PROTECT, related_name="tenants")
    limit_overrides = models.JSONField(
        default=dict,
        blank=True,
        validators=[validate_limits],
        help_text='Replaces limits of the plan, such as {"monthly_tokens": 1000000}; null is unlimited.',
    )
    quota_anchor_day = models.PositiveSmallIntegerField(
        default=1,
        validators=[MinValueValidator(1), MaxValueValidator(28)],
        help_text="Day of the month (UTC) on which the quota starts anew.",
    )
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        ordering = ["name"]
        constraints = [
            models.CheckConstraint(
                condition=Q(quota_anchor_day__range=(1, 28)), name="tenant_anchor_day_exists_in_every_month"
            ),
        ]

    def __str__(self) -> str:
        return self.name

    @property
    def limits(self) -> Limits:
        """The plan's limits with the tenant's overrides."""
        return self.plan.limits.overridden(self.limit_overrides)


class Membership(models.Model):
    """A person's role in a tenant."""

    class MemberRole(models.TextChoices):
        OWNER = "owner", "Owner"
        MEMBER = "member", "Member"
        VIEWER = "viewer", "Viewer"

    tenant = models.ForeignKey(Tenant, on_delete=models.CASCADE, related_name="memberships")
    user = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="memberships")
    role = models.CharField(max_length=16, choices=MemberRole.choices, default=MemberRole.MEMBER)
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["tenant", "user"], name="membership_once_per_tenant")]

    def __str__(self) -> str:
        return f"{self.user} in {self.tenant}"


class Scope(models.TextChoices):
    """What a key may do. `operator` reaches /v1/admin and /metrics and cannot generate."""

    GENERATE = "generate", "Generate text"
    USAGE = "usage", "Read own usage"
    OPERATOR = "operator", "Operate the installation"


DEFAULT_SCOPES = [Scope.GENERATE.value, Scope.USAGE.value]


def default_scopes() -> list[str]:
    return list(DEFAULT_SCOPES)


def validate_scopes(value: object) -> None:
    """Raises ValidationError unless it is a list of known scopes, each once."""
    if not isinstance(value, list) or not value or len(value) != len({str(scope) for scope in value}):
        raise ValidationError("Give a list of one or more scopes, each once.")
    for scope in value:
        if scope not in Scope.values:
            raise ValidationError(f"{scope!r} is no scope: use {', '.join(Scope.values)}.")


class APIKey(models.Model):
    """A credential of a tenant. Only the HMAC of its secret is kept (accounts/keys.py)."""

    tenant = models.ForeignKey(Tenant, on_delete=models.PROTECT, related_name="api_keys")
    name = models.CharField(max_length=100)
    public_id = models.CharField(
        max_length=12, unique=True, editable=False, help_text="The part of the key that finds this row."
    )
    secret_hash = models.CharField(max_length=64, editable=False)
    pepper_id = models.CharField(max_length=8, editable=False)
    scopes = models.JSONField(default=default_scopes, validators=[validate_scopes])
    limit_overrides = models.JSONField(
        default=dict,
        blank=True,
        validators=[validate_limits],
        help_text="Limits of this key alone, beside the tenant's.",
    )
    expires_at = models.DateTimeField(null=True, blank=True)
    revoked_at = models.DateTimeField(null=True, blank=True)
    quota_key = models.ForeignKey(
        "self",
        null=True,
        blank=True,
        on_delete=models.PROTECT,
        related_name="+",
        editable=False,
        help_text="The first key of a rotation: its periods, rates and places are used by all its successors.",
    )
    rotated_from = models.ForeignKey(
        "self", null=True, blank=True, on_delete=models.SET_NULL, related_name="successors", editable=False
    )
    last_used_at = models.DateTimeField(null=True, blank=True, editable=False)
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        verbose_name = "API key"
        ordering = ["-id"]
        indexes = [models.Index(fields=["tenant", "revoked_at"], name="key_by_tenant")]

    def __str__(self) -> str:
        return f"{self.name} ({self.display})"

    @property
    def display(self) -> str:
        """What may be shown of the key."""
        return f"llms_{self.public_id}_…"

    @property
    def limits(self) -> Limits:
        """The key's own limits: nothing but its overrides. They bind beside the tenant's, whichever is tighter."""
        return Limits().overridden(self.limit_overrides)

    def is_active(self, now: datetime) -> bool:
        return self.revoked_at is None and (self.expires_at is None or self.expires_at > now)


class QuotaPeriod(models.Model):
    """Usage of a tenant (key is null) or of one key between two moments; counters move by conditional UPDATE only."""

    tenant = models.ForeignKey(Tenant, on_delete=models.PROTECT, related_name="periods")
    key = models.ForeignKey(APIKey, null=True, blank=True, on_delete=models.PROTECT, related_name="periods")
    starts_at = models.DateTimeField()
    ends_at = models.DateTimeField()
    used_tokens = models.BigIntegerField(default=0)
    reserved_tokens = models.BigIntegerField(default=0)
    used_requests = models.BigIntegerField(default=0)
    reserved_requests = models.BigIntegerField(default=0)
    prompt_tokens = models.BigIntegerField(default=0, help_text="Of the settled requests, cached ones included.")
    completion_tokens = models.BigIntegerField(default=0, help_text="Of the settled requests.")

    class Meta:
        ordering = ["-starts_at"]
        constraints = [
            models.UniqueConstraint(
                fields=["tenant", "starts_at"], condition=Q(key__isnull=True), name="period_once_per_tenant"
            ),
            models.UniqueConstraint(
                fields=["key", "starts_at"], condition=Q(key__isnull=False), name="period_once_per_key"
            ),
            models.CheckConstraint(condition=Q(ends_at__gt=F("starts_at")), name="period_ends_after_start"),
            models.CheckConstraint(
                condition=Q(reserved_tokens__gte=0, reserved_requests__gte=0, used_tokens__gte=0, used_requests__gte=0),
                name="period_counters_not_negative",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.key or self.tenant} from {self.starts_at:%Y-%m-%d}"


class Reservation(models.Model):
    """Tokens held for a request between admission and settlement. Its id is the request's id."""

    class State(models.TextChoices):
        OPEN = "open", "Open"
        SETTLED = "settled", "Settled"
        RELEASED = "released", "Released"

    request_id = models.CharField(max_length=64, primary_key=True)
    tenant_period = models.ForeignKey(QuotaPeriod, on_delete=models.PROTECT, related_name="+", db_index=False)
    key_period = models.ForeignKey(QuotaPeriod, on_delete=models.PROTECT, related_name="+", db_index=False)
    tokens = models.BigIntegerField()
    state = models.CharField(max_length=8, choices=State.choices, default=State.OPEN)
    expires_at = models.DateTimeField(help_text="After it the sweep releases the reservation.")
    created_at = models.DateTimeField()

    class Meta:
        indexes = [models.Index(fields=["expires_at"], condition=Q(state="open"), name="reservation_open_by_expiry")]

    def __str__(self) -> str:
        return f"{self.request_id}: {self.tokens} tokens, {self.state}"


class LedgerEntry(models.Model):
    """One movement of quota; never changed, never deleted before its retention ends.

    reserved_* and used_* are what the movement added to the periods' counters (negative where it took away).
    On RESERVE, tenant_limit and key_limit are the monthly token limits of that moment and *_committed_after is
    used + reserved just after it, so audit_ledger can prove that no reservation passed its limit.
    """

    class Kind(models.TextChoices):
        RESERVE = "reserve", "Reserve"
        SETTLE = "settle", "Settle"
        RELEASE = "release", "Release"
        ADJUST = "adjust", "Adjust"

    kind = models.CharField(max_length=8, choices=Kind.choices)
    request_id = models.CharField(max_length=64)
    tenant_period = models.ForeignKey(QuotaPeriod, on_delete=models.PROTECT, related_name="+", db_index=False)
    key_period = models.ForeignKey(QuotaPeriod, null=True, on_delete=models.PROTECT, related_name="+", db_index=False)
    reserved_tokens = models.BigIntegerField(default=0)
    used_tokens = models.BigIntegerField(default=0)
    reserved_requests = models.BigIntegerField(default=0)
    used_requests = models.BigIntegerField(default=0)
    tenant_limit = models.BigIntegerField(null=True)
    key_limit = models.BigIntegerField(null=True)
    tenant_committed_after = models.BigIntegerField(null=True)
    key_committed_after = models.BigIntegerField(null=True)
    tenant_request_limit = models.BigIntegerField(null=True)
    key_request_limit = models.BigIntegerField(null=True)
    tenant_requests_after = models.BigIntegerField(null=True)
    key_requests_after = models.BigIntegerField(null=True)
    model = models.CharField(max_length=100, blank=True)
    prompt_tokens = models.BigIntegerField(default=0)
    cached_tokens = models.BigIntegerField(default=0)
    completion_tokens = models.BigIntegerField(default=0)
    reason = models.CharField(max_length=200, blank=True)
    created_at = models.DateTimeField()

    class Meta:
        verbose_name_plural = "ledger entries"
        indexes = [
            models.Index(fields=["tenant_period", "created_at"], name="ledger_by_tenant_period"),
            models.Index(fields=["key_period", "created_at"], name="ledger_by_key_period"),
            models.Index(fields=["created_at"], name="ledger_by_time"),
        ]
        constraints = [
            models.UniqueConstraint(
                fields=["request_id", "kind"], condition=~Q(kind="adjust"), name="ledger_once_per_request_and_kind"
            ),
            models.UniqueConstraint(
                fields=["request_id"], condition=Q(kind__in=["settle", "release"]), name="ledger_ends_a_request_once"
            ),
        ]

    def __str__(self) -> str:
        return f"{self.kind} {self.request_id}"

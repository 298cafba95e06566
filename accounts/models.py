"""The rows of the month's clock: plans, tenants, members, keys, quota periods, reservations, the ledger and its sums.

ledger/quotas.py alone writes periods, reservations, ledger entries and the days' sums; the ledger is append-only.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from decimal import Decimal
from typing import Any

from django.conf import settings
from django.core.exceptions import ValidationError
from django.core.validators import MaxValueValidator, MinValueValidator
from django.db import models
from django.db.models import F, Q
from django.utils import timezone

from accounts.identity import known_keys, origins
from accounts.limits import approval
from accounts.limits.precedence import (
    LIMIT_NAMES,
    MAX_LIMIT,
    NORMAL_WEIGHT,
    Limits,
    validate_names,
    validate_overrides,
)
from accounts.limits.schedules import MAX_LAST_DAYS
from accounts.trail.audited import AuditedManager

MAX_RESPONSE_DAYS = 400
ALERT_PERCENTS = (50, 80, 100)
MAX_WEIGHT = 10_000
MAX_SLOTS = 100_000


def validate_limits(value: object) -> None:
    """Limits.overridden's rules, as a form error."""
    try:
        validate_overrides(value)
    except ValueError as error:
        raise ValidationError(str(error)) from error


def validate_allowed(value: object) -> None:
    """limits.validate_names' rules, as a form error."""
    try:
        validate_names(value)
    except ValueError as error:
        raise ValidationError(str(error)) from error


def validate_origins(value: object) -> None:
    """origins.validate's rules, as a form error."""
    try:
        origins.validate(value)
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


def allowed_field(things: str, example: str) -> models.JSONField[list[str] | None, list[str] | None]:
    return models.JSONField(
        null=True,
        blank=True,
        validators=[validate_allowed],
        help_text=f"The {things} that may be used, of those that are granted, such as {example}. Empty: all of them.",
    )


def allowed_models() -> models.JSONField[list[str] | None, list[str] | None]:
    return allowed_field("models", '["small"]')


def allowed_adapters() -> models.JSONField[list[str] | None, list[str] | None]:
    return allowed_field("adapters", '["formal", "small:verse"]')


class Announced(models.Model):
    """Rows that requests depend on: who saves or deletes one, all processes hear of it when the transaction commits."""

    class Meta:
        abstract = True

    def save(self, *args: Any, **kwargs: Any) -> None:
        super().save(*args, **kwargs)
        self.announce()

    def delete(self, *args: Any, **kwargs: Any) -> tuple[int, dict[str, int]]:
        deleted = super().delete(*args, **kwargs)
        self.announce()
        return deleted

    def announce(self) -> None:
        known_keys.announce_change(known_keys.EVERYTHING)


class Plan(Announced):
    """A named set of limits that tenants share."""

    class OutagePolicy(models.TextChoices):
        INSTALLATION = "", "As REDIS_OUTAGE_POLICY says"
        CLOSED = "closed", "Refuse with 503"
        OPEN = "open", "Let a bounded number through"

    name = models.CharField(max_length=64, unique=True)
    role = models.CharField(max_length=16, choices=Role.choices, default=Role.STANDARD)
    requests_per_minute = limit_field("Requests a minute, refused ones included.")
    tokens_per_minute = limit_field("Prompt and output tokens a minute, reserved at admission.")
    concurrent_requests = limit_field("Requests running or waiting at once.")
    concurrent_streams = limit_field("Streamed answers running or waiting at once.")
    queue_length = limit_field("Requests waiting for a slot at once.")
    monthly_tokens = limit_field("Prompt and output tokens a period.")
    monthly_requests = limit_field("Requests a period.")
    max_context = limit_field("Prompt and output tokens of one request together.")
    max_output = limit_field("Output tokens of one request.")
    allowed_models = allowed_models()
    allowed_adapters = allowed_adapters()
    redis_outage_policy = models.CharField(
        max_length=8,
        choices=OutagePolicy.choices,
        default=OutagePolicy.INSTALLATION,
        blank=True,
        help_text="Requests a minute while they cannot be counted.",
    )
    weight = models.PositiveSmallIntegerField(
        default=NORMAL_WEIGHT,
        validators=[MinValueValidator(1), MaxValueValidator(MAX_WEIGHT)],
        help_text="Share of the slots while others wait, in percent of a normal tenant's: 200 gets twice as much.",
    )
    max_slots = models.PositiveIntegerField(
        null=True,
        blank=True,
        validators=[MinValueValidator(1), MaxValueValidator(MAX_SLOTS)],
        help_text="Requests of a tenant that run at once; others wait, also while slots are free. Empty: any number.",
    )
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    objects = AuditedManager()

    class Meta:
        ordering = ["name"]
        constraints = [
            models.CheckConstraint(condition=Q(weight__range=(1, MAX_WEIGHT)), name="plan_weight_in_bounds"),
            models.CheckConstraint(condition=Q(max_slots__range=(1, MAX_SLOTS)), name="plan_max_slots_in_bounds"),
        ]

    def clean(self) -> None:
        self.check_quota()

    def save(self, *args: Any, **kwargs: Any) -> None:
        self.check_quota()
        super().save(*args, **kwargs)

    def check_quota(self) -> None:
        """Raises RaiseError where a second operator has to approve it."""
        if approval.is_above(self.monthly_tokens):
            before = Plan.objects.filter(pk=self.pk).first() if self.pk else None
            approval.check(self.monthly_tokens, 0 if before is None else before.monthly_tokens)

    def __str__(self) -> str:
        return self.name

    @property
    def limits(self) -> Limits:
        return Limits(**{name: getattr(self, name) for name in LIMIT_NAMES})


class Tenant(Announced):
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
    allowed_models = allowed_models()
    allowed_adapters = allowed_adapters()
    quota_anchor_day = models.PositiveSmallIntegerField(
        default=1,
        validators=[MinValueValidator(1), MaxValueValidator(28)],
        help_text="Day of the month (UTC) on which the quota starts anew.",
    )
    response_days = models.PositiveSmallIntegerField(
        null=True,
        blank=True,
        validators=[MinValueValidator(1), MaxValueValidator(MAX_RESPONSE_DAYS)],
        help_text="Days that responses of /v1/responses are stored, prompts and answers included. Empty: none are.",
    )
    allowed_origins = models.JSONField(
        default=list,
        blank=True,
        validators=[validate_origins],
        help_text='Web pages that browsers let ask with its keys, such as ["https://app.example.org"]; ["*"]: all.',
    )
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    objects = AuditedManager()
    quota_is_approved = False
    """No column: of the object that limits/raises.py saves once two people want its quota."""

    class Meta:
        ordering = ["name"]
        constraints = [
            models.CheckConstraint(
                condition=Q(quota_anchor_day__range=(1, 28)), name="tenant_anchor_day_exists_in_every_month"
            ),
            models.CheckConstraint(
                condition=Q(response_days__isnull=True) | Q(response_days__range=(1, MAX_RESPONSE_DAYS)),
                name="tenant_response_days",
            ),
        ]

    def clean(self) -> None:
        self.check_quota()

    def save(self, *args: Any, **kwargs: Any) -> None:
        self.check_quota()
        super().save(*args, **kwargs)

    def check_quota(self) -> None:
        """Raises RaiseError where a second operator has to approve it."""
        if self.quota_is_approved or self.plan_id is None:  # without a plan, the form says what is wrong
            return
        if not self.pk and approval.LIMIT not in self.limit_overrides:
            return  # a new tenant has what its plan says, and the plan was approved or is older than the rule
        if approval.is_above(self.limits.monthly_tokens):
            before = Tenant.objects.select_related("plan").filter(pk=self.pk).first() if self.pk else None
            approval.check(self.limits.monthly_tokens, 0 if before is None else before.limits.monthly_tokens)

    def __str__(self) -> str:
        return self.name

    def announce(self) -> None:
        announce_tenant(self.pk)

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
    objects = AuditedManager()

    class Meta:
        constraints = [models.UniqueConstraint(fields=["tenant", "user"], name="membership_once_per_tenant")]

    def __str__(self) -> str:
        return f"{self.user} in {self.tenant}"


class StaffRole(models.Model):
    """A person's role in the whole installation; superusers have Django's flag and need none. Given by superusers."""

    class Role(models.TextChoices):
        OPERATOR = "operator", "Operator: runs the installation"
        AUDITOR = "auditor", "Auditor: reads all, changes nothing"

    user = models.OneToOneField(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="staff_role")
    role = models.CharField(max_length=16, choices=Role.choices)
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    objects = AuditedManager()

    class Meta:
        verbose_name = "role in the installation"
        verbose_name_plural = "roles in the installation"

    def __str__(self) -> str:
        return f"{self.user}: {self.role}"


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


class APIKey(Announced):
    """A credential of a tenant. Only the HMAC of its secret is kept (accounts/identity/keys.py)."""

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
    allowed_models = allowed_models()
    allowed_adapters = allowed_adapters()
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
    objects = AuditedManager()

    class Meta:
        verbose_name = "API key"
        ordering = ["-id"]
        indexes = [models.Index(fields=["tenant", "revoked_at"], name="key_by_tenant")]

    def __str__(self) -> str:
        return f"{self.name} ({self.display})"

    def announce(self) -> None:
        known_keys.announce_change(self.public_id)

    @property
    def first_id(self) -> int:
        """Of the first key of its rotation."""
        return self.quota_key_id or self.pk

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


def announce_tenant(tenant_id: int) -> None:
    """As known_keys.announce_change, for every key of a tenant that may still be used."""
    ids = APIKey.objects.filter(tenant_id=tenant_id, revoked_at__isnull=True).values_list("public_id", flat=True)
    known_keys.announce_change(*ids)


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
    cost_nanos = models.BigIntegerField(default=0, help_text="Billionths of the currency.")
    purged_at = models.DateTimeField(
        null=True, editable=False, help_text="Since then the days' sums stand for its ledger entries."
    )

    class Meta:
        ordering = ["-starts_at"]
        indexes = [models.Index(fields=["-starts_at", "-id"], name="period_by_start")]
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


class LedgerRows(models.QuerySet["LedgerEntry"]):
    def of_requests(self, request_ids: Collection[str]) -> LedgerRows:
        """Entries of these requests, along the two indexes that have a part of the ledger each.

        Asked for in one piece, neither index would be used: the ledger has none of all requests.
        """
        wanted, by_hand = Q(request_id__in=request_ids), Q(kind=LedgerEntry.Kind.ADJUST)
        return self.filter((wanted & ~by_hand) | (wanted & by_hand))


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
    adapters = models.CharField(max_length=200, blank=True, help_text="Names, with + between them.")
    operation = models.CharField(max_length=16, blank=True, help_text="completions or embeddings.")
    prompt_tokens = models.BigIntegerField(default=0)
    cached_tokens = models.BigIntegerField(default=0)
    completion_tokens = models.BigIntegerField(default=0)
    cost_nanos = models.BigIntegerField(
        default=0, help_text="Billionths of the currency, by the price of its moment (accounts/ledger/prices.py)."
    )
    reason = models.CharField(max_length=200, blank=True)
    created_at = models.DateTimeField()
    objects = LedgerRows.as_manager()

    class Meta:
        verbose_name_plural = "ledger entries"
        indexes = [
            models.Index(fields=["tenant_period", "created_at"], name="ledger_by_tenant_period"),
            models.Index(fields=["key_period", "created_at"], name="ledger_by_key_period"),
            models.Index(fields=["created_at"], name="ledger_by_time"),
            # of the kinds that are rare: no index of all kinds, which each request would have to write
            models.Index(fields=["request_id"], condition=Q(kind="adjust"), name="ledger_adjustments"),
            models.Index(fields=["-id"], condition=Q(kind="release"), name="ledger_releases"),
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


# What is read from the ledger, and outlives it


class DayUsage(models.Model):
    """What was charged on one day (UTC) in one period, by key, model, adapters and operation: sums of ledger entries.

    Written with the entries, by UPSERT, in their transaction. `key` is the first of a rotation; null for corrections
    of the tenant as a whole. A request counts on the day on which it was settled.
    """

    day = models.DateField()
    tenant = models.ForeignKey(Tenant, on_delete=models.PROTECT, related_name="+", db_index=False)
    key = models.ForeignKey(APIKey, null=True, on_delete=models.PROTECT, related_name="+", db_index=False)
    tenant_period = models.ForeignKey(QuotaPeriod, on_delete=models.PROTECT, related_name="+")
    key_period = models.ForeignKey(QuotaPeriod, null=True, on_delete=models.PROTECT, related_name="+")
    model = models.CharField(max_length=100, blank=True)
    adapters = models.CharField(max_length=200, blank=True)
    operation = models.CharField(max_length=16, blank=True)
    requests = models.BigIntegerField(default=0)
    used_tokens = models.BigIntegerField(default=0)
    prompt_tokens = models.BigIntegerField(default=0)
    cached_tokens = models.BigIntegerField(default=0)
    completion_tokens = models.BigIntegerField(default=0)
    cost_nanos = models.BigIntegerField(default=0)

    class Meta:
        verbose_name = "day of usage"
        verbose_name_plural = "days of usage"
        ordering = ["-day"]
        indexes = [
            models.Index(fields=["tenant", "day"], name="day_usage_by_tenant"),
            models.Index(fields=["key", "day"], name="day_usage_by_key"),
            models.Index(fields=["day"], name="day_usage_by_day"),
        ]
        constraints = [
            models.UniqueConstraint(
                fields=["day", "tenant_period", "key_period", "model", "adapters", "operation"],
                condition=Q(key_period__isnull=False),
                name="day_usage_once_per_key",
            ),
            models.UniqueConstraint(
                fields=["day", "tenant_period", "model", "adapters", "operation"],
                condition=Q(key_period__isnull=True),
                name="day_usage_once_per_tenant",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.tenant} on {self.day}"


class DayTotal(models.Model):
    """What all keys used on one day (UTC) together: of each tenant, of each model, of each vector of adapters.

    Written once, when nothing of the day can change (accounts/ledger/day_totals.py), with all its rows or not at all:
    the row of the whole day says that they are there. For charts, which would read a row for each key otherwise.
    """

    class By(models.TextChoices):
        DAY = "day", "Whole day"
        TENANT = "tenant", "Tenant"
        MODEL = "model", "Model"
        ADAPTERS = "adapters", "Adapters"

    day = models.DateField()
    by = models.CharField(max_length=8, choices=By.choices)
    name = models.CharField(max_length=200, blank=True, help_text="Of a tenant, its id; of the whole day, nothing.")
    requests = models.BigIntegerField()
    used_tokens = models.BigIntegerField()
    cost_nanos = models.BigIntegerField()

    class Meta:
        constraints = [models.UniqueConstraint(fields=["by", "day", "name"], name="day_total_once")]

    def __str__(self) -> str:
        return f"{self.by} {self.name} on {self.day}"


def price_field(help_text: str, *, null: bool = False) -> models.DecimalField[Any, Any]:
    return models.DecimalField(
        max_digits=12,
        decimal_places=6,
        null=null,
        blank=null,
        validators=[MinValueValidator(Decimal(0)), MaxValueValidator(Decimal(100_000))],
        help_text=help_text,
    )


class Price(Announced):
    """What a million tokens of a model cost from a moment on, until a later row of that model begins.

    An empty name stands for every model that has no row of its own. What was settled keeps the cost that it had.
    """

    model = models.CharField(max_length=100, blank=True, help_text="Empty: every model that has no price of its own.")
    valid_from = models.DateTimeField(default=timezone.now)
    input_per_million = price_field("A million prompt tokens.")
    cached_input_per_million = price_field(
        "A million prompt tokens that the prompt cache had. Empty: as the others.", null=True
    )
    output_per_million = price_field("A million generated tokens.")
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    objects = AuditedManager()

    class Meta:
        ordering = ["model", "-valid_from"]
        constraints = [
            models.UniqueConstraint(fields=["model", "valid_from"], name="price_one_a_moment"),
            models.CheckConstraint(
                condition=Q(input_per_million__gte=0, output_per_million__gte=0)
                & (Q(cached_input_per_million__isnull=True) | Q(cached_input_per_million__gte=0)),
                name="price_not_negative",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.model or 'every other model'} from {self.valid_from:%Y-%m-%d %H:%M}"


class Statement(models.Model):
    """What a tenant used in one month (UTC), as it was told: written once, when nothing of the month can change."""

    tenant = models.ForeignKey(Tenant, on_delete=models.PROTECT, related_name="statements")
    month = models.DateField(help_text="Its first day.")
    currency = models.CharField(max_length=3)
    requests = models.BigIntegerField()
    used_tokens = models.BigIntegerField()
    cost_nanos = models.BigIntegerField()
    lines = models.JSONField(default=list)
    created_at = models.DateTimeField()

    class Meta:
        ordering = ["-month", "tenant"]
        constraints = [models.UniqueConstraint(fields=["tenant", "month"], name="statement_once_a_month")]

    def __str__(self) -> str:
        return f"{self.tenant}, {self.month:%Y-%m}"


class QuotaAlert(models.Model):
    """A part of a quota was reached in a period: once for each part, of tokens and of requests."""

    period = models.ForeignKey(QuotaPeriod, on_delete=models.CASCADE, related_name="alerts")
    counts = models.CharField(max_length=8, choices=[("tokens", "Tokens"), ("requests", "Requests")])
    percent = models.PositiveSmallIntegerField(choices=[(each, f"{each} %") for each in ALERT_PERCENTS])
    used = models.BigIntegerField(help_text="When it was noticed.")
    quota = models.BigIntegerField(help_text="When it was noticed.")
    created_at = models.DateTimeField()
    mailed_at = models.DateTimeField(null=True, editable=False)

    class Meta:
        ordering = ["-created_at"]
        indexes = [models.Index(fields=["-created_at", "-percent"], name="quota_alert_newest")]
        constraints = [
            models.UniqueConstraint(fields=["period", "counts", "percent"], name="quota_alert_once_a_period"),
        ]

    def __str__(self) -> str:
        return f"{self.percent} % of {self.counts}: {self.period}"


# Limits for a time


class LimitRule(Announced):
    """Another value of one limit for a time: a raise that ends, a night, the last days of a month (UTC).

    While it is in force it stands in the place of what its plan, tenant or key says. Of several that are in force for
    the same limit of the same owner, the one that was made last counts.
    """

    class Recurrence(models.TextChoices):
        ALWAYS = "always", "All of the time"
        DAILY = "daily", "Hours of each day"
        MONTH_END = "month_end", "Last days of each month"

    plan = models.ForeignKey(Plan, null=True, blank=True, on_delete=models.CASCADE, related_name="limit_rules")
    tenant = models.ForeignKey(Tenant, null=True, blank=True, on_delete=models.CASCADE, related_name="limit_rules")
    key = models.ForeignKey(APIKey, null=True, blank=True, on_delete=models.CASCADE, related_name="limit_rules")
    limit = models.CharField(max_length=32, choices=[(name, name.replace("_", " ")) for name in LIMIT_NAMES])
    value = models.BigIntegerField(
        null=True,
        blank=True,
        validators=[MinValueValidator(0), MaxValueValidator(MAX_LIMIT)],
        help_text="Empty: unlimited. 0: none at all.",
    )
    starts_at = models.DateTimeField(default=timezone.now)
    ends_at = models.DateTimeField(null=True, blank=True, help_text="Empty: until it is deleted.")
    recurrence = models.CharField(max_length=10, choices=Recurrence.choices, default=Recurrence.ALWAYS)
    daily_from = models.TimeField(null=True, blank=True, help_text="UTC, such as 22:00.")
    daily_until = models.TimeField(null=True, blank=True, help_text="UTC; before the beginning: on the next day.")
    last_days = models.PositiveSmallIntegerField(
        null=True, blank=True, validators=[MinValueValidator(1), MaxValueValidator(MAX_LAST_DAYS)]
    )
    reason = models.CharField(max_length=200, blank=True)
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    objects = AuditedManager()

    quota_is_approved = False
    """No column: of the object that limits/raises.py saves once two people want its quota."""

    class Meta:
        ordering = ["-id"]
        constraints = [
            models.CheckConstraint(
                condition=Q(plan__isnull=False, tenant__isnull=True, key__isnull=True)
                | Q(plan__isnull=True, tenant__isnull=False, key__isnull=True)
                | Q(plan__isnull=True, tenant__isnull=True, key__isnull=False),
                name="limit_rule_has_one_owner",
            ),
            models.CheckConstraint(condition=Q(value__isnull=True) | Q(value__gte=0), name="limit_rule_not_negative"),
            models.CheckConstraint(
                condition=Q(ends_at__isnull=True) | Q(ends_at__gt=F("starts_at")), name="limit_rule_ends_after_start"
            ),
            models.CheckConstraint(
                condition=Q(recurrence="always")
                | Q(recurrence="daily", daily_from__isnull=False, daily_until__isnull=False)
                | Q(recurrence="month_end", last_days__range=(1, MAX_LAST_DAYS)),
                name="limit_rule_recurrence_is_whole",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.limit} of {self.plan or self.tenant or self.key}"

    def save(self, *args: Any, **kwargs: Any) -> None:
        self.check_quota()
        super().save(*args, **kwargs)

    def check_quota(self) -> None:
        """Raises RaiseError where a second operator has to approve it. A key's own quota is within its tenant's."""
        if self.quota_is_approved:
            return
        if self.limit == approval.LIMIT and self.key_id is None and approval.is_above(self.value):
            before = LimitRule.objects.filter(pk=self.pk, limit=approval.LIMIT).first() if self.pk else None
            approval.check(self.value, 0 if before is None or self._reaches_beyond(before) else before.value)

    def _reaches_beyond(self, before: LimitRule) -> bool:
        """Whether it is for others, in other hours, or for longer: what was approved was not that."""
        same = ("plan_id", "tenant_id", "recurrence", "daily_from", "daily_until", "last_days")
        if any(getattr(self, name) != getattr(before, name) for name in same):
            return True
        if self.starts_at is not None and self.starts_at < before.starts_at.replace(microsecond=0):  # forms have none
            return True
        return before.ends_at is not None and (self.ends_at is None or self.ends_at > before.ends_at)

    def announce(self) -> None:
        if self.key is not None:
            rotated = APIKey.objects.filter(Q(pk=self.key.first_id) | Q(quota_key=self.key.first_id))
            known_keys.announce_change(*rotated.values_list("public_id", flat=True))
        elif self.tenant is not None:
            self.tenant.announce()
        else:
            super().announce()

    def clean(self) -> None:
        """What one field cannot say. Raises ValidationError."""
        if sum(owner is not None for owner in (self.plan, self.tenant, self.key)) != 1:
            raise ValidationError("Choose a plan, a tenant or a key: one of them.")
        if self.ends_at is not None and self.starts_at is not None and self.ends_at <= self.starts_at:
            raise ValidationError({"ends_at": "It would end before it begins."})
        hours = (self.daily_from, self.daily_until)
        if self.recurrence == self.Recurrence.DAILY and (None in hours or hours[0] == hours[1]):
            raise ValidationError({"daily_from": "Give two different hours, such as 22:00 and 06:00."})
        if self.recurrence == self.Recurrence.MONTH_END and self.last_days is None:
            raise ValidationError({"last_days": "Say how many days."})
        self.check_quota()


# Refusals


class RefusedRequest(models.Model):
    """A request that was refused, and why. Written in groups, a moment later (trail/refusal_log.py); kept for days.

    Without constraints in the database: a key or a tenant may be gone before its refusals are written.
    """

    request_id = models.CharField(max_length=64)
    tenant = models.ForeignKey(
        Tenant, null=True, on_delete=models.CASCADE, related_name="+", db_constraint=False, db_index=False
    )
    key = models.ForeignKey(
        APIKey, null=True, on_delete=models.CASCADE, related_name="+", db_constraint=False, db_index=False
    )
    route = models.CharField(max_length=64, blank=True)
    code = models.CharField(max_length=64)
    limit = models.CharField(max_length=32, blank=True, help_text="The limit that bound.")
    bound_to = models.CharField(max_length=8, blank=True, help_text="Whose limit: tenant or key.")
    value = models.BigIntegerField(null=True)
    frees_at = models.DateTimeField(null=True, help_text="When the same request may pass.")
    message = models.CharField(max_length=500, blank=True, help_text="What the client was told, if it repeats nothing.")
    num_more = models.PositiveIntegerField(
        default=0, help_text="Others of the same tenant in that second, which were counted and not kept."
    )
    created_at = models.DateTimeField()

    class Meta:
        ordering = ["-id"]
        indexes = [
            models.Index(fields=["request_id"], name="refused_by_request"),
            models.Index(fields=["tenant", "-created_at"], name="refused_by_tenant"),
            models.Index(fields=["created_at"], name="refused_by_time"),
        ]

    def __str__(self) -> str:
        return f"{self.request_id}: {self.code}"


# Who changed what


class AuditEntry(models.Model):
    """A row that was created, changed or deleted, or a sign-in; by whom, and how. Written by trail/audit_log.py."""

    class Action(models.TextChoices):
        CREATE = "create", "Created"
        CHANGE = "change", "Changed"
        DELETE = "delete", "Deleted"
        SIGN_IN = "sign-in", "Signed in"
        SIGN_OUT = "sign-out", "Signed out"
        REFUSED = "refused", "Sign-in refused"
        LOCKED = "locked", "Sign-in locked"

    class ActorKind(models.TextChoices):
        PERSON = "person", "Person"
        KEY = "key", "Key"
        COMMAND = "command", "Command"
        SYSTEM = "system", "System"
        UNKNOWN = "unknown", "Unknown"

    action = models.CharField(max_length=8, choices=Action.choices)
    actor_kind = models.CharField(max_length=8, choices=ActorKind.choices)
    actor = models.CharField(max_length=150)
    model = models.CharField(max_length=64)
    row = models.CharField(max_length=64, help_text="Its primary key.")
    name = models.CharField(max_length=200)
    diff = models.JSONField(default=dict, help_text="Field → what it was and what it is; secrets are never in it.")
    created_at = models.DateTimeField()

    class Meta:
        verbose_name_plural = "audit log"
        ordering = ["-id"]
        indexes = [
            models.Index(fields=["model", "row"], name="audit_by_row"),
            models.Index(fields=["created_at"], name="audit_by_time"),
        ]

    def __str__(self) -> str:
        return f"{self.action} {self.model} {self.name} by {self.actor}"


class QuotaRaise(models.Model):
    """More tokens a month than QUOTA_APPROVAL_TOKENS: asked by one operator, in force once another approves."""

    class State(models.TextChoices):
        ASKED = "asked", "Asked"
        APPROVED = "approved", "Approved"
        REFUSED = "refused", "Refused"

    tenant = models.ForeignKey(Tenant, on_delete=models.CASCADE, related_name="quota_raises")
    monthly_tokens = models.BigIntegerField(
        null=True,
        blank=True,
        validators=[MinValueValidator(0), MaxValueValidator(MAX_LIMIT)],
        help_text="Empty: unlimited.",
    )
    ends_at = models.DateTimeField(null=True, blank=True, help_text="Empty: for good. Else as a limit for a time.")
    reason = models.CharField(max_length=200)
    state = models.CharField(max_length=8, choices=State.choices, default=State.ASKED, editable=False)
    asked_by = models.CharField(max_length=160, editable=False)
    asked_at = models.DateTimeField(default=timezone.now, editable=False)
    decided_by = models.CharField(max_length=160, blank=True, editable=False)
    decided_at = models.DateTimeField(null=True, editable=False)
    objects = AuditedManager()

    class Meta:
        ordering = ["-id"]
        constraints = [
            models.CheckConstraint(
                condition=~Q(state="approved") | ~Q(decided_by=F("asked_by")), name="quota_raise_has_two_people"
            ),
        ]

    def __str__(self) -> str:
        wanted = "unlimited" if self.monthly_tokens is None else f"{self.monthly_tokens:,}"
        until = f" until {self.ends_at:%Y-%m-%d %H:%M} UTC" if self.ends_at else ""
        return f"{wanted} tokens a month for {self.tenant}{until}"

    def clean(self) -> None:
        if self.ends_at is not None and self.ends_at <= self.asked_at:
            raise ValidationError({"ends_at": "It would end before it begins."})

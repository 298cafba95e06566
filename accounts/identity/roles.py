"""Who may do what in the console: one table of roles and rows, and the questions that are asked of it.

A person is a superuser (Django's flag), an operator or an auditor of the installation (StaffRole), or owner, member or
viewer of tenants (Membership). What stands in no row of TABLE is the superuser's alone. Django's own permissions of
staff count beside the table. Read by RoleBackend for permissions and by pages/role_admin.py for rows. docs/roles.md
shows the table; a test compares.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from django.contrib.auth.backends import ModelBackend
from django.db.models import Model, Q, QuerySet

from accounts.models import Membership, Scope, StaffRole

M = TypeVar("M", bound=Model)
OPERATOR, AUDITOR = StaffRole.Role.OPERATOR.value, StaffRole.Role.AUDITOR.value
OWNER, MEMBER, VIEWER = (role.value for role in Membership.MemberRole)
ROLES = (OPERATOR, AUDITOR, OWNER, MEMBER, VIEWER)
TENANT_ROLES = (OWNER, MEMBER, VIEWER)

READ = frozenset({"view"})
WRITE = frozenset({"view", "add", "change"})
EVERY = frozenset({"view", "add", "change", "delete"})
NOTHING: frozenset[str] = frozenset()
VERBS = ("view", "add", "change", "delete")

SECRETS = ("secret_hash", "pepper_id", "password")
"""Fields that no page shows and no filter asks for."""


@dataclass(frozen=True, slots=True)
class Row:
    """What each role may do with the rows of one model. Auditors read all, in every row."""

    model: str
    operator: frozenset[str] = READ
    owner: frozenset[str] = NOTHING
    member: frozenset[str] = NOTHING
    viewer: frozenset[str] = NOTHING
    tenants: tuple[str, ...] = ("tenant",)
    """Lookups of the tenant that a row belongs to: one of them is enough."""
    also: Mapping[str, Any] = field(default_factory=dict)
    """A filter for rows that belong to every tenant."""
    only: Mapping[str, Any] = field(default_factory=dict)
    """A filter for what people of tenants see."""
    never: Mapping[str, Any] = field(default_factory=dict)
    """A filter for what people of tenants do not see."""
    not_for_operators: Q | None = None
    """Rows that operators do not see, and that other staff, whatever permissions it has, does not write."""
    hidden: tuple[str, ...] = ()
    """Fields that people of tenants do not see."""

    def verbs(self, role: str) -> frozenset[str]:
        return READ if role == AUDITOR else getattr(self, role)


def tenant_rows(model: str, **more: Any) -> Row:
    """Rows that all people of a tenant may read and nobody writes by hand."""
    return Row(model, owner=READ, member=READ, viewer=READ, **more)


PRIVILEGED = Q(is_superuser=True) | Q(is_staff=True) | Q(staff_role__isnull=False)
"""People whose password nobody but a superuser may set."""

TABLE: tuple[Row, ...] = (
    tenant_rows("accounts.tenant", operator=WRITE, tenants=("pk",)),
    Row(
        "accounts.membership",
        operator=EVERY,
        owner=frozenset({"view", "change", "delete"}),
        member=READ,
    ),
    Row(
        "accounts.apikey",
        operator=WRITE,
        owner=WRITE,
        member=frozenset({"view", "add"}),
        viewer=READ,
        never={"scopes__icontains": f'"{Scope.OPERATOR.value}"'},
    ),
    Row("accounts.plan", operator=EVERY),
    Row("accounts.limitrule", operator=EVERY),
    Row("accounts.price", operator=EVERY),
    Row("accounts.quotaraise", operator=WRITE),
    tenant_rows("accounts.quotaperiod"),
    tenant_rows("accounts.reservation", tenants=("tenant_period__tenant",)),
    tenant_rows("accounts.ledgerentry", tenants=("tenant_period__tenant",)),
    tenant_rows("accounts.dayusage"),
    tenant_rows("accounts.statement"),
    tenant_rows("accounts.quotaalert", tenants=("period__tenant",)),
    tenant_rows("accounts.refusedrequest"),
    Row("accounts.auditentry"),
    Row("accounts.staffrole", operator=NOTHING),
    Row("auth.user", operator=WRITE, not_for_operators=PRIVILEGED),
    Row("auth.group", operator=NOTHING),
    Row("inference.servedmodel", operator=EVERY),
    Row("inference.modelvariant", operator=EVERY),
    Row("inference.modelimport", operator=WRITE),
    Row("inference.optimization", operator=WRITE),
    tenant_rows(
        "inference.adapter",
        operator=EVERY,
        tenants=("owner", "grants__tenant"),
        also={"visibility": "shared"},
        only={"enabled": True},
        hidden=("path", "owner", "inspect_again", "effect", "checked"),
    ),
    Row("inference.adapteralias", operator=EVERY),
    Row("inference.adaptergrant", operator=EVERY),
    tenant_rows("inference.defaultvector"),
    tenant_rows("inference.receipt", hidden=("worker",)),
    tenant_rows("inference.batch", operator=frozenset({"view", "change"})),
    tenant_rows("inference.storedfile"),
)
BY_MODEL = {row.model: row for row in TABLE}


@dataclass(frozen=True, slots=True)
class Roles:
    """The roles of one person, read once a request."""

    staff: str = ""
    """operator, auditor or empty."""
    tenants: Mapping[int, str] = field(default_factory=dict)
    """Tenant → the person's role in it."""


def roles_of(user: Any) -> Roles:
    """One or two queries, the first time; none for superusers and for nobody."""
    known: Roles | None = getattr(user, "_llmsite_roles", None)
    if known is not None:
        return known
    found = Roles()
    if user.pk is not None and user.is_active and not user.is_superuser:
        staff = StaffRole.objects.filter(user_id=user.pk).values_list("role", flat=True).first()
        memberships = Membership.objects.filter(user_id=user.pk).values_list("tenant_id", "role")
        found = Roles(staff or "", dict(memberships))
    user._llmsite_roles = found
    return found


def may_enter(user: Any) -> bool:
    """Whether the console is open to a person at all."""
    if not user.is_active:
        return False
    return bool(user.is_staff or user.is_superuser or roles_of(user).staff or roles_of(user).tenants)


def reach(user: Any, model: str, verb: str) -> frozenset[int] | None:
    """The tenants whose rows of a model a person may view, add, change or delete; None: all rows there are."""
    if not user.is_active:
        return frozenset()
    if user.is_superuser or _has_django_permission(user, model, verb):
        return None
    roles, row = roles_of(user), BY_MODEL.get(model)
    if row is None:
        return frozenset()
    if roles.staff and verb in row.verbs(roles.staff):
        return None
    return frozenset(tenant for tenant, role in roles.tenants.items() if verb in row.verbs(role))


def _has_django_permission(user: Any, model: str, verb: str) -> bool:
    application, name = model.split(".")
    if not user.is_staff:
        return False
    held = ModelBackend().get_all_permissions(user)
    return f"{application}.{verb}_{name}" in held or (verb == "view" and f"{application}.change_{name}" in held)


def visible(user: Any, rows: QuerySet[M], verb: str = "view") -> QuerySet[M]:
    """Of these rows, those that a person may view, add, change or delete. No query of its own."""
    model = rows.model._meta.label_lower
    tenants, row = reach(user, model, verb), BY_MODEL.get(model)
    if tenants is None:
        kept = row.not_for_operators if row is not None and not user.is_superuser else None
        if kept is None or (verb == "view" and roles_of(user).staff != OPERATOR):
            return rows
        return rows.exclude(kept)
    if not tenants or row is None:
        return rows.none()
    wanted = Q(**row.also) if row.also else Q()
    for path in row.tenants:
        wanted |= Q(**{f"{path}__in": tenants})
    if len(row.tenants) > 1:  # a join may find a row twice
        wanted = Q(pk__in=rows.model._default_manager.filter(wanted).values("pk"))
    found = rows.filter(wanted, **row.only)
    return found.exclude(**row.never) if row.never else found


def may(user: Any, verb: str, row: Model) -> bool:
    """Whether a person may do it with this row, as it is in the database. A query, unless all rows are theirs."""
    model = type(row)._meta.label_lower
    if reach(user, model, verb) == frozenset():
        return False
    if user.is_superuser:
        return True
    return visible(user, type(row)._default_manager.filter(pk=row.pk), verb).exists()


def is_of_tenants(user: Any, model: str) -> bool:
    """Whether a person sees rows of their tenants alone."""
    return reach(user, model, "view") is not None


class RoleBackend(ModelBackend):
    """AUTHENTICATION_BACKENDS: Django's permissions, and those that TABLE gives. Rows are role_admin.py's matter."""

    def has_perm(self, user_obj: Any, perm: str, obj: Any = None) -> bool:
        if not user_obj.is_active or user_obj.is_anonymous:
            return False
        if super().has_perm(user_obj, perm, None):
            return True
        application, _, codename = perm.partition(".")
        verb, _, name = codename.partition("_")
        return verb in VERBS and reach(user_obj, f"{application}.{name}", verb) != frozenset()

    def has_module_perms(self, user_obj: Any, app_label: str) -> bool:
        if not user_obj.is_active or user_obj.is_anonymous:
            return False
        of_table = (row.model for row in TABLE if row.model.startswith(f"{app_label}."))
        return super().has_module_perms(user_obj, app_label) or any(
            reach(user_obj, model, "view") != frozenset() for model in of_table
        )


def as_rows() -> Iterable[tuple[str, ...]]:
    """The table in words, as docs/roles.md shows it: model, then what each role may do."""
    for row in TABLE:
        yield (row.model, *(", ".join(verb for verb in VERBS if verb in row.verbs(role)) or "-" for role in ROLES))

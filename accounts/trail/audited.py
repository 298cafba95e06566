"""Which rows and fields people's changes are kept of, and a manager that tells of UPDATEs and bulk inserts.

Django's own signals tell of save and delete. Conditional UPDATEs stay what they are: rows are read before them, in the
same transaction, in which the signals are sent, too. Who writes an entry is audit_log.py; nothing of it is known here.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any, TypeVar

from django.db import models, router, transaction
from django.dispatch import Signal

AUDITED = (
    "accounts.Plan",
    "accounts.Tenant",
    "accounts.Membership",
    "accounts.StaffRole",
    "accounts.APIKey",
    "accounts.Price",
    "accounts.LimitRule",
    "accounts.QuotaRaise",
    "auth.User",
    "auth.Group",
    "inference.ServedModel",
    "inference.ModelVariant",
    "inference.Adapter",
    "inference.AdapterAlias",
    "inference.AdapterGrant",
)
UNSEEN = frozenset({"last_used_at", "last_login", "updated_at", "created_at", "metadata", "measured", "chat_facts"})
"""Kept by programs, not by people."""
MOST_ROWS = 1000
"""Of one UPDATE; those beyond have no entry."""

rows_updated = Signal()
"""rows: as they are after an UPDATE; before: primary key → values_of the row as it was."""
rows_inserted = Signal()
"""rows: of one bulk_create."""

M = TypeVar("M", bound=models.Model)


@cache
def fields_of(model: type[models.Model]) -> frozenset[str]:
    """Names of the fields that are watched, by either of their names."""
    if model._meta.label not in AUDITED:
        return frozenset()
    watched = [each for each in model._meta.concrete_fields if each.name not in UNSEEN]
    return frozenset(name for each in watched for name in (each.name, each.attname))


def values_of(row: models.Model) -> dict[str, Any]:
    """Field → value, as it can be compared. A deferred field is not read."""
    deferred = row.get_deferred_fields()
    return {
        each.name: getattr(row, each.attname)
        for each in row._meta.concrete_fields
        if each.name not in UNSEEN and each.attname not in deferred and not each.primary_key
    }


class AuditedQuerySet(models.QuerySet[M]):
    def update(self, **values: Any) -> int:
        """As Django's; sends rows_updated where a watched field is written."""
        seen = fields_of(self.model)
        if not any(name in seen for name in values):
            return super().update(**values)
        with transaction.atomic(using=router.db_for_write(self.model)):
            before = {row.pk: values_of(row) for row in self.order_by()[:MOST_ROWS]}
            number = super().update(**values)
            after = list(self.model._base_manager.filter(pk__in=before)) if number else []
            rows_updated.send(self.model, rows=after, before=before)
        return number

    def bulk_create(self, objs: Iterable[M], *args: Any, **kwargs: Any) -> list[M]:
        rows = super().bulk_create(objs, *args, **kwargs)
        rows_inserted.send(self.model, rows=rows)
        return rows


AuditedManager = models.Manager.from_queryset(AuditedQuerySet)
"""`objects` of a model that is in AUDITED."""

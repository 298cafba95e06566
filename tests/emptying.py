"""How a test's rows go where they were committed: from tables that have any, and not what the migrations made.

Django's own flush empties all tables after every such test, then makes permissions and content types again.
"""

from __future__ import annotations

from typing import Any

from django.db import connections, transaction
from django.test import TransactionTestCase

KEPT = {"auth_permission", "django_content_type"}
"""As the migrations left them; no test changes them."""
_tables: dict[str, list[str]] = {}


def install() -> None:
    """For every test with `django_db(transaction=True)` or the fixture `transactional_db`."""
    TransactionTestCase._fixture_teardown = _empty_databases  # type: ignore[attr-defined, method-assign]


def _empty_databases(case: Any) -> None:
    for alias in case._databases_names(include_mirrors=False):
        empty(alias)


def empty(alias: str) -> None:
    connection = connections[alias]
    if alias not in _tables:
        _tables[alias] = sorted(set(connection.introspection.django_table_names(only_existing=True)) - KEPT)
    quote = connection.ops.quote_name
    questions = [f"SELECT '{table}' WHERE EXISTS (SELECT 1 FROM {quote(table)})" for table in _tables[alias]]
    with transaction.atomic(using=alias), connection.cursor() as cursor:  # foreign keys are compared at its end
        cursor.execute(" UNION ALL ".join(questions))
        for (table,) in cursor.fetchall():
            cursor.execute(f"DELETE FROM {quote(table)}")

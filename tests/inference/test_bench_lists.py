"""The benchmark of the lists: its rows, its pages, its command; and what makes long lists quick."""

from __future__ import annotations

import io
import json
from argparse import ArgumentTypeError
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.core.management import call_command
from django.db import connection
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from accounts.models import APIKey, LedgerEntry
from accounts.pages import long_lists
from inference.api.operator import paging
from inference.bench.lists import child, report, rows, study
from inference.bench.lists.sizes import Sizes
from inference.catalog import adapters, registry
from inference.management.commands.bench import between
from inference.models import DefaultVector, Receipt

NOW = datetime(2026, 1, 20, 12, tzinfo=UTC)
MACHINE: dict[str, object] = {
    "processor": "Abacus",
    "cores": 2,
    "memory_gb": 1.0,
    "system": "Linux 1 x",
    "python": "3.11.0",
    "load_average_before": 0.1,
}


def one(name: str, milliseconds: float) -> dict[str, Any]:
    return {
        "name": name,
        "who": "superuser",
        "queries": 5,
        "milliseconds": milliseconds,
        "cpu_milliseconds": milliseconds,
        "sql_milliseconds": milliseconds / 2,
        "sql": "SELECT 1",
    }


def found(*lists: dict[str, Any]) -> dict[str, Any]:
    counts = {"keys": 100_000, "tenants": 2000, "ledger": 10**6, "receipts": 200_000, "refusals": 1, "days": 1}
    return {"database": "sqlite", "version": "3.40", "rows": counts, "fill_seconds": 1.0, "lists": list(lists)}


@pytest.mark.unit
def test_a_hundred_thousand_keys_have_a_million_ledger_entries() -> None:
    sizes = Sizes(100_000)
    assert (sizes.tenants, sizes.ledger, sizes.receipts) == (2000, 1_000_000, 200_000)
    for number in (19, 1_000_001):
        with pytest.raises(ValueError, match="use 20 to"):
            Sizes(number)
        with pytest.raises(ArgumentTypeError):
            between(20, 1_000_000, int)(str(number))


@pytest.mark.unit
def test_the_page_names_the_slowest_and_those_beyond_the_limit(tmp_path: Path) -> None:
    result = found(one("quick", 20), one("slow|er", 299.9), one("late", 300.0))
    assert [each["name"] for each in study.too_slow(result["lists"])] == ["late"]
    assert report.verdict(result) == "missed by 1 of 3"
    assert report.verdict(found(one("quick", 20))) == "met by all 1"
    page, whole = sorted(report.write(tmp_path, [result], MACHINE, NOW), key=lambda path: path.suffix, reverse=True)
    lines = page.read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines if "| superuser |" in line] == ["| late", "| slow/er", "| quick"]
    assert "| SQLite (3.40) | missed by 1 of 3 | 300 | 300 | 5 |" in lines
    assert json.loads(whole.read_text())["databases"][0]["lists"][0]["name"] == "quick"


@pytest.mark.unit
def test_progress_is_said_in_lines_where_there_is_no_terminal() -> None:
    out, seconds = io.StringIO(), iter([0.0, 1.0, 2.0, 11.5, 12.0, 13.0])
    tell = child.lines(out, lambda: next(seconds))
    for what, number in (("plans", 2), ("plans", 4), ("plans", 6), ("plans", 20), ("tenants", 2000)):
        tell(what, number, 20 if what == "plans" else 10_000)
    assert [line.split(maxsplit=2)[::2] for line in out.getvalue().splitlines()] == [
        ["1", "plans: 2 of 20"],
        ["12", "plans: 6 of 20"],
        ["12", "plans: 20 of 20"],
        ["13", "tenants: 2,000 of 10,000"],
    ]


@pytest.mark.slow
@pytest.mark.integration
def test_the_command_measures_in_a_database_of_its_own(tmp_path: Path) -> None:
    out = io.StringIO()
    call_command("bench_lists", "--keys", "20", "--only", "Plan", "--out", str(tmp_path), "--json", stdout=out)
    (measured,) = json.loads(out.getvalue())["databases"]
    assert measured["database"] == "sqlite" and measured["rows"]["ledger"] == 200
    names = {each["name"] for each in measured["lists"]}
    assert {"accounts.Plan", "accounts.Plan last page", "accounts.Plan page", "accounts.Plan new"} <= names
    assert (tmp_path / "lists.md").exists()


# What makes them quick


@pytest.fixture
def filled(valkey: Any, db: None) -> rows.Filled:
    return rows.fill(Sizes(100), timezone.now(), lambda *_: None)


@pytest.mark.integration
def test_the_ledger_of_a_request_is_found_along_its_indexes(filled: rows.Filled) -> None:
    ended = LedgerEntry.objects.filter(kind="settle").values_list("request_id", flat=True)[0]
    entries = LedgerEntry.objects.of_requests([ended])
    assert sorted(entries.values_list("kind", flat=True)) == ["reserve", "settle"]
    by_hand = LedgerEntry.objects.filter(kind="adjust")[0]
    assert by_hand in LedgerEntry.objects.of_requests([by_hand.request_id, ended])
    if connection.vendor == "sqlite":  # PostgreSQL reads a table of this size whole, and is right
        for asked in (
            entries,
            entries.filter(kind="settle"),
            LedgerEntry.objects.filter(kind="release").order_by("-id"),
        ):
            assert "SCAN accounts_ledgerentry\n" not in f"{asked.explain()}\n"


@pytest.mark.integration
def test_a_search_of_the_console_looks_once_and_finds_the_newest(
    filled: rows.Filled, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_lists, "MOST_FOUND", 3)
    console, url = Client(), reverse("admin:accounts_apikey_changelist")
    console.force_login(User.objects.get(pk=filled.superuser.pk))
    page = console.get(url, {"q": filled.largest.name})
    newest = list(APIKey.objects.filter(tenant=filled.largest).order_by("-pk").values_list("pk", flat=True)[:3])
    assert [row.pk for row in page.context["cl"].result_list] == newest
    first = APIKey.objects.order_by("pk")[0]
    assert [row.pk for row in console.get(url, {"q": first.public_id[:9]}).context["cl"].result_list] == [first.pk]


@pytest.mark.integration
def test_adapters_of_many_models_are_read_at_once(filled: rows.Filled, django_assert_num_queries: Any) -> None:
    models = registry.every()
    tenant = DefaultVector.objects.order_by("pk")[0].tenant_id
    one_by_one = {
        served.id: (adapters.granted(tenant, served), adapters.granted_aliases(tenant, served)) for served in models
    }
    assert sum(len(found) for found, _ in one_by_one.values()) == 1
    adapters.forget()
    with django_assert_num_queries(4):
        assert adapters.usable_on(tenant, models) == one_by_one
    with django_assert_num_queries(0):
        assert adapters.usable_on(tenant, models) == one_by_one


@pytest.mark.integration
def test_a_page_is_in_the_order_of_its_list(filled: rows.Filled) -> None:
    listed = Receipt.objects.select_related("tenant").order_by("-created_at", "request_id")
    assert paging.slice_of(listed, 50, 20) == list(listed[50:70])
    assert paging.slice_of(listed, 10_000, 20) == []
    assert long_lists.UncountedPaginator(listed, 30).page(2).object_list[0] == listed[30]

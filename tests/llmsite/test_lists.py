"""No list asks the database more often where there are more rows, and none is slow among very many."""

from __future__ import annotations

import os
from datetime import datetime

import pytest
from django.contrib import admin
from django.contrib.contenttypes.models import ContentType
from django.utils import timezone

from accounts.identity import known_keys
from inference.api.hop import shared_hop
from inference.bench.lists import addresses, asking, rows, study
from inference.bench.lists.addresses import Address
from inference.bench.lists.sizes import Sizes
from inference.catalog import registry

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.django_db(transaction=True)]
FEW, MORE = 20, int(os.environ.get("LIST_KEYS", "40"))
IS_LONG = MORE >= 10_000
SLOW_MACHINE = 3
"""Times of the limit that a machine may need which does other things, too."""


def asked_among(keys: int, now: datetime, seen: asking.Watched) -> dict[str, asking.Measured]:
    """So many keys more, then every list by its name; in the suite without the ways to sort, search and filter."""
    filled = rows.fill(Sizes(keys), now, lambda *_: None)
    askers, listed = asking.Askers(filled), addresses.every(filled, now)
    if IS_LONG:
        return {each.name: asking.measure(askers, each, seen) for each in listed}
    ContentType.objects.get_for_models(*admin.site._registry)  # is remembered from then on, and so is who asks
    for each in listed:
        if each.name in ("playground", "/v1/models", "/v1/admin/plans"):
            askers.ask(each)
    return {each.name: asking.asked_once(askers, each, seen) for each in listed if is_plain(each)}


def is_plain(address: Address) -> bool:
    variants = (" by ", " where ", " search ", " last page", " choices of ", " history", " new", " deep", "of little")
    return not any(word in address.name for word in variants)


@pytest.fixture
def fresh_threads(valkey: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads of the API whose connections are opened under the test's eyes; what is remembered stays so."""
    known_keys.WATCHER.stop()
    monkeypatch.setattr(known_keys.WATCHER, "ensure_started", lambda: None)  # news of new keys come when they come
    shared_hop.cache_clear()
    monkeypatch.setattr(known_keys, "KEEP_SECONDS_WITHOUT_REDIS", 3600.0)
    monkeypatch.setattr(registry, "CACHE_SECONDS", 3600.0)
    for page in admin.site._registry.values():  # else the many need a second page, and with it one question more
        monkeypatch.setattr(page, "list_per_page", 150)


def test_no_list_asks_more_often_among_more_rows(fresh_threads: None) -> None:
    now = timezone.now()
    with asking.watched() as seen:
        few, more = asked_among(FEW, now, seen), asked_among(MORE, now, seen)
    differ = {name: (each.queries, more[name].queries) for name, each in few.items() if name in more}
    assert {name: counts for name, counts in differ.items() if not 0 <= counts[1] - counts[0] <= IS_LONG} == {}
    lists = {model._meta.label for model in admin.site._registry}
    assert lists <= differ.keys() and {f"{label} page" for label in lists} <= differ.keys()
    assert max(each.queries for each in more.values()) <= 22
    if IS_LONG:
        late = {name: each.milliseconds for name, each in more.items()}
        assert {name: took for name, took in late.items() if took > SLOW_MACHINE * study.LIMIT_MS} == {}

"""The cache behind django-ratelimit: counters in one round trip, on a server that may forget them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from django.conf import settings
from django.core.cache import caches

from llmsite import cache as cache_module
from llmsite.cache import SharedRedisCache

pytestmark = pytest.mark.integration

SECONDS = 65


@pytest.fixture
def cache(valkey: Any) -> Iterator[SharedRedisCache]:
    made = caches.create_connection("default")
    assert isinstance(made, SharedRedisCache)
    yield made
    made.delete("count")


def num_commands(cache: SharedRedisCache) -> int:
    return int(cache._cache.get_client().info("stats")["total_commands_processed"])


def test_a_counter_starts_once_and_counts(cache: SharedRedisCache) -> None:
    assert cache.add("count", 1, SECONDS)
    assert not cache.add("count", 1, SECONDS)
    assert cache.incr("count") == 2
    assert cache.get("count") == 2


def test_two_threads_count_together(cache: SharedRedisCache) -> None:
    other: Any = caches.create_connection("default")
    assert cache.add("count", 1, SECONDS)
    assert not other.add("count", 1, SECONDS)
    assert (cache.incr("count"), other.incr("count")) == (2, 3)


def test_a_counter_that_is_known_costs_one_round_trip(cache: SharedRedisCache) -> None:
    cache.add("count", 1, SECONDS)
    cache.incr("count")
    before = num_commands(cache)
    assert not cache.add("count", 1, SECONDS)
    cache.incr("count")
    assert num_commands(cache) - before <= 3  # the script with its INCRBY, and this question


def test_a_counter_that_the_server_lost_starts_anew_and_ends_in_time(cache: SharedRedisCache) -> None:
    cache.add("count", 1, SECONDS)
    cache.incr("count")
    client = cache._cache.get_client()
    client.delete(cache.make_key("count"))
    assert not cache.add("count", 1, SECONDS)
    assert cache.incr("count") == 1
    assert SECONDS - 5 <= client.ttl(cache.make_key("count")) <= SECONDS


def test_a_counter_that_nobody_added_is_an_error(cache: SharedRedisCache) -> None:
    with pytest.raises(ValueError, match="not found"):
        cache.incr("count")


def test_a_deleted_counter_is_added_again(cache: SharedRedisCache) -> None:
    cache.add("count", 1, SECONDS)
    assert cache.delete("count")
    assert cache.add("count", 5, SECONDS)
    assert cache.get("count") == 5


def test_no_more_is_remembered_than_fits(cache: SharedRedisCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "MAX_REMEMBERED", 2)
    for name in ("a", "b", "count"):
        cache.add(name, 1, SECONDS)
    assert len(cache._cache._remembered) == 1
    assert not cache.add("a", 1, SECONDS)
    for name in ("a", "b"):
        cache.delete(name)


def test_django_ratelimit_uses_it() -> None:
    assert settings.CACHES[settings.RATELIMIT_USE_CACHE]["BACKEND"] == "llmsite.cache.SharedRedisCache"

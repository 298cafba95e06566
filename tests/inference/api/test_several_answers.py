"""Requests with several answers: admitted as a whole or refused as a whole, in every dialect, over HTTP."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from accounts.identity import key_rows, known_keys
from accounts.ledger import quotas
from accounts.ledger.audit import audit
from accounts.limits import throttling
from accounts.models import LedgerEntry
from accounts.trail import refusal_log
from accounts.trail.refusals import Refusal
from inference.inquiry.explain import explain
from inference.intake import together
from inference.models import Receipt
from tests.in_process import Client, FakeSpeed, InProcessSite, wait_until
from tests.inference.api.test_idempotency import key_header

pytestmark = [pytest.mark.api, pytest.mark.integration]

FOUR = "one two three four"
"""A prompt of four tokens."""
SEVERAL: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": FOUR, "n": 4, "max_tokens": 8, "temperature": 0},
    "/v1/generate/batch": {"prompts": ["one", "two", "three", "four"], "max_new_tokens": 8, "cache": False},
    "/completion": {"prompt": ["one", "two", "three", "four"], "n_predict": 8},
}
"""Each may take 36 tokens."""
WAYS = {False: [*SEVERAL], True: ["/v1/completions", "/completion"]}
"""Whether they stream → those that do so."""


@pytest.fixture
def fake_speed() -> FakeSpeed:
    return FakeSpeed(seconds_per_step=0.001)


def limited(site: InProcessSite, **limits: int) -> Client:
    tenant = site.cast.alice.tenant
    tenant.limit_overrides = limits
    tenant.save()
    known_keys.CACHE.forget()
    return site.client(site.cast.alice)


def post(client: Client, path: str, **more: Any) -> Any:
    headers = more.pop("headers", {})
    return client.post(path, json={**SEVERAL[path], **more}, headers=headers)


def nothing_was_taken(site: InProcessSite) -> bool:
    return (
        site.charged(site.cast.alice) == (0, 0)
        and not Receipt.objects.exists()
        and not LedgerEntry.objects.exists()
        and throttling.running(site.cast.alice.tenant.pk) == 0
    )


@pytest.mark.parametrize("path", SEVERAL)
def test_more_tokens_a_minute_than_there_are_refuse_all_of_them(site: InProcessSite, path: str) -> None:
    alice = limited(site, tokens_per_minute=35)
    refused = post(alice, path)
    assert refused.status_code == 429, refused.text
    assert "retry-after" not in refused.headers, "it never fits"
    assert nothing_was_taken(site)
    assert refused.headers["x-ratelimit-remaining-tokens"] == "35"
    refusal_log.LOG.write()
    found = explain(refused.headers["x-request-id"])
    assert found is not None
    assert (found["refusal"]["limit"], found["refusal"]["value"]) == ("tokens_per_minute", 35)


@pytest.mark.parametrize("path", SEVERAL)
@pytest.mark.parametrize("limits", [{"monthly_tokens": 35}, {"monthly_requests": 3}])
def test_a_quota_that_does_not_cover_all_of_them_refuses_all(
    site: InProcessSite, path: str, limits: dict[str, int]
) -> None:
    refused = post(limited(site, **limits), path, headers={"x-quota-all-or-nothing": "true"})
    assert refused.status_code == (429 if path == "/v1/completions" else 402), refused.text
    assert nothing_was_taken(site)


@pytest.mark.parametrize(("path", "stream"), [(path, stream) for stream in (False, True) for path in WAYS[stream]])
def test_what_a_quota_has_left_is_shared_out(site: InProcessSite, path: str, stream: bool) -> None:
    alice = limited(site, monthly_tokens=24)
    answer = post(alice, path, **({"stream": True} if stream else {}))
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-quota-clamped"] == "true"
    site.settle()
    assert [receipt.completion_tokens for receipt in Receipt.objects.all()] == [5] * 4
    assert site.charged(site.cast.alice) == (24, 0)
    assert audit().is_clean


def test_a_prompt_is_paid_once_where_the_first_answer_comes_from_the_cache(site: InProcessSite) -> None:
    client = limited(site, monthly_tokens=1000)
    body = {"prompt": FOUR, "max_tokens": 8, "temperature": 1, "seed": 7, "cache": True}
    assert client.post("/v1/completions", json=body).status_code == 200
    assert client.post("/v1/completions", json={**body, "n": 3}).status_code == 200
    site.settle()
    paid = LedgerEntry.objects.filter(kind="settle").order_by("pk").values_list("prompt_tokens", "completion_tokens")
    assert sorted(paid) == [(0, 0), (0, 8), (4, 8), (4, 8)]
    assert audit().is_clean


def test_who_shares_a_prompt_waits_for_who_pays_for_it_also_behind_an_answer_from_the_cache(
    site: InProcessSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = site.client(site.cast.alice)
    body = {"prompt": FOUR, "max_tokens": 8, "temperature": 1, "seed": 7, "cache": True}
    assert client.post("/v1/completions", json=body).status_code == 200
    site.settle()
    seen: list[str] = []
    admit = together.Together.admit

    def slow(self: together.Together, number: int) -> Any:
        seen.append(f"{number} asks")
        if number == 1:
            time.sleep(0.2)
        found = admit(self, number)
        seen.append(f"{number} is in")
        return found

    monkeypatch.setattr(together.Together, "admit", slow)
    assert client.post("/v1/completions", json={**body, "n": 3}).status_code == 200
    assert seen.index("1 is in") < seen.index("2 asks")


def test_more_answers_than_places_are_made_one_after_the_other(site: InProcessSite) -> None:
    alice = limited(site, concurrent_requests=1, concurrent_streams=1, tokens_per_minute=72, monthly_tokens=72)
    assert post(alice, "/v1/completions").status_code == 200
    assert post(alice, "/v1/completions", stream=True).status_code == 200
    assert site.charged(site.cast.alice) == (72, 0)


def test_those_that_wait_for_their_turn_keep_what_is_held_for_them(
    site: InProcessSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    prolonged: list[int] = []

    def noted(request_ids: Any, expires_at: Any) -> int:
        prolonged.append(len(request_ids))
        return prolong(request_ids, expires_at)

    prolong = quotas.prolong
    monkeypatch.setattr(quotas, "prolong", noted)
    monkeypatch.setattr(together, "PROLONG_EVERY_SECONDS", 0.0)
    assert post(limited(site, concurrent_requests=1), "/v1/completions").status_code == 200
    assert prolonged == [3, 2, 1]


def test_what_was_held_for_the_rest_is_given_back_where_one_fails(site: InProcessSite) -> None:
    site.stop_worker()
    site.speed.seconds_per_step = 0.01
    site.start_worker()
    alice = limited(site, concurrent_requests=1, tokens_per_minute=4000)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(post, alice, "/v1/completions", max_tokens=200)
        wait_until(lambda: site.num_running() == 1)
        site.stop_worker()
        assert asked.result(30).status_code == 503
    wait_until(lambda: site.charged(site.cast.alice) == (0, 0))
    wait_until(lambda: throttling.peek_tokens(flow_principal(site)).remaining == 4000)
    assert audit().is_clean


def flow_principal(site: InProcessSite) -> Any:
    key = type(site.cast.alice.key).objects.select_related("tenant__plan").get(pk=site.cast.alice.key.pk)
    return key_rows.principal_of(key)


def test_a_later_one_that_is_refused_all_the_same_is_explained(
    site: InProcessSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter = throttling.enter

    def refuses(principal: Any, request_id: str, **more: Any) -> Any:
        if request_id.endswith(".2"):
            raise Refusal("rate_limit_exceeded", "Not this one.", limit="tokens_per_minute", value=1)
        return enter(principal, request_id, **more)

    monkeypatch.setattr(throttling, "enter", refuses)
    refused = post(limited(site), "/v1/completions")
    assert refused.status_code == 429
    wait_until(lambda: site.charged(site.cast.alice)[1] == 0)
    found = explain(refused.headers["x-request-id"])
    assert found is not None and found["refusal"]["limit"] == "tokens_per_minute"
    assert audit().is_clean


def test_a_key_whose_answers_were_charged_in_part_is_not_computed_again(site: InProcessSite) -> None:
    site.stop_worker()
    site.speed.seconds_per_step = 0.02
    site.start_worker()
    alice, header = limited(site, concurrent_requests=1), key_header()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(post, alice, "/v1/completions", max_tokens=80, n=2, headers=header)
        wait_until(lambda: LedgerEntry.objects.filter(kind="settle").exists())
        wait_until(lambda: site.num_running() == 1)
        site.stop_worker()
        assert asked.result(30).status_code == 503
    site.start_worker()
    charged = site.charged(site.cast.alice)
    assert charged == (84, 0)
    again = post(alice, "/v1/completions", max_tokens=80, n=2, headers=header)
    assert again.status_code == 409, again.text
    assert again.headers["x-should-retry"] == "false"
    assert site.charged(site.cast.alice) == charged


def test_a_key_whose_answers_were_refused_as_a_whole_is_free(site: InProcessSite) -> None:
    header = key_header()
    assert post(limited(site, tokens_per_minute=35), "/v1/completions", headers=header).status_code == 429
    again = post(limited(site), "/v1/completions", headers=header)
    assert again.status_code == 200
    assert "idempotent-replayed" not in again.headers

"""POST /v1/admission says what would happen, and nothing happens. Refusals are kept with the limit that bound."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest
from django.core.management import CommandError, call_command

from accounts.models import LedgerEntry, QuotaPeriod, RefusedRequest, Reservation, announce_tenant
from accounts.trail import refusal_log
from accounts.trail.refusals import Refusal
from inference.intake import dry_run
from tests.conftest import Customer
from tests.in_process import MODEL, OTHER_MODEL, Client, InProcessSite

pytestmark = pytest.mark.integration

BODIES: dict[str, dict[str, Any]] = {
    "/v1/generate": {"prompt": "one two three", "max_new_tokens": 5},
    "/v1/generate/batch": {"prompts": ["one two three", "four"], "max_new_tokens": 5},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "one two"}], "max_tokens": 5},
    "/v1/completions": {"prompt": "one two three", "max_tokens": 5},
    "/completion": {"prompt": "one two three", "n_predict": 5},
}


def limited(customer: Customer, **limits: int | None) -> None:
    customer.tenant.limit_overrides = limits
    customer.tenant.save()
    announce_tenant(customer.tenant.pk)


def ask(client: Client, body: dict[str, Any], route: str = "/v1/generate", **headers: str) -> Any:
    return client.post("/v1/admission", json=body, headers={"X-Admission-Route": route, **headers})


BEATING = (b"llmsite", b"worker:", b"web:", b"webs", b"heard", b"doubted", b"accounts:version")


def counters(site: InProcessSite, valkey: Any) -> Any:
    """Everything that a request could have moved, but the attempts. An empty period that was opened is nothing."""
    keys = sorted(key for key in valkey.keys("*") if not key.startswith(BEATING))
    tokens = {key: float(valkey.hget(key, "level")) for key in keys if b":tokens:" in key}
    periods = QuotaPeriod.objects.exclude(used_requests=0, reserved_requests=0)
    tables = (periods, Reservation.objects.all(), LedgerEntry.objects.all())
    rows = [list(rows.order_by("pk").values()) for rows in tables]
    return [key for key in keys if b":tokens:" not in key], tokens, rows


@pytest.mark.parametrize("route", BODIES)
def test_any_body_of_any_dialect_is_counted_to_the_token_and_takes_nothing(
    site: InProcessSite, valkey: Any, route: str
) -> None:
    client = site.client(site.cast.alice)
    limited(site.cast.alice, monthly_tokens=1000, tokens_per_minute=500)
    found = ask(client, BODIES[route], route)
    assert found.status_code == 200, found.text
    told = found.json()
    assert told["admitted"] and told["refusal"] is None and told["route"] == route
    before = counters(site, valkey)
    assert before[2] == [[], [], []] and not before[1]
    real = client.post(route, json=BODIES[route])
    assert real.status_code == 200, real.text
    site.settle()
    reserved = LedgerEntry.objects.filter(kind="reserve").values_list("reserved_tokens", flat=True)
    assert told["reserved_tokens"] == sum(reserved)
    assert told["requests"] == len(reserved)


def test_the_route_is_a_header_and_generate_without_it(site: InProcessSite) -> None:
    client = site.client(site.cast.alice)
    assert client.post("/v1/admission", json=BODIES["/v1/generate"]).json()["route"] == "/v1/generate"
    for route in ("/v1/models", "/v1/admission", "/nowhere", "x", "/admin/", "/v1/requests/1/cancel"):
        refused = ask(client, BODIES["/v1/generate"], route)
        assert (refused.status_code, refused.json()["code"]) == (422, "validation_error")


def test_what_is_wrong_with_a_body_is_said_in_its_dialect(site: InProcessSite) -> None:
    client = site.client(site.cast.alice)
    assert ask(client, {"messages": []}, "/v1/chat/completions").json()["error"]["param"] == "messages"
    assert ask(client, {"prompt": 5}).json()["code"] == "validation_error"
    hidden = ask(site.client(site.cast.bob), {"prompt": "a", "model": OTHER_MODEL})
    assert (hidden.status_code, hidden.json()["code"]) == (404, "model_not_found")


REFUSALS: dict[str, tuple[dict[str, int | None], str, str]] = {
    "monthly tokens": ({"monthly_tokens": 3}, "quota_exhausted", "monthly_tokens"),
    "monthly requests": ({"monthly_requests": 0}, "quota_exhausted", "monthly_requests"),
    "tokens a minute": ({"tokens_per_minute": 7}, "rate_limit_exceeded", "tokens_per_minute"),
    "requests at once": ({"concurrent_requests": 0}, "too_many_concurrent_requests", "concurrent_requests"),
    "streams at once": ({"concurrent_streams": 0}, "too_many_concurrent_streams", "concurrent_streams"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_says_the_same_sentence_and_is_explained(
    site: InProcessSite, valkey: Any, name: str, capsys: Any
) -> None:
    limits, code, limit = REFUSALS[name]
    limited(site.cast.alice, **limits)
    client, body = site.client(site.cast.alice), {**BODIES["/v1/generate"], "stream": True}
    told = ask(client, body).json()
    before = counters(site, valkey)
    real = client.post("/v1/generate", json=body)
    assert counters(site, valkey) == before, "a refused request moves nothing but the attempts"
    assert (real.json()["code"], told["admitted"], told["reserved_tokens"]) == (code, False, 0)
    assert told["refusal"]["message"] == real.json()["message"]
    assert told["binding"]["limit"] == limit
    request_id = real.headers["x-request-id"]
    found = client.get(f"/v1/requests/{request_id}").json()
    assert (found["status"], found["code"], found["limit"], found["of"]) == ("refused", code, limit, "tenant")
    assert found["value"] == next(iter(limits.values()))
    assert refusal_log.LOG.write() >= 0
    row = RefusedRequest.objects.get(request_id=request_id)
    assert (row.tenant_id, row.key_id, row.route) == (site.cast.alice.tenant.pk, site.cast.alice.key.pk, "/v1/generate")
    assert client.get(f"/v1/requests/{request_id}").json()["message"] == real.json()["message"]
    call_command("explain", request_id)
    assert real.json()["message"] in capsys.readouterr().out
    for other in (site.cast.bob, site.cast.charlie):
        assert site.client(other).get(f"/v1/requests/{request_id}").status_code == 404
        assert site.client(other).get("/v1/me/refusals").json()["data"] == []
    listed = client.get("/v1/me/refusals").json()["data"]
    assert request_id in {each["id"] for each in listed}


def test_requests_a_minute_count_the_dry_run_as_an_attempt(site: InProcessSite) -> None:
    limited(site.cast.alice, requests_per_minute=2)
    client = site.client(site.cast.alice)
    assert [ask(client, BODIES["/v1/generate"]).status_code for _ in range(3)] == [200, 200, 429]
    refused = client.get("/v1/me")
    row = refusal_log.find(refused.headers["x-request-id"])
    assert row is not None and (row.limit, row.value, row.bound_to) == ("requests_per_minute", 2, "tenant")
    assert row.frees_at is not None and row.frees_at > row.created_at


def test_a_clamped_quota_is_told_and_never_exceeded(site: InProcessSite) -> None:
    """Five tokens are left after the prompt, five hundred are asked for."""
    limited(site.cast.alice, monthly_tokens=8)
    client, body = site.client(site.cast.alice), {"prompt": "one two three", "max_new_tokens": 200, "cache": False}
    told = ask(client, body).json()
    assert (told["max_tokens"], told["clamped"], told["reserved_tokens"]) == (5, True, 8)
    strict = {"x-quota-all-or-nothing": "true"}
    assert ask(client, body, **strict).json()["refusal"]["code"] == "quota_exhausted"
    assert client.post("/v1/generate", json=body, headers=strict).status_code == 402
    answer = client.post("/v1/generate", json=body)
    assert (answer.headers["x-quota-clamped"], answer.headers["x-usage-completion-tokens"]) == ("true", "5")
    assert site.charged(site.cast.alice) == (8, 0)
    assert client.post("/v1/generate", json={**body, "max_new_tokens": 1}).status_code == 402


def test_a_cached_answer_takes_a_request_and_no_tokens(site: InProcessSite) -> None:
    client = site.client(site.cast.alice)
    client.post("/v1/generate", json=BODIES["/v1/generate"])
    told = ask(client, BODIES["/v1/generate"]).json()
    assert (told["cached"], told["reserved_tokens"], told["requests"]) == (True, 0, 1)


def test_a_cached_answer_needs_no_tokens_of_a_quota_that_was_lowered(site: InProcessSite) -> None:
    client = site.client(site.cast.alice)
    client.post("/v1/generate", json=BODIES["/v1/generate"])
    site.settle()
    limited(site.cast.alice, monthly_tokens=3)
    told = ask(client, BODIES["/v1/generate"]).json()
    assert (told["admitted"], told["refusal"], told["max_tokens"]) == (True, None, 0)
    assert client.post("/v1/generate", json=BODIES["/v1/generate"]).headers["x-cache"] == "hit"


def test_a_prompt_is_counted_once_where_the_first_of_several_answers_is_cached(site: InProcessSite) -> None:
    client = site.client(site.cast.alice)
    body = {"prompt": "one two three four", "max_tokens": 8, "temperature": 1, "seed": 7, "cache": True}
    assert client.post("/v1/completions", json=body).status_code == 200
    site.settle()
    told = ask(client, {**body, "n": 3}, "/v1/completions").json()
    assert (told["prompt_tokens"], told["max_tokens"]) == (4, 16)


def test_of_two_limits_that_refuse_it_names_the_one_that_the_request_meets_first(
    site: InProcessSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, "crowd_of", lambda *_: SimpleNamespace(full="tenant", num_waiting=1, num_free=0))
    limited(site.cast.alice, queue_length=1, tokens_per_minute=7, monthly_tokens=3)
    client, body = site.client(site.cast.alice), BODIES["/v1/generate"]
    told, real = ask(client, body).json(), client.post("/v1/generate", json=body)
    assert real.json()["code"] == "queue_full"
    assert (told["refusal"]["message"], told["binding"]["limit"]) == (real.json()["message"], "queue_length")


def test_the_queue_is_told(site: InProcessSite) -> None:
    told = ask(site.client(site.cast.alice), BODIES["/v1/generate"]).json()
    assert told["queue"] == {"waiting": 0, "free_slots": 8, "seconds": 0.0}


def test_the_wait_is_guessed_by_what_runs_at_once_whatever_the_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "crowd_of", lambda *_: SimpleNamespace(num_waiting=8, num_free=0))
    monkeypatch.setattr(dry_run, "_mean_seconds", lambda *_: 10.0)
    served: Any = SimpleNamespace(n_slots=2, n_lanes=4, num_slots=8)
    who: Any = None
    assert dry_run._queue(served, who, datetime.now(UTC))["seconds"] == 50.0


def test_charlie_learns_nothing_of_alices_limits(site: InProcessSite) -> None:
    limited(site.cast.alice, monthly_tokens=3)
    told = ask(site.client(site.cast.charlie), BODIES["/v1/generate"]).json()
    assert told["admitted"] and {limit["value"] for limit in told["limits"]} == {10_000_000}


# What is kept of refusals


def _note(number: int, tenant: int | None = 1, **extra: Any) -> None:
    principal: Any = None
    if tenant is not None:
        principal = type("Anyone", (), {"tenant_id": tenant, "key_id": tenant})()
    refusal = Refusal("queue_full", "3 wait.", retry_after=1, limit="queue_length", value=3, **extra)
    refusal_log.note(refusal, request_id=f"r{number}", route="/v1/generate", principal=principal)


@pytest.mark.django_db
def test_who_is_refused_a_lot_does_not_push_out_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    log = refusal_log.RefusalLog()
    monkeypatch.setattr(log, "_ensure_started", lambda: None)
    monkeypatch.setattr(refusal_log, "LOG", log)
    for number in range(1000):
        _note(number)
    _note(1000, tenant=2)
    _note(1001, tenant=None)
    assert log.write() == refusal_log.MAX_EACH + 2
    assert RefusedRequest.objects.get(request_id=f"r{refusal_log.MAX_EACH - 1}").num_more == 1000 - refusal_log.MAX_EACH
    assert log.write() == 0


@pytest.mark.django_db
def test_notes_outlive_a_database_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    from django.db import OperationalError

    log = refusal_log.RefusalLog()
    monkeypatch.setattr(log, "_ensure_started", lambda: None)
    monkeypatch.setattr(refusal_log, "LOG", log)

    def away(*_arguments: Any, **_options: Any) -> None:
        raise OperationalError("away")

    _note(1)
    with monkeypatch.context() as broken:
        broken.setattr(RefusedRequest.objects, "bulk_create", away)
        with pytest.raises(OperationalError):
            log.write()
    _note(2)
    assert log.write() == 2


@pytest.mark.django_db(transaction=True)
def test_the_end_of_a_web_process_writes_the_rest_and_is_not_held_up_by_a_database_that_is_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from django.db import OperationalError

    log = refusal_log.RefusalLog()
    monkeypatch.setattr(log, "_ensure_started", lambda: None)
    monkeypatch.setattr(refusal_log, "LOG", log)
    _note(1)
    refusal_log.write_rest()
    assert RefusedRequest.objects.get().request_id == "r1"

    def away() -> int:
        raise OperationalError("away")

    monkeypatch.setattr(log, "write", away)
    refusal_log.write_rest()


@pytest.mark.unit
@pytest.mark.parametrize("code", ["validation_error", "model_not_found", "invalid_grammar", "chat_template_refused"])
def test_what_a_request_said_is_not_kept(code: str) -> None:
    row = refusal_log.row_of(
        Refusal(code, "There is no model 'canary'."), request_id="r", route="/v1/generate", principal=None
    )
    assert (row.message, row.code) == ("", code)


@pytest.mark.django_db
def test_an_unknown_request_is_said_to_be_unknown() -> None:
    with pytest.raises(CommandError, match="Nothing is kept"):
        call_command("explain", "nothing")


def test_a_served_request_is_explained_by_its_receipt(site: InProcessSite, capsys: Any) -> None:
    answer = site.client(site.cast.alice).post("/v1/generate", json=BODIES["/v1/generate"])
    site.settle()
    call_command("explain", answer.headers["x-request-id"])
    told = capsys.readouterr().out
    assert "completed" in told and "8 tokens charged" in told and "settle: +8 used" in told


@pytest.mark.parametrize(
    "gone", [lambda cast: cast.key.delete(), lambda cast: cast.tenant.api_keys.all().delete() and cast.tenant.delete()]
)
def test_the_refusals_of_a_tenant_that_is_gone_do_no_harm(
    site: InProcessSite, gone: Callable[[Customer], object]
) -> None:
    limited(site.cast.bob, concurrent_requests=0)
    site.client(site.cast.bob).post("/v1/generate", json=BODIES["/v1/generate"])
    gone(site.cast.bob)
    refusal_log.LOG.write()
    assert site.client(site.cast.alice).get("/v1/me/refusals").json()["data"] == []


def test_a_key_may_use_the_models_of_its_list_alone(site: InProcessSite) -> None:
    from accounts.identity import known_keys

    key, client = site.cast.alice.key, site.client(site.cast.alice)
    assert {each["id"] for each in client.get("/v1/models").json()["models"]} == {MODEL, OTHER_MODEL}
    key.allowed_models = [OTHER_MODEL]
    key.save()
    known_keys.announce_change(key.public_id)
    assert {each["id"] for each in client.get("/v1/models").json()["models"]} == {OTHER_MODEL}
    assert client.generate(model=OTHER_MODEL).status_code == 200
    hidden, invented = client.generate(model=MODEL), client.generate(model="invented")
    assert (hidden.status_code, hidden.json()["code"]) == (invented.status_code, invented.json()["code"])
    assert hidden.json()["code"] == "model_not_found"

"""API keys at the door: missing, malformed, unknown, revoked, expired, suspended, and what a scope allows."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import httpx
import pytest
from django.utils import timezone

from tests.conftest import make_customer
from tests.in_process import Client, InProcessSite

pytestmark = pytest.mark.api

TENANT_PATHS = ["/v1/models", "/v1/me", "/v1/me/usage", "/v1/requests/3fa85f64-5717-4562-b3fc-2c963f66afa6"]
OPERATOR_PATHS = [
    "/v1/admin/tenants",
    "/v1/admin/keys",
    "/v1/admin/plans",
    "/v1/admin/quotas",
    "/v1/admin/ledger",
    "/v1/admin/models",
    "/v1/admin/usage",
    "/v1/admin/logs",
    "/v1/admin/stats",
    "/v1/admin/reports/summary",
]
PUBLIC_PATHS = ["/healthz", "/health", "/v1/healthz", "/readyz", "/v1/readyz", "/modelz", "/openapi.json", "/docs/"]


def without_key(api: Client) -> httpx.Client:
    return httpx.Client(base_url=api.base_url, timeout=30)


def test_a_missing_key_is_told(api: Client) -> None:
    with without_key(api) as client:
        reply = client.post("/v1/generate", json={"prompt": "x"})
    assert (reply.status_code, reply.json()["code"]) == (401, "missing_api_key")
    assert reply.headers["www-authenticate"] == "Bearer"
    assert reply.json()["request_id"] == reply.headers["x-request-id"]


@pytest.mark.parametrize(
    "headers",
    [
        {"X-API-Key": "nonsense"},
        {"X-API-Key": "llms_0123456789ab_" + "A" * 38},
        {"Authorization": "Bearer llms_"},
        {"Authorization": "Bearer " + "x" * 5000},
    ],
)
def test_an_unknown_key_is_invalid(api: Client, headers: dict[str, str]) -> None:
    with without_key(api) as client:
        reply = client.post("/v1/generate", json={"prompt": "x"}, headers=headers)
    assert (reply.status_code, reply.json()["code"]) == (401, "invalid_api_key")
    assert next(iter(headers.values())) not in reply.text


@pytest.mark.parametrize("headers", [{"Authorization": "Basic abc"}, {"Authorization": "Bearer"}, {"X-API-Key": ""}])
def test_credentials_of_another_kind_are_no_key(api: Client, headers: dict[str, str]) -> None:
    with without_key(api) as client:
        reply = client.get("/v1/me", headers=headers)
    assert (reply.status_code, reply.json()["code"]) == (401, "missing_api_key")


def test_both_headers_carry_a_key(api: Client) -> None:
    with without_key(api) as client:
        assert client.get("/v1/me", headers={"X-API-Key": api.key}).status_code == 200
        assert client.get("/v1/me", headers={"Authorization": f"bearer {api.key}"}).status_code == 200


def test_the_key_itself_is_never_echoed(api: Client) -> None:
    for path in ("/v1/me", "/v1/me/usage", "/v1/models"):
        reply = api.get(path)
        assert reply.status_code == 200
        assert api.key not in reply.text
        assert api.key.split("_")[2] not in reply.text


@pytest.mark.parametrize("path", PUBLIC_PATHS)
def test_health_and_documents_need_no_key(api: Client, path: str) -> None:
    with without_key(api) as client:
        assert client.get(path).status_code in {200, 503}


@pytest.mark.parametrize("path", [*TENANT_PATHS, *OPERATOR_PATHS])
def test_everything_else_needs_one(api: Client, path: str) -> None:
    with without_key(api) as client:
        reply = client.get(path)
    assert (reply.status_code, reply.json()["code"]) == (401, "missing_api_key")


def test_a_revoked_key_is_refused(site: InProcessSite) -> None:
    from accounts.identity import issuing

    alice = site.client(site.cast.alice)
    assert alice.get("/v1/me").status_code == 200
    issuing.revoke(site.cast.alice.key)
    reply = alice.get("/v1/me")
    assert (reply.status_code, reply.json()["code"]) == (401, "invalid_api_key")


def test_an_expired_key_may_say_so(site: InProcessSite, cast: Any) -> None:
    from accounts.identity.known_keys import announce_change
    from accounts.models import APIKey

    APIKey.objects.filter(pk=cast.bob.key.pk).update(expires_at=timezone.now() - timedelta(seconds=1))
    announce_change(cast.bob.key.public_id)
    reply = site.client(cast.bob).get("/v1/me")
    assert (reply.status_code, reply.json()["code"]) == (401, "expired_api_key")


def test_keys_of_a_suspended_tenant_are_refused(site: InProcessSite, cast: Any) -> None:
    operator = site.client(cast.operator)
    assert operator.patch(f"/v1/admin/tenants/{cast.bob.tenant.pk}", json={"status": "suspended"}).status_code == 200
    reply = site.client(cast.bob).get("/v1/me")
    assert reply.status_code in {401, 403}
    assert reply.json()["code"] in {"invalid_api_key", "tenant_suspended"}


@pytest.mark.parametrize("path", OPERATOR_PATHS)
def test_a_tenant_may_not_operate(site: InProcessSite, path: str) -> None:
    for customer in (site.cast.alice, site.cast.charlie):
        reply = site.client(customer).get(path)
        assert (reply.status_code, reply.json()["code"]) == (403, "forbidden")


def test_an_operator_key_does_not_generate(site: InProcessSite) -> None:
    reply = site.client(site.cast.operator).generate()
    assert (reply.status_code, reply.json()["code"]) == (403, "forbidden")


def test_a_key_for_usage_alone_does_not_generate(site: InProcessSite) -> None:
    reader = site.client(make_customer("Reader", site.cast.alice.tenant.plan, scopes=["usage"]))
    assert reader.get("/v1/me/usage").status_code == 200
    assert reader.generate().status_code == 403


def test_what_is_wrong_with_the_body_is_told_before_the_scope(site: InProcessSite) -> None:
    """The order of the contract: key, rate, parse, scope."""
    assert site.client(site.cast.operator).post("/v1/generate", content=b"{").status_code == 400


def test_charlie_sees_nothing_of_alice(site: InProcessSite) -> None:
    alice, charlie = site.client(site.cast.alice), site.client(site.cast.charlie)
    request_id = alice.generate().headers["x-request-id"]
    site.settle()
    assert alice.get(f"/v1/requests/{request_id}").status_code == 200
    for reply in (charlie.get(f"/v1/requests/{request_id}"), charlie.post(f"/v1/requests/{request_id}/cancel")):
        assert (reply.status_code, reply.json()["code"]) == (404, "not_found")
    assert charlie.get("/v1/me/usage").json()["total_requests"] == 0

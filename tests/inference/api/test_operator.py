"""The operator's API: plans, tenants, keys, quotas, models, logs and reports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from accounts.identity import issuing, tenants
from accounts.models import APIKey, Tenant
from inference.api.operator import views
from tests.in_process import MODEL, OTHER_MODEL, Client, InProcessSite, wait_until

pytestmark = [pytest.mark.api, pytest.mark.integration]


@pytest.fixture
def operator(site: InProcessSite) -> Client:
    return site.client(site.cast.operator)


def test_a_tenant_is_made_and_gets_a_key_that_works(site: InProcessSite, operator: Client) -> None:
    plan = operator.post("/v1/admin/plans", json={"name": "tiny", "role": "free", "requests_per_minute": 5})
    assert plan.status_code == 201
    tenant = operator.post("/v1/admin/tenants", json={"name": "Dana's", "plan": "tiny"})
    assert tenant.status_code == 201
    issued = operator.post("/v1/admin/keys", json={"tenant": "Dana's", "name": "laptop"})
    assert issued.status_code == 201
    text = issued.json()["key"]
    assert text.startswith("llms_")
    dana = Client(site.base_url, text)
    assert dana.get("/v1/me").json()["limits"]["requests_per_minute"] == 5
    assert text not in operator.get(f"/v1/admin/keys/{issued.json()['id']}").text
    assert text not in operator.get("/v1/admin/keys").text


def test_a_change_does_not_undo_what_another_did_meanwhile(
    site: InProcessSite, operator: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row was read before the key was revoked and the tenant suspended, and is written after it."""
    alice = site.cast.alice

    def between(view: Any, meanwhile: Callable[[], object]) -> None:
        read = view.get_object

        def late(self: Any) -> Any:
            row = read(self)
            meanwhile()
            return row

        monkeypatch.setattr(view, "get_object", late)

    between(views.KeyViewSet, lambda: issuing.revoke(APIKey.objects.get(pk=alice.key.pk)))
    renamed = operator.patch(f"/v1/admin/keys/{alice.key.pk}", json={"name": "renamed"})
    assert (renamed.status_code, renamed.json()["name"]) == (200, "renamed")
    key = APIKey.objects.get(pk=alice.key.pk)
    assert key.revoked_at is not None and key.name == "renamed"
    suspended = Tenant.Status.SUSPENDED
    between(views.TenantViewSet, lambda: tenants.set_status([Tenant.objects.get(pk=alice.tenant.pk)], suspended))
    body = {"response_days": 3, "limit_overrides": {"monthly_tokens": 7}}
    assert operator.patch(f"/v1/admin/tenants/{alice.tenant.pk}", json=body).status_code == 200
    tenant = Tenant.objects.get(pk=alice.tenant.pk)
    assert (tenant.status, tenant.response_days, tenant.limit_overrides) == (suspended, 3, {"monthly_tokens": 7})


def test_lists_come_in_pages(operator: Client) -> None:
    page = operator.get("/v1/admin/keys", params={"limit": 2, "offset": 1}).json()
    assert (page["total"], page["limit"], page["offset"]) == (4, 2, 1)
    assert len(page["results"]) == 2
    assert {"key_prefix", "name", "role", "created_at", "disabled"} <= page["results"][0].keys()


@pytest.mark.parametrize("query", [{"limit": 0}, {"limit": 201}, {"limit": "x"}, {"offset": -1}])
def test_a_page_out_of_range_is_refused(operator: Client, query: dict[str, Any]) -> None:
    for path in ("/v1/admin/keys", "/v1/admin/logs"):
        reply = operator.get(path, params=query)
        assert (reply.status_code, reply.json()["code"]) == (422, "validation_error")
        assert reply.json()["request_id"] == reply.headers["x-request-id"]


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/admin/plans", {"name": "p", "requests_per_minute": -1}, "requests_per_minute"),
        ("/v1/admin/plans", {"name": "cast"}, "name"),
        ("/v1/admin/tenants", {"name": "x", "plan": "no such plan"}, "plan"),
        ("/v1/admin/tenants", {"name": "x", "plan": "cast", "limit_overrides": {"bogus": 1}}, "limit_overrides"),
        ("/v1/admin/tenants", {"name": "x", "plan": "cast", "quota_anchor_day": 31}, "quota_anchor_day"),
        ("/v1/admin/keys", {"tenant": "Alice's"}, "name"),
        ("/v1/admin/keys", {"tenant": "Alice's", "name": "k", "scopes": ["root"]}, "scopes"),
        ("/v1/admin/keys", {"tenant": "Alice's", "name": "k", "expires_at": "2001-01-01T00:00:00Z"}, "expires_at"),
        ("/v1/admin/quotas/adjust", {"tenant": "Alice's", "tokens": 5}, "reason"),
        ("/v1/admin/models", {"name": "m", "path": "/nowhere/at/all.gguf"}, "path"),
    ],
)
def test_what_is_wrong_is_named(operator: Client, path: str, body: dict[str, Any], field: str) -> None:
    reply = operator.post(path, json=body)
    assert (reply.status_code, reply.json()["code"]) == (422, "validation_error")
    assert field in {found["loc"][0] for found in reply.json()["extra"]["fields"]}


def test_broken_json_and_other_media_types_are_told_apart(operator: Client) -> None:
    broken = operator.post("/v1/admin/plans", content=b"{", headers={"content-type": "application/json"})
    form = operator.post("/v1/admin/plans", data={"name": "x"})
    assert (broken.status_code, broken.json()["code"]) == (400, "invalid_json")
    assert (form.status_code, form.json()["code"]) == (415, "unsupported_media_type")


def test_what_does_not_exist_is_not_found(operator: Client) -> None:
    for path in ("/v1/admin/keys/999999", "/v1/admin/tenants/none", "/v1/admin/nothing"):
        reply = operator.get(path)
        assert (reply.status_code, reply.json()["code"]) == (404, "not_found")


def test_methods_that_are_not_offered_are_refused(operator: Client, site: InProcessSite) -> None:
    reply = operator.delete(f"/v1/admin/tenants/{site.cast.bob.tenant.pk}")
    assert (reply.status_code, reply.json()["code"]) == (405, "method_not_allowed")


def test_operators_answers_show_their_limits_too(operator: Client) -> None:
    for reply in (operator.get("/v1/admin/plans"), operator.post("/v1/admin/plans", json={})):
        assert int(reply.headers["x-ratelimit-limit-requests"]) > 0
        assert int(reply.headers["x-ratelimit-remaining-tokens"]) > 0


def test_a_plan_in_use_cannot_be_deleted(operator: Client, site: InProcessSite) -> None:
    reply = operator.delete(f"/v1/admin/plans/{site.cast.alice.tenant.plan.pk}")
    assert (reply.status_code, reply.json()["code"]) == (409, "conflict")
    spare = operator.post("/v1/admin/plans", json={"name": "spare"}).json()["id"]
    assert operator.delete(f"/v1/admin/plans/{spare}").status_code == 204


def test_a_change_of_a_plan_holds_at_once(operator: Client, site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    assert alice.get("/v1/me").json()["limits"]["requests_per_minute"] is None
    plan = site.cast.alice.tenant.plan.pk
    assert operator.patch(f"/v1/admin/plans/{plan}", json={"requests_per_minute": 77}).status_code == 200
    assert alice.get("/v1/me").json()["limits"]["requests_per_minute"] == 77
    tenant = site.cast.alice.tenant.pk
    body = {"limit_overrides": {"requests_per_minute": 66}}
    assert operator.patch(f"/v1/admin/tenants/{tenant}", json=body).status_code == 200
    assert alice.get("/v1/me").json()["limits"]["requests_per_minute"] == 66


def test_a_key_is_issued_with_the_models_and_adapters_that_it_may_use(operator: Client, site: InProcessSite) -> None:
    body = {"tenant": "Alice's", "name": "narrow", "allowed_models": ["other"], "allowed_adapters": []}
    issued = operator.post("/v1/admin/keys", json=body)
    assert issued.status_code == 201, issued.text
    assert (issued.json()["allowed_models"], issued.json()["allowed_adapters"]) == (["other"], [])
    narrow = Client(site.base_url, issued.json()["key"])
    assert narrow.generate("one").status_code == 404
    successor = operator.post(f"/v1/admin/keys/{issued.json()['id']}/rotate", json={"overlap_seconds": 60}).json()
    assert successor["allowed_models"] == ["other"]
    assert Client(site.base_url, successor["key"]).generate("one").status_code == 404
    wrong = operator.post("/v1/admin/keys", json={**body, "allowed_models": "other"})
    assert (wrong.status_code, wrong.json()["extra"]["fields"][0]["loc"]) == (422, ["allowed_models"])


def test_a_key_is_renamed_rotated_and_revoked(operator: Client, site: InProcessSite) -> None:
    key = site.cast.alice.key.pk
    assert operator.patch(f"/v1/admin/keys/{key}", json={"name": "renamed"}).json()["name"] == "renamed"
    rotated = operator.post(f"/v1/admin/keys/{key}/rotate", json={"overlap_seconds": 60})
    assert rotated.status_code == 201
    successor = Client(site.base_url, rotated.json()["key"])
    assert successor.get("/v1/me").status_code == 200
    assert site.client(site.cast.alice).get("/v1/me").status_code == 200
    assert operator.post(f"/v1/admin/keys/{key}/revoke").json()["disabled"] is True
    assert site.client(site.cast.alice).get("/v1/me").status_code == 401
    assert successor.get("/v1/me").status_code == 200
    assert operator.post(f"/v1/admin/keys/{key}/rotate", json={}).status_code == 409
    assert operator.delete(f"/v1/admin/keys/{rotated.json()['id']}").status_code == 204
    assert successor.get("/v1/me").status_code == 401


def test_quotas_are_listed_and_corrected(operator: Client, site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    tokens = int(alice.generate("one two").headers["x-usage-total-tokens"])
    site.settle()
    (row,) = [row for row in operator.get("/v1/admin/quotas").json()["results"] if row["key"] is None]
    assert (row["tenant"], row["used_tokens"], row["reserved_tokens"]) == ("Alice's", tokens, 0)
    body = {"tenant": "Alice's", "tokens": -tokens, "reason": "a gift"}
    adjusted = operator.post("/v1/admin/quotas/adjust", json=body)
    assert adjusted.status_code == 200
    assert [row["used_tokens"] for row in adjusted.json() if row["key"] is None] == [0]
    assert operator.post("/v1/admin/quotas/adjust", json=body).status_code == 409
    kinds = [row["kind"] for row in operator.get("/v1/admin/ledger").json()["results"]]
    assert kinds[0] == "adjust"
    assert {"reserve", "settle"} <= set(kinds)


def test_a_key_of_another_tenant_cannot_be_adjusted(operator: Client, site: InProcessSite) -> None:
    body = {"tenant": "Alice's", "key": site.cast.bob.key.public_id, "tokens": 1, "reason": "mistake"}
    assert operator.post("/v1/admin/quotas/adjust", json=body).status_code == 422


def test_models_are_listed_and_changed(
    operator: Client, site: InProcessSite, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from inference.catalog import model_rows
    from inference.vetting.inspection import Inspected

    def known(path: Any, *, known: Any = None, **_: Any) -> Any:
        return Inspected(
            path=Path(known.path), digest=known.digest, size_bytes=known.size_bytes, metadata=known.metadata
        )

    monkeypatch.setattr(model_rows, "examine", known)
    listed = {row["name"]: row for row in operator.get("/v1/admin/models").json()["results"]}
    assert set(listed) == {MODEL, OTHER_MODEL}
    assert listed[OTHER_MODEL]["granted_tenants"] == ["Alice's"]
    changed = operator.patch(
        f"/v1/admin/models/{listed[OTHER_MODEL]['id']}", json={"granted_tenants": ["Bob's"], "aliases": ["second"]}
    )
    assert changed.status_code == 200
    assert site.client(site.cast.bob).generate(model="second").status_code == 200
    assert site.client(site.cast.alice).generate(model="second").status_code == 404
    assert operator.patch(f"/v1/admin/models/{listed[MODEL]['id']}", json={"n_ctx": 1}).status_code == 422
    drafts = operator.patch(f"/v1/admin/models/{listed[MODEL]['id']}", json={"draft_kind": "prompt_lookup"})
    assert (drafts.status_code, drafts.json()["draft_kind"], drafts.json()["draft_model"]) == (
        200,
        "prompt_lookup",
        None,
    )
    for wrong in ({"draft_model": "nobody"}, {"draft_n_max": 65}, {"draft_kind": "model"}):
        assert operator.patch(f"/v1/admin/models/{listed[MODEL]['id']}", json=wrong).status_code == 422
    assert operator.delete(f"/v1/admin/models/{listed[OTHER_MODEL]['id']}").status_code == 204
    assert operator.get("/v1/admin/models").json()["total"] == 1


def test_a_file_that_is_no_model_is_refused(operator: Client, tmp_path: Path) -> None:
    file = tmp_path / "not.gguf"
    file.write_bytes(b"this is not a model")
    reply = operator.post("/v1/admin/models", json={"name": "m", "path": str(file)})
    assert (reply.status_code, reply.json()["code"]) == (422, "validation_error")
    assert operator.get("/v1/admin/models").json()["total"] == 2


def test_logs_are_filtered_and_hold_no_text(operator: Client, site: InProcessSite) -> None:
    alice, bob = site.client(site.cast.alice), site.client(site.cast.bob)
    alice.generate("canary words")
    bob.generate("other words", model=None)
    bob.generate(model="nothing")
    site.settle()
    page = operator.get("/v1/admin/logs").json()
    assert (page["total"], page["limit"], page["offset"]) == (2, 50, 0)
    assert "canary" not in str(page)
    mine = operator.get("/v1/admin/logs", params={"api_key": site.cast.alice.key.public_id}).json()["items"]
    assert [item["tenant"] for item in mine] == ["Alice's"]
    assert mine[0]["latency_ms"] >= 0
    for query, number in (
        ({"tenant": "Bob's"}, 1),
        ({"route": "/v1/generate"}, 2),
        ({"route": "/elsewhere"}, 0),
        ({"model_id": MODEL}, 2),
        ({"from_ts": "2001-01-01T00:00:00Z"}, 2),
        ({"to_ts": "2001-01-01T00:00:00Z"}, 0),
        ({"status": "completed", "limit": 1}, 2),
    ):
        assert operator.get("/v1/admin/logs", params=query).json()["total"] == number, query
    assert operator.get("/v1/admin/logs", params={"from_ts": "yesterday"}).status_code == 422


def test_usage_stats_and_summary_agree(operator: Client, site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    replies = [alice.generate(prompt) for prompt in ("one", "two", "two")]
    site.settle()
    tokens = sum(int(reply.headers["x-usage-completion-tokens"]) for reply in replies[:2])
    (usage,) = operator.get("/v1/admin/usage").json()["results"]
    assert usage["tenant"] == "Alice's"
    stats = operator.get("/v1/admin/stats", params={"window_days": 1}).json()
    assert stats["window_days"] == 1
    assert stats["total_requests"] == usage["total_requests"] == stats["per_model"][0]["total_requests"]
    assert stats["total_charged_tokens"] == tokens + 2
    assert stats["per_model"][0]["model_id"] == MODEL
    assert operator.get("/v1/admin/stats", params={"window_days": 366}).status_code == 422
    text, markdown, json = (
        operator.get("/v1/admin/reports/summary", params={"format": form}) for form in ("text", "md", "json")
    )
    assert text.headers["content-type"].startswith("text/plain")
    assert MODEL in text.text
    assert markdown.text.startswith("# Usage of the last 30 days")
    assert json.json()["total_requests"] == stats["total_requests"]
    assert operator.get("/v1/admin/reports/summary", params={"format": "pdf"}).status_code == 422


def test_an_empty_house_has_reports_too(operator: Client) -> None:
    stats = operator.get("/v1/admin/stats").json()
    assert (stats["total_requests"], stats["avg_latency_ms"], stats["per_model"]) == (0, 0.0, [])
    assert operator.get("/v1/admin/reports/summary").status_code == 200
    assert operator.get("/v1/admin/usage").json() == {"results": []}


# Loading


def state_of(client: Client, name: str) -> dict[str, Any]:
    return next(each for each in client.get("/v1/models").json()["models"] if each["id"] == name)


def test_an_operator_unloads_loads_and_pins_a_model(site: InProcessSite, operator: Client) -> None:
    alice = site.client(site.cast.alice)
    reply = operator.post("/v1/admin/models/load", json={}).json()
    assert (reply["ok"], reply["already_loaded"], reply["default_model"]) == (True, True, MODEL)
    assert {each["id"]: each["loaded"] for each in reply["models"]} == {MODEL: True, OTHER_MODEL: True}

    assert operator.post("/v1/admin/models/unload", json={"model_id": "default-chat"}).json()["already_loaded"]
    wait_until(lambda: state_of(alice, MODEL)["state"] == "unloaded")
    assert not state_of(alice, MODEL)["loaded"]
    assert operator.post("/v1/admin/models/load", json={"model_id": MODEL}).json()["already_loaded"] is False
    wait_until(lambda: state_of(alice, MODEL)["loaded"])

    pinned = operator.post("/v1/admin/models/pin", json={"model_id": MODEL}).json()
    assert {each["id"]: each["pinned"] for each in pinned["models"]} == {MODEL: True, OTHER_MODEL: False}
    freed = operator.post("/v1/admin/models/pin", json={"model_id": MODEL, "pinned": False}).json()
    assert not any(each["pinned"] for each in freed["models"])


def test_health_props_metrics_and_lists_neither_wake_a_model_nor_count_as_its_use(
    site: InProcessSite, operator: Client
) -> None:
    alice = site.client(site.cast.alice)
    operator.post("/v1/admin/models/unload", json={"model_id": MODEL})
    wait_until(lambda: state_of(alice, MODEL)["state"] == "unloaded")
    model = next(each for each in site.host._all_models() if each.served.name == MODEL)
    used_at = model.used_at
    for path in ("/health", "/healthz", "/readyz", "/modelz", "/metrics", "/v1/models", f"/v1/models/{MODEL}"):
        assert alice.get(path).status_code in {200, 503}, path
    for path in ("/props", "/slots", "/lora-adapters"):
        assert alice.get(path).status_code == 200, path
    site.host.follow_registry()
    assert (model.state.value, model.used_at) == ("unloaded", used_at)
    assert alice.get("/readyz").json()["llm"] == "unloaded"
    assert alice.get("/readyz").status_code == 200, "its next request loads it"
    assert alice.get("/modelz").json()["model_error"] == "the model is loaded by its next request"
    assert alice.generate().status_code == 200
    assert alice.get("/modelz").status_code == 200


@pytest.mark.parametrize("path", ["load", "unload", "pin"])
def test_models_are_moved_by_operators_alone_and_by_names_that_exist(
    site: InProcessSite, operator: Client, path: str
) -> None:
    url = f"/v1/admin/models/{path}"
    assert site.client().post(url, json={}).status_code == 401
    assert site.client(site.cast.charlie).post(url, json={}).status_code == 403
    unknown = operator.post(url, json={"model_id": "none"})
    assert (unknown.status_code, unknown.json()["code"]) == (404, "model_not_found")
    assert operator.post(url, json={"model_id": ["x"]}).status_code == 422


@pytest.mark.parametrize(
    ("value", "status"),
    [(0, 200), ("5m", 200), ("90", 200), (-1, 200), (1.5, 200), ("soon", 422), (True, 422), (1e300, 422), ([], 422)],
)
def test_a_request_says_how_long_its_model_is_to_stay(site: InProcessSite, value: object, status: int) -> None:
    reply = site.client(site.cast.alice).generate(keep_alive=value)
    assert reply.status_code == status, reply.text


def test_a_request_for_a_model_without_room_is_refused_with_its_code(site: InProcessSite, operator: Client) -> None:
    alice = site.client(site.cast.alice)
    operator.post("/v1/admin/models/unload", json={"model_id": MODEL})
    wait_until(lambda: state_of(alice, MODEL)["state"] == "unloaded")
    site.host._keeper.budget_bytes = 1.0
    reply = alice.generate()
    assert (reply.status_code, reply.json()["code"]) == (503, "model_does_not_fit")
    assert "retry-after" not in reply.headers
    assert reply.headers["x-should-retry"] == "false"
    wait_until(lambda: state_of(alice, MODEL)["state"] == "failed")
    assert "error" not in state_of(alice, MODEL), "why is the operator's business"
    listed = operator.post("/v1/admin/models/unload", json={"model_id": MODEL}).json()["models"]
    assert "MODEL_MEMORY_MB" in next(each for each in listed if each["id"] == MODEL)["error"]
    assert alice.get("/readyz").status_code == 503
    assert site.charged(site.cast.alice) == (0, 0)

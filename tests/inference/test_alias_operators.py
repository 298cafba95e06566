"""Aliases as operators have them: the command, the console, the API; adapters and variants over the API, too."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.core.management import CommandError, call_command
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from accounts.identity import issuing
from accounts.models import AuditEntry, Plan, Tenant
from inference.catalog import adapter_rows, aliases, granting, model_rows, registry, variants, version_figures
from inference.models import Adapter, AdapterAlias, ModelVariant, Receipt, ServedModel
from tests.inference import gguf_files
from tests.inference.gguf_files import PassingTrial

pytestmark = [pytest.mark.integration, pytest.mark.django_db, pytest.mark.usefixtures("passing_trials", "valkey")]
NOW = datetime.now(UTC)
LIST, ADD = (reverse(f"admin:inference_adapteralias_{page}") for page in ("changelist", "add"))


@pytest.fixture
def tenant() -> Tenant:
    return Tenant.objects.create(name="Alice's", plan=Plan.objects.create(name="plan"))


@pytest.fixture
def base(tmp_path: Path, tenant: Tenant) -> ServedModel:
    return model_rows.register(gguf_files.write(tmp_path), "tiny")


@pytest.fixture
def versions(tmp_path: Path, base: ServedModel, tenant: Tenant) -> list[Adapter]:
    made = []
    for name in ("v1", "v2"):
        path = gguf_files.write_adapter(tmp_path, f"{name}.gguf")
        made.append(adapter_rows.register(path, base, name, granted_tenants=[tenant]))
    return made


def call(*words: str) -> str:
    out = io.StringIO()
    call_command("alias", *words, stdout=out)
    return out.getvalue()


def code_of_failure(*words: str) -> str:
    out = io.StringIO()
    with pytest.raises(CommandError):
        call_command("alias", *words, "--json", stdout=out)
    return str(json.loads(out.getvalue())["error"]["code"])


def receipt(tenant: Tenant, number: int, version: str, **values: Any) -> None:
    key = tenant.api_keys.first() or issuing.issue(tenant, "key", ["generate"], {}, None)[0]
    moment = NOW - timedelta(seconds=number)
    Receipt.objects.create(
        **{
            "request_id": f"request-{number}",
            "tenant": tenant,
            "key": key,
            "model": "tiny",
            "adapters": [[version, 1.0]],
            "aliases": [["support", version]],
            "status": "completed",
            "finish_reason": "stop",
            "prefill_seconds": number / 100,
            "decode_seconds": 1.0,
            "completion_tokens": 20,
            "created_at": moment,
            "finished_at": moment,
            **values,
        }
    )


# The command


def test_the_command_goes_the_whole_way(versions: list[Adapter]) -> None:
    assert "No alias yet" in call()
    assert call("set", "tiny:support", "v1") == "tiny:support is answered by v1.\n"
    assert call("canary", "tiny:support", "v2", "--share", "10") == "tiny:support is answered by v1, 10 % by v2.\n"
    assert "v1, 10 % by v2" in call("list")
    assert call("end-canary", "tiny:support") == "tiny:support is answered by v1.\n"
    call("canary", "tiny:support", "v2", "--share", "100")
    assert call("promote", "tiny:support") == "tiny:support is answered by v2.\n"
    assert call("roll-back", "tiny:support") == "tiny:support is answered by v1.\n"
    [row] = json.loads(call("list", "--json"))["aliases"]
    assert (row["model"], row["name"], row["target"], row["canary"], row["share"]) == ("tiny", "support", "v1", None, 0)
    assert "is gone" in call("remove", "tiny:support")
    assert AuditEntry.objects.filter(model="inference.adapteralias", actor__endswith=": alias").count() == 7


def test_the_command_says_what_is_wrong(versions: list[Adapter], tenant: Tenant) -> None:
    call("set", "tiny:support", "v1")
    for words, code in (
        (("set", "support", "v1"), "alias_missing"),
        (("set", "huge:support", "v1"), "model_not_found"),
        (("set", "tiny:more", "v9"), "adapter_not_found"),
        (("set", "tiny:more", "support"), "invalid"),
        (("set", "tiny:more"), "version_missing"),
        (("set", "tiny:v2", "v1"), "invalid"),
        (("canary", "tiny:support", "v2"), "share_missing"),
        (("canary", "tiny:none", "v2", "--share", "5"), "alias_not_found"),
        (("promote", "tiny:support"), "conflict"),
        (("roll-back", "tiny:support"), "conflict"),
    ):
        assert code_of_failure(*words) == code
    for share in ("101", "-1", "5.5", "many"):
        with pytest.raises(CommandError, match="whole number of percent"):
            call("canary", "tiny:support", "v2", f"--share={share}")
    with pytest.raises(CommandError, match="hours"):
        call("compare", "tiny:support", "--hours", "0")
    granting.revoke(versions[1], tenant)
    assert code_of_failure("set", "tiny:support", "v2") == "alias_loses_tenants"
    call("set", "tiny:support", "v2", "--force")


def test_versions_are_compared_by_what_came_through_the_alias(versions: list[Adapter], tenant: Tenant) -> None:
    alias = aliases.try_out(aliases.point(versions[0].base_model, "support", versions[0]), versions[1], 50)
    for number in range(1, 21):
        receipt(tenant, number, "v1")
    receipt(tenant, 21, "v1", status="failed", error_code="timeout")
    receipt(tenant, 30, "v2", prefill_seconds=0.5, decode_seconds=4.0)
    receipt(tenant, 31, "v2", cached=True, prefill_seconds=0.0, decode_seconds=0.0)
    receipt(tenant, 32, "v2", aliases=[])  # asked for by its own name
    receipt(tenant, 33, "v2", model="other")
    receipt(tenant, 34, "v2", created_at=NOW - timedelta(hours=30))
    first, second = version_figures.compare(alias, NOW)
    assert first == {
        "version": "v1",
        "requests": 21,
        "completed": 20,
        "cancelled": 0,
        "failed": 1,
        "failed_percent": 4.76,
        "first_token_p50_seconds": 0.11,
        "first_token_p95_seconds": 0.2,
        "tokens_per_second": 20.0,
    }
    assert (second["version"], second["requests"], second["tokens_per_second"]) == ("v2", 2, 5.0)
    text = call("compare", "tiny:support", "--hours", "720")
    assert "1 (4.76 %)" in text and "v2" in text


def test_no_more_than_the_newest_receipts_are_compared(
    versions: list[Adapter], tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(version_figures, "MAX_RECEIPTS", 3)
    alias = aliases.point(versions[0].base_model, "support", versions[0])
    receipt(tenant, 1, "v1", aliases=[])
    for number in (2, 3, 4, 5):
        receipt(tenant, number, "v1")
    (only,) = version_figures.compare(alias, NOW)
    assert only["requests"] == 2, "the newest three, of which one asked for the version by its own name"


# The console


@pytest.fixture
def operator(client: Client) -> Client:
    client.force_login(User.objects.create_superuser("operator", password="a long password for tests"))
    return client


def test_versions_are_compared_once_for_a_page(
    operator: Client, versions: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[AdapterAlias] = []
    compare = version_figures.compare
    monkeypatch.setattr(version_figures, "compare", lambda row, now: asked.append(row) or compare(row, now))
    alias = aliases.point(versions[0].base_model, "support", versions[0])
    assert "v1" in operator.get(reverse("admin:inference_adapteralias_change", args=[alias.pk])).content.decode()
    assert asked == [alias]


def test_choosing_from_many_adapters_asks_as_often_as_from_few(operator: Client, versions: list[Adapter]) -> None:
    about = {"app_label": "inference", "model_name": "adapteralias", "field_name": "target"}
    counts = []
    for numbers in (range(1), range(1, 6)):
        for number in numbers:
            values = {"path": f"/{number}", "digest": f"{number:064}", "rank": 2}
            Adapter.objects.create(name=f"more-{number}", base_model=versions[0].base_model, **values)
        with CaptureQueriesContext(connection) as queries:
            found = operator.get(reverse("admin:autocomplete"), about).json()["results"]
        counts.append((len(found), len(queries)))
    assert [number for number, _ in counts] == [3, 8]
    assert counts[0][1] == counts[1][1]


def page(alias: AdapterAlias) -> str:
    return reverse("admin:inference_adapteralias_change", args=[alias.pk])


def text_of(response: Any) -> str:
    return str(response.content, "utf-8")


def form(target: Adapter, canary: Adapter | None = None, share: int = 0, **values: Any) -> dict[str, Any]:
    return {"target": target.pk, "canary": canary.pk if canary else "", "share": share, **values}


def test_the_pages_make_change_and_show_an_alias(operator: Client, versions: list[Adapter], tenant: Tenant) -> None:
    v1, v2 = versions
    data = form(v1, v2, 5, name="support", base_model=v1.base_model_id)
    assert operator.post(ADD, data).status_code == 302
    alias = AdapterAlias.objects.get()
    assert (alias.target, alias.canary, alias.share) == (v1, v2, 5)
    receipt(tenant, 1, "v1", created_at=datetime.now(UTC))
    shown = text_of(operator.get(page(alias)))
    assert "1 requests, 0 % failed" in shown and "no request yet" in shown and "Changes in the audit log" in shown
    assert "v2: 5 %" in text_of(operator.get(LIST)) and operator.get(ADD).status_code == 200
    assert operator.post(page(alias), form(v2)).status_code == 302
    alias.refresh_from_db()
    assert (alias.target, alias.canary, alias.share, alias.previous) == (v2, None, 0, v1)


def test_actions_promote_and_roll_back(operator: Client, versions: list[Adapter]) -> None:
    v1, v2 = versions
    alias = aliases.try_out(aliases.point(v1.base_model, "support", v1), v2, 5)
    for action, words in (
        ("promote", "answered by v2 now"),
        ("roll_back", "answered by v1 now"),
        ("roll_back", "no version to return to"),
        ("end_trial", "answered by v1 now"),
    ):
        data = {"action": action, "_selected_action": [alias.pk]}
        assert words in text_of(operator.post(LIST, data, follow=True))


def test_the_form_says_what_is_wrong(operator: Client, versions: list[Adapter], tenant: Tenant, tmp_path: Path) -> None:
    v1, v2 = versions
    other = model_rows.register(gguf_files.write(tmp_path, "other.gguf"), "other")
    foreign = adapter_rows.register(gguf_files.write_adapter(tmp_path, "foreign.gguf"), other, "foreign")
    for data, words in (
        (form(v1, name="v2"), "is an adapter"),
        (form(v1, v1, 5, name="x"), "answers already"),
        (form(v1, v2, 101, name="x"), "less than or equal to 100"),
        (form(v1, None, 5, name="x"), "Choose the canary"),
        (form(foreign, name="x"), "belongs to another model"),
        (form(v1, name="two words"), "1 to 64 letters"),
    ):
        response = operator.post(ADD, {**data, "base_model": v1.base_model_id})
        assert response.status_code == 200
        assert words in text_of(response)
    alias = aliases.point(v1.base_model, "support", v1)
    granting.revoke(v2, tenant)
    assert "not granted to Alice&#x27;s" in text_of(operator.post(page(alias), form(v2)))
    assert operator.post(page(alias), form(v2, force="on")).status_code == 302
    data = {"name": "support", "base_model": v1.base_model_id, "path": v1.path, "default_scale": 1}
    data |= {"visibility": "granted", "grants-TOTAL_FORMS": 0, "grants-INITIAL_FORMS": 0}
    assert "is an alias" in text_of(operator.post(reverse("admin:inference_adapter_add"), data))


def test_an_adapter_that_an_alias_leads_to_stays_on_its_page(operator: Client, versions: list[Adapter]) -> None:
    aliases.point(versions[0].base_model, "support", versions[0])
    url = reverse("admin:inference_adapter_delete", args=[versions[0].pk])
    assert operator.post(url, {"post": "yes"}).status_code in (200, 403)
    selected = {"action": "delete_selected", "_selected_action": [versions[0].pk], "post": "yes"}
    operator.post(reverse("admin:inference_adapter_changelist"), selected)
    assert Adapter.objects.count() == 2


# The API


class Api:
    """The operator's API by a key of its own, without a server."""

    def __init__(self, client: Client, tenant: Tenant) -> None:
        _, self.text = issuing.issue(tenant, "operator", ["operator"], {}, None)
        self._client = client

    def __call__(self, method: str, path: str, status: int = 200, /, **body: Any) -> Any:
        reply = self._client.generic(
            method,
            f"/v1/admin/{path}",
            json.dumps(body) if body else "",
            content_type="application/json",
            headers={"Authorization": f"Bearer {self.text}"},
        )
        assert reply.status_code == status, text_of(reply)
        return json.loads(reply.content) if reply.content else None


@pytest.fixture
def api(client: Client, tenant: Tenant) -> Api:
    return Api(client, tenant)


def test_adapters_are_registered_granted_changed_and_forgotten_over_the_api(
    api: Api, base: ServedModel, tenant: Tenant, tmp_path: Path
) -> None:
    path = str(gguf_files.write_adapter(tmp_path))
    made = api("POST", "adapters", 201, model="tiny", name="style", path=path, default_scale=0.5)
    assert (made["model"], made["rank"], made["default_scale"], made["granted"]) == ("tiny", 2, 0.5, {})
    here = f"adapters/{made['id']}"
    assert api("POST", f"{here}/grant", tenant="Alice's")["granted"] == {"Alice's": 0}
    assert api("POST", f"{here}/revoke", tenant="Alice's")["granted"] == {}
    assert api("PATCH", here, enabled=False, visibility="shared")["enabled"] is False
    assert [row["name"] for row in api("GET", "adapters")["results"]] == ["style"]
    wrong = api("POST", "adapters", 422, model="tiny", name="x", path="/nowhere.gguf")
    assert [(each["field"], each["type"]) for each in wrong["extra"]["fields"]] == [("path", "gguf_missing")]
    assert api("POST", "adapters", 422, model="huge", name="x", path=path)["extra"]["fields"][0]["field"] == "model"
    assert api("PATCH", here, 422, default_scale=17)["extra"]["fields"][0]["field"] == "default_scale"
    assert api("PATCH", here, 422, owner="Alice's")["extra"]["fields"][0]["field"] == "visibility"
    api("DELETE", here, 204)
    assert not Adapter.objects.exists()


def test_an_alias_goes_the_whole_way_over_the_api(api: Api, versions: list[Adapter], tenant: Tenant) -> None:
    made = api("POST", "aliases", 201, model="tiny", name="support", target="v1", canary="v2", share=5)
    assert (made["model"], made["target"], made["canary"], made["share"]) == ("tiny", "v1", "v2", 5)
    here = f"aliases/{made['id']}"
    assert api("POST", "aliases", 409, model="tiny", name="support", target="v1")["code"] == "conflict"
    assert api("PATCH", here, share=20)["share"] == 20
    assert [each["version"] for each in api("GET", f"{here}/compare?hours=2")["versions"]] == ["v1", "v2"]
    assert api("POST", f"{here}/promote") | {"target": "v2", "canary": None, "previous": "v1"} == api("GET", here)
    assert api("POST", f"{here}/roll-back")["target"] == "v1"
    assert api("POST", f"{here}/roll-back", 409)["code"] == "conflict"
    assert api("PATCH", here, target="v2")["previous"] == "v1"
    api("PATCH", here, canary="v1", share=1)
    assert api("PATCH", here, canary=None)["share"] == 0
    assert api("GET", "aliases")["total"] == 1
    assert "leads to it" in api("DELETE", f"adapters/{versions[1].pk}", 409)["message"]
    api("DELETE", here, 204)
    assert not AdapterAlias.objects.exists()


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"name": "v2"}, "name"),
        ({"name": "two words"}, "name"),
        ({"target": "v9"}, "target"),
        ({"target": "taken"}, "target"),
        ({"canary": "v1", "share": 5}, "canary"),
        ({"canary": "v2", "share": 101}, "share"),
        ({"share": 5}, "canary"),
        ({"model": "huge"}, "model"),
    ],
)
def test_a_wrong_alias_is_named_and_not_made(
    api: Api, versions: list[Adapter], body: dict[str, Any], field: str
) -> None:
    aliases.point(versions[0].base_model, "taken", versions[0])
    reply = api("POST", "aliases", 422, **{"model": "tiny", "name": "support", "target": "v1", **body})
    assert [each["field"] for each in reply["extra"]["fields"]] == [field]
    assert AdapterAlias.objects.count() == 1


def test_variants_are_activated_and_reverted_over_the_api(api: Api, base: ServedModel) -> None:
    row = variants.register(
        base, "quick", Path(base.path), n_threads=2, flash_attention=None, measured={"gain": 1.5}, trial=PassingTrial()
    )
    here = f"variants/{row.pk}"
    assert api("GET", here) | {"is_active": True} == api("POST", f"{here}/activate")
    assert registry.every()[0].n_threads == 2
    assert api("POST", f"{here}/revert")["is_active"] is False
    ServedModel.objects.update(digest="another file")
    assert api("POST", f"{here}/activate", 409)["code"] == "conflict"
    assert api("GET", "variants")["results"][0]["stale"] is True
    api("DELETE", here, 204)
    assert not ModelVariant.objects.exists()


def test_a_tenants_key_reaches_none_of_it(client: Client, tenant: Tenant, versions: list[Adapter]) -> None:
    _, text = issuing.issue(tenant, "laptop", ["generate", "usage"], {}, None)
    for path in ("adapters", "aliases", "variants"):
        reply = client.get(f"/v1/admin/{path}", headers={"Authorization": f"Bearer {text}"})
        assert reply.status_code == 403

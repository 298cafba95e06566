"""How origins are written, who may set them, and how soon all processes know."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.core.exceptions import ValidationError
from django.core.management import call_command
from django.core.management.base import CommandError
from django.test import Client
from django.urls import reverse

from accounts.identity import known_keys, known_origins, origins
from accounts.models import Tenant

APP = "https://app.example.org"
GOOD = [
    APP,
    "http://localhost:5173",
    "https://app.example.org:8443",
    "https://xn--bcher-kva.example",
    "http://127.0.0.1:3000",
    "http://[::1]:3000",
    "chrome-extension://abcdefghijklmnopabcdefghijklmnop",
    "capacitor://localhost",
]
CORRECTED = {
    "https://App.Example.org": APP,
    "https://app.example.org/": APP,
    "https://app.example.org/index.html?a=1": APP,
    "https://app.example.org:443": APP,
    "http://localhost:80": "http://localhost",
    " https://app.example.org": APP,
    "https://bücher.example": "https://xn--bcher-kva.example",
    "https://me:secret@app.example.org": APP,
}
HOPELESS = [
    "",
    "null",
    "app.example.org",
    "https://",
    "https://a b.example",
    "https://app.example.org:99999",
    "https://app.example.org:0",
    "https://app.example.org\r\nSet-Cookie: a=b",
    "javascript:alert(1)",
    "<script>alert(1)</script>",
    f"https://{'a' * 300}.example",
]


@pytest.mark.unit
def test_origins_are_written_as_browsers_send_them() -> None:
    for origin in GOOD:
        origins.validate([origin])
    origins.validate([])
    origins.validate([origins.ANY])
    for wrong, right in CORRECTED.items():
        with pytest.raises(ValueError, match="no origin as browsers send it") as caught:
            origins.validate([wrong])
        assert str(caught.value).endswith(f"write {right!r}")
    for wrong in HOPELESS:
        with pytest.raises(ValueError):
            origins.validate([wrong])


@pytest.mark.unit
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (APP, "use a list"),
        ([1], "use a list"),
        ([APP, APP], "each origin once"),
        ([APP, "*"], "let it stand alone"),
        (["https://*.example.org"], "no patterns"),
        ([f"https://a{n}.example" for n in range(origins.MAX_ORIGINS + 1)], "20 origins are the most"),
    ],
)
def test_lists_are_bounded_and_every_origin_is_named(value: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        origins.validate(value)


@pytest.mark.unit
def test_an_answer_names_the_origin_or_all_or_nothing() -> None:
    assert origins.answer(APP, {APP}) == APP
    assert origins.answer(f"{APP}.evil.example", {APP}) is None
    assert origins.answer("null", {APP}) is None
    assert origins.answer("null", {"*"}) == origins.answer(APP, {"*"}) == "*"


def allow(tenant: Tenant, *listed: str) -> None:
    tenant.allowed_origins = list(listed)
    tenant.save(update_fields=["allowed_origins"])


@pytest.mark.integration
@pytest.mark.django_db(transaction=True)
def test_what_any_tenant_lists_is_read_once_and_forgotten_with_the_change(
    cast: Any, django_assert_num_queries: Any
) -> None:
    known_keys.WATCHER.ensure_started()
    known_keys.WATCHER.poll()
    allow(cast.alice.tenant, APP)
    with django_assert_num_queries(1):
        for _ in range(50):
            assert known_origins.all_of_them() == {APP}
    assert known_origins.remembered() == {APP}
    allow(cast.bob.tenant, "http://localhost:5173")
    assert known_origins.remembered() is None
    assert known_origins.all_of_them() == {APP, "http://localhost:5173"}
    cast.bob.tenant.status = Tenant.Status.SUSPENDED
    cast.bob.tenant.save(update_fields=["status"])
    assert known_origins.all_of_them() == {APP}, "a tenant that is suspended allows nobody"


@pytest.mark.integration
@pytest.mark.django_db
def test_the_number_that_is_kept_in_memory_is_bounded(cast: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_origins, "MAX_KNOWN", 1)
    known_keys.CACHE.forget()
    allow(cast.alice.tenant, APP)
    allow(cast.bob.tenant, "http://localhost:5173")
    known_keys.CACHE.forget()
    assert known_origins.all_of_them() == {APP}


@pytest.mark.integration
@pytest.mark.django_db
def test_operators_set_them_on_the_page_of_a_tenant(cast: Any, client: Client) -> None:
    client.force_login(User.objects.create_superuser("root", password="not a real password"))
    tenant = cast.alice.tenant
    address = reverse("admin:accounts_tenant_change", args=[tenant.pk])
    form = client.get(address).context["adminform"].form
    data = {name: form.get_initial_for_field(field, name) for name, field in form.fields.items()}
    posted: dict[str, Any] = {}
    for name, value in data.items():
        for at, part in enumerate(form.fields[name].widget.decompress(value) if name.startswith("limit_") else [value]):
            posted[f"{name}_{at}" if name.startswith("limit_") else name] = "" if part is None else part
    posted |= {"memberships-TOTAL_FORMS": 0, "memberships-INITIAL_FORMS": 0, "_save": "1"}
    posted["allowed_models"] = posted["allowed_adapters"] = ""

    answer = client.post(address, {**posted, "allowed_origins": f"{APP}, http://localhost:5173"})
    assert answer.status_code == 302, answer.context["adminform"].form.errors
    assert Tenant.objects.get(pk=tenant.pk).allowed_origins == [APP, "http://localhost:5173"]
    assert f"{APP}, http://localhost:5173" in client.get(address).content.decode()
    answer = client.post(address, {**posted, "allowed_origins": f"{APP}/"})
    assert "write &#x27;https://app.example.org&#x27;" in answer.content.decode()
    client.post(address, {**posted, "allowed_origins": ""})
    assert Tenant.objects.get(pk=tenant.pk).allowed_origins == []


@pytest.mark.integration
@pytest.mark.django_db
def test_they_are_set_by_command(cast: Any) -> None:
    def run(*words: str) -> Any:
        out = io.StringIO()
        call_command("allowed_origins", "--tenant", cast.alice.tenant.name, *words, "--json", stdout=out)
        return json.loads(out.getvalue())["allowed_origins"]

    assert run() == []
    assert run("--allow-origin", APP, "--allow-origin", "http://localhost:1") == [APP, "http://localhost:1"]
    assert run("--allow-origin", APP, "--remove-origin", "http://localhost:1") == [APP]
    assert run("--none", "--allow-origin", "*") == ["*"]
    with pytest.raises(CommandError, match="let it stand alone"):
        run("--allow-origin", APP)
    with pytest.raises(CommandError, match="not among"):
        run("--remove-origin", APP)
    assert run("--none") == []
    call_command("create_tenant", "Dora's", "--allow-origin", APP, stdout=io.StringIO())
    assert Tenant.objects.get(name="Dora's").allowed_origins == [APP]
    with pytest.raises(CommandError, match="no origin"):
        call_command("create_tenant", "Eve's", "--allow-origin", "app", stdout=io.StringIO())


@pytest.mark.integration
@pytest.mark.django_db
def test_a_row_with_a_wrong_list_is_refused_by_its_own_rules(cast: Any) -> None:
    tenant = cast.alice.tenant
    tenant.allowed_origins = ["app.example.org"]
    with pytest.raises(ValidationError, match="no origin as browsers send it"):
        tenant.full_clean()

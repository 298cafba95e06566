"""register_adapter, grant_adapter, revoke_adapter and adapters, and the pages for adapters in the admin."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.core.management import CommandError, call_command, load_command_class
from django.test import Client
from django.urls import reverse

from accounts.models import Plan, Tenant
from inference.catalog import adapter_rows, granting, model_rows, registry
from inference.models import Adapter, DefaultVector, ServedModel
from inference.vetting.trial import Trial
from tests.inference import gguf_files
from tests.inference.gguf_files import FailingTrial

pytestmark = [pytest.mark.integration, pytest.mark.django_db, pytest.mark.usefixtures("passing_trials")]
COMMANDS = ("register_adapter", "grant_adapter", "revoke_adapter", "adapters")
ADD = reverse("admin:inference_adapter_add")
LIST = reverse("admin:inference_adapter_changelist")


@pytest.fixture
def tenants() -> dict[str, Tenant]:
    plan = Plan.objects.create(name="plan")
    return {name: Tenant.objects.create(name=name, plan=plan) for name in ("Alice's", "Bob's", "Charlie's")}


@pytest.fixture
def base(tmp_path: Path, tenants: dict[str, Tenant]) -> ServedModel:
    return model_rows.register(gguf_files.write(tmp_path), "tiny")


@pytest.fixture
def style(tmp_path: Path, base: ServedModel) -> Adapter:
    return adapter_rows.register(gguf_files.write_adapter(tmp_path), base, "style")


def call(name: str, *arguments: str) -> str:
    output = io.StringIO()
    call_command(name, *arguments, stdout=output, stderr=output)
    return output.getvalue()


def call_json(name: str, *arguments: str) -> Any:
    return json.loads(call(name, *arguments, "--json"))


def code_of_failure(name: str, *arguments: str) -> str:
    output = io.StringIO()
    with pytest.raises(CommandError):
        call_command(name, *arguments, "--json", stdout=output)
    return str(json.loads(output.getvalue())["error"]["code"])


# Commands


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_that_the_command_understands(name: str) -> None:
    command = load_command_class("inference", name)
    parser = command.create_parser("manage.py", name)
    assert "examples:" in parser.format_help()
    for example in command.examples:  # type: ignore[attr-defined]
        words = example.replace('"Alice\'s"', "Alices").split()
        assert words[0] == name
        parser.parse_args(words[1:])


def test_an_adapter_is_registered_granted_listed_and_taken_away(tmp_path: Path, base: ServedModel) -> None:
    assert "No adapter is registered" in call("adapters")
    path = gguf_files.write_adapter(tmp_path)
    text = call("register_adapter", str(path), "--model", "tiny")
    assert text == "tiny:style: rank 2 on ffn_up, 0.0 MB, for no tenant yet.\n"
    assert call("grant_adapter", "style", "Alice's", "Bob's") == (
        "tiny:style is granted to Alice's (id 0), Bob's (id 0).\n"
    )
    assert "Alice's (0), Bob's (0)" in call("adapters")
    assert call("revoke_adapter", "tiny:style", "Bob's", "Charlie's") == "tiny:style is taken from Bob's.\n"
    assert "nobody, it was not granted" in call("revoke_adapter", "style", "Charlie's")
    listed = call_json("adapters", "--model", "tiny")["adapters"]
    assert [(row["name"], row["granted"], row["effect"]) for row in listed] == [("style", {"Alice's": 0}, 5.0)]


def test_register_adapter_takes_every_option(tmp_path: Path, base: ServedModel) -> None:
    path = gguf_files.write_adapter(tmp_path)
    options = ("--name", "mine", "--default-scale", "0.5", "--owner", "Alice's", "--grant", "Bob's", "--force")
    row = call_json("register_adapter", str(path), "--model", "tiny", *options)
    assert (row["name"], row["model"], row["default_scale"], row["owner"]) == ("mine", "tiny", 0.5, "Alice's")
    assert row["granted"] == {"Alice's": 0, "Bob's": 0}
    assert "for every tenant" in call("register_adapter", str(path), "--model", "tiny", "--shared")
    assert "It is shared" in call("revoke_adapter", "style", "Bob's")
    adapter_rows.set_enabled([Adapter.objects.get(name="mine").pk], False)
    assert "tiny:mine (off)" in call("adapters")


def test_what_cannot_be_done_has_a_code(
    tmp_path: Path, base: ServedModel, style: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(gguf_files.write_adapter(tmp_path, "more.gguf"))
    assert code_of_failure("register_adapter", path, "--model", "huge") == "model_not_found"
    assert code_of_failure("register_adapter", "/nowhere.gguf", "--model", "tiny") == "gguf_missing"
    assert code_of_failure("register_adapter", path, "--model", "tiny", "--owner", "Nobody") == "tenant_not_found"
    assert code_of_failure("register_adapter", path, "--model", "tiny", "--default-scale", "99") == "invalid"
    assert code_of_failure("register_adapter", base.path, "--model", "tiny") == "not_an_adapter"
    assert code_of_failure("grant_adapter", "tiny:invented", "Alice's") == "adapter_not_found"
    assert code_of_failure("grant_adapter", "style", "Nobody") == "tenant_not_found"
    monkeypatch.setattr(Trial, "run_adapter", FailingTrial.run_adapter)
    assert code_of_failure("register_adapter", path, "--model", "tiny") == "trial_failed"


def test_a_name_that_two_models_have_needs_the_model(tmp_path: Path, base: ServedModel, style: Adapter) -> None:
    other = model_rows.register(gguf_files.write(tmp_path, "other.gguf"), "other")
    adapter_rows.register(style.path, other, "style")
    assert code_of_failure("grant_adapter", "style", "Alice's") == "adapter_ambiguous"
    assert call_json("grant_adapter", "other:style", "Alice's")["model"] == "other"
    assert "tiny:style" not in call("adapters", "--model", "other")


# The admin


@pytest.fixture
def operator(db: None, client: Client) -> Client:
    client.force_login(User.objects.create_superuser("operator", password="a long password for tests"))
    return client


def form(base: ServedModel, grants: tuple[Tenant, ...] = (), **values: Any) -> dict[str, Any]:
    """What a browser sends from the add page."""
    fields = {
        "name": "style",
        "base_model": base.pk,
        "default_scale": "1.0",
        "visibility": "granted",
        "owner": "",
        "enabled": "on",
        "grants-TOTAL_FORMS": len(grants),
        "grants-INITIAL_FORMS": 0,
    }
    for number, tenant in enumerate(grants):
        fields[f"grants-{number}-tenant"] = tenant.pk
    return {**fields, **values}


def change_page(row: Adapter) -> str:
    return reverse("admin:inference_adapter_change", args=[row.pk])


def text_of(response: Any) -> str:
    return str(response.content, "utf-8")


def test_an_adapter_is_registered_by_its_path_and_granted(
    operator: Client, tmp_path: Path, base: ServedModel, tenants: dict[str, Tenant]
) -> None:
    path = gguf_files.write_adapter(tmp_path)
    data = form(base, (tenants["Alice's"], tenants["Bob's"]), path=str(path), default_scale="0.5")
    response = operator.post(ADD, data)
    assert response.status_code == 302, text_of(response)
    row = Adapter.objects.get()
    assert (row.name, row.rank, row.default_scale, row.path) == ("style", 2, 0.5, str(path))
    assert set(row.grants.values_list("tenant__name", "position")) == {("Alice's", 0), ("Bob's", 0)}
    for url in (LIST, ADD, change_page(row)):
        assert operator.get(url).status_code == 200
    page = text_of(operator.get(change_page(row)))
    for shown in (row.digest, "ffn_up", "moves scores by up to 5", "the base model&#x27;s file of now", "In style: "):
        assert shown in page
    ServedModel.objects.update(digest="0" * 64)
    assert "an earlier file of the base model" in text_of(operator.get(change_page(row)))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"path": "/nowhere.gguf"}, "There is no file"),
        ({"path": "MODEL"}, "no adapter"),
        ({"path": "WRONG"}, "it is another model"),
        ({"path": "GOOD", "name": "two words"}, "Use 1 to 64 letters"),
        ({"path": "GOOD", "default_scale": "17"}, "less than or equal to 16"),
        ({"path": "GOOD", "default_scale": "nan"}, "Enter a number"),
        ({"path": "GOOD", "visibility": "shared", "owner": "ALICE"}, "not shared with every tenant"),
    ],
)
def test_what_is_wrong_is_shown_on_the_form(
    operator: Client, tmp_path: Path, base: ServedModel, tenants: dict[str, Tenant], values: dict[str, Any], said: str
) -> None:
    wrong = (("blk.0.ffn_up.weight.lora_a", (32, 2), 0), ("blk.0.ffn_up.weight.lora_b", (2, 2), 0))
    places = {
        "GOOD": str(gguf_files.write_adapter(tmp_path)),
        "WRONG": str(gguf_files.write_adapter(tmp_path, "wrong.gguf", tensors=wrong)),
        "MODEL": base.path,
        "ALICE": tenants["Alice's"].pk,
    }
    response = operator.post(ADD, form(base, **{name: places.get(value, value) for name, value in values.items()}))
    assert response.status_code == 200
    assert said in text_of(response)
    assert not Adapter.objects.exists()


def test_a_change_does_not_check_the_file_again_unless_asked(
    operator: Client, base: ServedModel, style: Adapter
) -> None:
    calls = Trial.calls  # type: ignore[attr-defined]
    assert operator.post(change_page(style), form(base, path=style.path, default_scale="2")).status_code == 302
    style.refresh_from_db()
    assert (style.default_scale, Trial.calls) == (2.0, calls)  # type: ignore[attr-defined]
    gguf_files.write_adapter(Path(style.path).parent, changes={"adapter.lora.alpha": (6, 8.0)})
    data = form(base, path=style.path, inspect_again="on", owner=Tenant.objects.get(name="Bob's").pk)
    assert operator.post(change_page(style), data).status_code == 302
    style.refresh_from_db()
    assert style.alpha == 8.0
    assert list(style.grants.values_list("tenant__name", flat=True)) == ["Bob's"]


def test_grants_are_added_and_taken_away_in_place(
    operator: Client, base: ServedModel, style: Adapter, tenants: dict[str, Tenant]
) -> None:
    made = granting.grant(style, tenants["Alice's"])
    data = form(base, path=style.path)
    data |= {"grants-TOTAL_FORMS": 2, "grants-INITIAL_FORMS": 1, "grants-1-tenant": tenants["Bob's"].pk}
    data |= {
        "grants-0-id": made.pk,
        "grants-0-adapter": style.pk,
        "grants-0-DELETE": "on",
        "grants-1-adapter": style.pk,
    }
    response = operator.post(change_page(style), data)
    assert response.status_code == 302, text_of(response)
    assert list(style.grants.values_list("tenant__name", flat=True)) == ["Bob's"]


def test_actions_switch_adapters_off_and_on_and_delete_them(operator: Client, style: Adapter) -> None:
    for action, enabled in (("switch_off", False), ("switch_on", True)):
        data = {"action": action, "_selected_action": [style.pk]}
        assert "1 switched" in text_of(operator.post(LIST, data, follow=True))
        style.refresh_from_db()
        assert style.enabled is enabled
    data = {"action": "delete_selected", "_selected_action": [style.pk], "post": "yes"}
    assert operator.post(LIST, data).status_code == 302
    assert not Adapter.objects.exists()


def test_one_adapter_is_deleted_on_its_page(operator: Client, style: Adapter) -> None:
    url = reverse("admin:inference_adapter_delete", args=[style.pk])
    assert operator.post(url, {"post": "yes"}).status_code == 302
    assert not Adapter.objects.exists()


def test_what_tenants_have_set_is_shown_and_read_only(
    operator: Client, style: Adapter, tenants: dict[str, Tenant]
) -> None:
    granting.grant(style, tenants["Alice's"])
    served = registry.resolve("tiny", SimpleNamespace(tenant_id=0, allowed_models=None, allowed_adapters=None))
    granting.set_default_vector(tenants["Alice's"].pk, served, [("style", 0.5)])
    row = DefaultVector.objects.get()
    assert "style × 0.5" in text_of(operator.get(reverse("admin:inference_defaultvector_changelist")))
    url = reverse("admin:inference_defaultvector_change", args=[row.pk])
    assert "style × 0.5" in text_of(operator.get(url))
    assert operator.post(url, {}).status_code == 403
    assert operator.get(reverse("admin:inference_defaultvector_add")).status_code == 403
    assert str(row) == "Alice's on tiny"


def test_only_staff_with_the_permission_see_the_pages(client: Client, style: Adapter) -> None:
    client.force_login(User.objects.create_user("staff", is_staff=True))
    for url in (LIST, ADD, change_page(style)):
        assert client.get(url).status_code == 403

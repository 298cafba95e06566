"""The demo: made once, private, and clear about what to do when half of it is lost."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth import authenticate
from django.core.management import CommandError, call_command

from accounts.models import APIKey, Plan, Role, Tenant
from inference.catalog import adapter_rows, granting, model_rows
from inference.models import Adapter, AdapterGrant, ServedModel
from inference.vetting.adapter_file import AdapterFacts, Base, ExaminedAdapter
from inference.vetting.inspection import RegistrationError
from llmsite import demo
from tests.conftest import STATE_DIR

pytestmark = [pytest.mark.integration, pytest.mark.django_db]

BASE_URL = "http://127.0.0.1:8000"


@pytest.fixture(autouse=True)
def _registers_without_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's file is not loaded here: tests/real does that."""

    def register(path: Path, name: str, **options: Any) -> ServedModel:
        row, _ = ServedModel.objects.update_or_create(
            name=name, defaults={"path": str(path), "digest": "0" * 64, "is_default": True, **options}
        )
        return row

    def examine(path: Path, base: Base, **_options: Any) -> ExaminedAdapter:
        facts = AdapterFacts(rank=8, alpha=16.0, targets=("attn_q",), num_tensors=1, num_parameters=1, size_bytes=1)
        return ExaminedAdapter(path=path, digest=path.stem.ljust(64, "0")[:64], facts=facts, metadata={})

    monkeypatch.setattr(model_rows, "register", register)
    monkeypatch.setattr(adapter_rows, "examine", examine)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "demo.json"


def test_the_file_holds_what_a_newcomer_needs_and_is_private(file: Path) -> None:
    assert demo.make_demo(file, BASE_URL) is True
    content = json.loads(file.read_text())
    assert list(content) == ["base_url", "admin", "tenants", "operator_key", "models"]
    assert content["base_url"] == BASE_URL
    assert content["models"] == ["smollm2-135m"]
    assert [set(tenant) for tenant in content["tenants"]] == [{"name", "api_key"}] * 2
    assert file.stat().st_mode & 0o777 == 0o600
    user = authenticate(username="admin", password=content["admin"]["password"])
    assert user is not None
    assert user.is_superuser


def test_the_demo_plan_is_generous(file: Path) -> None:
    demo.make_demo(file, BASE_URL)
    plan = Plan.objects.get(name="demo")
    assert plan.requests_per_minute == 1200
    assert plan.concurrent_requests == 64
    assert plan.queue_length == 256
    assert plan.monthly_tokens == 10_000_000
    assert set(Plan.objects.values_list("name", "requests_per_minute")) == {
        ("demo", 1200),
        ("admin", None),
        ("standard", 120),
        ("free", 30),
    }


def test_the_keys_work_and_the_operator_may_operate(file: Path) -> None:
    from accounts.identity.authentication import authenticate_credentials

    demo.make_demo(file, BASE_URL)
    content = json.loads(file.read_text())
    alice = authenticate_credentials({"Authorization": f"Bearer {content['tenants'][0]['api_key']}"})
    assert (alice.tenant_name, alice.plan_name) == ("Alice's bakery", "demo")
    operator = authenticate_credentials({"Authorization": f"Bearer {content['operator_key']}"})
    assert operator.scopes == {"operator"}
    assert operator.role == Role.ADMIN


def test_a_second_time_changes_nothing_but_the_url(file: Path) -> None:
    demo.make_demo(file, BASE_URL)
    first = json.loads(file.read_text())
    assert demo.make_demo(file, BASE_URL) is False
    assert demo.make_demo(file, "http://127.0.0.1:8001") is False
    assert json.loads(file.read_text()) == {**first, "base_url": "http://127.0.0.1:8001"}
    assert Tenant.objects.count() == 3
    assert APIKey.objects.count() == 3


def test_a_lost_file_is_not_made_up_but_can_be_renewed(file: Path) -> None:
    demo.make_demo(file, BASE_URL)
    file.unlink()
    with pytest.raises(demo.DemoError, match="--renew"):
        demo.make_demo(file, BASE_URL)
    assert demo.make_demo(file, BASE_URL, renew=True) is True
    assert APIKey.objects.filter(revoked_at__isnull=True).count() == 3
    assert APIKey.objects.count() == 6
    assert demo.make_demo(file, BASE_URL) is False


def test_a_file_of_another_database_is_told(file: Path) -> None:
    demo.make_demo(file, BASE_URL)
    APIKey.objects.all().delete()
    with pytest.raises(demo.DemoError, match="another database"):
        demo.make_demo(file, BASE_URL)
    assert demo.make_demo(file, BASE_URL, renew=True) is True


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}'])
def test_a_file_that_is_no_demo_file_is_told(file: Path, content: str) -> None:
    file.write_text(content)
    with pytest.raises(demo.DemoError, match="remove it"):
        demo.make_demo(file, BASE_URL)
    assert not Tenant.objects.exists()


def test_a_file_that_cannot_be_written_leaves_no_tenants(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo, "_write", full)
    with pytest.raises(OSError, match="No space left"):
        demo.make_demo(file, BASE_URL)
    assert not Tenant.objects.exists()


def test_what_an_operator_changed_on_the_model_stays(file: Path) -> None:
    demo.make_demo(file, BASE_URL)
    row = ServedModel.objects.get()
    assert (row.n_slots, row.n_ctx, row.aliases) == (8, 1536, ["smollm2-135m-instruct", "default"])
    ServedModel.objects.update(n_slots=2)
    demo.make_demo(file, BASE_URL)
    assert ServedModel.objects.get().n_slots == 2
    ServedModel.objects.update(path="/gone.gguf")  # as after a new virtual environment
    demo.make_demo(file, BASE_URL)
    assert Path(ServedModel.objects.get().path).exists()
    assert ServedModel.objects.get().n_slots == 2


def grants() -> set[tuple[str, str, int]]:
    return set(AdapterGrant.objects.values_list("tenant__name", "adapter__name", "position"))


def test_each_tenant_has_an_adapter_and_both_have_one(file: Path) -> None:
    demo.make_demo(file, BASE_URL)
    assert grants() == {
        ("Alice's bakery", "shakespeare", 0),
        ("Bob's bookshop", "json-reply", 0),
        ("Bob's bookshop", "shakespeare", 1),
    }
    granting.revoke(Adapter.objects.get(name="json-reply"), Tenant.objects.get(name="Bob's bookshop"))
    demo.make_demo(file, BASE_URL)
    demo.make_demo(file, BASE_URL, renew=True)
    assert len(grants()) == 2


def test_a_demo_from_before_the_adapters_gets_them(file: Path) -> None:
    demo.make_demo(file, BASE_URL)
    Adapter.objects.all().delete()
    assert demo.make_demo(file, BASE_URL) is False
    assert len(grants()) == 3


def test_an_adapter_whose_file_moved_is_registered_again_with_its_grants(file: Path) -> None:
    demo.make_demo(file, BASE_URL)
    Adapter.objects.update(path="/gone.gguf")
    demo.make_demo(file, BASE_URL)
    assert all(Path(row.path).is_file() for row in Adapter.objects.all())
    assert len(grants()) == 3


def test_an_adapter_that_is_refused_is_told(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any, **_options: Any) -> ExaminedAdapter:
        raise RegistrationError("adapter_without_effect", "it was not trained")

    monkeypatch.setattr(adapter_rows, "examine", refuse)
    with pytest.raises(demo.DemoError, match="it was not trained"):
        demo.make_demo(file, BASE_URL)


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "MODEL_PACKAGE", "no_such_package")
    with pytest.raises(demo.DemoError, match="make install"):
        demo.demo_model_path()


def test_the_command_says_where_the_file_is() -> None:
    file = STATE_DIR / "demo.json"
    try:
        out = io.StringIO()
        call_command("demo", stdout=out)
        assert f"Made the demo tenants; their keys are in {file}" in out.getvalue()
        assert "curl -s " in out.getvalue()
        out = io.StringIO()
        call_command("demo", "--json", stdout=out)
        assert json.loads(out.getvalue()) == {"file": str(file), "created": False}
        file.unlink()
        with pytest.raises(CommandError, match="--renew"):
            call_command("demo")
    finally:
        file.unlink(missing_ok=True)

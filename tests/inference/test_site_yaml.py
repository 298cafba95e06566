"""export_config, diff_config, apply_config: the configuration goes out as a file and comes back the same."""

from __future__ import annotations

import io
import itertools
import json
import math
from datetime import UTC, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml
from django.core.management import CommandError, call_command

from accounts.identity import issuing
from accounts.models import APIKey, LimitRule, Plan, Price, Tenant
from inference.catalog import adapter_rows, adapters, aliases, granting, model_rows, registry, variants
from inference.models import Adapter, AdapterAlias, AdapterGrant, DefaultVector, ModelVariant, ServedModel
from inference.site_file import rules_yaml, site_yaml, vectors_yaml
from inference.vetting.trial import Trial
from tests.inference import gguf_files

pytestmark = [pytest.mark.integration, pytest.mark.django_db, pytest.mark.usefixtures("passing_trials")]
NOW = datetime(2026, 11, 21, 12, 0, 0, 500, tzinfo=UTC)
LATER = NOW + timedelta(days=30)
NIGHT = {"daily_from": time(22), "daily_until": time(6, 30)}


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """Two models, three adapters (one is Bob's own), grants with a gap, limits, a key, a tenant that is suspended; an
    alias with a canary, a default vector, a variant that is served, prices, and limits for a time."""
    for name in ("first", "second"):
        gguf_files.write(tmp_path, f"{name}.gguf", changes={"general.name": (8, name)})
    plan = Plan.objects.create(name="cast", role="free", monthly_tokens=10_000, requests_per_minute=0)
    spare = Plan.objects.create(name="spare", weight=250, max_slots=3)
    alice = Tenant.objects.create(name="Alice's", plan=plan, limit_overrides={"monthly_tokens": None})
    bob = Tenant.objects.create(name="Bob's", plan=plan, quota_anchor_day=15, response_days=7)
    Tenant.objects.create(name="Charlie's", plan=plan, status="suspended")
    issuing.issue(alice, "laptop", ["generate"], {"concurrent_requests": 2}, None)
    model_rows.register(
        tmp_path / "second.gguf",
        "second",
        n_slots=3,
        chat_template="{% for m in messages %}{{ m.content }}{% endfor %}",
    )
    first = model_rows.register(
        tmp_path / "first.gguf",
        "first",
        default=True,
        aliases=["chat"],
        visibility="granted",
        granted_tenants=[alice],
        draft_kind="prompt_lookup",
        notes="a <b> & ü",
    )
    made = {}
    for name, owner in (("zeta", None), ("alpha", None), ("own", bob)):
        path = gguf_files.write_adapter(tmp_path, f"{name}.gguf")
        made[name] = adapter_rows.register(path, first, name, owner=owner, default_scale=0.5)
    granting.grant(made["alpha"], bob)
    for name in ("alpha", "zeta", "own"):
        if name != "own":
            granting.grant(made[name], alice)
    granting.revoke(made["alpha"], alice)
    aliases.point(first, "support", made["alpha"])
    aliases.point(first, "support", made["zeta"], force=True)
    aliases.try_out(aliases.find(first, "support"), made["alpha"], 20)
    [served] = [each for each in registry.every() if each.name == "first"]
    granting.set_default_vector(bob.pk, served, [("own", 0.25), ("alpha", -1.5)])
    quick = gguf_files.write(tmp_path, "quick.gguf", changes={"general.name": (8, "first, quick")})
    variant = variants.register(first, "quick", quick, n_threads=2, flash_attention=True, measured={"gain": 1.5})
    variants.activate(variant)
    Price.objects.create(valid_from=NOW, input_per_million=Decimal("0.15"), output_per_million=2)
    Price.objects.create(
        model="first",
        valid_from=NOW,
        input_per_million=1,
        cached_input_per_million=Decimal("0.000001"),
        output_per_million=2,
    )
    LimitRule.objects.create(tenant=alice, limit="max_output", value=None, starts_at=NOW, reason="a <b> raise")
    LimitRule.objects.create(
        plan=spare, limit="max_output", value=5, starts_at=NOW, recurrence="month_end", last_days=3, ends_at=LATER
    )
    LimitRule.objects.create(
        tenant=bob, limit="queue_length", value=0, starts_at=NOW, recurrence="daily", **NIGHT, reason="night"
    )
    return tmp_path


def command(name: str, *words: str, status: int = 0) -> str:
    out = io.StringIO()
    if status == 2:
        with pytest.raises(SystemExit) as end:
            call_command(name, *words, stdout=out, stderr=out)
        assert end.value.code == 2
    else:
        call_command(name, *words, stdout=out, stderr=out)
    return out.getvalue()


def refused(name: str, *words: str) -> dict[str, Any]:
    out = io.StringIO()
    with pytest.raises(CommandError):
        call_command(name, *words, "--json", stdout=out)
    return dict(json.loads(out.getvalue())["error"])


def empty_database() -> None:
    for kind in (AdapterAlias, AdapterGrant, Price, LimitRule, Adapter, ServedModel, APIKey, Tenant, Plan):
        kind.objects.all().delete()
    registry.forget()
    adapters.forget()


def written(folder: Path, content: dict[str, Any]) -> str:
    (folder / "site.yaml").write_text(site_yaml.as_yaml(content))
    return str(folder / "site.yaml")


def rows() -> list[tuple[Any, ...]]:
    """Everything that a tenant or an operator could see, without row numbers and times."""
    grants = AdapterGrant.objects.values_list("tenant__name", "base_model__name", "adapter__name", "position")
    files = Adapter.objects.values_list("name", "digest", "rank", "owner__name", "visibility", "default_scale")
    models = ServedModel.objects.values_list("name", "digest", "is_default", "chat_facts", *model_rows.OPTIONS)
    leads = AdapterAlias.objects.values_list("name", "target__name", "canary__name", "share", "previous__name")
    made = ModelVariant.objects.values_list(
        "base_model__name", "name", "digest", "source_digest", "n_threads", "flash_attention", "measured", "is_active"
    )
    paid = Price.objects.values_list("model", "valid_from", *rules_yaml.PRICE_VALUES)
    owners = ("plan__name", "tenant__name", "key__public_id")
    rules = LimitRule.objects.order_by("pk").values_list(*owners, *rules_yaml.RULE_TIMES, *rules_yaml.RULE_VALUES)
    vectors = {Tenant.objects.get(pk=pk).name: each for pk, each in vectors_yaml.read().items()}
    shares = Plan.objects.values_list("name", "weight", "max_slots")
    listed = (sorted(each, key=str) for each in (grants, files, models, leads, made, paid, shares))
    return [*itertools.chain(*listed), *rules, vectors]


def test_a_file_reproduces_the_registry_in_an_empty_database_and_a_second_time_changes_nothing(house: Path) -> None:
    before, there = site_yaml.export(), rows()
    path = str(house / "site.yaml")
    assert "2 plans, 3 tenants, 2 models" in command("export_config", "--out", path)
    assert command("diff_config", path) == "Nothing differs.\n"
    empty_database()
    text = command("diff_config", path, status=2)
    assert "+ plan    cast  created" in text and "+ model   first  created" in text
    assert not Plan.objects.exists()
    text = command("apply_config", path)
    assert "Applied: 13 changes." in text and "issue another" in text  # the key's text is in no file
    assert rows() == there
    after = site_yaml.export()
    for tenant in before["tenants"]:
        tenant["keys"] = []
    assert after == before
    assert "nothing was changed" in command("apply_config", path)
    facts = json.loads(command("apply_config", path, "--json"))
    assert (facts["differs"], facts["applied"], facts["changes"]) == (False, False, [])
    assert Trial.calls == 12  # type: ignore[attr-defined]  # files that are known are not loaded again


def test_no_secret_is_in_the_file(house: Path) -> None:
    [key] = APIKey.objects.all()
    text = command("export_config")
    assert key.public_id in text and key.secret_hash not in text
    assert json.loads(command("export_config", "--json")) == yaml.safe_load(text)


def test_a_dry_run_says_what_would_change_and_changes_nothing(house: Path) -> None:
    content = site_yaml.export()
    content["plans"][0]["monthly_tokens"] = 5
    content["tenants"][0]["status"] = "suspended"
    content["tenants"][0]["adapters"] = {"first": {"alpha": None}}
    content["tenants"][0]["keys"][0]["limits"] = {}
    content["models"][0]["n_slots"] = 4
    content["default_model"] = "second"
    path = written(house, content)
    facts = json.loads(command("apply_config", path, "--dry-run", "--json", status=2))
    assert {(change["kind"], change["name"]) for change in facts["changes"]} >= {
        ("plan", "cast"),
        ("tenant", "Alice's"),
        ("model", "second"),
        ("default", "second"),
    }
    [tenant] = [change["details"] for change in facts["changes"] if change["kind"] == "tenant"]
    assert tenant == {
        "status": "active → suspended",
        "adapters.first.alpha": "granted",
        "adapters.first.zeta": "revoked",
    }
    assert Plan.objects.get(name="cast").monthly_tokens == 10_000
    command("apply_config", path)
    assert Plan.objects.get(name="cast").monthly_tokens == 5
    assert Tenant.objects.get(name="Alice's").status == "suspended"
    assert APIKey.objects.get().limit_overrides == {}
    assert list(Tenant.objects.get(name="Alice's").adapter_grants.values_list("adapter__name", flat=True)) == ["alpha"]
    assert ServedModel.objects.get(is_default=True).name == "second"
    command("diff_config", path)


def test_what_the_file_does_not_name_stays_or_is_switched_off(house: Path) -> None:
    content = site_yaml.export()
    content["tenants"], content["models"] = content["tenants"][1:], content["models"][:1]
    del content["default_model"]
    path = written(house, content)
    assert "left as they are" in command("apply_config", path)
    assert Tenant.objects.get(name="Alice's").status == "active"
    text = command("apply_config", path, "--prune")
    assert "- tenant  Alice's  suspended" in text and "- model   first  switched_off" in text
    assert Tenant.objects.get(name="Alice's").status == "suspended"
    assert ServedModel.objects.get(name="first").load_mode == "off"
    command("diff_config", path, "--prune")


def test_a_models_yaml_is_such_a_file(house: Path) -> None:
    (house / "models.yaml").write_text("models: [{id: second, n_slots: 2}]")
    text = command("diff_config", str(house / "models.yaml"), status=2)
    assert "n_slots: 3 → 2" in text


def test_a_file_that_is_not_about_tenants_or_models_prunes_none(house: Path) -> None:
    (house / "models.yaml").write_text("models: [{id: second}]")
    text = command("apply_config", str(house / "models.yaml"), "--prune")
    assert "- model   first  switched_off" in text
    assert Tenant.objects.filter(status="active").count() == 2
    ServedModel.objects.update(load_mode="lazy")
    (house / "tenants.yaml").write_text("tenants: [{name: Bob's, plan: cast}]")
    text = command("apply_config", str(house / "tenants.yaml"), "--prune")
    assert "- tenant  Alice's  suspended" in text
    assert set(ServedModel.objects.values_list("load_mode", flat=True)) == {"lazy"}
    (house / "tenants.yaml").write_text("tenants: []")
    assert "- tenant  Bob's  suspended" in command("apply_config", str(house / "tenants.yaml"), "--prune")


def test_a_key_without_limits_in_the_file_keeps_its_own(house: Path) -> None:
    content, key = site_yaml.export(), APIKey.objects.get()
    assert key.limit_overrides
    del content["tenants"][0]["keys"][0]["limits"]
    path = written(house, content)
    command("diff_config", path)
    content["tenants"][0]["keys"][0]["name"] = "renamed"
    command("apply_config", written(house, content))
    changed = APIKey.objects.get()
    assert (changed.name, changed.limit_overrides) == ("renamed", key.limit_overrides)


def test_all_problems_of_a_file_are_listed_and_nothing_is_changed(house: Path) -> None:
    content = site_yaml.export()
    content["tenants"][0]["plan"] = "gold"
    content["tenants"][1]["limits"] = {"tokens": 5}
    content["tenants"][1]["adapters"]["first"]["none"] = 0
    content["tenants"][1]["adapters"]["first"]["own"] = 7
    content["models"][0]["granted_tenants"] = ["Nobody's"]
    error = refused("apply_config", written(house, content))
    assert error["code"] == "config_invalid"
    listed = "\n".join(error["problems"])
    for words in ("tenants.0.plan", "tenants.1.limits", "first:none", "its position is 0", 'no tenant "Nobody\'s"'):
        assert words in listed
    assert len(error["problems"]) == 6  # position 0 is that of two adapters
    assert refused("apply_config", str(house / "none.yaml"))["code"] == "config_missing"
    content = site_yaml.export()
    content["models"][0]["sha256"] = "0" * 64
    assert "the file is another one" in refused("diff_config", written(house, content))["message"]
    (house / "site.yaml").write_text("plans: [{name: a, monthly_tokens: -1}]\nsecrets: {}")
    assert len(refused("diff_config", str(house / "site.yaml"))["problems"]) == 2


def test_a_failure_in_the_middle_leaves_everything_as_it_was(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = site_yaml.export()
    content["plans"][0]["monthly_tokens"] = 5
    content["tenants"][0]["adapters"] = {}

    def broken(*_: Any) -> None:
        raise site_yaml.RegistrationError("conflict", "The registry was changed at the same moment.")

    monkeypatch.setattr(granting, "revoke", broken)
    assert refused("apply_config", written(house, content))["code"] == "config_invalid"
    assert Plan.objects.get(name="cast").monthly_tokens == 10_000


def test_the_file_may_come_from_a_pipe(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = command("export_config")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert "Nothing differs" in command("apply_config")


# Prices, limits for a time, default vectors, aliases, variants


def differing(folder: Path, content: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Name → details of what a file would change."""
    facts = json.loads(command("diff_config", written(folder, content), "--json", status=2))
    return {change["name"]: change["details"] for change in facts["changes"]}


def test_each_part_that_differs_is_shown_applied_and_then_the_same(house: Path) -> None:
    content = site_yaml.export()
    content["prices"][0]["output_per_million"] = 2.5
    content["prices"].append({"model": "second", "valid_from": NOW, "input_per_million": 1, "output_per_million": "1"})
    content["limit_rules"][0]["value"] = 7
    content["limit_rules"].append({"tenant": "Bob's", "limit": "max_output", "value": 3, "starts_at": NOW.isoformat()})
    content["tenants"][1]["default_vectors"] = {"first": {"own": 2}}
    content["models"][1]["adapter_aliases"] = {"support": "alpha", "more": {"target": "zeta"}}
    content["models"][1]["variants"][0] |= {"n_threads": 4, "active": False}
    found = differing(house, content)
    assert found["every other model from 2026-11-21 12:00"] == {"output_per_million": "2.000000 → 2.5"}
    assert found["max_output of Alice's"] == {"value": "none → 7"}
    assert found["Bob's"] == {"default_vectors.first": "{'own': 0.25, 'alpha': -1.5} → {'own': 2.0}"}
    assert found["first"] == {
        "adapter_aliases.support": "target zeta → alpha, canary alpha → None, share 20 → 0",
        "adapter_aliases.more": "new",
        "variants.quick": "n_threads 2 → 4, active True → False",
    }
    assert {"second from 2026-11-21 12:00", "max_output of Bob's"} <= found.keys()
    path = str(house / "site.yaml")
    command("apply_config", path)
    assert Price.objects.get(model="").output_per_million == Decimal("2.5") and Price.objects.count() == 3
    assert list(LimitRule.objects.order_by("pk").values_list("value", flat=True)) == [7, 5, 0, 3]
    assert DefaultVector.objects.get().scales == [[Adapter.objects.get(name="own").pk, 2.0]]
    assert AdapterAlias.objects.get(name="support").previous == Adapter.objects.get(name="alpha")
    assert ModelVariant.objects.get().is_active is False
    assert "Nothing differs" in command("apply_config", path)


def test_what_a_file_does_not_name_of_them_stays(house: Path) -> None:
    content, there = site_yaml.export(), rows()
    del content["prices"], content["limit_rules"]
    for tenant in content["tenants"]:
        del tenant["default_vectors"]
    for model in content["models"]:
        del model["adapter_aliases"], model["variants"]
    assert "Nothing differs" in command("apply_config", written(house, content))
    content["prices"] = content["limit_rules"] = []
    for model in content["models"]:
        model["adapter_aliases"], model["variants"] = {}, []
    text = command("apply_config", written(house, content), "--prune")
    assert "price first from 2026-11-21 12:00" in text and "limit_rule max_output of Alice's" in text
    assert rows() == there


def test_their_problems_are_listed_with_their_places(house: Path) -> None:
    content = site_yaml.export()
    content["prices"].append(dict(content["prices"][0]))
    content["limit_rules"][0]["tenant"] = "Nobody's"
    content["limit_rules"][1]["tenant"] = "Bob's"
    content["limit_rules"][2]["daily_until"] = "22:00"
    content["tenants"][0]["default_vectors"] = {"first": {"none": 1}, "third": {}}
    content["models"][1]["adapter_aliases"] = {
        "zeta": "alpha",
        "a": "support",
        "b": {"target": "zeta", "canary": "zeta"},
        "c d": "zeta",
    }
    content["models"][1]["variants"].append({"name": "other", "path": "quick.gguf", "active": True})
    listed = refused("apply_config", written(house, content))["problems"]
    for words in (
        "prices.2: the name of this row is there twice",
        "limit_rules.0.tenant: there is no tenant",
        "limit_rules.1: name a plan, a tenant or a key",
        "limit_rules.2.daily_from: Give two different hours",
        "tenants: Alice's.default_vectors.first.none: there is no adapter first:none",
        "tenants: Alice's.default_vectors.third: it has no adapter",
        "models.1.adapter_aliases.zeta: is an adapter",
        "models.1.adapter_aliases.a: there is no adapter 'support' of this model",
        "models.1.adapter_aliases.b: the canary answers already",
        "models.1.adapter_aliases.c d: Use 1 to 64 letters",
        "models.1.variants: one of them can be active",
    ):
        assert any(problem.startswith(words) for problem in listed), (words, listed)
    assert len(listed) == 11


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("prices", {"valid_from": "x", "input_per_million": 1, "output_per_million": 1}, "prices.0.valid_from"),
        ("prices", {"valid_from": "2026-01-01", "input_per_million": -1, "output_per_million": 1}, "greater than"),
        ("prices", {"valid_from": "2026-01-01", "input_per_million": math.nan, "output_per_million": 1}, "finite"),
        ("limit_rules", {"plan": "cast", "limit": "speed", "starts_at": "2026-01-01T00:00:00Z"}, "limit_rules.0.limit"),
        (
            "limit_rules",
            {"plan": "cast", "limit": "max_output", "starts_at": "2026-01-01T00:00:00Z", "daily_from": 1320},
            "put the hour in quotes",
        ),
        ("limit_rules", {"plan": "cast", "limit": "max_output", "starts_at": NOW, "value": -1}, "greater than"),
    ],
)
def test_a_wrong_form_is_refused(house: Path, part: str, value: dict[str, Any], words: str) -> None:
    assert words in refused("diff_config", written(house, {part: [value]}))["message"]


def test_a_default_vector_of_an_adapter_that_is_not_granted_changes_nothing(house: Path) -> None:
    content, there = site_yaml.export(), rows()
    content["plans"][0]["monthly_tokens"] = 5
    content["tenants"][0]["default_vectors"] = {"first": {"own": 1.0}}
    error = refused("apply_config", written(house, content))
    assert "Alice's: default_vectors.first: There is no adapter 'own'" in error["message"]
    assert rows() == there and Plan.objects.get(name="cast").monthly_tokens == 10_000


def test_rules_of_keys_are_for_keys_that_are_there(house: Path) -> None:
    key = APIKey.objects.get()
    LimitRule.objects.create(key=key, limit="max_output", value=5, starts_at=NOW)
    content = site_yaml.export()
    assert content["limit_rules"][-1]["key"] == key.public_id
    path = written(house, content)
    command("diff_config", path)
    issuing.revoke(key)
    text = command("apply_config", path)
    assert f"the key {key.public_id!r} is not there: this rule is left out" in text


def test_a_quota_that_needs_a_second_operator_is_a_problem_of_its_place(house: Path, settings: Any) -> None:
    settings.CONFIG = settings.CONFIG.model_copy(update={"quota_approval_tokens": 20_000})
    content = site_yaml.export()
    content["plans"][0]["monthly_tokens"] = 30_000
    content["limit_rules"].append({"tenant": "Bob's", "limit": "monthly_tokens", "value": 30_000, "starts_at": NOW})
    problems = refused("apply_config", written(house, content))["problems"]
    assert {"plans.0", "limit_rules.3"} <= {problem.split(":")[0] for problem in problems}
    assert all("need a second operator" in problem for problem in problems)

"""Adapters: what a file must be, who may use which at what id, and what a request's vector is. Charlie sees none."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from django.db import DatabaseError, IntegrityError
from django.db.models import ProtectedError

from accounts.identity import issuing, known_keys
from accounts.models import DEFAULT_SCOPES, Plan, Tenant
from accounts.trail.refusals import Refusal
from inference.catalog import adapter_rows, adapters, granting, model_rows, registry
from inference.catalog.served import Served
from inference.models import Adapter, AdapterGrant, DefaultVector, ServedModel
from inference.vetting.inspection import RegistrationError
from tests.inference import gguf_files
from tests.inference.gguf_files import FailingTrial, PassingTrial

pytestmark = [pytest.mark.integration, pytest.mark.django_db]
A, B = "blk.0.ffn_up.weight.lora_a", "blk.0.ffn_up.weight.lora_b"


@dataclass(frozen=True)
class Caller:
    tenant_id: int
    allowed_models: frozenset[str] | None = None
    allowed_adapters: frozenset[str] | None = None


@dataclass
class House:
    """One model, three tenants, and adapters as a test needs them."""

    folder: Path
    base: ServedModel
    tenants: dict[str, Tenant]

    @property
    def served(self) -> Served:
        return registry.resolve("tiny", Caller(0))

    def adapter(self, name: str, *granted: str, **options: Any) -> Adapter:
        path = self.folder / f"{name}.gguf"
        if not path.exists():
            gguf_files.write_adapter(self.folder, path.name)
        row = adapter_rows.register(path, self.base, name, trial=PassingTrial(), **options)
        for tenant in granted:
            granting.grant(row, self.tenants[tenant])
        return row

    def caller(self, name: str) -> Caller:
        return Caller(self.tenants[name].pk)

    def ids(self, name: str) -> dict[str, int]:
        return {one.name: one.position for one in adapters.granted(self.caller(name), self.served)}

    def vector(self, name: str, wanted: Any) -> dict[str, float]:
        """Names in the place of digests."""
        names = dict(Adapter.objects.values_list("digest", "name"))
        pairs = adapters.choose(self.caller(name), self.served, wanted).vector
        assert list(pairs) == sorted(pairs)
        return {names[digest]: scale for digest, scale in pairs}

    def refusal(self, name: str, wanted: Any) -> Refusal:
        with pytest.raises(Refusal) as caught:
            adapters.choose(self.caller(name), self.served, wanted)
        return caught.value


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    registry.forget()
    adapters.forget()
    yield
    registry.forget()
    adapters.forget()


@pytest.fixture
def house(tmp_path: Path) -> House:
    base = model_rows.register(gguf_files.write(tmp_path), "tiny", trial=PassingTrial())
    plan = Plan.objects.create(name="plan")
    names = ("Alice's", "Bob's", "Charlie's")
    return House(tmp_path, base, {name: Tenant.objects.create(name=name, plan=plan) for name in names})


# Registering


def test_an_adapter_is_what_its_file_says(house: House) -> None:
    seen: list[tuple[int, int]] = []
    row = house.adapter("style", default_scale=0.5, progress=lambda done, total: seen.append((done, total)))
    assert (row.rank, row.alpha, row.targets) == (2, 4.0, ["ffn_up"])
    assert (row.task_name, row.prompt_prefix, row.default_scale) == ("style", "In style: ", 0.5)
    assert (len(row.digest), row.size_bytes) == (64, Path(row.path).stat().st_size)
    assert row.metadata["title"] == "Tiny style"
    assert row.metadata["base_digest"] == house.base.digest
    assert row.metadata["trial"] == {"effect": 5.0, "residue": 0.0}
    assert seen[-1] == (row.size_bytes, row.size_bytes)
    assert str(row) == "tiny:style"


def test_a_file_that_did_not_change_is_not_checked_again(house: House) -> None:
    house.adapter("style")
    before = PassingTrial.calls
    assert house.adapter("style", default_scale=2.0).default_scale == 2.0
    assert PassingTrial.calls == before
    house.adapter("style", force=True)
    assert PassingTrial.calls == before + 1
    ServedModel.objects.update(digest="another file of the base")
    house.base.refresh_from_db()
    house.adapter("style")
    assert PassingTrial.calls == before + 2
    assert Adapter.objects.count() == 1


@pytest.mark.parametrize(
    ("changes", "tensors", "code"),
    [
        ({"general.type": (8, "model")}, gguf_files.MATRICES, "not_an_adapter"),
        ({"adapter.type": None}, gguf_files.MATRICES, "not_an_adapter"),
        ({"adapter.type": (8, "dora")}, gguf_files.MATRICES, "adapter_unsupported"),
        ({"adapter.alora.invocation_tokens": (9, (4, [1, 2]))}, gguf_files.MATRICES, "adapter_unsupported"),
        ({"general.architecture": (8, "qwen3")}, gguf_files.MATRICES, "adapter_wrong_base"),
        ({"adapter.lora.alpha": None}, gguf_files.MATRICES, "adapter_malformed"),
        ({"adapter.lora.alpha": (6, math.nan)}, gguf_files.MATRICES, "adapter_malformed"),
        ({"adapter.lora.alpha": (6, math.inf)}, gguf_files.MATRICES, "adapter_malformed"),
        ({"adapter.lora.alpha": (6, -1.0)}, gguf_files.MATRICES, "adapter_malformed"),
        ({"adapter.lora.alpha": (7, True)}, gguf_files.MATRICES, "adapter_malformed"),
        ({"adapter.lora.prompt_prefix": (8, "x" * 5000)}, gguf_files.MATRICES, "gguf_too_large"),
        ({}, (), "adapter_malformed"),
        ({}, ((A, (64, 2), 0),), "adapter_malformed"),
        ({}, ((B, (2, 2), 0),), "adapter_malformed"),
        ({}, ((A, (64,), 0), (B, (2, 2), 0)), "adapter_malformed"),
        ({}, ((A, (64, 2), 0), (B, (3, 2), 0)), "adapter_malformed"),
        ({}, ((A, (64, 2, 2), 0), (B, (2, 2), 0)), "adapter_malformed"),
        ({}, ((A, (64, 5000), 0), (B, (5000, 2), 0)), "adapter_malformed"),
        ({}, (*gguf_files.MATRICES, ("blk.0.ffn_up.weight", (64, 2), 0)), "adapter_malformed"),
        ({}, ((A, (32, 2), 0), (B, (2, 2), 0)), "adapter_wrong_base"),
        ({}, ((A, (64, 2), 0), (B, (2, 3), 0)), "adapter_wrong_base"),
        ({}, ((A, (64, 2, 2), 0), (B, (2, 2, 2), 0)), "adapter_wrong_base"),
        (
            {},
            (("blk.7.ffn_up.weight.lora_a", (64, 2), 0), ("blk.7.ffn_up.weight.lora_b", (2, 2), 0)),
            "adapter_wrong_base",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused_before_llama_cpp_sees_it(
    house: House, changes: dict[str, Any], tensors: Any, code: str
) -> None:
    path = gguf_files.write_adapter(house.folder, changes=changes, tensors=tensors)
    before = PassingTrial.calls
    with pytest.raises(RegistrationError) as caught:
        adapter_rows.register(path, house.base, "style", trial=PassingTrial())
    assert (caught.value.code, PassingTrial.calls) == (code, before)
    assert not Adapter.objects.exists()


def test_a_wrong_base_is_named_with_both_shapes(house: House) -> None:
    path = gguf_files.write_adapter(house.folder, tensors=((A, (32, 2), 0), (B, (2, 2), 0)))
    with pytest.raises(RegistrationError, match="of 32 × 2, the base's is 64 × 2"):
        adapter_rows.register(path, house.base, "style", trial=PassingTrial())


def test_embeddings_are_adapted_with_the_first_matrix_transposed(house: House) -> None:
    def pair(a: tuple[int, int], b: tuple[int, int]) -> Any:
        return (("token_embd.weight.lora_a", a, 0), ("token_embd.weight.lora_b", b, 0))

    path = gguf_files.write_adapter(house.folder, tensors=pair((2, 4), (2, 64)))
    row = adapter_rows.register(path, house.base, "words", trial=PassingTrial())
    assert (row.rank, row.targets) == (2, ["token_embd"])
    path = gguf_files.write_adapter(house.folder, tensors=pair((64, 2), (2, 4)))
    with pytest.raises(RegistrationError):
        adapter_rows.register(path, house.base, "words", trial=PassingTrial())


def test_norms_beside_the_matrices_are_passed_over(house: House) -> None:
    tensors = (*gguf_files.MATRICES, ("blk.0.attn_norm.weight", (64,), 0))
    row = adapter_rows.register(
        gguf_files.write_adapter(house.folder, tensors=tensors), house.base, "style", trial=PassingTrial()
    )
    assert row.targets == ["ffn_up"]


def test_a_base_whose_file_is_gone_is_said(house: House) -> None:
    Path(house.base.path).unlink()
    with pytest.raises(RegistrationError) as caught:
        house.adapter("style")
    assert caught.value.code == "adapter_base_unreadable"


class SaysOtherwise(PassingTrial):
    """A trial with another result."""

    report = {"effect": 0.0, "residue": 0.0}

    def run_adapter(self, path: Path, base: Path) -> dict[str, Any]:
        return dict(self.report)


@pytest.mark.parametrize(
    ("report", "code"),
    [
        ({"effect": 0.0, "residue": 0.0}, "adapter_without_effect"),
        ({"effect": 1e-4, "residue": 0.0}, "adapter_without_effect"),
        ({"effect": 5.0, "residue": 1e-6}, "trial_failed"),
    ],
)
def test_what_a_trial_measures_decides(
    house: House, monkeypatch: pytest.MonkeyPatch, report: dict[str, float], code: str
) -> None:
    monkeypatch.setattr(SaysOtherwise, "report", report)
    path = gguf_files.write_adapter(house.folder)
    with pytest.raises(RegistrationError) as caught:
        adapter_rows.register(path, house.base, "style", trial=SaysOtherwise())
    assert caught.value.code == code
    assert not Adapter.objects.exists()


def test_a_crash_in_the_trial_is_told(house: House) -> None:
    with pytest.raises(RegistrationError, match="SIGSEGV") as caught:
        adapter_rows.register(gguf_files.write_adapter(house.folder), house.base, "style", trial=FailingTrial())
    assert caught.value.code == "trial_failed"


def test_a_file_that_changes_or_goes_during_its_trial_is_refused(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    path = gguf_files.write_adapter(house.folder)

    def replace(*_: Any) -> dict[str, float]:
        path.write_bytes(path.read_bytes() + b"more")
        return {"effect": 5.0, "residue": 0.0}

    def unlink(*_: Any) -> dict[str, float]:
        path.unlink()
        raise FileNotFoundError(path)

    for act, code in ((replace, "file_changed"), (unlink, "gguf_unreadable")):
        monkeypatch.setattr(SaysOtherwise, "run_adapter", act)
        with pytest.raises(RegistrationError) as caught:
            adapter_rows.register(path, house.base, "style", trial=SaysOtherwise())
        assert caught.value.code == code


def test_damaged_files_end_in_a_reason(house: House) -> None:
    original = gguf_files.write_adapter(house.folder).read_bytes()
    path = house.folder / "damaged.gguf"
    refused = 0
    for data in gguf_files.damaged(original, seed=20, count=600):
        path.write_bytes(data)
        try:
            adapter_rows.examine(path, adapter_rows.base_of(house.base), trial=PassingTrial())
        except RegistrationError as error:
            assert error.message
            refused += 1
    assert refused > 300


@pytest.mark.parametrize(
    ("name", "options", "field"),
    [
        ("", {}, "name"),
        ("a:b", {}, "name"),
        ("a/b", {}, "name"),
        ("line\n", {}, "name"),
        ("a" * 65, {}, "name"),
        ("style", {"default_scale": 16.5}, "default_scale"),
        ("style", {"default_scale": math.inf}, "default_scale"),
        ("style", {"default_scale": math.nan}, "default_scale"),
        ("style", {"visibility": "hidden"}, "visibility"),
    ],
)
def test_wrong_options_are_errors_of_their_field(house: House, name: str, options: dict[str, Any], field: str) -> None:
    path = gguf_files.write_adapter(house.folder)
    with pytest.raises(RegistrationError) as caught:
        adapter_rows.register(path, house.base, name, trial=PassingTrial(), **options)
    assert (caught.value.code, list(caught.value.fields)) == ("invalid", [field])
    assert not Adapter.objects.exists()


def test_an_unknown_option_is_a_mistake_of_the_caller(house: House) -> None:
    with pytest.raises(TypeError, match="scale"):
        house.adapter("style", scale=5)


def test_an_owned_adapter_is_granted_to_its_owner_and_never_shared(house: House) -> None:
    house.adapter("own", owner=house.tenants["Alice's"])
    assert house.ids("Alice's") == {"own": 0}
    assert house.ids("Charlie's") == {}
    with pytest.raises(RegistrationError, match="not shared with every tenant"):
        house.adapter("own", visibility="shared")
    with pytest.raises(IntegrityError):
        Adapter.objects.update(visibility="shared")


def test_two_registrations_at_the_same_moment_are_a_conflict(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def collide(*_: Any) -> None:
        raise IntegrityError("adapter_one_name_per_model")

    row = house.adapter("style")
    monkeypatch.setattr(adapter_rows, "saved", collide)
    monkeypatch.setattr(granting, "_changed_for", collide)
    with pytest.raises(RegistrationError) as caught:
        house.adapter("other")
    assert caught.value.code == "conflict"
    with pytest.raises(RegistrationError) as caught:
        granting.grant(row, house.tenants["Alice's"])
    assert caught.value.code == "conflict"
    assert (Adapter.objects.count(), AdapterGrant.objects.count()) == (1, 0)


def test_a_model_with_adapters_is_not_deleted(house: House) -> None:
    row = house.adapter("style", "Alice's")
    with pytest.raises(ProtectedError):
        model_rows.remove([house.base.pk])
    assert adapter_rows.remove([row.pk]) == 1
    assert not AdapterGrant.objects.exists()
    assert model_rows.remove([house.base.pk]) == 1


# Who sees what, under which id


@pytest.mark.parametrize("named", ["verse", "tiny:verse"])
def test_a_list_of_allowed_adapters_hides_the_others(house: House, named: str) -> None:
    for name in ("style", "verse"):
        house.adapter(name, "Alice's")
    granting.set_default_vector(house.caller("Alice's"), house.served, [("style", 0.5), ("verse", 1.0)])
    narrow = replace(house.caller("Alice's"), allowed_adapters=frozenset({named}))
    assert [(one.name, one.position) for one in adapters.granted(narrow, house.served)] == [("verse", 1)]
    assert [(one.name, scale) for one, scale in adapters.default_vector(narrow, house.served)] == [("verse", 1.0)]
    for key in ("style", 0):
        with pytest.raises(Refusal) as caught:
            adapters.choose(narrow, house.served, [(key, 1.0)])
        assert caught.value.code == "adapter_not_found"
    with pytest.raises(Refusal):
        adapters.resolve_model("tiny:style", narrow)
    elsewhere = replace(narrow, allowed_adapters=frozenset({"other:verse"}))
    assert adapters.granted(elsewhere, house.served) == ()


def test_charlie_sees_no_adapter_and_cannot_tell_it_from_an_invented_one(house: House) -> None:
    house.adapter("style", "Alice's", "Bob's")
    for name in ("Alice's", "Bob's"):
        assert house.ids(name) == {"style": 0}
        assert house.vector(name, [("style", 1.0)]) == {"style": 1.0}
    assert adapters.granted(house.tenants["Charlie's"].pk, house.served) == ()
    assert adapters.default_vector(house.caller("Charlie's"), house.served) == ()
    texts = set()
    for key in ("style", "invented", 0, 7):
        refusal = house.refusal("Charlie's", [(key, 1.0)])
        assert (refusal.code, refusal.extra) == ("adapter_not_found", {})
        texts.add(refusal.message.replace(repr(str(key)), "KEY"))
        with pytest.raises(Refusal):
            granting.set_default_vector(house.caller("Charlie's"), house.served, [(key, 1.0)])
    assert len(texts) == 1
    for name in ("tiny:style", "tiny:invented", "invented:style"):
        with pytest.raises(Refusal) as caught:
            adapters.resolve_model(name, house.caller("Charlie's"))
        assert caught.value.code == "model_not_found"
        texts.add(caught.value.message.replace(name, "KEY"))
    assert len(texts) == 2
    assert not DefaultVector.objects.exists()


def test_ids_are_stable_while_other_grants_come_and_go(house: House) -> None:
    rows = {name: house.adapter(name) for name in ("a", "b", "c")}
    alice = house.tenants["Alice's"]
    for name in ("c", "a"):
        granting.grant(rows[name], alice)
    assert house.ids("Alice's") == {"c": 0, "a": 1}
    assert granting.grant(rows["c"], alice).position == 0
    granting.grant(rows["b"], alice)
    assert granting.revoke(rows["c"], alice) is True
    assert granting.revoke(rows["c"], alice) is False
    assert house.ids("Alice's") == {"a": 1, "b": 2}
    assert granting.grant(rows["c"], alice).position == 3
    adapter_rows.set_enabled([rows["a"].pk], False)
    assert house.ids("Alice's") == {"b": 2, "c": 3}
    assert house.refusal("Alice's", [(1, 1.0)]).code == "adapter_not_found"
    adapter_rows.set_enabled([rows["a"].pk], True)
    assert house.ids("Alice's") == {"a": 1, "b": 2, "c": 3}


def test_shared_adapters_serve_everybody_after_the_granted_ones(house: House) -> None:
    first = house.adapter("first-shared", visibility="shared")
    house.adapter("second-shared", visibility="shared")
    house.adapter("own", "Alice's")
    assert house.ids("Charlie's") == {"first-shared": 0, "second-shared": 1}
    assert house.ids("Alice's") == {"own": 0, "first-shared": 1, "second-shared": 2}
    adapter_rows.set_enabled([first.pk], False)
    assert house.ids("Charlie's") == {"second-shared": 1}


def test_adapters_of_another_model_are_not_seen(house: House) -> None:
    other = model_rows.register(
        gguf_files.write(house.folder, "other.gguf", changes={"general.name": (8, "Other")}),
        "other",
        trial=PassingTrial(),
    )
    house.adapter("style", "Alice's")
    path = gguf_files.write_adapter(house.folder, "others.gguf")
    row = adapter_rows.register(path, other, "style", trial=PassingTrial(), granted_tenants=[house.tenants["Alice's"]])
    found = {
        model: adapters.granted(house.caller("Alice's"), registry.resolve(model, Caller(0)))
        for model in ("tiny", "other")
    }
    assert [(one.id, one.position) for one in found["other"]] == [(row.pk, 0)]
    assert found["tiny"][0].digest != found["other"][0].digest


def test_snapshots_are_frozen_and_know_what_the_engine_needs(house: House) -> None:
    row = house.adapter("style", "Alice's", default_scale=0.5)
    one = adapters.granted(house.caller("Alice's"), house.served)[0]
    assert (one.path, one.rank, one.alpha, one.task_name) == (Path(row.path), 2, 4.0, "style")
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.position = 3  # type: ignore[misc]
    files = adapters.files_of(house.served)
    assert [(file.digest, file.path, file.size_bytes, file.rank) for file in files] == [
        (row.digest, Path(row.path), row.size_bytes, 2)
    ]
    adapter_rows.set_enabled([row.pk], False)
    assert adapters.files_of(house.served) == ()


# Vectors


def test_a_vector_is_sorted_and_holds_no_zero(house: House) -> None:
    house.adapter("a", "Alice's", default_scale=0.5)
    house.adapter("b", "Alice's")
    assert house.vector("Alice's", [("b", 1.5), ("a", -0.3)]) == {"b": 1.5, "a": -0.3}
    assert house.vector("Alice's", [(1, 1.5), (0, -0.3)]) == {"b": 1.5, "a": -0.3}
    assert house.vector("Alice's", [("a", None), ("b", None)]) == {"a": 0.5, "b": 1.0}
    assert house.vector("Alice's", [("a", 0), ("b", -0.0)]) == {}
    assert house.vector("Alice's", []) == {}
    assert house.vector("Alice's", None) == {}
    assert house.vector("Alice's", [("a", 16), ("b", -16.0)]) == {"a": 16.0, "b": -16.0}


@pytest.mark.parametrize("scale", [16.01, -17, math.inf, -math.inf, math.nan, True])
def test_a_scale_out_of_range_is_refused(house: House, scale: float) -> None:
    house.adapter("a", "Alice's")
    refusal = house.refusal("Alice's", [("a", scale)])
    assert refusal.code == "validation_error"
    assert refusal.extra["fields"][0]["field"] == "adapters.0.scale"


def test_an_adapter_named_twice_is_refused(house: House) -> None:
    house.adapter("a", "Alice's")
    for wanted in ([("a", 0.5), ("a", 0.5)], [("a", 0.5), (0, 0.5)]):
        refusal = house.refusal("Alice's", wanted)
        assert (refusal.code, refusal.extra["fields"][0]["loc"]) == ("validation_error", ["adapters", "1"])


def test_one_file_under_two_names_is_one_adapter_whose_scales_add_up(house: House) -> None:
    row = house.adapter("a", "Alice's")
    twin = adapter_rows.register(row.path, house.base, "twin", trial=PassingTrial())
    granting.grant(twin, house.tenants["Alice's"])
    pairs = adapters.choose(house.caller("Alice's"), house.served, [("a", 0.5), ("twin", 0.25)]).vector
    assert pairs == ((row.digest, 0.75),)
    assert adapters.choose(house.caller("Alice's"), house.served, [("a", 0.5), ("twin", -0.5)]).vector == ()


def test_there_is_a_bound_on_the_adapters_of_a_request(house: House) -> None:
    house.adapter("a", "Alice's")
    assert house.refusal("Alice's", [("a", 1.0)] * 17).code == "validation_error"


def test_keys_that_are_no_names_are_not_found(house: House) -> None:
    house.adapter("a", "Alice's")
    for key in (True, False, -1, "0", "A", "", "x" * 5000):
        refusal = house.refusal("Alice's", [(key, 1.0)])
        assert refusal.code == "adapter_not_found"
        assert len(refusal.message) < 200


def test_a_model_name_may_carry_an_adapter(house: House) -> None:
    ServedModel.objects.update(aliases=["chat"])
    registry.forget()
    house.adapter("style", "Alice's")
    alice = house.caller("Alice's")
    for name in ("tiny:style", "chat:style"):
        served, wanted = adapters.resolve_model(name, alice)
        assert served.name == "tiny"
        assert wanted == [("style", None)]
        assert len(adapters.choose(alice, served, wanted).vector) == 1
    for plain in ("tiny", "chat", None):
        assert adapters.resolve_model(plain, alice) == (house.served, None)
    for name in ("tiny:", ":style", "tiny:a:b", "tiny:0"):
        with pytest.raises(Refusal) as caught:
            adapters.resolve_model(name, alice)
        assert caught.value.code == "model_not_found"
    model_rows.set_load_mode([house.base.pk], "off")
    with pytest.raises(Refusal) as caught:
        adapters.resolve_model("tiny:style", alice)
    assert caught.value.code == "llm_not_loaded"


# The tenant's own default


def test_the_default_vector_is_the_tenants_own_and_replaces_the_whole(house: House) -> None:
    house.adapter("a", "Alice's", "Bob's")
    house.adapter("b", "Alice's")
    alice = house.caller("Alice's")
    set_to = granting.set_default_vector(alice, house.served, [(0, 0.5), (1, 0.0)])
    assert [(one.name, scale) for one, scale in set_to] == [("a", 0.5)]
    assert house.vector("Alice's", None) == {"a": 0.5}
    assert house.vector("Alice's", []) == {}
    assert house.vector("Alice's", [("b", 1.0)]) == {"b": 1.0}
    assert house.vector("Bob's", None) == {}
    granting.set_default_vector(alice, house.served, [("b", 2.0)])
    assert [(one.name, scale) for one, scale in adapters.default_vector(alice, house.served)] == [("b", 2.0)]
    granting.set_default_vector(alice, house.served, [])
    assert house.vector("Alice's", None) == {}
    assert not DefaultVector.objects.exists()


def test_a_refused_default_changes_nothing(house: House) -> None:
    house.adapter("a", "Alice's")
    alice = house.caller("Alice's")
    granting.set_default_vector(alice, house.served, [("a", 0.5)])
    for wanted in ([("a", 99.0)], [("b", 1.0)], [("a", 0.1), ("b", 1.0)]):
        with pytest.raises(Refusal):
            granting.set_default_vector(alice, house.served, wanted)
    assert house.vector("Alice's", None) == {"a": 0.5}


def test_a_revoked_or_removed_adapter_leaves_the_default(house: House) -> None:
    rows = {name: house.adapter(name, "Alice's") for name in ("a", "b", "c")}
    alice, served = house.caller("Alice's"), house.served
    granting.set_default_vector(alice, served, [("a", 1.0), ("b", 2.0), ("c", 3.0)])
    granting.revoke(rows["a"], house.tenants["Alice's"])
    assert house.vector("Alice's", None) == {"b": 2.0, "c": 3.0}
    granting.grant(rows["a"], house.tenants["Alice's"])
    assert house.vector("Alice's", None) == {"b": 2.0, "c": 3.0}
    adapter_rows.set_enabled([rows["b"].pk], False)
    assert house.vector("Alice's", None) == {"c": 3.0}
    adapter_rows.remove([rows["c"].pk])
    assert house.vector("Alice's", None) == {}
    assert DefaultVector.objects.get().scales == [[rows["b"].pk, 2.0]]


@pytest.mark.django_db(transaction=True)
def test_setting_the_same_default_again_announces_nothing(house: House, valkey: Any) -> None:
    issuing.issue(house.tenants["Alice's"], "main", DEFAULT_SCOPES)
    house.adapter("a", "Alice's")
    alice = house.caller("Alice's")
    granting.set_default_vector(alice, house.served, [("a", 0.5)])
    before = int(valkey.get(known_keys.VERSION_KEY))
    granting.set_default_vector(alice, house.served, [("a", 0.5)])
    assert int(valkey.get(known_keys.VERSION_KEY)) == before
    granting.set_default_vector(alice, house.served, [("a", 0.6)])
    assert int(valkey.get(known_keys.VERSION_KEY)) > before


# The cache


def test_answers_come_from_memory(house: House, django_assert_num_queries: Callable[[int], Any]) -> None:
    house.adapter("a", "Alice's")
    served, alice, charlie = house.served, house.caller("Alice's"), house.caller("Charlie's")
    adapters.forget()
    with django_assert_num_queries(4):
        for _ in range(20):
            adapters.choose(alice, served, [("a", 1.0)])
            adapters.choose(alice, served, None)
    with django_assert_num_queries(1):
        for _ in range(20):
            adapters.choose(charlie, served, None)


def test_a_change_in_another_process_is_seen(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    row = house.adapter("a", "Alice's")
    assert house.ids("Alice's") == {"a": 0}
    Adapter.objects.filter(pk=row.pk).update(enabled=False)
    assert house.ids("Alice's") == {"a": 0}
    known_keys.CACHE.forget()  # what its watcher does when the counter in Redis has moved
    assert house.ids("Alice's") == {}
    Adapter.objects.filter(pk=row.pk).update(enabled=True)
    assert house.ids("Alice's") == {}
    monkeypatch.setattr(registry, "CACHE_SECONDS", 0.0)
    assert house.ids("Alice's") == {"a": 0}


def test_what_was_read_before_a_change_is_not_kept_after_it(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.adapter("a", "Alice's")
    served, read = house.served, adapters._read

    def read_slowly(*arguments: Any) -> Any:
        view = read(*arguments)
        adapters.forget()  # another thread changes something while this one still reads
        return view

    monkeypatch.setattr(adapters, "_read", read_slowly)
    adapters.granted(house.caller("Alice's"), served)
    assert adapters._views == {}


def test_the_cache_is_bounded(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "MAX_VIEWS", 10)
    served = house.served
    for tenant_id in range(25):
        adapters.granted(tenant_id, served)
    assert len(adapters._views) <= 10


@pytest.mark.django_db(transaction=True)
def test_grants_at_the_same_moment_get_positions_of_their_own(house: House) -> None:
    rows = [house.adapter(f"a{number}") for number in range(6)]
    alice = house.tenants["Alice's"]
    problems: list[Exception] = []

    def grant(row: Adapter) -> None:
        from django.db import connection

        try:
            granting.grant(row, alice)
        except (RegistrationError, DatabaseError) as error:
            problems.append(error)
        finally:
            connection.close()

    threads = [threading.Thread(target=grant, args=(row,)) for row in rows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert sorted(house.ids("Alice's").values()) == list(range(6))

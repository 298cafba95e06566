"""Aliases of adapters: which version answers whom, trials on a share, promotion, the way back, and who sees what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from django.db import IntegrityError, transaction

from accounts.identity import key_rows, known_keys
from accounts.models import AuditEntry
from accounts.trail.refusals import Refusal
from inference.catalog import adapter_rows, adapters, aliases, granting, model_rows, registry
from inference.catalog.alias_choice import goes_to_canary, session_of
from inference.chat.prompt import ChatPrompt, Message
from inference.engine.types import Embedding, Pooling
from inference.intake.admission import CachedAnswer, admit
from inference.models import Adapter, AdapterAlias, Receipt, ServedModel
from inference.transport import doorbell
from inference.transport.ticket import Ticket
from inference.upkeep import entitlements
from inference.vetting.inspection import RegistrationError
from tests.inference import gguf_files
from tests.inference.flow import admitted, fake_load, finish, new_id, order, principal_of, register, wait_for, worker
from tests.inference.gguf_files import PassingTrial

pytestmark = [pytest.mark.integration, pytest.mark.django_db]


@pytest.fixture(autouse=True)
def bell(monkeypatch: pytest.MonkeyPatch, valkey: Any) -> None:
    monkeypatch.setattr(doorbell, "ring", lambda pool: True)


@pytest.fixture
def model() -> ServedModel:
    return register()


@pytest.fixture
def versions(cast: Any, make: Any) -> tuple[Adapter, Adapter, Adapter]:
    return make("v1", cast.alice, cast.bob), make("v2", cast.alice, cast.bob), make("v3", cast.alice)


def answered_by(who: Any, **changes: Any) -> str:
    """The version that the ticket of a request for the alias names."""
    [name] = admitted(principal_of(who), **{"model": "small:support", **changes}).ticket.adapter_names
    return name


def refused(who: Any, **changes: Any) -> Refusal:
    with pytest.raises(Refusal) as caught:
        admit(principal_of(who), order(**changes), request_id=new_id(), route="/v1/generate")
    return caught.value


def code_of(step: Callable[[], object]) -> str:
    with pytest.raises(RegistrationError) as caught:
        step()
    return caught.value.code


def state(alias: AdapterAlias) -> tuple[str, str | None, int, str | None]:
    row = aliases.as_alias_row(aliases.find(alias.base_model, alias.name))  # type: ignore[arg-type]
    return row["target"], row["canary"], row["share"], row["previous"]


# Which version?


def test_the_share_of_conversations_is_the_share_that_was_asked_for() -> None:
    for share in (1, 10, 50, 90):
        number = sum(
            goes_to_canary(tenant_id=7, alias_id=3, canary_id=2, share=share, session=b"session:%d" % each)
            for each in range(20_000)
        )
        assert abs(number / 20_000 - share / 100) < 0.012  # more than three standard deviations
    for share, expected in ((0, False), (100, True)):
        found = {
            goes_to_canary(tenant_id=7, alias_id=3, canary_id=2, share=share, session=b"%d" % n) for n in range(99)
        }
        assert found == {expected}


def test_a_larger_share_only_adds_and_another_canary_meets_others() -> None:
    def taken(share: int, canary_id: int) -> set[int]:
        return {
            each
            for each in range(2000)
            if goes_to_canary(tenant_id=7, alias_id=3, canary_id=canary_id, share=share, session=b"%d" % each)
        }

    assert taken(5, 2) < taken(20, 2) < taken(60, 2)
    assert len(taken(20, 2) & taken(20, 4)) < 150  # a fifth of a fifth, some 80


def test_what_belongs_together_has_one_session() -> None:
    system, first = Message(role="system", content="Be kind."), Message(role="user", content="Hello")
    later = (Message(role="assistant", content="Hi!"), Message(role="user", content="How are you?"))
    begun = order(prompt=ChatPrompt(messages=(system, first)))
    goes_on = order(prompt=ChatPrompt(messages=(system, first, *later)))
    other = order(prompt=ChatPrompt(messages=(system, later[1])))
    assert session_of(begun) == session_of(goes_on) != session_of(other)
    named = {session_of(replace(each, session="conversation 7")) for each in (begun, other, order(prompt="text"))}
    assert len(named) == 1
    assert session_of(order(prompt="text")) != session_of(order(prompt="text that goes on"))
    assert session_of(order(prompt=(1, 2))) != session_of(order(prompt=(2, 1)))
    vectors = Embedding(lengths=(2,), pooling=Pooling.MEAN)
    assert session_of(order(embedding=vectors, session="x")) == session_of(order(embedding=vectors, prompt=(5, 6)))


def test_an_alias_is_asked_for_like_an_adapter_and_the_ticket_names_the_version(
    cast: Any, model: ServedModel, versions: Any, valkey: Any
) -> None:
    v1, v2, _ = versions
    aliases.point(model, "support", v1)
    alice = principal_of(cast.alice)
    named = admitted(alice, model="small:support").ticket
    listed = admitted(alice, adapters=(("support", 0.5), ("v2", 0.25))).ticket
    assert (named.adapters, named.adapter_names, named.aliases) == (((v1.digest, 1.0),), ("v1",), (("support", "v1"),))
    assert listed.adapters == ((v1.digest, 0.5), (v2.digest, 0.25))
    assert (listed.adapter_names, listed.aliases) == (("v1", "v2"), (("support", "v1"),))
    assert Ticket.parse(listed.header()).aliases == listed.aliases
    assert admitted(alice, adapters=()).ticket.aliases == ()
    assert b"aliases" not in admitted(alice).ticket.header()  # workers of before know nothing of it
    assert refused(cast.alice, adapters=(("support", 1.0), ("v1", 1.0))).code == "validation_error"


@pytest.mark.django_db(transaction=True)
def test_the_receipt_and_the_usage_say_which_version_answered(
    cast: Any, model: ServedModel, versions: Any, valkey: Any
) -> None:
    v1, v2, _ = versions
    alias = aliases.point(model, "support", v1)
    alice = principal_of(cast.alice)
    with worker(valkey, threads=1, load=fake_load(supports_adapters=True)):
        first = admitted(alice, model="small:support", use_cache=True).ticket
        finish(valkey, first.request_id)
        cached = admit(alice, order(model="small:support", use_cache=True), request_id=new_id(), route="/v1/generate")
        assert isinstance(cached, CachedAnswer)
        aliases.try_out(alias, v2, 100)
        second = admitted(alice, model="small:support", use_cache=True).ticket
        finish(valkey, second.request_id)
        wait_for(lambda: Receipt.objects.count() == 3)
    rows = {row.request_id: (row.adapters, row.aliases) for row in Receipt.objects.all()}
    assert rows[first.request_id] == ([["v1", 1.0]], [["support", "v1"]])
    assert rows[cached.request_id] == rows[first.request_id]
    assert rows[second.request_id] == ([["v2", 1.0]], [["support", "v2"]])


def test_a_trial_meets_its_share_of_conversations_and_each_of_them_always(
    cast: Any, model: ServedModel, versions: Any
) -> None:
    v1, v2, _ = versions
    alias = aliases.try_out(aliases.point(model, "support", v1), v2, 30)
    alice = principal_of(cast.alice)
    served = registry.resolve("small", alice)

    def version(session: int) -> str:
        choice = adapters.choose(alice, served, [("support", None)], lambda: b"%d" % session)
        return choice.names[0]

    found = [version(each) for each in range(1000)]
    assert 240 < found.count("v2") < 360
    adapters.forget()
    assert [version(each) for each in range(1000)] == found
    aliases.try_out(alias, v2, 60)
    wider = [version(each) for each in range(1000)]
    assert all(after == "v2" for before, after in zip(found, wider, strict=True) if before == "v2")
    assert 530 < wider.count("v2") < 670
    assert len({answered_by(cast.alice, session="the same") for _ in range(5)}) == 1


def test_requests_of_one_body_are_answered_by_one_version(cast: Any, model: ServedModel, versions: Any) -> None:
    aliases.try_out(aliases.point(model, "support", versions[0]), versions[1], 50)
    by_prompt = {
        prompt: {answered_by(cast.alice, prompt=prompt, shares_prompt=shares) for shares in (False, True)}
        for prompt in ((each, 1, 2) for each in range(1, 30))
    }
    assert all(len(found) == 1 for found in by_prompt.values())
    assert set.union(*by_prompt.values()) == {"v1", "v2"}


# The way of a version


def test_a_version_is_tried_out_promoted_and_rolled_back(cast: Any, model: ServedModel, versions: Any) -> None:
    v1, v2, v3 = versions
    alias = aliases.point(model, "support", v1)
    assert (state(alias), answered_by(cast.alice)) == (("v1", None, 0, None), "v1")
    aliases.try_out(alias, v2, 0)
    assert (state(alias), answered_by(cast.alice)) == (("v1", "v2", 0, None), "v1")
    aliases.try_out(alias, v2, 100)
    assert answered_by(cast.alice) == "v2"
    aliases.roll_back(alias)
    assert (state(alias), answered_by(cast.alice)) == (("v1", None, 0, None), "v1")
    aliases.try_out(alias, v2, 10)
    aliases.promote(alias)
    assert (state(alias), answered_by(cast.alice)) == (("v2", None, 0, "v1"), "v2")
    aliases.roll_back(alias)
    assert (state(alias), answered_by(cast.alice)) == (("v1", None, 0, None), "v1")
    assert code_of(lambda: aliases.roll_back(alias)) == "conflict"  # asked twice: it does not come back
    assert state(alias)[0] == "v1"
    aliases.point(model, "support", v3, force=True)
    assert state(alias) == ("v3", None, 0, "v1")
    assert code_of(lambda: aliases.promote(alias)) == "conflict"


def test_the_audit_log_has_each_step(model: ServedModel, versions: Any) -> None:
    v1, v2, _ = versions
    alias = aliases.point(model, "support", v1)
    aliases.try_out(alias, v2, 10)
    aliases.promote(alias)
    aliases.roll_back(alias)
    aliases.point(model, "support", v1)  # it points there already
    entries = AuditEntry.objects.filter(model="inference.adapteralias").order_by("pk")
    assert [entry.name for entry in entries] == ["small:support"] * 4
    assert [sorted(entry.diff) for entry in entries][1:] == [
        ["canary", "share"],
        ["canary", "previous", "share", "target"],
        ["previous", "target"],
    ]
    assert entries[2].diff["target"] == [v1.pk, v2.pk]


@pytest.mark.django_db(transaction=True)
def test_a_change_reaches_every_process(model: ServedModel, versions: Any, valkey: Any) -> None:
    v1, v2, _ = versions
    alias = aliases.point(model, "support", v1)
    steps: list[Callable[[], object]] = [
        lambda: aliases.try_out(alias, v2, 5),
        lambda: aliases.promote(alias),
        lambda: aliases.roll_back(alias),
        lambda: aliases.remove([alias.pk]),
    ]
    for step in steps:
        before = int(valkey.get(known_keys.VERSION_KEY) or 0)
        step()
        assert int(valkey.get(known_keys.VERSION_KEY)) > before


# Who may use it


def test_for_charlie_an_alias_does_not_exist(cast: Any, model: ServedModel, versions: Any) -> None:
    aliases.point(model, "support", versions[0])
    unknown, known = refused(cast.charlie, model="small:nobody"), refused(cast.charlie, model="small:support")
    assert (known.code, known.message.replace("support", "nobody")) == (unknown.code, unknown.message)
    unknown, known = (refused(cast.charlie, adapters=((name, 1.0),)) for name in ("nobody", "support"))
    assert (known.code, known.message.replace("support", "nobody")) == (unknown.code, unknown.message)
    served = registry.resolve("small", principal_of(cast.charlie))
    assert adapters.granted_aliases(principal_of(cast.charlie), served) == ()
    assert [each.name for each in adapters.granted_aliases(principal_of(cast.bob), served)] == ["support"]


def test_a_trial_is_for_tenants_that_may_use_the_version_and_takes_the_name_from_nobody(
    cast: Any, model: ServedModel, versions: Any
) -> None:
    v1, _, v3 = versions
    aliases.try_out(aliases.point(model, "support", v1), v3, 100)
    assert (answered_by(cast.alice), answered_by(cast.bob)) == ("v3", "v1")
    adapter_rows.set_enabled([v3.pk], False)
    assert answered_by(cast.alice) == "v1"
    adapter_rows.set_enabled([v1.pk], False)
    assert refused(cast.bob, model="small:support").code == "model_not_found"


def test_nobody_loses_the_name_by_accident(cast: Any, model: ServedModel, versions: Any, make: Any) -> None:
    v1, v2, v3 = versions
    alias = aliases.try_out(aliases.point(model, "support", v1), v3, 10)
    with pytest.raises(RegistrationError, match="Bob's may use small:v1 and not small:v3") as caught:
        aliases.promote(alias)
    assert caught.value.code == "alias_loses_tenants"
    assert code_of(lambda: aliases.point(model, "support", v3)) == "alias_loses_tenants"
    assert state(alias) == ("v1", "v3", 10, None)
    granting.grant(v3, cast.bob.tenant)
    aliases.promote(alias)
    shared = make("everybody", visibility="shared")
    aliases.point(model, "support", shared)
    assert code_of(lambda: aliases.point(model, "support", v2)) == "alias_loses_tenants"
    aliases.roll_back(alias)  # the way back is never refused
    assert state(alias)[0] == "v3"


def test_a_list_of_allowed_adapters_may_name_an_alias(cast: Any, model: ServedModel, versions: Any) -> None:
    v1, v2, v3 = versions
    alias = aliases.try_out(aliases.point(model, "support", v1), v2, 100)
    key = cast.alice.key

    def allow(*names: str) -> None:
        key.allowed_adapters = list(names)
        key.save()

    def answers() -> tuple[str, ...]:
        return admitted(key_rows.principal_of(key), model="small:support").ticket.adapter_names

    served = registry.resolve("small", principal_of(cast.alice))
    for names, expected in ((("support",), "v2"), (("small:support",), "v2"), (("v1",), "v1"), (("v1", "v2"), "v2")):
        allow(*names)
        assert answers() == (expected,)
    allow("support")
    assert [each.name for each in adapters.granted(key_rows.principal_of(key), served)] == ["v1", "v2"]
    running = admitted(key_rows.principal_of(key), model="small:support").ticket
    aliases.end_trial(alias)
    aliases.point(model, "support", v3, force=True)
    old = replace(running, adapters=((v1.digest, 1.0),))
    gone = replace(running, request_id="gone", adapters=((v2.digest, 1.0),))
    assert entitlements.judge([old, gone], datetime.now(UTC)).ended == {"gone": "adapter_withdrawn"}
    allow("v2")
    with pytest.raises(Refusal) as caught:
        answers()
    assert caught.value.code == "model_not_found"


# What is refused


def test_wrong_words_are_refused_and_change_nothing(model: ServedModel, versions: Any, make: Any) -> None:
    v1, v2, _ = versions
    other = register("other", is_default=False)
    foreign = make("foreign", base_model=other)
    alias = aliases.point(model, "support", v1)
    off = make("off", enabled=False)
    for wrong, words in (
        (lambda: aliases.point(model, "v2", v1), "is an adapter"),
        (lambda: aliases.point(model, "a/b", v1), "1 to 64 letters"),
        (lambda: aliases.point(model, "more", foreign), "another model"),
        (lambda: aliases.point(model, "more", off), "switched off"),
        (lambda: aliases.try_out(alias, foreign, 5), "another model"),
        (lambda: aliases.try_out(alias, v1, 5), "answers already"),
        (lambda: aliases.try_out(alias, v2, 101), "100"),
        (lambda: aliases.try_out(alias, v2, -1), "0"),
        (lambda: aliases.version_of(model, "support"), "is an alias itself"),
    ):
        with pytest.raises(RegistrationError, match=words) as caught:
            wrong()
        assert caught.value.code == "invalid"
    assert code_of(lambda: aliases.version_of(model, "nobody")) == "adapter_not_found"
    assert AdapterAlias.objects.count() == 1 and state(alias) == ("v1", None, 0, None)


def test_an_adapter_does_not_take_the_name_of_an_alias(tmp_path: Path) -> None:
    base = model_rows.register(gguf_files.write(tmp_path), "tiny", trial=PassingTrial())
    path = gguf_files.write_adapter(tmp_path)
    first = adapter_rows.register(path, base, "v1", trial=PassingTrial())
    aliases.point(base, "support", first)
    with pytest.raises(RegistrationError, match="'support' is an alias"):
        adapter_rows.register(path, base, "support", trial=PassingTrial())
    assert list(Adapter.objects.values_list("name", flat=True)) == ["v1"]


def test_a_version_that_an_alias_leads_to_stays_and_an_earlier_one_may_go(model: ServedModel, versions: Any) -> None:
    v1, v2, v3 = versions
    alias = aliases.try_out(aliases.point(model, "support", v1), v2, 5)
    for version in (v1, v2):
        with pytest.raises(RegistrationError, match="alias small:support leads to it") as caught:
            adapter_rows.remove([v3.pk, version.pk])
        assert caught.value.code == "adapter_in_use"
    assert Adapter.objects.count() == 3
    aliases.promote(alias)
    adapter_rows.remove([v1.pk])
    assert state(alias) == ("v2", None, 0, None)
    assert code_of(lambda: aliases.roll_back(alias)) == "conflict"
    assert aliases.remove([alias.pk]) == 1
    assert code_of(lambda: aliases.end_trial(alias)) == "alias_not_found"
    adapter_rows.remove([v2.pk, v3.pk])


def test_the_database_keeps_the_rules_too(model: ServedModel, versions: Any) -> None:
    v1, v2, _ = versions
    for values in ({"share": 5}, {"share": 101, "canary": v2}, {"canary": v1}):
        with pytest.raises(IntegrityError), transaction.atomic():
            AdapterAlias.objects.create(name="x", base_model=model, target=v1, **values)

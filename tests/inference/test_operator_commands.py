"""What an operator does over a terminal to requests, batches, slots, imports, models and adapters."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from django.core.management import CommandError, call_command

from accounts.models import AuditEntry
from accounts.trail.refusals import Refusal
from inference.batches.models import Batch
from inference.catalog import registry
from inference.imports import desk
from inference.imports.models import ModelImport
from inference.models import Adapter, ModelVariant, ServedModel
from inference.slots import holdings
from inference.slots.holdings import Disk, Holdings, Loaded, Names
from inference.transport import queue
from tests.accounts.test_commands import answer, failure, said
from tests.conftest import Cast
from tests.in_process import MODEL, InProcessSite
from tests.inference.flow import POOL, ticket
from tests.inference.test_batch_operators import SECRET, make_batch, make_file
from tests.test_slots import FRANCE, act, computed

pytestmark = [pytest.mark.integration, pytest.mark.django_db]


def noted(row: Any) -> list[AuditEntry]:
    found = AuditEntry.objects.filter(actor_kind="command", model=row._meta.label_lower, row=str(row.pk))
    return list(found.order_by("pk"))


# Requests


@pytest.fixture
def live(cast: Cast) -> tuple[str, str]:
    """One of Alice's runs, one of Bob's waits."""
    tickets = queue.ticket_queue()
    running, waiting = (
        ticket(tenant_id=who.tenant.pk, key_id=who.key.pk, quota_key_id=who.key.pk) for who in (cast.alice, cast.bob)
    )
    tickets.beat("worker-1", POOL, 1, {"models": []})
    tickets.put(running)
    assert tickets.take(POOL, "worker-1", [1]) is not None
    tickets.put(waiting)
    return running.request_id, waiting.request_id


def test_what_waits_and_runs_is_listed_and_cancelled(cast: Cast, live: tuple[str, str]) -> None:
    running, waiting = live
    rows = answer("cancel")["live"]
    assert [(row["request_id"], row["state"], row["tenant"]) for row in rows] == [
        (running, "running", "Alice's"),
        (waiting, "waiting", "Bob's"),
    ]
    assert "worker-1" in said("cancel")
    assert answer("cancel", waiting)["requests"] == [{"request_id": waiting, "was": "waiting"}]
    assert [row["request_id"] for row in answer("cancel")["live"]] == [running]
    assert said("cancel", running, "nothing").splitlines() == [
        f"{running} is cancelled.",
        "nothing is not known.",
    ]
    assert queue.ticket_queue().beat("worker-1", POOL, 1, {"models": []}).cancels == {running: "cancelled"}
    assert noted(cast.bob.tenant)[-1].diff == {f"request {waiting}": ["waiting", "cancelled"]}
    assert noted(cast.alice.tenant)[-1].diff == {f"request {running}": ["running", "cancelled"]}


def test_everything_of_a_tenant_or_key_is_cancelled_and_nothing_of_others(cast: Cast, live: tuple[str, str]) -> None:
    running, waiting = live
    assert said("cancel", "--tenant", "Charlie's") == "Nothing of it waits or runs.\n"
    assert answer("cancel", "--tenant", "Bob's")["requests"] == [{"request_id": waiting, "was": "waiting"}]
    assert [row["request_id"] for row in answer("cancel")["live"]] == [running]
    assert answer("cancel", "--key", cast.alice.key.public_id)["requests"][0]["request_id"] == running
    assert failure("cancel", "nothing")[0] == "request_not_found"
    assert failure("cancel", running, "--tenant", "Alice's")[0] == "bad_request"
    assert failure("cancel", "--tenant", "Nobody's")[0] == "tenant_not_found"


def test_a_worker_that_does_not_answer_may_hold_something_yet(cast: Cast, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was erased there, and the status says so."""
    silent = Refusal("service_unavailable", "The worker does not answer.")
    found = Holdings(
        [Loaded("w1", {"name": "small", "id": 1}, silent), Loaded("w2", {"name": "large", "id": 2}, {"slots": []})],
        [Disk("here", "w1", silent)],
        Names(),
    )
    monkeypatch.setattr(holdings, "look", lambda: found)
    for action, kind in (("erase", "slots"), ("forget", "states")):
        out = io.StringIO()
        with pytest.raises(CommandError, match="w1: The worker does not answer") as caught:
            call_command("slots", action, "--tenant", "Alice's", "--json", stdout=out)
        error = json.loads(out.getvalue())["error"]
        assert caught.value.returncode == 1 and [each["of"] for each in error["problems"]] == [kind]
    assert answer("slots", "erase", "--tenant", "Alice's", "--worker", "w2") == {"erased": []}


# Batches


def test_batches_are_listed_without_their_content_and_cancelled(cast: Cast) -> None:
    file = make_file(cast.alice)
    batch, ended = make_batch(cast.alice, file), make_batch(cast.alice, file, status="completed")
    others = make_batch(cast.bob, make_file(cast.bob))
    assert {row["id"] for row in answer("batches")["batches"]} == {batch.pk, ended.pk, others.pk}
    open_ones = answer("batches", "list", "--tenant", "Alice's", "--open")["batches"]
    assert [row["id"] for row in open_ones] == [batch.pk]
    assert SECRET not in said("batches") + said("batches", "--json")
    told = answer("batches", "cancel", batch.pk, ended.pk)
    assert told["cancelled"] == [batch.pk]
    assert {row["id"]: row["status"] for row in told["batches"]} == {batch.pk: "cancelling", ended.pk: "completed"}
    assert noted(batch)[-1].diff == {"status": ["in_progress", "cancelling"]} and not noted(ended)
    assert failure("batches", "cancel", "batch_none")[0] == "batch_not_found"
    assert failure("batches", "cancel")[0] == "batch_missing"
    assert answer("batches", "cancel", "--tenant", "Bob's")["cancelled"] == [others.pk]
    assert Batch.objects.get(pk=others.pk).status == "cancelling"


# Slots and saved states


@pytest.mark.api
def test_slots_and_states_of_one_tenant_are_shown_and_dropped(site: InProcessSite) -> None:
    alice, bob = site.cast.alice, site.cast.bob
    for customer in (alice, bob):
        site.ask(customer, FRANCE, 1)
        assert act(site.client(customer), 1, "save", "diary").status_code == 200
    assert {row["tenant"] for row in answer("slots")["slots"]} == {"Alice's", "Bob's"}
    found = answer("slots", "list", "--tenant", "Alice's")
    assert {row["tenant"] for row in (*found["slots"], *found["states"])} == {"Alice's"}
    assert len(found["states"]) == 1 and found["slots"][0]["tokens"] > 0
    assert "diary" not in said("slots")
    number = found["slots"][0]["number"]
    erased = answer("slots", "erase", "--tenant", "Alice's", "--model", MODEL, "--number", number)["erased"]
    assert [(row["tenant"], row["tokens"]) for row in erased] == [("Alice's", found["slots"][0]["tokens"])]
    assert computed(site.ask(alice, FRANCE, 1)) == 20, "its prompt is computed anew"
    assert computed(site.ask(bob, FRANCE, 1)) < 20, "the other's is not"
    forgotten = answer("slots", "forget", "--tenant", "Alice's")["forgotten"]
    assert [row["name"] for row in forgotten] == [found["states"][0]["name"]]
    assert act(site.client(alice), 0, "restore", "diary").status_code == 400
    assert act(site.client(bob), 0, "restore", "diary").status_code == 200
    assert [list(entry.diff) for entry in noted(alice.tenant)] == [[f"slot {number} of {MODEL}"], ["saved state"]]


def test_without_a_worker_there_is_nothing_to_drop(cast: Cast) -> None:
    assert said("slots") == "No worker holds anything of it.\n"
    assert answer("slots", "erase", "--tenant", "Alice's") == {"erased": []}
    assert failure("slots", "erase")[0] == "tenant_missing"
    assert failure("slots", "forget", "--tenant", "Nobody's")[0] == "tenant_not_found"


# Imports


def test_imports_are_listed_and_cancelled() -> None:
    row = desk.ask(desk.Asked(kind="model", name="small"))
    assert "receiving" in said("imports")
    assert answer("imports", "cancel", row.pk)["cancelled"] == [row.pk]
    assert ModelImport.objects.get(pk=row.pk).state == "cancelled"
    assert answer("imports", "cancel", row.pk)["cancelled"] == [], "twice is once"
    assert answer("imports", "list", "--open")["imports"] == []
    assert failure("imports", "cancel", row.pk + 1)[0] == "import_not_found"
    assert failure("imports", "cancel")[0] == "import_missing"


# Models, variants and adapters


@pytest.fixture
def small(db: None) -> ServedModel:
    row = ServedModel.objects.create(name="small", path="/models/s.gguf", digest="a" * 64, n_ctx=64, n_slots=1)
    ServedModel.objects.create(name="large", path="/models/l.gguf", digest="b" * 64, n_ctx=64, n_slots=1)
    registry.forget()
    return row


def test_models_are_switched_off_and_on_made_the_default_and_removed(small: ServedModel) -> None:
    assert [row["load_mode"] for row in answer("models", "switch-off", "small", "large")["models"]] == ["off", "off"]
    assert answer("models", "lazy", "small")["models"][0]["load_mode"] == "lazy"
    assert answer("models", "eager", "large")["models"][0]["load_mode"] == "eager"
    assert answer("models", "default", "large")["models"][0]["default"] is True
    assert ServedModel.objects.get(is_default=True).name == "large"
    assert failure("models", "default", "small", "large")[0] == "model_ambiguous"
    assert failure("models", "remove")[0] == "model_missing"
    assert failure("models", "remove", "small", "none")[0] == "model_not_found"
    assert said("models", "remove", "large") == "Removed: large. The files stay.\n"
    Adapter.objects.create(name="poet", base_model=small, path="/poet.gguf", digest="p" * 64)
    code, message = failure("models", "remove", "small")
    assert code == "model_in_use" and "adapter small:poet" in message
    assert [row.name for row in ServedModel.objects.all()] == ["small"]
    moved = [entry.diff["load_mode"] for entry in noted(small) if "load_mode" in entry.diff]
    assert moved == [["eager", "off"], ["off", "lazy"]]


def test_a_variant_is_removed(small: ServedModel) -> None:
    ModelVariant.objects.create(
        base_model=small, name="q8_0", path="/v.gguf", digest="c" * 64, source_digest=small.digest, is_active=True
    )
    assert failure("activate_variant", "small", "--remove")[0] == "variant_missing"
    assert "its file stays" in said("activate_variant", "small", "q8_0", "--remove")
    assert not ModelVariant.objects.exists()


def test_adapters_are_switched_off_and_on_and_removed(small: ServedModel) -> None:
    row = Adapter.objects.create(base_model=small, name="poet", path="/p.gguf", digest="d" * 64, rank=4, alpha=4.0)
    assert answer("adapters", "switch-off", "small:poet")["adapters"][0]["enabled"] is False
    assert answer("adapters", "switch-on", "poet")["adapters"][0]["enabled"] is True
    assert [entry.diff for entry in noted(row)] == [{"enabled": [True, False]}, {"enabled": [False, True]}]
    answer("alias", "set", "small:support", "poet")
    assert failure("adapters", "remove", "small:poet")[0] == "adapter_in_use"
    answer("alias", "remove", "small:support")
    assert failure("adapters", "remove")[0] == "adapter_missing"
    assert said("adapters", "remove", "small:poet") == "Removed: small:poet. The files stay.\n"
    assert not Adapter.objects.exists()

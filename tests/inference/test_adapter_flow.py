"""Adapters from a request to the engine and back: which vector a ticket carries, and what a worker holds for it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from accounts.trail.refusals import Refusal
from inference.catalog import adapter_rows, granting, registry
from inference.catalog.adapters import AdapterFile
from inference.engine import EngineError, EngineRunner, FakeBackend
from inference.intake.admission import CachedAnswer, admit
from inference.models import Receipt, ServedModel
from inference.transport import doorbell
from inference.worker import adapter_shelf
from inference.worker.adapter_shelf import AdapterShelf
from tests.engine.cast import EventLog, make_request
from tests.inference.flow import (
    admitted,
    events,
    fake_load,
    finish,
    new_id,
    order,
    principal_of,
    register,
    text_of,
    wait_for,
    worker,
)

pytestmark = [pytest.mark.integration, pytest.mark.django_db(transaction=True)]


@pytest.fixture(autouse=True)
def bell(monkeypatch: pytest.MonkeyPatch, valkey: Any) -> None:
    monkeypatch.setattr(doorbell, "ring", lambda pool: True)


@pytest.fixture
def model() -> ServedModel:
    return register()


def refused(principal: Any, **changes: Any) -> Refusal:
    with pytest.raises(Refusal) as caught:
        admit(principal, order(**changes), request_id=new_id(), route="/v1/generate")
    return caught.value


def test_a_ticket_carries_digests_and_scales_and_the_receipt_names(cast: Any, make: Any, valkey: Any) -> None:
    poet, alice = make("poet", cast.alice), principal_of(cast.alice)
    with worker(valkey, threads=1, load=fake_load(supports_adapters=True)):
        plain = admitted(alice).ticket
        styled = admitted(alice, adapters=(("poet", 0.5),)).ticket
        named = admitted(alice, model="small:poet").ticket
        for sent in (plain, styled, named):
            finish(valkey, sent.request_id)
        wait_for(lambda: Receipt.objects.count() == 3)
    assert (plain.adapters, styled.adapters) == ((), ((poet.digest, 0.5),))
    assert named.adapters == ((poet.digest, 1.0),)
    texts = [text_of(events(valkey, sent.request_id)) for sent in (plain, styled, named)]
    assert len(set(texts)) == 3
    assert Receipt.objects.get(pk=styled.request_id).adapters == [["poet", 0.5]]
    assert Receipt.objects.get(pk=plain.request_id).adapters == []


def test_a_request_that_says_nothing_has_the_tenants_default_and_an_empty_list_has_none(cast: Any, make: Any) -> None:
    poet = make("poet", cast.alice, cast.bob)
    alice, bob = principal_of(cast.alice), principal_of(cast.bob)
    granting.set_default_vector(alice, registry.resolve("small", alice), [("poet", 0.25)])
    assert admitted(alice).ticket.adapters == ((poet.digest, 0.25),)
    assert admitted(alice, adapters=()).ticket.adapters == ()
    assert admitted(alice, adapters=(("poet", 0.0),)).ticket.adapters == ()
    assert admitted(bob).ticket.adapters == ()


def test_charlie_gets_no_adapter_of_alice_by_any_name(cast: Any, make: Any) -> None:
    make("poet", cast.alice)
    charlie = principal_of(cast.charlie)
    assert refused(charlie, adapters=(("poet", 1.0),)).code == "adapter_not_found"
    assert refused(charlie, adapters=((0, 1.0),)).code == "adapter_not_found"
    assert refused(charlie, model="small:poet").code == "model_not_found"


def test_an_adapter_in_the_name_and_another_in_the_list_add_up(cast: Any, make: Any) -> None:
    poet, clerk = make("poet", cast.alice), make("clerk", cast.alice)
    alice = principal_of(cast.alice)
    sent = admitted(alice, model="small:poet", adapters=(("clerk", 0.5),)).ticket
    assert sent.adapters == ((clerk.digest, 0.5), (poet.digest, 1.0))
    assert sent.adapter_names == ("clerk", "poet")
    assert refused(alice, model="small:poet", adapters=(("poet", 0.5),)).code == "validation_error"


def test_a_kept_answer_is_for_its_own_vector_alone(cast: Any, make: Any, valkey: Any) -> None:
    make("poet", cast.alice)
    alice = principal_of(cast.alice)
    scaled = {"adapters": (("poet", 0.5),), "use_cache": True}
    with worker(valkey, threads=1, load=fake_load(supports_adapters=True)):
        first = admitted(alice, **scaled).ticket
        finish(valkey, first.request_id)
    again = admit(alice, order(**scaled), request_id=new_id(), route="/v1/generate")
    assert isinstance(again, CachedAnswer)
    assert Receipt.objects.get(pk=again.request_id).adapters == [["poet", 0.5]]
    for other in ((("poet", 0.6),), ()):
        assert admitted(alice, adapters=other, use_cache=True).ticket.cache_key != first.cache_key


def test_a_worker_loads_what_is_registered_and_unloads_what_is_not(cast: Any, make: Any, valkey: Any) -> None:
    poet, alice = make("poet", cast.alice), principal_of(cast.alice)
    with worker(valkey, threads=1, load=fake_load(supports_adapters=True)) as host:
        (hosted,) = host._all_models()
        assert hosted.runner().adapters == {poet.digest}
        clerk = make("clerk", cast.alice)  # after the worker has looked: loaded when it is asked for
        sent = admitted(alice, adapters=(("clerk", 1.0),)).ticket
        assert finish(valkey, sent.request_id)["error"] is None
        assert hosted.runner().adapters == {poet.digest, clerk.digest}
        adapter_rows.remove([poet.pk])
        host.follow_registry()
        assert hosted.runner().adapters == {clerk.digest}
        assert hosted.report()["adapters"] == 1


def test_an_adapter_that_is_removed_before_its_turn_costs_nothing(cast: Any, make: Any, valkey: Any) -> None:
    poet, alice = make("poet", cast.alice), principal_of(cast.alice)
    sent = admitted(alice, adapters=(("poet", 1.0),)).ticket
    adapter_rows.remove([poet.pk])
    with worker(valkey, threads=1, load=fake_load(supports_adapters=True)):
        assert finish(valkey, sent.request_id)["error"] == "adapter_not_loaded"
        wait_for(lambda: Receipt.objects.exists())
    assert Receipt.objects.get().charged_tokens == 0


def test_a_broken_file_fails_its_requests_and_leaves_the_worker_alive(cast: Any, make: Any, valkey: Any) -> None:
    broken, alice = make("broken", cast.alice), principal_of(cast.alice)
    Path(broken.path).write_bytes(b"")
    with worker(valkey, threads=1, load=fake_load(supports_adapters=True)):
        sent = admitted(alice, adapters=(("broken", 1.0),)).ticket
        assert finish(valkey, sent.request_id)["error"] == "adapter_file_invalid"
        sent = admitted(alice).ticket
        assert finish(valkey, sent.request_id)["error"] is None


def test_a_reader_of_adapters_that_breaks_ends_the_request_and_its_model_is_loaded_anew(
    cast: Any, make: Any, valkey: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("poet", cast.alice)
    alice = principal_of(cast.alice)

    class Breaking(FakeBackend):
        def load_adapter(self, digest: str, path: object) -> None:
            raise ValueError("a file that was cut while it was read")

    def load(served: Any) -> FakeBackend:
        return Breaking(served.n_slots, served.n_ctx, supports_adapters=True)

    monkeypatch.setattr(adapter_shelf, "MAX_AHEAD", 0)
    with worker(valkey, threads=1, load=load) as host:
        sent = admitted(alice, adapters=(("poet", 0.5),)).ticket
        last = finish(valkey, sent.request_id)
        wait_for(lambda: not host._live)
        assert (last["reason"], last["error"]) == ("error", "engine_crashed")
        assert [model.num_busy for model in host._all_models()] == [0]
        wait_for(lambda: not valkey.exists("settlements"))
    assert Receipt.objects.get().status == "failed"


def test_a_thread_that_looked_an_adapter_up_keeps_no_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[bool] = []
    monkeypatch.setattr(adapter_shelf, "connection", SimpleNamespace(close=lambda: closed.append(True)))
    file = tmp_path / "poet.gguf"
    file.write_bytes(b"poet")
    shelf = AdapterShelf(lambda: [AdapterFile(id=1, name="poet", digest="poet", path=file, size_bytes=4, rank=8)])
    runner = EngineRunner(FakeBackend(1, 64, supports_adapters=True), sink=EventLog())
    runner.start()
    for name in ("first", "second"):
        shelf.submit(runner, make_request(name, adapters=(("poet", 1.0),)))
    runner.stop()
    assert closed == [True]  # the second found it loaded


def test_the_adapter_used_longest_ago_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_shelf, "MAX_LOADED", 2)
    monkeypatch.setattr(adapter_shelf, "MAX_AHEAD", 0)
    path = tmp_path / "adapter.gguf"
    path.write_text("adapter")
    files = [
        AdapterFile(id=number, name=name, digest=name, path=path, size_bytes=1, rank=8)
        for number, name in enumerate("abcd")
    ]
    log = EventLog()
    runner = EngineRunner(FakeBackend(2, 64, supports_adapters=True), sink=log)
    shelf = AdapterShelf(lambda: files)
    runner.start()
    try:
        for number, name in enumerate("abacd"):
            shelf.submit(runner, make_request(f"r{number}", adapters=((name, 1.0),)))
            log.wait_finished(f"r{number}")
        assert runner.adapters == {"c", "d"}
        with pytest.raises(EngineError) as caught:
            shelf.submit(runner, make_request("e", adapters=(("e", 1.0),)))
        assert caught.value.code == "adapter_not_loaded"
    finally:
        runner.stop()

"""Models come and go: a fake engine, real Valkey, a real database."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from prometheus_client import REGISTRY

from accounts.models import QuotaPeriod
from accounts.trail.refusals import Refusal
from inference.catalog import model_rows, registry
from inference.catalog import served as served_module
from inference.catalog.model_memory import MemoryEstimate
from inference.catalog.served import Served
from inference.engine.fake_backend import FakeBackend
from inference.engine.runner import EngineRunner
from inference.engine.types import EngineError
from inference.models import ServedModel
from inference.transport import doorbell, model_orders
from inference.transport.queue import Mark, ticket_queue
from inference.worker import hosted, memory, model_keeper
from inference.worker import worker as worker_module
from inference.worker.hosted import HostedModel, State
from inference.worker.worker import WorkerHost
from tests.inference.flow import admitted, fake_load, finish, principal_of, register, wait_for, worker
from tests.timing import PATIENCE_SECONDS, Stopwatch

pytestmark = [pytest.mark.integration, pytest.mark.django_db(transaction=True)]

MEGABYTES = 10**6
ONE = 100 * MEGABYTES
"""What each model of these tests needs."""


@pytest.fixture(autouse=True)
def bell(monkeypatch: pytest.MonkeyPatch, valkey: Any) -> list[str]:
    rung: list[str] = []
    monkeypatch.setattr(doorbell, "ring", lambda pool: rung.append(pool) or True)
    return rung


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(served_module, "memory_of", lambda row, variant=None: MemoryEstimate(ONE, 0, 0))


@pytest.fixture
def alice(cast: Any) -> Any:
    return principal_of(cast.alice, tokens_per_minute=None, concurrent_requests=None)


def models_of(host: WorkerHost) -> dict[str, HostedModel]:
    return {model.served.name: model for model in host._all_models()}


def states_of(host: WorkerHost) -> dict[str, str]:
    return {name: model.state.value for name, model in models_of(host).items()}


def register_lazy(*names: str, **options: Any) -> list[ServedModel]:
    return [register(name, is_default=name == names[0], load_mode="lazy", **options) for name in names]


def ask(client: Any, principal: Any, model: str, **order: Any) -> dict[str, Any]:
    return finish(client, admitted(principal, model=model, **order).ticket.request_id, 20.0)


def served(name: str) -> Served:
    return next(each for each in registry.every() if each.name == name)


def metric(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


# One budget, several models


def test_two_models_with_room_for_one_answer_fifty_alternating_requests_of_four_clients(
    alice: Any, valkey: Any
) -> None:
    register_lazy("one", "two")
    most: list[int] = []
    with worker(valkey, threads=8, load=fake_load(0.002), budget_bytes=1.5 * ONE) as host:

        def client(number: int) -> list[str]:
            reasons = []
            for turn in range(12 + (number < 2)):
                reasons.append(ask(valkey, alice, ("one", "two")[(number + turn) % 2], max_tokens=4)["reason"])
                most.append(host._keeper.used_bytes)
            return reasons

        with ThreadPoolExecutor(4) as pool:
            answers = [reason for part in pool.map(client, range(4)) for reason in part]
    assert answers == ["length"] * 50
    assert max(most) == ONE


def test_the_least_recently_used_model_goes_and_is_loaded_again_when_asked(alice: Any, valkey: Any) -> None:
    register_lazy("one", "two", "three")
    before = metric("llm_model_unloads_total", model_id="two", reason="memory")
    with worker(valkey, threads=2, budget_bytes=2 * ONE) as host:
        for name in ("one", "two", "one", "three"):
            assert ask(valkey, alice, name)["reason"] == "length"
        assert states_of(host) == {"one": "ready", "two": "unloaded", "three": "ready"}
        assert ask(valkey, alice, "two")["reason"] == "length"
        assert states_of(host)["one"] == "unloaded"
    assert metric("llm_model_unloads_total", model_id="two", reason="memory") == before + 1


def test_no_busy_model_is_unloaded_for_another_and_the_other_waits_for_its_end(
    alice: Any, valkey: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_lazy("long", "short")
    monkeypatch.setattr("inference.worker.residency.MIN_PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(model_keeper, "ELSEWHERE_SECONDS", 0.05)
    monkeypatch.setattr(hosted, "LOAD_OVERHEAD_SECONDS", 0.0)
    with worker(valkey, threads=4, load=fake_load(0.01), budget_bytes=ONE) as host:
        long = admitted(alice, model="long", max_tokens=200).ticket
        wait_for(lambda: host._live)
        short = admitted(alice, model="short", max_tokens=4).ticket
        wait_for(lambda: models_of(host)["long"].state is State.RETIRING)
        assert models_of(host)["short"].is_waiting
        later = admitted(alice, model="long", max_tokens=4).ticket
        last = finish(valkey, long.request_id)
        assert (last["reason"], last["receipt"]["completion_tokens"]) == ("length", 200)
        assert finish(valkey, short.request_id)["reason"] == "length"
        assert finish(valkey, later.request_id)["reason"] == "length"


def test_a_model_that_can_never_fit_is_refused_at_once_and_free_of_charge(alice: Any, valkey: Any) -> None:
    register_lazy("large")
    with worker(valkey, threads=1, budget_bytes=ONE - 1) as host:
        last = ask(valkey, alice, "large")
        assert (last["reason"], last["error"]) == ("error", "model_does_not_fit")
        report = models_of(host)["large"].report()
        assert report["state"] == "failed"
        assert "needs 100 MB, and models may have 100 MB (MODEL_MEMORY_MB)" in report["error"]
        wait_for(lambda: not valkey.exists("settlements"))
    row = QuotaPeriod.objects.get(tenant_id=alice.tenant_id, key=None)
    assert (row.used_tokens, row.reserved_tokens) == (0, 0)


def test_a_pinned_model_stays_and_who_needs_its_place_is_told(alice: Any, valkey: Any) -> None:
    first, _ = register_lazy("one", "two", keep_alive_seconds=0)
    model_rows.pin([first.pk], True)
    with worker(valkey, threads=1, budget_bytes=1.5 * ONE) as host:
        assert ask(valkey, alice, "one")["reason"] == "length"
        assert ask(valkey, alice, "two")["error"] == "model_does_not_fit"
        assert states_of(host)["one"] == "ready"
        model_rows.pin([first.pk], False)
        registry.forget()
        host.follow_registry()
        assert ask(valkey, alice, "two")["reason"] == "length"


def test_eager_models_fill_the_memory_in_order_and_the_rest_is_loaded_on_request(alice: Any, valkey: Any) -> None:
    register("one")
    register("two", is_default=False)
    with worker(valkey, threads=1, budget_bytes=ONE) as host:
        assert sorted(states_of(host).values()) == ["ready", "unloaded"]
        for name in ("one", "two", "one"):
            assert ask(valkey, alice, name)["reason"] == "length"


def test_a_model_that_is_switched_off_is_not_served_and_not_loaded(alice: Any, valkey: Any) -> None:
    register("one", load_mode="off")
    with worker(valkey, threads=1) as host:
        assert host._all_models() == []
        with pytest.raises(Refusal, match="switched off"):
            admitted(alice, model="one")
        with pytest.raises(Refusal, match="switched off"):
            model_orders.load(served("one"))


# How long it stays


def test_an_idle_model_goes_after_its_time_and_an_eager_one_stays(
    alice: Any, valkey: Any, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings.CONFIG, "model_idle_timeout_seconds", 1)
    register("eager")
    register("lazy", is_default=False, load_mode="lazy")
    with worker(valkey, threads=1) as host:
        assert ask(valkey, alice, "lazy")["reason"] == "length"
        assert states_of(host) == {"eager": "ready", "lazy": "ready"}
        wait_for(lambda: states_of(host) == {"eager": "ready", "lazy": "unloaded"})


@pytest.mark.parametrize(("asked", "goes"), [(0.0, True), (None, False), (3600.0, False)])
def test_a_request_shortens_the_stay_and_never_lengthens_it(
    alice: Any, valkey: Any, asked: float | None, goes: bool
) -> None:
    register_lazy("one", keep_alive_seconds=60)
    with worker(valkey, threads=1) as host:
        ask(valkey, alice, "one", keep_alive_seconds=asked)
        (model,) = host._all_models()
        if goes:
            wait_for(lambda: model.state is State.UNLOADED)
        else:
            wait_for(model.is_idle)
            assert 50 < model.unload_at - time.monotonic() <= 60


def test_one_tenants_short_stay_does_not_end_anothers(alice: Any, cast: Any, valkey: Any) -> None:
    register_lazy("one", keep_alive_seconds=60)
    with worker(valkey, threads=1) as host:
        ask(valkey, principal_of(cast.bob), "one")
        ask(valkey, alice, "one", keep_alive_seconds=0.0)
        (model,) = host._all_models()
        wait_for(model.is_idle)
        host.follow_registry()
        assert model.state is State.READY


def test_a_tenant_without_a_queue_may_wait_for_a_load_and_for_nothing_else(cast: Any, valkey: Any) -> None:
    register_lazy("one", n_slots=1)
    alice = principal_of(cast.alice, queue_length=0, concurrent_requests=None)
    with pytest.raises(Refusal, match="wait already"):
        admitted(alice, model="one")
    with worker(valkey, threads=2, load=fake_load(0.01)) as host:
        sent = admitted(alice, model="one", max_tokens=240).ticket
        wait_for(lambda: host._live)
        wait_for(lambda: host.queue.num_waiting("default") == 0)
        wait_for(lambda: valkey.hget("slots:default", host.worker_id) == b"1")
        with pytest.raises(Refusal, match="wait already"):
            admitted(alice, model="one")
        assert finish(valkey, sent.request_id)["reason"] == "length"


# What goes wrong


def test_a_load_that_fails_ends_its_requests_with_the_reason_and_is_tried_again_later(
    alice: Any, valkey: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_lazy("one", "two")
    is_broken = threading.Event()
    is_broken.set()

    def load(model: Any) -> FakeBackend:
        if model.name == "one" and is_broken.is_set():
            raise EngineError("model_file_missing", "there is no file")
        return FakeBackend(model.n_slots, model.n_ctx)

    before = metric("llm_model_loads_total", model_id="one", outcome="failed")
    with worker(valkey, threads=2, load=load) as host:
        tickets = [admitted(alice, model="one").ticket for _ in range(3)]
        assert {finish(valkey, each.request_id)["error"] for each in tickets} == {"llm_unavailable"}
        assert "there is no file" in models_of(host)["one"].error
        assert ask(valkey, alice, "two")["reason"] == "length"
        is_broken.clear()
        monkeypatch.setattr(hosted, "RETRY_SECONDS", 0.0)  # as if they had passed
        assert ask(valkey, alice, "one")["reason"] == "length"
    assert metric("llm_model_loads_total", model_id="one", outcome="failed") == before + 1


def test_an_unload_that_fails_is_told_and_the_worker_goes_on(
    alice: Any, valkey: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_lazy("one", "two")
    monkeypatch.setattr(hosted, "RETRY_SECONDS", 0.2)
    stop = EngineRunner.stop

    def failing(self: EngineRunner, error: str = "worker_stopping") -> None:
        stop(self, error)
        monkeypatch.setattr(EngineRunner, "stop", stop)
        raise RuntimeError("the driver is gone")

    with worker(valkey, threads=2, budget_bytes=ONE) as host:
        ask(valkey, alice, "one")
        monkeypatch.setattr(EngineRunner, "stop", failing)
        assert ask(valkey, alice, "two")["reason"] == "length"
        report = models_of(host)["one"].report()
        assert report["state"] == "failed"
        assert "could not be unloaded: RuntimeError('the driver is gone')" in report["error"]
        time.sleep(0.2)
        assert ask(valkey, alice, "one")["reason"] == "length"


def test_a_model_that_is_replaced_while_the_keeper_looks_is_not_loaded_in_the_place_of_its_successor(
    alice: Any, valkey: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = register(n_ctx=256)
    with worker(valkey) as host:
        (old,) = host._all_models()
        ServedModel.objects.filter(pk=row.pk).update(n_ctx=64)
        registry.forget()
        waiting, is_first = host.queue.waiting, [True]

        def replaced_meanwhile(*arguments: Any) -> Any:
            if is_first and is_first.pop():
                host._compare_all()
            return waiting(*arguments)

        monkeypatch.setattr(host.queue, "waiting", replaced_meanwhile)
        host._keeper.look()
        wait_for(lambda: [(each.served.n_ctx, each.state) for each in host._all_models()] == [(64, State.READY)])
        assert not old.is_in_memory


def test_a_slow_load_holds_up_no_other_model_and_can_be_cancelled_meanwhile(alice: Any, valkey: Any) -> None:
    register_lazy("quick", "slow")
    gate = threading.Event()

    def load(model: Any) -> FakeBackend:
        if model.name == "slow":
            gate.wait(PATIENCE_SECONDS)
        return FakeBackend(model.n_slots, model.n_ctx)

    with worker(valkey, threads=4, load=load) as host:
        ask(valkey, alice, "quick")
        slow = [admitted(alice, model="slow").ticket for _ in range(2)]
        wait_for(lambda: states_of(host)["slow"] == "loading")
        assert ask(valkey, alice, "quick")["reason"] == "length"
        assert ticket_queue().state(slow[0].request_id).state == "waiting"  # type: ignore[union-attr]
        assert worker_module.TicketQueue(valkey).cancel(slow[1].request_id)[0] == "waiting"
        gate.set()
        assert finish(valkey, slow[0].request_id)["reason"] == "length"


def test_who_stops_gives_up_a_load_and_ends_what_waits_for_it(
    alice: Any, valkey: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the progress that llama.cpp reports; the requests are told to come back."""
    register_lazy("slow")
    started = threading.Event()

    def load_backend(model: Any, progress: Any) -> FakeBackend:
        while True:
            progress(0.5)
            started.set()
            time.sleep(0.01)

    monkeypatch.setattr(hosted, "load_backend", load_backend)
    host = WorkerHost("default", client=valkey)
    host.start()
    try:
        sent = admitted(alice, model="slow").ticket
        host.serve()
        assert started.wait(PATIENCE_SECONDS)
        (model,) = host._all_models()
        assert (model.report()["state"], model.report()["progress"]) == ("loading", 0.5)
        watch = Stopwatch()
    finally:
        host.stop(1.0)
    assert watch.seconds() < 5
    assert finish(valkey, sent.request_id)["error"] == "worker_stopping"


# Several workers


def test_one_of_two_workers_loads_a_model_and_serves_it(alice: Any, valkey: Any) -> None:
    register_lazy("one")
    with worker(valkey, threads=2) as first, worker(valkey, threads=2) as second:
        tickets = [admitted(alice, model="one").ticket for _ in range(12)]
        for sent in tickets:
            assert finish(valkey, sent.request_id)["reason"] == "length"
        assert sorted([*states_of(first).values(), *states_of(second).values()]) == ["ready", "unloaded"]


def test_the_worker_that_has_room_loads_what_the_other_cannot(alice: Any, valkey: Any) -> None:
    register_lazy("one")
    with (
        worker(valkey, threads=2, budget_bytes=ONE - 1) as small,
        worker(valkey, threads=2, budget_bytes=ONE) as large,
    ):
        for _ in range(3):
            assert ask(valkey, alice, "one")["reason"] == "length"
        assert states_of(large) == {"one": "ready"}
        assert states_of(small)["one"] != "ready"


def test_a_worker_that_died_holds_nothing(alice: Any, valkey: Any) -> None:
    (row,) = register_lazy("one")
    queue = ticket_queue()
    admitted(alice, model="one")
    queue.beat("dead", "default", 0, {})
    assert queue.waiting("default", "dead", {row.pk: Mark.ABLE})[row.pk].is_mine
    assert not queue.waiting("default", "other", {row.pk: Mark.ABLE})[row.pk].is_mine
    queue.beat("dead", "default", 0, {}, ttl_seconds=0.01)
    time.sleep(0.05)
    found = queue.waiting("default", "other", {row.pk: Mark.ABLE})[row.pk]
    assert (found.number, found.is_mine, found.is_hopeless) == (1, True, False)


def test_a_request_is_hopeless_where_no_living_worker_can_load_its_model(alice: Any, valkey: Any) -> None:
    (row,) = register_lazy("one")
    queue = ticket_queue()
    admitted(alice, model="one")
    queue.beat("one", "default", 0, {})
    queue.beat("two", "default", 0, {})
    assert not queue.waiting("default", "one", {row.pk: Mark.UNABLE})[row.pk].is_hopeless
    assert queue.waiting("default", "two", {row.pk: Mark.UNABLE})[row.pk].is_hopeless
    assert not queue.waiting("default", "two", {row.pk: Mark.LATER})[row.pk].is_mine
    assert not queue.waiting("default", "one", {row.pk: Mark.UNABLE})[row.pk].is_hopeless


def test_without_redis_nothing_is_unloaded_that_somebody_might_wait_for(
    alice: Any, valkey: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import redis

    register_lazy("one", keep_alive_seconds=60)

    def away(*_: Any) -> Any:
        raise redis.ConnectionError("away")

    with worker(valkey, threads=1) as host:
        ask(valkey, alice, "one")
        (model,) = host._all_models()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(host._keeper._queue, "waiting", away)
            host.follow_registry()
            model._plain_use_at -= 100
            host.follow_registry()
            assert model.state is State.READY
        host.follow_registry()
        assert model.state is State.UNLOADED


# The operator's word


def test_an_operator_loads_and_unloads_by_order(valkey: Any) -> None:
    register_lazy("one")
    with worker(valkey) as host:
        wait_for(lambda: valkey.pubsub_numsub(model_orders.channel_of(host.worker_id))[0][1])
        assert model_orders.load(served("one"))
        wait_for(lambda: states_of(host) == {"one": "ready"})
        wait_for(lambda: not model_orders.load(served("one")))
        assert model_orders.unload(served("one")) == 1
        wait_for(lambda: states_of(host) == {"one": "unloaded"})
        wait_for(lambda: model_orders.unload(served("one")) == 0)


def run(command: str, *arguments: str) -> Any:
    output = io.StringIO()
    call_command(command, *arguments, "--json", stdout=output)
    return json.loads(output.getvalue().splitlines()[-1])


def test_commands_load_and_wait_and_unload(valkey: Any, cast: Any) -> None:
    def load(model: Any) -> FakeBackend:
        if model.name == "broken":
            raise EngineError("model_file_missing", "there is no file")
        return FakeBackend(model.n_slots, model.n_ctx)

    register_lazy("one", "broken")
    with worker(valkey, load=load) as host:
        wait_for(lambda: valkey.pubsub_numsub(model_orders.channel_of(host.worker_id))[0][1])
        assert run("load_model", "one") == {"model": "one", "already_loaded": False, "state": "ready"}
        assert run("load_model", "one")["already_loaded"]
        assert run("unload_model", "one") == {"model": "one", "num_workers": 1}
        with pytest.raises(CommandError, match="there is no file"):
            call_command("load_model", "broken")
        wait_for(lambda: states_of(host) == {"one": "unloaded", "broken": "failed"})


def test_an_order_without_a_worker_is_refused(valkey: Any, cast: Any) -> None:
    register_lazy("one")
    with pytest.raises(Refusal, match="No worker"):
        model_orders.load(served("one"))
    assert model_orders.unload(served("one")) == 0


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"action": "burn", "model_id": 1}', b'{"action": "load"}'])
def test_orders_that_nobody_wrote_are_dropped(cast: Any, valkey: Any, data: bytes) -> None:
    register_lazy("one")
    with worker(valkey) as host:
        host._take_model_order(data)
        host._take_model_order(model_orders.ModelOrder(action="load", model_id=10**6).to_bytes())
        host.follow_registry()
        assert states_of(host) == {"one": "unloaded"}


# Memory of the machine


def test_the_budget_is_the_setting_or_most_of_what_the_process_may_have(
    settings: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(settings.CONFIG, "model_memory_mb", 300)
    assert memory.budget_of_machine() == 300e6
    monkeypatch.setattr(settings.CONFIG, "model_memory_mb", 0)
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "CGROUP_LIMITS", (str(limit), str(tmp_path / "none")))
    limit.write_text("max\n")
    assert memory.budget_of_machine() == pytest.approx(0.9 * memory._total_bytes())
    limit.write_text("1000000\n")
    assert memory.budget_of_machine() == pytest.approx(900_000)


def test_the_state_of_a_model_is_that_of_the_worker_nearest_to_serving(valkey: Any, cast: Any) -> None:
    register_lazy("one")
    model = HostedModel(served("one"), load=fake_load(), sink=lambda _: None)
    report = model.report()
    queue = ticket_queue()
    assert model_orders.state_of(served("one"), []).state == "missing"
    queue.beat("a", "default", 0, {"models": [{**report, "state": "failed", "error": "broken", "is_waiting": False}]})
    queue.beat("b", "default", 0, {"models": [{**report, "state": "loading", "progress": 0.25}]})
    found = model_orders.state_of(served("one"), queue.workers())
    assert (found.state, found.progress, found.would_serve) == ("loading", 0.25, True)
    queue.beat("b", "default", 0, {"models": [{**report, "is_waiting": True}]})
    assert model_orders.state_of(served("one"), queue.workers()).state == "waiting"
    other = replace(served("one"), pool="other")
    assert model_orders.state_of(other, queue.workers()).state == "missing"


@pytest.fixture(autouse=True)
def _forget(db: Any) -> Iterator[None]:
    yield
    registry.forget()

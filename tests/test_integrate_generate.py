"""From end to end: HTTP, admission, queue, worker, engine, stream, settlement, cache, receipt."""

from __future__ import annotations

import itertools
import math
import os
import random
import socket
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import orjson
import pytest

from tests.conftest import make_customer
from tests.in_process import (
    MODEL,
    Client,
    FakeSpeed,
    InProcessSite,
    leave_after,
    post_bytes,
    read_events,
    wait_until,
)
from tests.timing import PATIENCE_SECONDS, Stopwatch

pytestmark = [pytest.mark.api, pytest.mark.integration]


@pytest.fixture
def slow_site(site: InProcessSite, fake_speed: FakeSpeed) -> InProcessSite:
    """A model that takes 20 ms a step and never ends by itself."""
    fake_speed.seconds_per_step = 0.02
    site.stop_worker()
    site.start_worker()
    return site


# The completion cache


def test_the_same_request_is_answered_from_the_cache(site: InProcessSite) -> None:
    client = site.client(site.cast.alice)
    first = client.generate("the same prompt", temperature=0.9)
    second = client.generate("the same prompt", temperature=0.9)
    assert (first.json()["cached"], second.json()["cached"]) == (False, True)
    assert first.json()["output"] == second.json()["output"]
    assert second.headers["x-cache"] == "hit"
    assert second.headers["x-usage-total-tokens"] == first.headers["x-usage-total-tokens"]


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.1},
        {"max_new_tokens": 9},
        {"top_p": 0.5},
        {"top_k": 3},
        {"stop": ["zz"]},
        {"seed": 5},
        {"prompt": "another prompt"},
        {"cache": False},
    ],
)
def test_another_parameter_is_another_answer(site: InProcessSite, change: dict[str, Any]) -> None:
    client = site.client(site.cast.alice)
    client.generate("a prompt")
    assert client.generate(**{"prompt": "a prompt", **change}).json()["cached"] is False


def test_without_the_cache_nothing_is_kept(site: InProcessSite) -> None:
    client = site.client(site.cast.alice)
    client.generate("a prompt", cache=False)
    assert client.generate("a prompt").json()["cached"] is False


def test_one_tenant_never_gets_what_another_cached(site: InProcessSite) -> None:
    site.client(site.cast.alice).generate("shared words")
    assert site.client(site.cast.bob).generate("shared words").json()["cached"] is False


def test_a_cached_answer_costs_a_request_and_no_tokens(site: InProcessSite) -> None:
    client = site.client(site.cast.alice)
    tokens = int(client.generate("words").headers["x-usage-total-tokens"])
    client.generate("words")
    assert site.charged(site.cast.alice) == (tokens, 0)
    assert client.get("/v1/me/usage").json()["total_requests"] == 2


# Receipts and running requests


def test_a_receipt_can_be_read_right_after_the_answer(site: InProcessSite) -> None:
    client = site.client(site.cast.alice)
    reply = client.generate("one two three", max_new_tokens=5)
    receipt = client.get(f"/v1/requests/{reply.headers['x-request-id']}").json()
    assert receipt["status"] == "completed"
    assert receipt["model"] == MODEL
    assert receipt["finish_reason"] == "length"
    assert receipt["usage"] == {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
    assert receipt["receipt"]["charged_tokens"] == 8
    assert receipt["receipt"]["num_steps"] >= 5


def test_a_running_request_can_be_seen_and_cancelled(slow_site: InProcessSite) -> None:
    client = slow_site.client(slow_site.cast.alice)
    with client.stream(
        "POST", "/v1/generate", json={"prompt": "go on", "max_new_tokens": 200, "stream": True}
    ) as response:
        request_id = response.headers["x-request-id"]
        other = slow_site.client(slow_site.cast.alice)
        assert other.get(f"/v1/requests/{request_id}").json()["status"] == "running"
        assert other.post(f"/v1/requests/{request_id}/cancel").json() == {"id": request_id, "status": "cancelling"}
        last = list(read_events(response))[-1]
    assert last[0] == "finished"
    assert last[1]["finish_reason"] == "cancelled"
    tokens = last[1]["usage"]["total_tokens"]
    assert 2 < tokens < 200
    assert slow_site.charged(slow_site.cast.alice) == (tokens, 0)
    assert other.post(f"/v1/requests/{request_id}/cancel").json()["status"] in {"cancelled", "done"}


def test_a_request_that_waits_has_a_position(slow_site: InProcessSite) -> None:
    client = slow_site.client(slow_site.cast.alice)
    slow_site.stop_worker()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.generate, "patience", max_new_tokens=2)
        from inference.transport.queue import ticket_queue

        wait_until(lambda: ticket_queue().num_waiting("default") == 1)
        (request_id,) = ticket_queue().live_requests(tenant_id=slow_site.cast.alice.tenant.pk)
        state = slow_site.client(slow_site.cast.alice).get(f"/v1/requests/{request_id}").json()
        assert (state["status"], state["position"]) == ("waiting", 0)
        assert slow_site.client(slow_site.cast.alice).post(f"/v1/requests/{request_id}/cancel").status_code == 200
        refused = waiting.result()
    assert (refused.status_code, refused.json()["code"]) == (409, "request_cancelled")
    assert refused.headers["x-should-retry"] == "false"
    assert slow_site.charged(slow_site.cast.alice) == (0, 0)


def test_requests_at_once_are_decoded_in_one_batch(slow_site: InProcessSite) -> None:
    from inference.transport.queue import ticket_queue

    client = slow_site.client(slow_site.cast.alice)
    slow_site.stop_worker()
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(client.generate, f"p{number}", max_new_tokens=30) for number in range(4)]
        wait_until(lambda: ticket_queue().num_waiting("default") == 4)
        slow_site.start_worker()
        replies = [each.result() for each in asked]
    slow_site.settle()
    receipts = [client.get(f"/v1/requests/{reply.headers['x-request-id']}").json()["receipt"] for reply in replies]
    assert all(receipt["mean_batch_size"] > 2 for receipt in receipts)


def test_more_requests_than_slots_wait_and_are_all_answered(slow_site: InProcessSite) -> None:
    client = slow_site.client(slow_site.cast.alice)
    with ThreadPoolExecutor(12) as pool:
        replies = list(pool.map(lambda number: client.generate(f"p{number}", max_new_tokens=3), range(12)))
    assert {reply.status_code for reply in replies} == {200}


# Clients that go


@pytest.mark.parametrize("stream", [True, False])
def test_a_closed_connection_frees_its_slot(slow_site: InProcessSite, stream: bool) -> None:
    body = {"prompt": "go on", "max_new_tokens": 200, "stream": stream}
    key = slow_site.cast.alice.text

    def has_text() -> bool:
        """What goes before its first step is free."""
        return any(live.first_text_at for live in list(slow_site.host._live.values()))

    leave_after(slow_site, key, body, lambda: wait_until(has_text))
    watch = Stopwatch()
    wait_until(lambda: slow_site.num_running() == 0)
    assert watch.seconds() < 0.25
    wait_until(lambda: slow_site.charged(slow_site.cast.alice)[1] == 0)  # its last event is under way
    used, _ = slow_site.charged(slow_site.cast.alice)
    assert 2 <= used < 150


CUTS = int(os.environ.get("STREAM_CUTS", "16"))


@pytest.mark.timeout(120 + 3 * CUTS)
def test_streams_that_are_cut_anywhere_pay_what_the_engine_computed_and_leave_nothing(
    slow_site: InProcessSite, valkey_connection: Any
) -> None:
    """R3, and R24: of a hundred clients that go, 99 slots are free within 250 ms."""
    from inference.models import Receipt

    draw, waits, seen = random.Random(3), [], {}
    alice = slow_site.cast.alice
    for _ in range(CUTS):
        num_events = draw.randrange(1, 30)
        body = {"prompt": "go on and on", "max_new_tokens": 200, "stream": True, "cache": False}
        with slow_site.client(alice).stream("POST", "/v1/generate", json=body) as response:
            request_id = response.headers["x-request-id"]
            found = list(itertools.islice(read_events(response), num_events))
        watch = Stopwatch()
        wait_until(lambda: slow_site.num_running() == 0)
        waits.append(watch.seconds())
        seen[request_id] = sum(len(event["text"].split()) for name, event in found if name == "delta")
    wait_until(lambda: slow_site.charged(alice)[1] == 0)
    receipts = {row.request_id: row for row in Receipt.objects.filter(request_id__in=seen)}
    assert set(receipts) == set(seen)
    for request_id, num_words in seen.items():
        assert 0 < num_words <= receipts[request_id].completion_tokens < 200
        assert receipts[request_id].charged_tokens == 4 + receipts[request_id].completion_tokens
    assert slow_site.charged(alice) == (sum(row.charged_tokens for row in receipts.values()), 0)
    assert not valkey_connection.keys("accounts:places:*")
    slowest = sorted(waits)[math.ceil(len(waits) * 0.99) - 1]
    print(f"{CUTS} cuts; slots free after {statistics.median(waits):.3f} s, {slowest:.3f} s at the 99th percentile")
    assert statistics.median(waits) < 0.25
    assert slowest < (0.25 if CUTS >= 100 else 2.0)  # few are timed by chance, on a machine that does other things, too


def test_a_client_that_goes_while_it_waits_leaves_nothing(slow_site: InProcessSite) -> None:
    from inference.transport.queue import ticket_queue

    slow_site.stop_worker()
    waiting = lambda: ticket_queue().num_waiting("default")  # noqa: E731
    body = {"prompt": "go on", "max_new_tokens": 20}
    leave_after(slow_site, slow_site.cast.alice.text, body, lambda: wait_until(lambda: waiting() == 1))
    wait_until(lambda: waiting() == 0)
    wait_until(lambda: slow_site.charged(slow_site.cast.alice) == (0, 0))


def test_a_client_that_goes_during_admission_leaves_nothing(
    slow_site: InProcessSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    from inference.intake import admission

    entered, go_on, admitted = threading.Event(), threading.Event(), threading.Event()
    admit = admission.admit

    def held(*args: Any, **kwargs: Any) -> Any:
        entered.set()
        go_on.wait(PATIENCE_SECONDS)
        try:
            return admit(*args, **kwargs)
        finally:
            admitted.set()

    monkeypatch.setattr(admission, "admit", held)
    body = {"prompt": "go on", "max_new_tokens": 200}
    leave_after(slow_site, slow_site.cast.alice.text, body, lambda: entered.wait(PATIENCE_SECONDS))
    time.sleep(0.1)
    go_on.set()
    assert admitted.wait(PATIENCE_SECONDS)
    time.sleep(0.1)
    wait_until(lambda: slow_site.num_running() == 0)
    wait_until(lambda: slow_site.charged(slow_site.cast.alice)[1] == 0)
    used, _ = slow_site.charged(slow_site.cast.alice)
    assert used < 60


# Workers that go


def test_a_worker_that_stops_ends_streams_with_an_error(slow_site: InProcessSite) -> None:
    client = slow_site.client(slow_site.cast.alice)
    body = {"prompt": "go on", "max_new_tokens": 250, "stream": True}
    with client.stream("POST", "/v1/generate", json=body) as response:
        events = read_events(response)
        next(events)
        slow_site.stop_worker(drain_seconds=0.1)
        last = list(events)[-1]
    assert last[0] == "error"
    assert last[1]["code"] == "service_unavailable"
    assert last[1]["request_id"] == response.headers["x-request-id"]
    assert slow_site.charged(slow_site.cast.alice) == (0, 0)


# Waiting costs no threads


@pytest.mark.memory
def test_two_hundred_waiting_requests_hold_no_more_than_the_bounded_threads(site: InProcessSite) -> None:
    from django.conf import settings

    from inference.transport.queue import ticket_queue

    warm = site.client(site.cast.alice)  # what a process has one of is there from now on
    assert warm.generate().status_code == warm.get("/healthz").status_code == 200
    used = site.charged(site.cast.alice)
    site.stop_worker()
    key = site.cast.alice.text
    before = {thread.name for thread in threading.enumerate()}
    sockets = []
    for number in range(200):
        content = orjson.dumps({"prompt": f"p{number}", "stream": number % 2 == 0})
        host, port = site.base_url.removeprefix("http://").split(":")
        connection = socket.create_connection((host, int(port)))
        connection.sendall(post_bytes(key, content))
        sockets.append(connection)
    wait_until(lambda: ticket_queue().num_waiting("default") == 200, 2 * PATIENCE_SECONDS)
    new = [thread.name for thread in threading.enumerate() if thread.name not in before]
    admission_threads = [name for name in new if name.startswith("api_")]
    assert len(admission_threads) <= settings.CONFIG.web_threads
    assert len(new) - len(admission_threads) <= 1, new
    for connection in sockets:
        connection.close()
    wait_until(lambda: ticket_queue().num_waiting("default") == 0, 2 * PATIENCE_SECONDS)
    wait_until(lambda: site.charged(site.cast.alice) == used)


# Dependencies that go


def test_redis_down_is_a_503_and_charges_nothing(site: InProcessSite, monkeypatch: pytest.MonkeyPatch) -> None:
    import redis

    from inference.transport import queue

    client = site.client(site.cast.alice)

    def down(*_: Any, **__: Any) -> Any:
        raise redis.ConnectionError("Connection refused")

    monkeypatch.setattr(queue.TicketQueue, "put", down)
    for stream in (False, True):
        reply = client.generate(f"p{stream}", stream=stream)
        assert (reply.status_code, reply.json()["code"]) == (503, "service_unavailable")
        assert int(reply.headers["retry-after"]) >= 1
    monkeypatch.undo()
    assert site.charged(site.cast.alice) == (0, 0)


def test_a_locked_database_is_a_503_and_charges_nothing(site: InProcessSite, monkeypatch: pytest.MonkeyPatch) -> None:
    from django.db import OperationalError

    from inference.intake import admission

    def locked(*_: Any, **__: Any) -> Any:
        raise OperationalError("database is locked")

    with monkeypatch.context() as patch:
        patch.setattr(admission.quotas, "reserve_together", locked)
        reply = site.client(site.cast.alice).generate("p")
    assert (reply.status_code, reply.json()["code"]) == (503, "service_unavailable")
    assert site.charged(site.cast.alice) == (0, 0)


def test_what_nobody_foresaw_is_an_internal_error_without_a_traceback(
    site: InProcessSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    from inference.intake import admission

    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("a secret detail")

    monkeypatch.setattr(admission, "_tokenize", broken)
    reply = site.client(site.cast.alice).generate("p")
    assert (reply.status_code, reply.json()["code"]) == (500, "internal_error")
    assert reply.json()["extra"] == {
        "stage": "admission",
        "path": "/v1/generate",
        "method": "POST",
        "exc_type": "ZeroDivisionError",
    }
    assert "secret" not in reply.text


# Listing


def test_models_are_the_union_of_both_lists(api: Client) -> None:
    reply = api.get("/v1/models").json()
    assert reply["object"] == "list"
    assert {model["id"] for model in reply["data"]} == {model["id"] for model in reply["models"]}
    assert reply["default_model"] in {model["id"] for model in reply["models"]}
    assert reply["deployment_capabilities"]["generate"] is True
    default = next(model for model in reply["models"] if model["default"])
    assert default["loaded"] is True
    assert default["load_mode"] == "eager"


def test_only_granted_models_are_listed(site: InProcessSite) -> None:
    listed = {
        name: {model["id"] for model in site.client(customer).get("/v1/models").json()["data"]}
        for name, customer in (("alice", site.cast.alice), ("bob", site.cast.bob))
    }
    assert listed["alice"] - listed["bob"] == {"granted-model"}


def test_a_tenant_without_anything_still_gets_an_answer(site: InProcessSite) -> None:
    nobody = site.client(make_customer("Nobody's", site.cast.alice.tenant.plan))
    assert nobody.get("/v1/me/usage").json()["quota_used"] == 0

"""/healthz, /readyz, /modelz: which dependency each looks at, and that none of them waits for one."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from django.conf import settings

from tests.in_process import Client, InProcessSite, wait_until
from tests.timing import PATIENCE_SECONDS, Stopwatch

pytestmark = pytest.mark.api


def break_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis refuses connections, for the health checks alone."""
    import redis

    from inference.api import health
    from inference.transport.queue import TicketQueue

    queue = TicketQueue(redis.Redis.from_url("redis://127.0.0.1:1/0", socket_connect_timeout=0.2))
    monkeypatch.setattr(health, "ticket_queue", lambda: queue)


@pytest.mark.parametrize("path", ["/healthz", "/health", "/v1/healthz"])
def test_the_process_lives(api: Client, path: str) -> None:
    reply = api.get(path)
    assert (reply.status_code, reply.json()) == (200, {"status": "ok"})


@pytest.mark.parametrize("path", ["/readyz", "/v1/readyz"])
def test_readiness_names_every_dependency(api: Client, path: str) -> None:
    reply = api.get(path)
    assert reply.status_code == 200
    answer = reply.json()
    assert answer["status"] == "ready"
    assert (answer["db"], answer["redis"], answer["llm"]) == ("ok", "ok", "ok")
    assert answer["model_load_mode"] in {"eager", "lazy"}
    assert answer["model_loaded"] is True
    assert answer["workers"] >= 1


def test_the_model_is_loaded(api: Client) -> None:
    reply = api.get("/modelz")
    assert reply.status_code == 200
    assert reply.json() == {
        "status": "ok",
        "model_load_mode": "eager",
        "model_loaded": True,
        "model_error": None,
        "llm": "ok",
    }


def test_without_a_worker_the_site_is_not_ready(site: InProcessSite) -> None:
    site.stop_worker()
    client = site.client()
    ready, model = client.get("/readyz"), client.get("/modelz")
    assert (ready.status_code, ready.json()["status"], ready.json()["llm"]) == (503, "not ready", "no worker")
    assert (model.status_code, model.json()["model_error"]) == (503, "no worker serves the model's pool")
    assert client.get("/healthz").status_code == 200


def test_readiness_does_not_need_the_model_where_that_is_the_setting(
    site: InProcessSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "CONFIG", settings.CONFIG.model_copy(update={"require_model_ready": False}))
    site.stop_worker()
    reply = site.client().get("/readyz")
    assert (reply.status_code, reply.json()["model_loaded"]) == (200, False)


def test_without_redis_the_site_is_not_ready(site: InProcessSite, monkeypatch: pytest.MonkeyPatch) -> None:
    break_redis(monkeypatch)
    client = site.client()
    watch = Stopwatch()
    ready, model = client.get("/readyz"), client.get("/modelz")
    assert watch.seconds() < 3
    assert (ready.status_code, ready.json()["redis"], ready.json()["db"]) == (503, "error", "ok")
    assert (model.status_code, model.json()["model_error"]) == (503, "Redis does not answer")
    assert client.get("/healthz").status_code == 200


def test_a_database_that_hangs_is_reported_within_the_bound(
    site: InProcessSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    from inference.api import health

    is_back = threading.Event()

    def hang() -> Any:
        is_back.wait(PATIENCE_SECONDS)
        return (None,)

    monkeypatch.setattr(health, "_default_model", hang)
    client = site.client()
    watch = Stopwatch()
    slow, quick = client.get("/readyz"), client.get("/readyz")
    seconds = watch.seconds()
    is_back.set()
    assert seconds < 1.5, "the second question must not wait behind the first"
    for reply in (slow, quick):
        assert (reply.status_code, reply.json()["db"]) == (503, "error")
    wait_until(lambda: all(probe._last is None or probe._last.done() for probe in health._probes()))


def test_whoever_asks_while_another_does_has_the_same_answer(
    site: InProcessSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    from inference.api import health

    ask = health._default_model

    def slowly() -> Any:
        time.sleep(0.3)
        return ask()

    monkeypatch.setattr(health, "_default_model", slowly)
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda _: site.client().get("/readyz"), range(4)))
    assert [(reply.status_code, reply.json()["db"], reply.json()["redis"]) for reply in replies] == [
        (200, "ok", "ok")
    ] * 4


def test_without_a_default_model_the_answer_says_so(site: InProcessSite) -> None:
    from inference.catalog import registry
    from inference.models import ServedModel

    ServedModel.objects.all().update(is_default=False)
    registry.forget()
    reply = site.client().get("/modelz")
    assert (reply.status_code, reply.json()["llm"]) == (503, "no model")
    assert reply.json()["model_error"] == "no default model is registered"


def test_a_model_that_failed_to_load_shows_why(site: InProcessSite, monkeypatch: pytest.MonkeyPatch) -> None:
    from inference.engine import fake_backend

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("the file is gone")

    site.stop_worker()
    monkeypatch.setattr(fake_backend, "FakeBackend", fail)
    site.start_worker()
    client = site.client()
    wait_until(lambda: "the file is gone" in str(client.get("/modelz").json()["model_error"]))
    assert client.get("/readyz").status_code == 503
    refused = site.client(site.cast.alice).generate()
    assert (refused.status_code, refused.json()["code"]) == (503, "llm_unavailable")

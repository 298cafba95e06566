"""/metrics: who may read it, and which names are there."""

from __future__ import annotations

from dataclasses import replace

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.in_process import MODEL, Client, InProcessSite

pytestmark = pytest.mark.api

NAMES = {
    "llm_api_request",
    "llm_api_request_latency_seconds",
    "llm_redis_hits",
    "llm_redis_misses",
    "llm_redis_latency_seconds",
    "llm_redis_enabled",
    "llm_tokens",
}


def value(text: str, sample: str, **labels: str) -> float:
    """Sum of a sample over all series with these labels."""
    return sum(
        found.value
        for family in text_string_to_metric_families(text)
        for found in family.samples
        if found.name == sample and labels.items() <= found.labels.items()
    )


def test_metrics_have_the_documented_names(api: Client) -> None:
    api.generate()
    reply = api.get("/metrics")
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/plain")
    families = {family.name for family in text_string_to_metric_families(reply.text)}
    assert families >= NAMES


def test_requests_are_counted_by_route_model_cache_and_status(site: InProcessSite) -> None:
    client = site.client(site.cast.alice)
    labels = {"route": "/v1/generate", "model_id": MODEL, "cached": "false", "status_code": "200"}
    before = client.get("/metrics").text
    client.generate("first")
    client.events("second")
    client.generate(temperature=77)
    after = client.get("/metrics").text

    def grown(sample: str, **labels: str) -> float:
        return value(after, sample, **labels) - value(before, sample, **labels)

    assert grown("llm_api_request_total", **labels) == 2
    assert grown("llm_api_request_latency_seconds_count", **labels) == 2
    assert grown("llm_api_request_total", route="/v1/generate", status_code="422", model_id="") == 1


def test_what_a_client_makes_up_does_not_become_a_series(site: InProcessSite) -> None:
    client = site.client(site.cast.alice)
    client.generate(model="made-up-by-a-client")
    assert "made-up-by-a-client" not in client.get("/metrics").text


def test_a_latency_histogram_has_buckets_and_a_sum(site: InProcessSite) -> None:
    client = site.client(site.cast.alice)
    client.generate()
    text = client.get("/metrics").text
    assert 'llm_api_request_latency_seconds_bucket{cached="false",le="+Inf",' in text
    assert value(text, "llm_api_request_latency_seconds_sum", route="/v1/generate") > 0


def test_no_prompt_and_no_key_is_in_the_metrics(site: InProcessSite) -> None:
    client = site.client(site.cast.alice)
    client.generate("canary-prompt-text")
    text = client.get("/metrics").text
    assert "canary" not in text
    assert client.key not in text
    assert site.cast.alice.key.public_id not in text


def test_beyond_the_allowed_networks_an_operator_key_is_asked_for(site: InProcessSite) -> None:
    forwarded = {"X-Forwarded-For": "203.0.113.9"}  # whoever forwards for others is no member of the network himself
    with httpx.Client(base_url=site.base_url, headers=forwarded) as client:
        assert client.get("/metrics").status_code == 401
    assert site.client(site.cast.alice).get("/metrics", headers=forwarded).status_code == 403
    assert site.client(site.cast.operator).get("/metrics", headers=forwarded).status_code == 200


def test_llama_cpps_names_are_there_and_count(site: InProcessSite) -> None:
    client = site.client(site.cast.alice)
    client.generate("warm up", max_new_tokens=4)
    site.settle()
    site.host.beat()
    before = client.get("/metrics").text
    client.generate("one two three four", max_new_tokens=40)
    site.settle()
    site.host.beat()
    after = client.get("/metrics").text

    def grown(name: str) -> float:
        return value(after, name, model_id=MODEL) - value(before, name, model_id=MODEL)

    assert grown("llamacpp:prompt_tokens_total") == 4
    assert grown("llamacpp:tokens_predicted_total") == 40
    assert grown("llamacpp:n_decode_total") == 40
    assert grown("llamacpp:prompt_seconds_total") > 0
    assert grown("llamacpp:tokens_predicted_seconds_total") > 0
    assert value(after, "llamacpp:n_busy_slots_per_decode", model_id=MODEL) == 1
    assert value(after, "llamacpp:n_tokens_max", model_id=MODEL) >= 43
    for name in ("prompt_tokens_seconds", "predicted_tokens_seconds"):
        assert value(after, f"llamacpp:{name}", model_id=MODEL) > 0
    families = {family.name for family in text_string_to_metric_families(after)}
    assert families >= {f"llamacpp:{name}" for name in ("requests_processing", "requests_deferred")}


def test_what_drafts_are_weighed_by_is_shown_for_a_bounded_number_of_adapters() -> None:
    from types import SimpleNamespace

    from prometheus_client import generate_latest

    from inference.engine.costs import CostCurve
    from inference.engine.engine import Engine
    from inference.engine.fake_backend import FakeBackend
    from inference.transport.queue import Pulse
    from inference.worker.worker_metrics import MAX_ADAPTER_SETS, EngineMetrics

    chances = {(): 0.5} | {(f"{number:08d}" + "f" * 56, "e" * 64): 0.25 for number in range(MAX_ADAPTER_SETS)}
    stats = replace(
        Engine(FakeBackend(2, 64)).stats(), cost_curve=CostCurve(((1, 0.01), (8, 0.04))), draft_chances=chances
    )
    model = SimpleNamespace(served=SimpleNamespace(name="weighed"), num_slots=2, stats=lambda: stats)
    EngineMetrics().update("default", Pulse({}, frozenset(), 0), [model])  # type: ignore[list-item]
    text = generate_latest().decode()
    assert value(text, "llm_engine_step_seconds", model_id="weighed", tokens="8") == 0.04
    assert value(text, "llm_engine_draft_acceptance", model_id="weighed", adapters="") == 0.5
    assert value(text, "llm_engine_draft_acceptance", model_id="weighed", adapters="00000007+eeeeeeee") == 0.25
    assert text.count('llm_engine_draft_acceptance{adapters="') >= MAX_ADAPTER_SETS
    shown = [
        line for line in text.splitlines() if line.startswith("llm_engine_draft_acceptance{") and "weighed" in line
    ]
    assert len(shown) == MAX_ADAPTER_SETS


def test_several_processes_are_added_up(
    site: InProcessSite, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("metrics")
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(folder))
    reply = site.client().get("/metrics")
    assert reply.status_code == 200
    assert "llm_api_request_total" not in reply.text, "the folder is empty: nothing but it may be read"

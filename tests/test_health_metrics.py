"""/metrics: who may read it, and which names are there."""

from __future__ import annotations

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


def test_several_processes_are_added_up(
    site: InProcessSite, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("metrics")
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(folder))
    reply = site.client().get("/metrics")
    assert reply.status_code == 200
    assert "llm_api_request_total" not in reply.text, "the folder is empty: nothing but it may be read"

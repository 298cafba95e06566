"""Aliases over HTTP: one name in every dialect, one version for what belongs together, and the same in a replay."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from inference.catalog import aliases, granting
from inference.engine.fake_backend import FakeBackend
from inference.inquiry import replay
from inference.models import Adapter, AdapterAlias, Receipt
from tests.in_process import MODEL, InProcessSite

pytestmark = [pytest.mark.api, pytest.mark.integration]
NAME = f"{MODEL}:support"
HELLO = {"model": NAME, "messages": [{"role": "user", "content": "Hello there"}], "max_tokens": 2}
SESSIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "session": ("/v1/generate", {"model": NAME, "prompt": "Hello there", "max_new_tokens": 2, "cache": False}),
    "user": ("/v1/chat/completions", HELLO),
    "safety_identifier": ("/v1/completions", {"model": NAME, "prompt": "Hello", "max_tokens": 2}),
    "prompt_cache_key": ("/v1/responses", {"model": NAME, "input": "Hello there", "max_output_tokens": 16}),
    "metadata": ("/v1/messages", HELLO),
}
"""Field → a request that names its session by it."""


@pytest.fixture
def alias(site: InProcessSite, tmp_path: Path) -> AdapterAlias:
    """Two versions, half of the conversations each, for Alice's alone."""
    made = []
    for number in (1, 2):
        path = tmp_path / f"v{number}.gguf"
        path.write_text(path.stem)
        values = {"base_model": site.models[MODEL], "path": str(path), "digest": str(number) * 64, "size_bytes": 2}
        made.append(Adapter.objects.create(name=path.stem, rank=8, **values))
        granting.grant(made[-1], site.cast.alice.tenant)
    return aliases.try_out(aliases.point(site.models[MODEL], "support", made[0]), made[1], 50)


def test_what_a_client_calls_one_session_is_answered_by_one_version_in_every_dialect(
    site: InProcessSite, alias: AdapterAlias
) -> None:
    alice, asked = site.client(site.cast.alice), {}
    for field, (route, body) in SESSIONS.items():
        for number in range(6):
            named: Any = {"user_id": f"session {number}"} if field == "metadata" else f"session {number}"
            reply = alice.post(route, json={**body, field: named})
            assert reply.status_code == 200, reply.text
            asked[reply.headers["x-request-id"]] = number
    site.settle()
    found = defaultdict(set)
    for receipt in Receipt.objects.all():
        [[name, version]] = receipt.aliases
        assert (name, receipt.adapters) == ("support", [[version, 1.0]])
        found[asked[receipt.parent_id or receipt.request_id]].add(version)
    assert [len(versions) for versions in found.values()] == [1] * 6
    assert set.union(*found.values()) == {"v1", "v2"}


def test_it_is_listed_for_those_who_may_use_it_and_does_not_exist_for_charlie(
    site: InProcessSite, alias: AdapterAlias
) -> None:
    alice, charlie = site.client(site.cast.alice), site.client(site.cast.charlie)
    listed = alice.get("/v1/models").json()
    assert NAME in [each["id"] for each in listed["data"]]
    assert [model["adapter_aliases"] for model in listed["models"] if model["name"] == MODEL] == [["support"]]
    assert alice.get(f"/v1/models/{NAME}").json()["id"] == NAME
    assert alice.get("/lora-adapters", params={"model": MODEL}).json()[-1]["path"] == "v2"
    assert "support" not in charlie.get("/v1/models").text
    for route, body in SESSIONS.values():
        assert charlie.post(route, json=body).status_code == 404


def test_a_session_that_is_no_text_is_named(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    for field, (route, body) in SESSIONS.items():
        reply = alice.post(route, json={**body, "model": MODEL, field: {"user_id": 5} if field == "metadata" else 5})
        assert reply.status_code in (400, 422)
        assert field in reply.text


def test_a_request_is_replayed_with_the_version_that_answered(site: InProcessSite, alias: AdapterAlias) -> None:
    def load(served: Any) -> FakeBackend:
        return FakeBackend(served.n_slots, served.n_ctx, supports_adapters=True)

    body = {**SESSIONS["session"][1], "session": "of a replay"}
    assert site.client(site.cast.alice).post("/v1/generate", json=body).status_code == 200
    site.settle()
    receipt = Receipt.objects.get()
    [[_, version]] = receipt.aliases
    other = Adapter.objects.exclude(name=version).get()
    aliases.end_trial(alias)
    aliases.point(alias.base_model, "support", other)
    assert replay.replay(receipt, json.dumps(body).encode(), load=load).verdict == "same"
    with pytest.raises(replay.ReplayError) as caught:  # a body that names the other one is another request
        replay.replay(receipt, json.dumps({**body, "model": f"{MODEL}:{other.name}"}).encode(), load=load)
    assert caught.value.code == "adapters_differ"

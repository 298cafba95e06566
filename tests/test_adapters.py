"""Adapters and the prompt cache over HTTP, in the native dialect: by name, by scale, and never across tenants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from inference.catalog import adapter_rows, granting, registry
from inference.models import Adapter
from tests.in_process import MODEL, InProcessSite, wait_until

pytestmark = pytest.mark.api

PROMPT = "Look in thy glass"


@pytest.fixture
def poet(site: InProcessSite, tmp_path: Path) -> Adapter:
    """An adapter of the shared model, for Alice's alone."""
    path = tmp_path / "poet.gguf"
    path.write_text("poet")
    row = Adapter.objects.create(
        name="poet", base_model=site.models[MODEL], path=str(path), digest="c" * 64, size_bytes=4, rank=8
    )
    granting.grant(row, site.cast.alice.tenant)
    adapter_rows.changed()
    return row


def output(reply: Any) -> str:
    assert reply.status_code == 200, reply.text
    return str(reply.json()["output"])


def test_adapters_by_name_and_scale_and_scale_0_is_none(site: InProcessSite, poet: Adapter) -> None:
    alice = site.client(site.cast.alice)
    base = output(alice.generate(PROMPT, cache=False, temperature=0.0))
    zero = output(alice.generate(PROMPT, cache=False, temperature=0.0, adapters=[{"name": "poet", "scale": 0}]))
    half = output(alice.generate(PROMPT, cache=False, temperature=0.0, adapters=[{"name": "poet", "scale": 0.5}]))
    whole = output(alice.generate(PROMPT, cache=False, temperature=0.0, adapters=[{"name": "poet"}]))
    named = output(alice.generate(PROMPT, cache=False, temperature=0.0, model=f"{MODEL}:poet"))
    assert base == zero
    assert whole == named
    assert len({base, half, whole}) == 3


def test_an_answer_with_an_adapter_is_not_kept_for_another_scale(site: InProcessSite, poet: Adapter) -> None:
    alice = site.client(site.cast.alice)
    styled = {"adapters": [{"name": "poet", "scale": 0.5}], "temperature": 0.0}
    first, again = (alice.generate(PROMPT, **styled) for _ in range(2))
    assert (first.headers["x-cache"], again.headers["x-cache"]) == ("miss", "hit")
    other = alice.generate(PROMPT, adapters=[{"name": "poet", "scale": 0.6}], temperature=0.0)
    assert other.headers["x-cache"] == "miss"


def test_the_tenants_default_is_used_where_nothing_is_said(site: InProcessSite, poet: Adapter) -> None:
    alice = site.client(site.cast.alice)
    base = output(alice.generate(PROMPT, cache=False, temperature=0.0))
    served = registry.resolve(MODEL, _Caller(site.cast.alice.tenant.pk))
    granting.set_default_vector(site.cast.alice.tenant.pk, served, [("poet", 1.0)])
    assert output(alice.generate(PROMPT, cache=False, temperature=0.0)) != base
    assert output(alice.generate(PROMPT, cache=False, temperature=0.0, adapters=[])) == base


class _Caller:
    allowed_models = allowed_adapters = None

    def __init__(self, tenant_id: int) -> None:
        self.tenant_id = tenant_id


def test_charlie_sees_no_adapter_and_cannot_use_one(site: InProcessSite, poet: Adapter) -> None:
    alice, charlie = site.client(site.cast.alice), site.client(site.cast.charlie)
    names = {entry["id"] for entry in alice.get("/v1/models").json()["data"]}
    assert f"{MODEL}:poet" in names
    assert not any(":" in entry["id"] for entry in charlie.get("/v1/models").json()["data"])
    assert all(not model["adapters"] for model in charlie.get("/v1/models").json()["models"])
    unknown = charlie.generate(PROMPT, adapters=[{"name": "no such adapter"}])
    refused = charlie.generate(PROMPT, adapters=[{"name": "poet"}])
    assert (refused.status_code, refused.json()["code"]) == (404, "adapter_not_found")
    assert refused.json()["message"].replace("poet", "") == unknown.json()["message"].replace("no such adapter", "")
    assert charlie.generate(PROMPT, model=f"{MODEL}:poet").json()["code"] == "model_not_found"


@pytest.mark.parametrize(
    "wanted", [{"name": "poet"}, [{"scale": 1}], [{"name": "poet", "scale": 1e9}], [{"name": "poet", "path": "x"}]]
)
def test_a_malformed_list_of_adapters_is_refused(site: InProcessSite, wanted: Any) -> None:
    reply = site.client(site.cast.alice).generate(PROMPT, adapters=wanted)
    assert (reply.status_code, reply.json()["code"]) == (422, "validation_error")


def test_a_receipt_names_adapters_and_cached_tokens(site: InProcessSite, poet: Adapter) -> None:
    alice = site.client(site.cast.alice)

    def receipt(**fields: Any) -> dict[str, Any]:
        reply = alice.generate(PROMPT * 20, cache=False, temperature=0.0, **fields)
        address = f"/v1/requests/{reply.headers['x-request-id']}"
        wait_until(lambda: "receipt" in alice.get(address).json())
        return dict(alice.get(address).json())

    first, second = receipt(model=f"{MODEL}:poet"), receipt(model=f"{MODEL}:poet")
    assert first["adapters"] == [{"name": "poet", "scale": 1.0}]
    assert first["receipt"]["cached_tokens"] == 0
    assert second["receipt"]["cached_tokens"] == second["usage"]["prompt_tokens"] - 1
    assert second["receipt"]["charged_tokens"] == second["usage"]["total_tokens"]
    assert receipt()["receipt"]["cached_tokens"] == 0
    assert receipt(cache_prompt=False, model=f"{MODEL}:poet")["receipt"]["cached_tokens"] == 0

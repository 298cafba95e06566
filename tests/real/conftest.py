"""The real model's tokenizer, and one running site with that model, for the tests of llama.cpp's dialect over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from inference.engine.tokenizer import Tokenizer
from tests.conftest import Site, running_site
from tests.in_process import wait_until
from tests.llamacpp_calls import complete

DRAFTS = {"draft_kind": "model", "draft_model": "smollm2-135m", "draft_policy": "always", "draft_n_max": 16}
MODELS: dict[str, dict[str, Any]] = {
    "narrow": {"n_ctx": 64, "n_slots": 1, **DRAFTS},
    "drafted": {"n_ctx": 256, "n_slots": 2, **DRAFTS},
}
"""Beside the demo's own: one of a short context and a single slot, and one with room for two."""


@pytest.fixture(scope="module")
def tokenizer(model_path: Path) -> Iterator[Tokenizer]:
    tokenizer = Tokenizer.load(model_path)
    yield tokenizer
    tokenizer.free()


@dataclass(frozen=True)
class LlamaSite:
    """Alice has one adapter, Bob two, on the demo's model; both may use the others."""

    site: Site
    alice: httpx.Client
    bob: httpx.Client
    operator: httpx.Client
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(16))

    def count(self, text: str, **fields: Any) -> int:
        """Tokens of a text, as its model puts them into a prompt."""
        answer = self.alice.post("/tokenize", json={"content": text, "add_special": True, **fields})
        return len(answer.json()["tokens"])

    def at_once(self, client: httpx.Client, *bodies: dict[str, Any]) -> list[dict[str, Any]]:
        """The answers of requests that are sent side by side; each must be 200."""
        answers = list(self.pool.map(lambda body: complete(client, **body), bodies))
        assert [each.status_code for each in answers] == [200] * len(bodies), [each.text[:300] for each in answers]
        return [each.json() for each in answers]


@pytest.fixture(scope="session")
def llama_site(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> Iterator[LlamaSite]:
    with running_site(tmp_path_factory.mktemp("llama") / "state") as site:
        keys = [site.key, site.other_key, site.demo["operator_key"]]
        clients = [httpx.Client(base_url=site.base_url, headers=site.headers(key), timeout=60) for key in keys]
        found = LlamaSite(site, *clients)
        bodies = [{"name": name, "path": str(model_path), **options} for name, options in MODELS.items()]
        answers = list(found.pool.map(lambda body: found.operator.post("/v1/admin/models", json=body), bodies))
        assert [each.status_code for each in answers] == [201] * len(bodies), [each.text for each in answers]
        for name in MODELS:
            wait_until(lambda name=name: complete(found.alice, "One", model=name, n_predict=1).status_code == 200, 30.0)
        yield found
        found.pool.shutdown()
        for client in clients:
            client.close()

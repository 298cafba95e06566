"""Slots of the real model over HTTP: llama.cpp's slot tests, a restart, and what nobody learns of others' prompts."""

from __future__ import annotations

import random
import statistics
from pathlib import Path
from typing import Any

import pytest

from inference.engine import LlamaBackend, SamplingParams
from inference.engine.tokenizer import Tokenizer
from tests.in_process import Client, InProcessSite
from tests.test_slots import act, computed

from .test_slots_real import FRANCE, GERMANY, LONG, N_PREDICT, differing

pytestmark = [pytest.mark.model, pytest.mark.integration]

ENDLESS = SamplingParams(temperature=0.0, ignore_eos=True)
N_CTX, N_SLOTS = 640, 2


@pytest.fixture
def real_site(site: InProcessSite, model_path: Path) -> InProcessSite:
    """The site with a worker that holds the real model alone."""
    from inference.catalog import registry
    from inference.models import ServedModel

    site.stop_worker()
    ServedModel.objects.filter(is_default=False).delete()
    ServedModel.objects.update(path=str(model_path), n_ctx=N_CTX, n_slots=N_SLOTS, n_threads=2)
    registry.forget()
    start(site)
    return site


def start(site: InProcessSite) -> None:
    from accounts import redis_client
    from inference.worker.worker import WorkerHost

    def load(served: Any) -> LlamaBackend:
        return LlamaBackend.load(served.path, n_ctx=served.n_ctx, n_slots=served.n_slots, n_threads=served.n_threads)

    site.host = WorkerHost("default", client=redis_client.client(), load=load)
    site.host.start()
    site.host._note(site.host.queue.beat(site.host.worker_id, "default", site.host.num_slots, site.host._info()))


def tokens_of(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special=True))


def test_llama_cpps_slot_tests_and_a_restart(real_site: InProcessSite, tokenizer: Tokenizer) -> None:
    site, alice = real_site, real_site.client(real_site.cast.alice)
    france, germany = tokens_of(tokenizer, FRANCE), tokens_of(tokenizer, GERMANY)
    tail = differing(tokenizer, FRANCE, GERMANY)

    def ask(prompt: tuple[int, ...], slot: int) -> int:
        return computed(site.ask(site.cast.alice, prompt, slot, max_tokens=N_PREDICT, sampling=ENDLESS))

    assert ask(france, 1) == len(france)
    saved = act(alice, 1, "save", "slot1.bin").json()
    assert saved["n_saved"] == len(france) + N_PREDICT - 1
    assert ask(germany, 1) == tail
    restored = act(alice, 0, "restore", "slot1.bin").json()
    assert (restored["n_restored"], restored["n_read"]) == (saved["n_saved"], saved["n_written"])
    assert ask(germany, 0) == tail
    assert ask(germany, 1) == 1
    assert act(alice, 1, "erase").status_code == 200
    assert act(alice, 0, "erase").status_code == 200
    assert ask(germany, 1) == len(germany)

    long = tokens_of(tokenizer, LONG)
    assert ask(long, 0) > len(long) - 8
    site.stop_worker()
    start(site)
    assert ask(long, 1) == 1, "what slots held when the worker stopped is there when it starts"
    assert act(alice, 0, "restore", "slot1.bin").json()["n_restored"] == saved["n_saved"]
    assert ask(france, 0) == 1


def auc(hits: list[float], controls: list[float]) -> float:
    """How often a hit is quicker than a control; 0.5 is no better than guessing. Mann and Whitney, 1947."""
    wins = sum((hit < control) + 0.5 * (hit == control) for hit in hits for control in controls)
    return wins / (len(hits) * len(controls))


NUM_PROBES = 100
PROMPT_TOKENS = 512
PROBE_TOKENS = 24
MAX_ROUNDS = 10


@pytest.mark.timeout(600)
def test_a_prompt_cannot_be_guessed_by_the_time_it_takes(real_site: InProcessSite, tokenizer: Tokenizer) -> None:
    """Alice's prompt of 512 tokens is held. Bob sends beginnings of it, and of others, and compares the times to the
    first token; then Alice does the same, to show that the test can tell. Beginnings, since a probe of 512 tokens takes
    seconds here and says the same: what is reused is the common prefix.

    Each probe is random behind its beginning, so that it reuses nothing of the probes before it. Of 100 hits and 100
    controls that do not differ, the AUC is outside of 0.45 to 0.55 one time in five; then there is another round, and
    all are counted together. A difference would only show more clearly. By chance alone it is outside after three
    rounds once in sixty runs, after ten once in a hundred thousand.
    """
    site, rng = real_site, random.Random(13)
    secret = tuple(rng.randrange(1000, 40_000) for _ in range(PROMPT_TOKENS))
    site.ask(site.cast.alice, secret, 0, max_tokens=0)

    def probe(customer: Any, beginning: tuple[int, ...]) -> tuple[float, int]:
        fresh = tuple(rng.randrange(1000, 40_000) for _ in range(4))
        receipt = site.ask(customer, beginning + fresh, 1, max_tokens=1)["receipt"]
        return receipt["prefill_seconds"], receipt["cached_tokens"]

    def probes(customer: Any) -> tuple[list[float], list[float], set[int]]:
        hits, controls, reused = [], [], set()
        for _ in range(NUM_PROBES):
            hit, number = probe(customer, secret[:PROBE_TOKENS])
            control, _ = probe(customer, tuple(rng.randrange(1000, 40_000) for _ in range(PROBE_TOKENS)))
            hits.append(hit)
            controls.append(control)
            reused.add(number)
        return hits, controls, reused

    hits, controls, reused = probes(site.cast.alice)
    assert reused == {PROBE_TOKENS}
    assert auc(hits, controls) >= 0.9
    hits, controls = [], []
    for _ in range(MAX_ROUNDS):
        more_hits, more_controls, reused = probes(site.cast.bob)
        assert reused == {0}
        hits += more_hits
        controls += more_controls
        if 0.45 <= auc(hits, controls) <= 0.55:
            return
    pytest.fail(f"AUC {auc(hits, controls)}, medians {statistics.median(hits)} and {statistics.median(controls)}")


def test_a_client_of_another_tenant_finds_no_slot(real_site: InProcessSite, tokenizer: Tokenizer) -> None:
    site = real_site
    bob: Client = site.client(site.cast.bob)
    site.ask(site.cast.alice, tokens_of(tokenizer, LONG), 0, max_tokens=1)
    assert all("n_held" not in slot for slot in bob.get("/slots").json())
    assert act(bob, 0, "save", "mine").json()["n_saved"] == 0
    assert act(bob, 0, "erase").json()["n_erased"] == 0
    last = site.ask(site.cast.alice, tokens_of(tokenizer, LONG), 0, max_tokens=1)
    assert computed(last) == 1

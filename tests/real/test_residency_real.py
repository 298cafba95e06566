"""Two real models and memory for one: they come and go with their requests, and the memory does too."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from inference.catalog import model_rows, registry
from inference.catalog.model_memory import memory_of
from inference.engine.tokenizer import Tokenizer
from inference.engine.types import SamplingParams
from inference.models import ServedModel
from inference.transport import doorbell
from inference.worker import hosted
from inference.worker.hosted import State
from inference.worker.memory import release_memory, resident_bytes
from tests.inference.flow import admitted, finish, principal_of, wait_for, worker

pytestmark = [pytest.mark.model, pytest.mark.memory, pytest.mark.integration, pytest.mark.django_db(transaction=True)]

GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)
OPTIONS = {"n_ctx": 1024, "n_slots": 4, "n_threads": 2, "load_mode": "lazy"}
SLACK_BYTES = 60e6
"""What a process that loads models keeps and does not give back."""


@pytest.fixture(autouse=True)
def _no_celery(monkeypatch: pytest.MonkeyPatch, valkey: Any, settings: Any) -> None:
    monkeypatch.setattr(doorbell, "ring", lambda pool: True)
    monkeypatch.setattr(settings.CONFIG, "slot_memory_mb", 32)


@pytest.fixture
def models(db: None, model_path: Path) -> dict[str, ServedModel]:
    """The same file under two names: nothing of it is shared between two that are loaded but pages of the disk."""
    found = {name: model_rows.register(model_path, name, **OPTIONS) for name in ("one", "two")}
    registry.forget()
    return found


def estimate(model: ServedModel) -> int:
    return memory_of(model).total_bytes


def ask(client: Any, principal: Any, model: str, prompt: tuple[int, ...], max_tokens: int = 4) -> dict[str, Any]:
    sent = admitted(principal, model=model, prompt=prompt, max_tokens=max_tokens, sampling=GREEDY).ticket
    return finish(client, sent.request_id, 60.0)


@pytest.mark.timeout(300)
def test_two_models_with_memory_for_one_answer_fifty_alternating_requests_of_four_clients(
    cast: Any, valkey: Any, models: dict[str, ServedModel]
) -> None:
    alice = principal_of(cast.alice, concurrent_requests=None, tokens_per_minute=None)
    need = estimate(models["one"])
    release_memory()
    before, resident, used = resident_bytes(), [], []
    with worker(valkey, threads=8, load=hosted.load_backend, budget_bytes=1.5 * need) as host:

        def client(number: int) -> list[str]:
            reasons = []
            for turn in range(12 + (number < 2)):
                name = ("one", "two")[(number + turn) % 2]
                prompt = tuple(range(1000 * (number + 1), 1000 * (number + 1) + 20))
                reasons.append(ask(valkey, alice, name, prompt)["reason"])
                resident.append(resident_bytes() - before)
                used.append(host._keeper.used_bytes)
            return reasons

        with ThreadPoolExecutor(4) as pool:
            answers = [reason for part in pool.map(client, range(4)) for reason in part]
    assert answers == ["length"] * 50
    assert max(used) == need, "never two at once"
    assert max(resident) < need + SLACK_BYTES
    half = len(resident) // 2
    assert max(resident[half:]) < max(resident[:half]) + SLACK_BYTES / 2, "flat"


@pytest.mark.timeout(120)
def test_an_idle_model_gives_its_memory_back_and_a_slots_state_outlives_that(
    cast: Any, valkey: Any, models: dict[str, ServedModel], model_path: Path
) -> None:
    alice = principal_of(cast.alice)
    tokenizer = Tokenizer.load(model_path)
    prompt = tuple(
        tokenizer.encode("Alice kept a careful diary of the weather and the harvest. " * 30, add_special=True)
    )
    tokenizer.free()
    ServedModel.objects.filter(name="one").update(keep_alive_seconds=1)
    registry.forget()
    release_memory()
    before = resident_bytes()
    with worker(valkey, threads=2, load=hosted.load_backend) as host:
        model = next(each for each in host._all_models() if each.served.name == "one")
        first = ask(valkey, alice, "one", prompt)
        held = resident_bytes() - before
        assert 100e6 < held < estimate(models["one"]) + SLACK_BYTES
        assert first["receipt"]["cached_tokens"] == 0

        wait_for(lambda: model.state is State.UNLOADED, 20.0)
        wait_for(lambda: resident_bytes() - before < held / 4)

        again = ask(valkey, alice, "one", prompt)
        assert again["receipt"]["cached_tokens"] == len(prompt) - 1
        assert again["receipt"]["prefill_seconds"] < first["receipt"]["prefill_seconds"] / 2
        bob = ask(valkey, principal_of(cast.bob), "one", prompt, 1)
        assert bob["receipt"]["cached_tokens"] == 0


def test_the_estimate_is_an_upper_bound_and_not_a_wild_one(models: dict[str, ServedModel], model_path: Path) -> None:
    served = next(each for each in registry.every() if each.name == "one")
    release_memory()
    before = resident_bytes()
    backend = hosted.load_backend(served)
    held = resident_bytes() - before
    backend.free()
    assert held < served.memory.total_bytes - served.memory.states_bytes < 2 * held

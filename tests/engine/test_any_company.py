"""Any company, step by step: whatever comes, goes, waits, makes room or is restored beside it, a request's answer is
the one that it has alone, and engine, slots, store and backend agree after every step about who holds what.

LLMSITE_FUZZ_COMPANIES: so many of them.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import count

import pytest

from inference.engine import (
    Decoding,
    Delta,
    EngineError,
    FakeBackend,
    Finished,
    FinishReason,
    GenerationRequest,
    Parked,
    Resumed,
    SamplingParams,
    SlotWork,
)
from inference.engine.backend import Chosen
from inference.engine.drafting import DraftPolicy, DraftSettings
from inference.engine.fake_backend import invented_answer
from inference.engine.slot_keeper import SlotState
from inference.engine.speculative import PromptLookup
from inference.engine.types import AdapterVector

from .cast import HandClock, assert_well_formed
from .test_engine import Bench

pytestmark = pytest.mark.unit

NUM_COMPANIES = int(os.environ.get("LLMSITE_FUZZ_COMPANIES", "40"))
ADAPTERS: Sequence[AdapterVector] = ((), (), (("poet", 1.0),), (("clerk", 0.5), ("poet", 0.0)))
REFUSED = 666
"""A prompt that ends with this cannot be opened."""


def repeating(prompt: tuple[int, ...], seed: int, index: int) -> int:
    """An answer that prompt lookup guesses now and then."""
    return (
        invented_answer(prompt, seed, index) if index % 17 == 16 else 1 + (prompt[0] * 7 + index * (1 + seed % 3)) % 5
    )


class Strict(FakeBackend):
    """Also about what a batch looks like."""

    def open(
        self, slot_id: int, prompt: Sequence[int], sampling: SamplingParams, seed: int, num_cached: int = 0
    ) -> None:
        super().open(slot_id, prompt, sampling, seed, num_cached)
        if prompt[-1] == REFUSED:
            raise EngineError("invalid_grammar", "no")

    def execute(self, work: Sequence[SlotWork], adapters: AdapterVector) -> list[Chosen]:
        slots = [part.slot_id for part in work]
        assert slots == sorted(set(slots))
        assert 0 < sum(len(part.tokens) for part in work) <= self.max_step_tokens
        return super().execute(work, adapters)


class Company:
    """A bench with dice that say what happens next."""

    def __init__(self, seed: int) -> None:
        self.dice = dice = random.Random(seed)
        clock = HandClock()
        self.talks = dice.random() < 0.6  # conversations that go on, or prompts that begin alike
        self.n_slots = dice.randint(2 if self.talks else 1, 4)
        backend = Strict(
            self.n_slots,
            300 if self.talks else dice.choice([40, 64, 200]),
            dice.choice([0, 0.01]),
            dice.choice([0.001, 0.01]),
            sleep=clock.sleep,
            supports_adapters=True,
            max_step_tokens=dice.choice([16, 64, 512]),
            adds_bos=dice.random() < 0.3,
            answer=dice.choice([invented_answer, repeating]),
        )
        for name in ("poet", "clerk"):
            backend.load_adapter(name, __file__)
        self.room = dice.choice([0, 3000, 20_000, 1 << 20])
        settings = DraftSettings(policy=dice.choice(list(DraftPolicy)), num_max=8, num_min=dice.choice([0, 2]))
        proposer = PromptLookup() if dice.random() < 0.5 else None
        self.bench = Bench(clock, backend, state_bytes=self.room, proposer=proposer, draft_settings=settings)
        self.backend, self.engine = backend, self.bench.engine
        self.asked: dict[str, GenerationRequest] = {}
        self._beginnings = {scope: self._words(backend.n_ctx) for scope in ("alice", "bob", "")}
        self._told: list[tuple[str, tuple[int, ...]]] = []
        self._saved: list[tuple[str, SlotState]] = []
        self._numbers = count()

    def _words(self, number: int) -> tuple[int, ...]:
        return tuple(self.dice.randrange(1, 9000) for _ in range(number))

    def _prompt(self) -> tuple[str, tuple[int, ...]]:
        """Whose, and what."""
        dice, most = self.dice, self.backend.n_ctx - 1
        if self.talks and self._told and dice.random() < 0.7:
            scope, before = dice.choice(self._told)
        else:
            scope = dice.choice(list(self._beginnings))
            before = self._beginnings[scope][: dice.randint(70, 100) if self.talks else dice.randint(1, most)]
        prompt = (before + self._words(dice.randint(0, 60 if self.talks else 5)))[:most]
        self._told = [*self._told[-8:], (scope, prompt[:200])]
        return scope, (*prompt[:-1], REFUSED) if dice.random() < 0.03 else prompt

    def ask(self) -> None:
        dice = self.dice
        request_id = f"r{next(self._numbers)}"
        scope, prompt = self._prompt()
        decoding = Decoding(
            context_shift=dice.random() < 0.3,
            num_keep=dice.choice([0, -1, 5]),
            num_discard=dice.choice([0, 3]),
            slot_id=dice.choice([None, None, dice.randrange(self.n_slots)]),
        )
        request = GenerationRequest(
            request_id=request_id,
            prompt=prompt,
            max_tokens=dice.choice([0, 1, 2, 3, 10] if self.talks else [0, 1, 3, 10, 30, 80]),
            sampling=SamplingParams(
                temperature=dice.choice([0, 1]), seed=dice.randrange(5), num_probs=dice.choice([0, 2])
            ),
            decoding=decoding,
            stop=dice.choice([(), (), (" river",), (". s",)]),
            deadline=self.bench.clock() + dice.uniform(0, 5) if dice.random() < 0.1 else None,
            adapters=() if self.talks else dice.choice(ADAPTERS),
            cache_scope=scope or None,
            cache_prompt=dice.random() < 0.9,
            is_patient=dice.random() < 0.2,
        )
        self.engine.check(request)
        self.engine.add(request, self.bench.clock())
        self.asked[request_id] = request

    def touch_a_slot(self) -> None:
        name = (self.dice.choice(["alice", "bob"]), self.dice.randrange(self.n_slots))
        chance = self.dice.random()
        if chance < 0.05 and not self.engine.is_slot_busy(name):
            self._saved.append((name[0], self.engine.save_slot(name)))
        elif chance < 0.1 and self.engine.can_restore_slot(name):
            self.engine.restore_slot(
                name, self.dice.choice([*(own for who, own in self._saved if who == name[0]), SlotState()])
            )
        elif chance < 0.13 and not self.engine.is_slot_busy(name):
            self.engine.erase_slot(name)

    def go_on(self) -> None:
        dice = self.dice
        for _ in range(dice.choice([0, 0, 0, 0, 1, 2] if self.talks else [0, 0, 1, 1, 2, 3])):
            self.ask()
        if self.asked and dice.random() < 0.15:
            self.engine.cancel(dice.choice(list(self.asked)[-8:]))
        for request_id in dice.sample(
            list(self.engine._running), min(len(self.engine._running), dice.choice([0, 0, 1, 2]))
        ):
            self.engine.park(request_id)
        self.agrees()
        self.touch_a_slot()
        self.agrees()
        self.bench.step()
        self.agrees()

    def agrees(self) -> None:
        """What the engine believes is what the backend has."""
        slots, store, running = self.engine._slots, self.engine._keeper._store, self.engine._running
        for slot_id, held in slots.held.items():
            assert slots.owner(slot_id) is None
            expected = [(token, held.key[1]) for token in held.tokens]
            assert self.backend._held[slot_id][: len(expected)] == expected
        for sequence in running.values():
            assert sequence.slot_id is not None
            assert sequence.num_computed <= len(self.backend._held[sequence.slot_id])
            assert len(sequence.tokens) <= self.backend.n_ctx
        assert self.backend._open.keys() == {sequence.slot_id for sequence in running.values()}
        assert len(self.backend._detached) == len(self.engine._parked)
        assert len(set(slots.names.values())) == len(slots.names)
        assert store.num_bytes == sum(len(each.state) for each in store) <= max(store.max_bytes, 0)

    def alone(self, request: GenerationRequest) -> tuple[str, Finished]:
        backend = FakeBackend(
            1, self.backend.n_ctx, answer=self.backend._answer, supports_adapters=True, adds_bos=self.backend.adds_bos
        )
        for name in ("poet", "clerk"):
            backend.load_adapter(name, __file__)
        bench = Bench(HandClock(), backend)
        bench.engine.add(replace(request, deadline=None, decoding=replace(request.decoding, slot_id=None)), 0.0)
        last = bench.run()[request.request_id]
        return bench.text(request.request_id), last


@pytest.mark.parametrize("seed", range(NUM_COMPANIES))
def test_in_any_company_an_answer_is_the_one_that_it_is_alone(seed: int) -> None:
    company = Company(seed)
    for _ in range(company.dice.randint(20, 60)):
        company.go_on()
    bench = company.bench
    finished = bench.run()
    company.agrees()
    assert company.engine._keeper._store.max_bytes == company.room
    assert finished.keys() == company.asked.keys()
    assert_well_formed([event for event in bench.events if not isinstance(event, Parked | Resumed)])
    for event in bench.events:
        if isinstance(event, Delta) and company.asked[event.request_id].sampling.num_probs:
            assert len(event.probs) == len(event.tokens)
    for request_id, last in finished.items():
        request, receipt = company.asked[request_id], last.receipt
        assert receipt.cached_tokens < receipt.prompt_tokens
        if not request.cache_prompt or request.cache_scope is None:
            assert receipt.cached_tokens == 0
        if last.reason in (FinishReason.CANCELLED, FinishReason.DEADLINE):
            continue
        if request.prompt[-1] == REFUSED:
            assert last.error == "invalid_grammar"
            continue
        text, expected = company.alone(request)
        assert bench.text(request_id) == text
        assert (last.reason, last.stop_word) == (expected.reason, expected.stop_word)
        assert receipt.completion_tokens == expected.receipt.completion_tokens
        assert receipt.is_truncated == expected.receipt.is_truncated
    assert company.engine.stats().completion_tokens_total == sum(
        each.receipt.completion_tokens for each in finished.values()
    )

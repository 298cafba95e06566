"""Slots on the real model: llama.cpp's own slot tests, and that a restored state is the state that was saved."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inference.engine import Decoding, EngineError, LlamaBackend, SamplingParams, SlotWork
from inference.engine.engine import Engine
from inference.engine.llama.library import native
from inference.engine.slot_keeper import SlotState
from inference.engine.tokenizer import Tokenizer
from tests.timing import Stopwatch

from .test_engine_real import GREEDY, PROMPTS, Run, alone

pytestmark = pytest.mark.model

FRANCE, GERMANY = "What is the capital of France?", "What is the capital of Germany?"
LONG = "Alice kept a careful diary of the weather, the harvest and the visitors of her village. " * 14
ENDLESS = SamplingParams(temperature=0.0, ignore_eos=True)
N_PREDICT = 64


def load(model_path: Path) -> LlamaBackend:
    return LlamaBackend.load(model_path, n_ctx=512, n_slots=2, n_threads=2)


@pytest.fixture(scope="module")
def backend(model_path: Path) -> Iterator[LlamaBackend]:
    backend = load(model_path)
    yield backend
    backend.free()


class Slots(Run):
    """Requests of one tenant that name their slots, one after the other."""

    def __init__(self, backend: LlamaBackend, tokenizer: Tokenizer, state_bytes: int = 0) -> None:
        super().__init__(backend, tokenizer)
        self.engine = Engine(backend, state_bytes=state_bytes)
        self.number = 0

    def ask(self, text: str, slot: int | None = None, *, scope: str = "alice", **fields: Any) -> tuple[int, str]:
        """(computed prompt tokens, answer)."""
        self.number += 1
        name = f"r{self.number}"
        decoding = fields.pop("decoding", Decoding(slot_id=slot))
        self.add(name, text, cache_scope=scope, decoding=decoding, **{"max_tokens": N_PREDICT, **fields})
        self.finish()
        receipt = self.finished(name).receipt
        return receipt.prompt_tokens - receipt.cached_tokens, self.text(name)


def length(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text, add_special=True))


def differing(tokenizer: Tokenizer, one: str, other: str) -> int:
    """Tokens of the other behind what both begin with."""
    first, second = (tokenizer.encode(text, add_special=True) for text in (one, other))
    common = next(i for i, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1])
    return len(second) - common


def test_save_and_restore_as_llama_cpp_tests_it(backend: LlamaBackend, tokenizer: Tokenizer) -> None:
    run = Slots(backend, tokenizer)
    whole, _ = run.ask(FRANCE, 1, sampling=ENDLESS)
    assert whole == length(tokenizer, FRANCE)
    saved = run.engine.save_slot(("alice", 1))
    assert len(saved.tokens) == whole + N_PREDICT - 1
    tail, german = run.ask(GERMANY, 1, sampling=ENDLESS)
    assert tail == differing(tokenizer, FRANCE, GERMANY) < whole
    run.engine.restore_slot(("alice", 0), saved)
    again, same = run.ask(GERMANY, 0, sampling=ENDLESS)
    assert (again, same) == (tail, german)
    assert run.ask(GERMANY, 1, sampling=ENDLESS) == (1, german)


def test_erase_as_llama_cpp_tests_it(backend: LlamaBackend, tokenizer: Tokenizer) -> None:
    run = Slots(backend, tokenizer, state_bytes=1 << 28)
    whole, text = run.ask(FRANCE, 1)
    assert run.engine.erase_slot(("alice", 1)) >= whole
    assert run.ask(FRANCE, 1) == (whole, text)


def log_probabilities(backend: LlamaBackend, slot_id: int, tokens: tuple[int, ...]) -> np.ndarray:
    """Of every token after these, of which the slot holds all but the last; it holds no more afterwards."""
    backend._decode([SlotWork(slot_id, len(tokens) - 1, [tokens[-1]], True)])
    row = native.llama_get_logits_ith(backend._context, 0)
    logits = np.ctypeslib.as_array(ctypes.cast(row, ctypes.POINTER(ctypes.c_float)), (backend.n_vocab,)).astype(float)
    backend.trim(slot_id, len(tokens) - 1)
    return np.asarray(logits - logits.max() - np.log(np.exp(logits - logits.max()).sum()))


def test_a_restored_slot_predicts_what_the_saved_one_did(
    backend: LlamaBackend, tokenizer: Tokenizer, model_path: Path
) -> None:
    """To the last bit, in another slot, and after a restart."""
    run = Slots(backend, tokenizer)
    computed, text = run.ask(LONG, 0)
    saved = run.engine.save_slot(("alice", 0))
    slot_id = run.engine.slots()[0].slot_id
    tokens = (*saved.tokens, 19)
    before = log_probabilities(backend, slot_id, tokens)
    seconds = run.finished("r1").receipt.prefill_seconds

    run.engine.erase_slot(("alice", 0))
    run.engine.restore_slot(("alice", 1), saved)
    assert np.array_equal(log_probabilities(backend, run.engine.slots()[0].slot_id, tokens), before)
    assert run.ask(LONG, 1) == (1, text)
    receipt = run.finished("r2").receipt
    assert (receipt.cached_tokens, receipt.prefill_seconds < seconds / 4) == (computed - 1, True)

    second = load(model_path)
    try:
        later = Slots(second, tokenizer)
        later.engine.restore_slot(("alice", 1), saved)
        assert np.array_equal(log_probabilities(second, later.engine.slots()[0].slot_id, tokens), before)
        assert later.ask(LONG, 1) == (1, text)
    finally:
        second.free()


def test_a_slot_is_saved_right_while_moves_wait(backend: LlamaBackend, tokenizer: Tokenizer) -> None:
    """Copies and shifts are done by llama.cpp with the next step; a state read before that would be garbage."""
    run = Slots(backend, tokenizer)
    run.ask(LONG, 0, max_tokens=1)
    source = run.engine.slots()[0].slot_id
    target = 1 - source
    tokens = tuple(tokenizer.encode(LONG, add_special=True))
    before = log_probabilities(backend, source, (*tokens, 19))

    backend.copy(source, target)
    state = backend.save(target)
    backend.erase(source)
    backend.restore(source, state)
    assert np.array_equal(log_probabilities(backend, source, (*tokens, 19)), before)

    backend.copy(source, target)
    backend.shift(target, 10, 50)
    state = backend.save(target)
    short = (*tokens[:10], *tokens[60:], 19)
    shifted = log_probabilities(backend, target, short)
    assert is_nearly(shifted, shifted) and not is_nearly(shifted, before)
    backend.restore(source, state)
    assert is_nearly(log_probabilities(backend, source, short), shifted)
    backend.copy(source, target)
    backend.shift(source, 10, 50)
    backend.restore(source, state)
    assert is_nearly(log_probabilities(backend, source, short), shifted)
    assert is_nearly(log_probabilities(backend, target, short), shifted)


def is_nearly(one: np.ndarray, other: np.ndarray) -> bool:
    """A shift leaves a hole, which a restore closes: sums in another order, the same to a few percent with 4 bits."""
    return bool(np.corrcoef(one, other)[0, 1] > 0.995 and one.argmax() == other.argmax())


def test_conversations_that_take_turns_in_few_slots_are_restored_and_right(
    backend: LlamaBackend, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six conversations of three tenants in two slots, and shifts in between: the answers are those of each alone."""
    texts = [LONG[: 300 + 60 * number] + PROMPTS[number] for number in range(6)]
    expected = [alone(backend, tokenizer, text, max_tokens=6) for text in texts]
    run = Slots(backend, tokenizer, state_bytes=1 << 28)
    scopes, restored, restore = ["alice", "bob", "charlie"], [], backend.restore

    def noted(slot_id: int, state: bytes) -> None:
        restore(slot_id, state)
        restored.append(slot_id)

    monkeypatch.setattr(backend, "restore", noted)
    for turn in range(2):
        for number, text in enumerate(texts):
            run.add(f"{turn} {number}", text, max_tokens=6, cache_scope=scopes[number % 3])
            run.step()
        full, shift = LONG + LONG[: len(LONG) * 9 // 10], Decoding(context_shift=True, num_keep=-1)
        run.add(f"{turn} shift", full, max_tokens=60, sampling=ENDLESS, decoding=shift, cache_scope="alice")
        run.finish()
        assert run.finished(f"{turn} shift").receipt.is_truncated
        assert [run.tokens(f"{turn} {number}") for number in range(6)] == expected
    receipts = [run.finished(f"1 {number}").receipt for number in range(6)]
    assert sum(each.cached_tokens >= each.prompt_tokens - 24 for each in receipts) >= 5
    assert len(restored) >= 4


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage"])
def test_what_llama_cpp_does_not_read_leaves_an_empty_slot(
    backend: LlamaBackend, tokenizer: Tokenizer, damage: str
) -> None:
    """Files are verified before they come here; a state of another build would be refused like this."""
    run = Slots(backend, tokenizer)
    whole, text = run.ask(FRANCE, 1, sampling=GREEDY)
    saved = run.engine.save_slot(("alice", 1))
    state = {"cut": saved.state[: len(saved.state) // 2], "empty": b"", "garbage": bytes(len(saved.state))}[damage]
    with pytest.raises(EngineError) as caught:
        run.engine.restore_slot(("alice", 1), SlotState(saved.tokens, (), state))
    assert caught.value.code == "state_invalid"
    assert run.engine.slots() == []
    assert run.ask(FRANCE, 1, sampling=GREEDY) == (whole, text)


def test_states_move_quickly(backend: LlamaBackend, tokenizer: Tokenizer) -> None:
    run = Slots(backend, tokenizer)
    run.ask(LONG, 0, max_tokens=1)
    seconds = run.finished("r1").receipt.prefill_seconds
    watch = Stopwatch()
    saved = run.engine.save_slot(("alice", 0))
    run.engine.restore_slot(("alice", 1), saved)
    assert watch.seconds() < seconds / 4

"""A backend that invents text at a set speed: for tests of policy and for measuring everything around the engine.

Deterministic: the answer depends on the prompt, the adapter vector and, above temperature 0, the seed; never on
neighbours. Token ids of any vocabulary are accepted as a prompt; answers are made of the ids 0..len(PIECES)-1.
"""

from __future__ import annotations

import copy
import json
import time
import zlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from inference.engine.backend import NOTHING, Abilities, Chosen, EmbeddingBackend, SlotWork
from inference.engine.costs import CostCurve
from inference.engine.thoughts import ThoughtGuard
from inference.engine.types import AdapterVector, EngineError, SamplingParams, TokenProbs

_WORDS = """the a river light of and stone quiet morning under over carries small bright road to in old story garden
wind between slow water door finds open path every house said green keeps near far mountain letter turns soft evening
bread table lamp winter seed market bridge ship answer question number music paper long window tree sea bird cloud"""
END = 0
"""The id of the token that ends an answer."""

PIECES: tuple[bytes, ...] = (
    b"",
    *(f" {word}".encode() for word in _WORDS.split()),
    *(b",", b".", b".\n", " é".encode(), b" \xe2\x82", b"\xac"),  # the last two are the halves of a euro sign
)
_WORDS_ONLY = range(1, 1 + len(_WORDS.split()))

Answer = Callable[[tuple[int, ...], int, int], int]
"""From (prompt, seed, index of the generated token) to the token."""


def invented_answer(prompt: tuple[int, ...], seed: int, index: int) -> int:
    """Words in an order that looks random, with a comma or a full stop now and then."""
    if index % 13 == 12:
        return PIECES.index(b".")
    state = zlib.crc32(array("q", prompt).tobytes(), seed)
    state = zlib.crc32(index.to_bytes(4, "little"), state)
    return _WORDS_ONLY[state % len(_WORDS_ONLY)]


@dataclass(slots=True)
class _Open:
    """A sequence in a slot, and how many tokens of its answer have been chosen."""

    prompt: tuple[int, ...]
    seed: int
    num_probs: int = 0
    num_chosen: int = 0
    guard: ThoughtGuard | None = None


def _certain(tokens: Sequence[int], num_probs: int) -> tuple[TokenProbs, ...]:
    """A fake is sure of what it says."""
    sure = (TokenProbs(token, 0.0, PIECES[token]) for token in tokens)
    return tuple(replace(each, top=(each,)) for each in sure) if num_probs else ()


class FakeBackend:
    """Implements Backend, and checks what it is told about slots: ValueError where tokens would not be what they must.

    A step takes seconds_per_step + seconds_per_token * tokens, spent in sleep; with half of n_threads, twice as long.

    answer: what is generated. answer_tokens: after so many tokens the answer ends, never if None.
    supports_adapters: load adapters, of any existing file that is not empty; a vector changes the seed of the answer.
    seconds_per_switch: what a step costs in addition where its vector is not that of the step before.
    """

    def __init__(
        self,
        n_slots: int,
        n_ctx: int,
        seconds_per_step: float = 0.0,
        seconds_per_token: float = 0.0,
        *,
        answer: Answer = invented_answer,
        answer_tokens: int | None = None,
        n_vocab: int = 2**31 - 1,
        max_step_tokens: int = 512,
        supports_adapters: bool = False,
        seconds_per_switch: float = 0.0,
        abilities: Abilities | None = None,
        adds_bos: bool = False,
        max_draft_tokens: int = 256,
        n_threads: int = 1,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.n_slots = n_slots
        self.n_ctx = n_ctx
        self.n_vocab = n_vocab
        self.max_step_tokens = max(max_step_tokens, n_slots)
        self.max_chunk_tokens = self.max_step_tokens
        self.supports_adapters = supports_adapters
        self.cost = _linear(seconds_per_step, seconds_per_token)
        self._answer = answer
        self._answer_tokens = answer_tokens
        self._sleep = sleep
        self._open: dict[int, _Open] = {}
        self._detached: dict[int, _Open] = {}
        self._num_detached = 0
        self._seconds_per_switch = seconds_per_switch
        self._attached: AdapterVector = ()
        self._held: dict[int, list[tuple[int, AdapterVector]]] = {}
        self.abilities = abilities or Abilities()
        self.adds_bos = adds_bos
        self.max_draft_tokens = max_draft_tokens
        self.n_threads = self.threads_now = n_threads
        self._loaded: set[str] = set()

    def sibling(self) -> FakeBackend:
        backend = copy.copy(self)
        backend._open, backend._held, backend._attached, backend._detached = {}, {}, (), {}
        backend.threads_now = self.n_threads
        return backend

    def embedder(self) -> EmbeddingBackend:
        from inference.engine.fake_embedder import FakeEmbedder  # with numpy, which few need

        return FakeEmbedder(self.n_ctx, seconds_per_token=self.cost.seconds(1), sleep=self._sleep)

    def set_threads(self, number: int) -> None:
        self.threads_now = number

    @property
    def adapters(self) -> frozenset[str]:
        return frozenset(self._loaded)

    def load_adapter(self, digest: str, path: str | Path) -> None:
        path = Path(path)
        if not path.is_file() or path.stat().st_size == 0:
            raise EngineError("adapter_file_invalid", f"{path} is no adapter")
        self._loaded.add(digest)

    def unload_adapter(self, digest: str) -> None:
        self._loaded.discard(digest)

    def open(
        self, slot_id: int, prompt: Sequence[int], sampling: SamplingParams, seed: int, num_cached: int = 0
    ) -> None:
        if not 0 <= slot_id < self.n_slots or slot_id in self._open:
            raise ValueError(f"slot {slot_id} cannot be opened")
        kept = self._held.get(slot_id, [])[:num_cached]
        if [token for token, _ in kept] != list(prompt[:num_cached]) or num_cached >= len(prompt):
            raise ValueError(f"slot {slot_id} does not hold the first {num_cached} tokens of this prompt")
        self._held[slot_id] = kept
        seed = 0 if sampling.temperature <= 0 else seed
        guard = ThoughtGuard(sampling.thoughts, self.piece) if sampling.thoughts else None
        self._open[slot_id] = _Open(tuple(prompt), seed, num_probs=sampling.num_probs, guard=guard)

    def copy(self, source_id: int, target_id: int) -> None:
        if target_id in self._open:
            raise ValueError(f"slot {target_id} is in use")
        self._held[target_id] = list(self._held.get(source_id, []))

    def execute(self, work: Sequence[SlotWork], adapters: AdapterVector) -> list[Chosen]:
        if missing := {digest for digest, _ in adapters} - self.adapters:
            raise ValueError(f"adapters {sorted(missing)} are not loaded")
        if sum(part.num_drafted for part in work) > self.max_draft_tokens:
            raise ValueError("more guesses than a step can verify")
        seconds = self.cost.seconds(sum(len(part.tokens) for part in work))
        if adapters != self._attached:
            self._attached = adapters
            seconds += self._seconds_per_switch
        if seconds > 0:
            self._sleep(seconds * self.n_threads / self.threads_now)
        for part in work:
            self._hold(part, adapters)
        return [self._choose(part, adapters) if part.samples else NOTHING for part in work]

    def _hold(self, part: SlotWork, adapters: AdapterVector) -> None:
        held = self._held[part.slot_id]
        if not part.tokens:
            raise ValueError(f"nothing is to be computed in slot {part.slot_id}")
        if part.start != len(held) or any(vector != adapters for _, vector in held):
            raise ValueError(f"slot {part.slot_id} holds {len(held)} tokens, or some of another adapter vector")
        if len(held) + len(part.tokens) > self.n_ctx:
            raise ValueError(f"slot {part.slot_id} has no room for {len(part.tokens)} tokens more")
        held.extend((token, adapters) for token in part.tokens)

    def _choose(self, part: SlotWork, adapters: AdapterVector) -> Chosen:
        """The answer's next tokens, up to the first that the draft did not guess; wrong guesses are forgotten."""
        opened = self._open[part.slot_id]
        tokens = []
        for guess in (*part.tokens[len(part.tokens) - part.num_drafted :], None):
            tokens.append(self._next_token(opened, adapters))
            opened.num_chosen += 1
            if tokens[-1] != guess:
                break
        held = self._held[part.slot_id]
        del held[len(held) - (part.num_drafted + 1 - len(tokens)) :]
        return Chosen(tuple(tokens), probs=_certain(tokens, opened.num_probs))

    def _next_token(self, opened: _Open, adapters: AdapterVector) -> int:
        seed = opened.seed ^ (zlib.crc32(repr(adapters).encode()) if adapters else 0)
        index = opened.num_chosen
        token = END if index == self._answer_tokens else self._answer(opened.prompt, seed, index)
        if opened.guard is None:
            return token
        due = opened.guard.due()
        token = token if due is None else due
        opened.guard.take(token)
        return token

    def shift(self, slot_id: int, num_keep: int, num_discard: int) -> None:
        held = self._held[slot_id]
        if num_keep + num_discard > len(held) or num_discard < 1:
            raise ValueError(f"slot {slot_id} has no {num_discard} tokens behind the first {num_keep}")
        del held[num_keep : num_keep + num_discard]

    def save(self, slot_id: int) -> bytes:
        return json.dumps(self._held.get(slot_id, [])).encode()

    def restore(self, slot_id: int, state: bytes) -> None:
        self.erase(slot_id)
        try:
            held = json.loads(state)  # ast.literal_eval fails at times where several threads call it
            self._held[slot_id] = [(token, tuple(tuple(pair) for pair in vector)) for token, vector in held]
        except (ValueError, TypeError) as error:
            raise EngineError("state_invalid", "these bytes are no state") from error

    def trim(self, slot_id: int, num_tokens: int) -> None:
        held = self._held[slot_id]
        if len(held) < num_tokens:
            raise ValueError(f"slot {slot_id} holds {len(held)} tokens, not {num_tokens}")
        del held[num_tokens:]

    def erase(self, slot_id: int) -> None:
        self._held.pop(slot_id, None)

    def piece(self, token: int) -> bytes:
        return PIECES[token]

    def shown_piece(self, token: int) -> bytes:
        return PIECES[token] or b"<end>"

    def is_end(self, token: int) -> bool:
        return token == END

    def detach(self, slot_id: int) -> int:
        self._num_detached += 1
        self._detached[self._num_detached] = self._open.pop(slot_id)
        self.erase(slot_id)
        return self._num_detached

    def attach(self, slot_id: int, number: int) -> None:
        if slot_id in self._open:
            raise ValueError(f"slot {slot_id} is in use")
        self._open[slot_id] = self._detached.pop(number)

    def drop(self, number: int) -> None:
        del self._detached[number]

    def close(self, slot_id: int) -> None:
        self._open.pop(slot_id, None)

    def free(self) -> None:
        self._open.clear()
        self._detached.clear()


def _linear(seconds_per_step: float, seconds_per_token: float) -> CostCurve:
    """The fake's speed as a cost curve, known without measuring; empty for an instant backend."""
    if seconds_per_step <= 0 and seconds_per_token <= 0:
        return CostCurve()
    return CostCurve(tuple((n, seconds_per_step + seconds_per_token * n) for n in (1, 256)))

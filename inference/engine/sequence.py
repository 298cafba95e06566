"""A request that the engine has taken: its tokens, its text, how far it is computed, and what that has cost.

State only, on the engine's thread; the engine decides what happens to it. The one number is num_computed: prefill,
chunk, decode and draft verification all advance it, and a sequence whose tokens are all computed but for the last
batch of them is decoding.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from inference.engine.backend import SlotWork
from inference.engine.plan import NOTHING_SHARED, Candidate
from inference.engine.prefix import CacheKey, Held, common_prefix
from inference.engine.stop import TextAssembler
from inference.engine.types import GenerationRequest, Receipt, SlotTask, effective

MIN_ROOM = 4
"""A context shift leaves room for so many tokens behind those that are kept."""


@dataclass(frozen=True, slots=True)
class ParkedState:
    """What a sequence goes on with in another slot: what the backend saved and detached (backend.py)."""

    state: bytes
    detached: int


class Sequence:
    """A live sequence. submitted_at and the other times are monotonic seconds of the engine's clock."""

    __slots__ = (
        "_batch_sequences",
        "_decode_batch_sequences",
        "_decode_steps",
        "_num_steps",
        "adapters",
        "arrived_step",
        "cache_key",
        "cached_tokens",
        "common",
        "first_token_at",
        "is_truncated",
        "last_step",
        "num_accepted",
        "num_completion",
        "num_computed",
        "num_drafted",
        "num_exact",
        "num_parks",
        "parked",
        "parked_at",
        "parked_seconds",
        "request",
        "seed",
        "slot_id",
        "slot_number",
        "started_at",
        "stored",
        "submitted_at",
        "text",
        "tokens",
    )

    def __init__(self, request: GenerationRequest, *, seed: int, submitted_at: float, arrived_step: int = 0) -> None:
        self.request = request
        self.adapters = effective(request.adapters)
        self.cache_key: CacheKey | None = None
        if request.cache_scope is not None:
            self.cache_key = request.cache_scope, self.adapters
        self.cached_tokens = 0
        self.common: dict[str, int] = {}  # prompt tokens in common with another request's prompt; prompts never change
        self.arrived_step = arrived_step
        self.seed = seed
        self.submitted_at = submitted_at
        self.started_at: float | None = None
        self.first_token_at: float | None = None
        self.slot_id: int | None = None
        self.slot_number: int | None = None  # what its scope calls the slot
        self.stored = (-1, 0)  # version of the state store, and tokens of the prompt that it has
        self.tokens = list(request.prompt)
        self.num_computed = 0
        self.num_completion = 0
        self.num_drafted = 0
        self.num_accepted = 0
        self.num_exact = sys.maxsize  # tokens from the first on that another prompt may reuse: see shift()
        self.parked: ParkedState | None = None
        self.parked_at = 0.0
        self.parked_seconds = 0.0
        self.num_parks = 0
        self.is_truncated = False
        self.last_step = -1
        self.text = TextAssembler(request.stop, request.decoding.min_indent)
        self._num_steps = 0
        self._batch_sequences = 0
        self._decode_steps = 0
        self._decode_batch_sequences = 0

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def is_decoding(self) -> bool:
        return self.num_completion > 0

    @property
    def is_prompt_done(self) -> bool:
        """The prompt is all that was wanted, and is computed."""
        return self.request.max_tokens == 0 and self.num_computed == len(self.tokens)

    def append(self, token: int) -> None:
        """One more token is chosen."""
        self.tokens.append(token)
        self.num_completion += 1

    def reuse(self, num_cached: int) -> None:
        """The first num_cached tokens need not be computed: the slot has them."""
        self.num_computed = self.cached_tokens = num_cached

    def shift(self, n_ctx: int, adds_bos: bool) -> tuple[int, int]:
        """Make room in a full context; returns how many of the first tokens are kept, and how many behind them go.

        What is behind the kept ones was computed in sight of what has gone: nobody else can reuse it from here on.
        """
        decoding, num_prompt = self.request.decoding, len(self.request.prompt)
        wanted = num_prompt if decoding.num_keep < 0 else min(decoding.num_keep + adds_bos, num_prompt)
        num_keep = max(0, min(wanted, n_ctx - MIN_ROOM))
        num_left = self.num_computed - num_keep
        num_discard = min(decoding.num_discard if decoding.num_discard > 0 else max(num_left // 2, 1), num_left)
        del self.tokens[num_keep : num_keep + num_discard]
        self.num_computed -= num_discard
        self.num_exact = min(self.num_exact, num_keep)
        self.is_truncated = True
        return num_keep, num_discard

    def held(self, used: int) -> Held | None:
        """What the slot still holds when this sequence has left it after step `used`."""
        reusable = self.tokens[: min(self.num_computed, self.num_exact)]
        return Held(self.cache_key, reusable, used, self.task()) if self.cache_key else None

    def task(self) -> SlotTask:
        """How far it is."""
        num_prompt = len(self.request.prompt)
        return SlotTask(
            request_id=self.request_id,
            num_prompt=num_prompt,
            num_cached=self.cached_tokens,
            num_processed=max(0, min(self.num_computed, num_prompt) - self.cached_tokens),
            num_decoded=self.num_completion,
            num_remaining=self.request.max_tokens - self.num_completion,
        )

    def num_shared(self, other: Sequence) -> int:
        """Tokens that the prompts of both begin with; 0 unless they may share."""
        if self.cache_key is None or self.cache_key != other.cache_key:
            return 0
        known = self.common.get(other.request_id)
        if known is None:
            known = self.common[other.request_id] = common_prefix(self.request.prompt, other.request.prompt)
        return known

    def num_reusable(self, other: Sequence) -> int:
        """Tokens of this prompt that the other, running, has computed; 0 unless they may share."""
        number = self.num_shared(other)
        if number and number == len(other.request.prompt):
            number += common_prefix(list(self.request.prompt[number:]), other.tokens[number:])
        return min(number, other.num_computed, other.num_exact)

    def candidate(
        self,
        prefixes: Mapping[int, int] | None = None,
        shared: Mapping[str, int] | None = None,
        number: int | None = None,
        stored: int = 0,
    ) -> Candidate:
        """How the scheduler sees this sequence. number: the slot of its scope that it waits for; stored: tokens of its
        prompt that can be restored."""
        return Candidate(
            self.request.request_id,
            len(self.tokens) - self.num_computed,
            self.is_decoding,
            self.adapters,
            self.last_step,
            self.arrived_step,
            prefixes or NOTHING_SHARED,
            shared or NOTHING_SHARED,
            self.request.cache_scope,
            number,
            stored,
            self.request.is_patient,
        )

    def work(self, slot_id: int, num_tokens: int, draft: Iterable[int] = ()) -> SlotWork:
        """The next num_tokens pending tokens as work for the backend, and a draft behind them; the last pending one
        samples, unless the prompt is all that is wanted. Fewer are pending than planned where the slot was filled with
        more of the prompt than the plan knew: taking an earlier seat may have stored it."""
        start, end = self.num_computed, min(self.num_computed + num_tokens, len(self.tokens))
        guesses = list(draft)
        samples = end == len(self.tokens) and self.request.max_tokens > 0
        return SlotWork(slot_id, start, self.tokens[start:end] + guesses, samples, len(guesses))

    def count_draft(self, num_drafted: int, num_accepted: int) -> None:
        """Book a verified draft. Its accepted tokens are computed already: the next step starts behind them."""
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        self.num_computed += num_accepted

    def count_step(self, step: int, num_tokens: int, num_sequences: int) -> None:
        """Book an executed step that carried num_tokens of this sequence, without a draft's, among num_sequences."""
        self.last_step = step
        self._num_steps += 1
        self._batch_sequences += num_sequences
        if self.is_decoding:
            self._decode_steps += 1
            self._decode_batch_sequences += num_sequences
        self.num_computed += num_tokens

    def receipt(self, now: float) -> Receipt:
        """What has been computed up to now. A sequence that never started has only queued."""
        started = now if self.started_at is None else self.started_at
        first_token = now if self.first_token_at is None else self.first_token_at
        parked = now - self.parked_at if self.parked else 0.0
        return Receipt(
            prompt_tokens=len(self.request.prompt),
            cached_tokens=self.cached_tokens,
            completion_tokens=self.num_completion,
            drafted_tokens=self.num_drafted,
            accepted_tokens=self.num_accepted,
            is_truncated=self.is_truncated,
            held_tokens=0 if self.slot_number is None else self.num_computed,  # vectors need no slot
            num_parks=self.num_parks,
            parked_seconds=self.parked_seconds + parked,
            queue_seconds=started - self.submitted_at,
            prefill_seconds=first_token - started,
            decode_seconds=now - first_token,
            num_steps=self._num_steps,
            batch_sequences=self._batch_sequences,
            decode_steps=self._decode_steps,
            decode_batch_sequences=self._decode_batch_sequences,
            slot_id=self.slot_number,
            seed=self.seed,
        )

"""A proposer with a model of its own: a smaller one of the same vocabulary guesses what the served one will say.

On the engine's thread after load(). Its sequences are the slots of the served model. It keeps up with them on its own:
whatever it holds beyond what a sequence has in common with it is forgotten, so wrong guesses need no report.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from inference.engine.backend import SlotWork
from inference.engine.costs import CostCurve, measure
from inference.engine.llama import abilities
from inference.engine.llama.backend import LlamaBackend
from inference.engine.llama.batch import Batch
from inference.engine.llama.library import native, token_texts
from inference.engine.llama.loading import (
    checked_file,
    load_model,
    make_context,
    step_tokens,
    trained_context,
    usable_cpus,
)
from inference.engine.prefix import common_prefix
from inference.engine.speculative import Ask, vocabulary_problem
from inference.engine.types import EngineError

logger = logging.getLogger(__name__)

CATCH_UP_SECONDS = 0.03
"""What one call may spend on reading texts that it has not seen, so that a long prompt stalls nobody."""
MIN_CATCH_UP_TOKENS = 16
USUALLY_BEHIND = 2
"""After a draft that was right to its end: its last guess, and the token that followed it."""


@dataclass(slots=True)
class _Guessing:
    """An ask that is being answered, and the row of scores that its next guess is read from."""

    ask: Ask
    num_max: int
    row: int = -1
    guesses: list[int] = field(default_factory=list)


class DraftModel:
    """Implements Proposer with a model and context of its own. Made by load()."""

    is_free = False

    def __init__(self, model: Any, context: Any, *, n_ctx: int, n_slots: int, n_vocab: int) -> None:
        """n_vocab: tokens that the served model knows, too."""
        self._model = model
        self._context = context
        self._n_ctx = n_ctx
        self._n_vocab = n_vocab
        self._memory = native.llama_get_memory(context)
        self._vocab = native.llama_model_get_vocab(model)
        self._batch = Batch(step_tokens(n_slots))
        self._held: list[list[int]] = [[] for _ in range(n_slots)]
        self._is_freed = False
        self.cost = CostCurve()
        self._catch_up_tokens = MIN_CATCH_UP_TOKENS
        self._can_shift = False

    @classmethod
    def load(
        cls, path: str | Path, backend: LlamaBackend, *, n_threads: int | None = None, n_gpu_layers: int = 0
    ) -> DraftModel:
        """Load a draft model for a loaded backend. Raises EngineError "model_file_missing", "model_file_invalid",
        "model_does_not_fit" or "draft_model_unfit", with a message that says what to do."""
        file = checked_file(Path(path))
        model = load_model(file, n_gpu_layers, None)
        try:
            tokens = token_texts(native.llama_model_get_vocab(model))
            if problem := vocabulary_problem(backend.token_texts(), tokens):
                raise EngineError("draft_model_unfit", f"{file} cannot draft for this model: {problem}")
            n_ctx = trained_context(model, backend.n_ctx)
            n_slots = backend.n_slots
            context = make_context(model, n_ctx, n_slots, n_threads or usable_cpus(), "f16", None, n_slots)
        except BaseException:
            native.llama_model_free(model)
            raise
        draft = cls(model, context, n_ctx=n_ctx, n_slots=n_slots, n_vocab=min(backend.n_vocab, len(tokens)))
        draft._measure()
        return draft

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        """Greedy guesses, one more for every sequence that still asks in each batch."""
        answers = [_Guessing(ask, min(ask.num_max, self._n_ctx - len(ask.tokens))) for ask in asks]
        guessing = self._catch_up([answer for answer in answers if answer.num_max > 0])
        while guessing := [answer for answer in guessing if self._guess(answer)]:
            work = [
                SlotWork(answer.ask.slot_id, len(self._held[answer.ask.slot_id]), answer.guesses[-1:], True)
                for answer in guessing
            ]
            for answer, row in zip(guessing, self._decode(work), strict=True):
                answer.row = row
        return [answer.guesses for answer in answers]

    def _catch_up(self, answers: list[_Guessing]) -> list[_Guessing]:
        """Compute what is new in these sequences, those with least of it first; who has all of it can be guessed for.

        A text that is much longer than what one call may compute takes several, without a guess until the last.
        """
        left = max(self._catch_up_tokens, USUALLY_BEHIND * len(answers))
        missing = sorted(((self._missing(answer.ask), answer) for answer in answers), key=lambda each: len(each[0]))
        chosen = []
        for tokens, answer in missing:
            chunk = tokens[:left]
            left -= len(chunk)
            slot_id = answer.ask.slot_id
            if chunk:
                work = SlotWork(slot_id, len(self._held[slot_id]), chunk, samples=len(chunk) == len(tokens))
                chosen.append((work, answer))
        # llama.cpp computes sequences together only where they follow each other in rising order of their ids.
        chosen.sort(key=lambda each: each[0].slot_id)
        rows = self._decode([work for work, _ in chosen]) if chosen else []
        for (_, answer), row in zip(chosen, rows, strict=True):
            answer.row = row
        return [answer for work, answer in chosen if work.samples]

    def _missing(self, ask: Ask) -> list[int]:
        """Forget what the sequence does not have, and return what it has beyond that; its last token at least."""
        held, tokens = self._held[ask.slot_id], list(ask.tokens)
        self._cut(ask.slot_id, min(common_prefix(held, tokens), len(tokens) - 1))
        return tokens[len(held) :]

    def _cut(self, slot_id: int, num_kept: int) -> None:
        held = self._held[slot_id]
        if len(held) > num_kept:
            del held[num_kept:]
            native.llama_memory_seq_rm(self._memory, slot_id, num_kept, -1)

    def _guess(self, answer: _Guessing) -> bool:
        """Read the next guess; whether another may follow it. The one with the highest score, if it is sure enough."""
        scores = np.ctypeslib.as_array(native.llama_get_logits_ith(self._context, answer.row), (self._n_vocab,))
        token = int(scores.argmax())
        least = answer.ask.min_probability
        if least > 0 and 1.0 / float(np.exp(scores - scores[token]).sum()) < least:
            return False
        answer.guesses.append(token)
        return len(answer.guesses) < answer.num_max and not native.llama_vocab_is_eog(self._vocab, token)

    def _decode(self, work: Sequence[SlotWork]) -> list[int]:
        rows = self._batch.fill(work)
        status = native.llama_decode(self._context, self._batch.native)
        if status != 0:
            raise RuntimeError(f"llama_decode of the draft model failed with status {status}")
        for part in work:
            self._held[part.slot_id] += part.tokens
        return rows

    def num_behind(self, slot_id: int, num_tokens: int) -> int:
        return max(num_tokens - len(self._held[slot_id]) - USUALLY_BEHIND, 0)

    def open(self, slot_id: int, num_kept: int) -> None:
        self._cut(slot_id, num_kept)

    def shift(self, slot_id: int, num_keep: int, num_discard: int) -> None:
        held = self._held[slot_id]
        end = num_keep + num_discard
        if not self._can_shift or len(held) <= end:
            self._cut(slot_id, num_keep)
            return
        native.llama_memory_seq_rm(self._memory, slot_id, num_keep, end)
        native.llama_memory_seq_add(self._memory, slot_id, end, -1, -num_discard)
        del held[num_keep:end]

    def free(self) -> None:
        if not self._is_freed:
            self._is_freed = True
            native.llama_free(self._context)
            native.llama_model_free(self._model)

    def _measure(self) -> None:
        """Measure what steps cost, and see that wrong guesses can be forgotten. Raises EngineError."""

        def fill(start: int, num_tokens: int) -> None:
            self._decode([SlotWork(0, start, [0] * num_tokens, True)])

        def step(num_tokens: int) -> None:
            self.open(0, 0)
            fill(0, num_tokens)

        self.cost = measure(step, most=min(step_tokens(len(self._held)), self._n_ctx))
        self.open(0, 0)
        found = abilities.probe(self._model, self._context, fill)
        self._held[0].clear()
        if not found.trim:
            self.free()
            raise EngineError("draft_model_unfit", f"this model cannot draft: {found.reasons['trim']}")
        self._can_shift = found.shift
        within = self.cost.tokens_within(CATCH_UP_SECONDS, step_tokens(len(self._held)))
        self._catch_up_tokens = max(within, MIN_CATCH_UP_TOKENS)
        logger.info("cost of a draft model's step, (tokens, seconds): %s", self.cost.points)

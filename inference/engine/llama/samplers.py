"""A slot's sampler: the chain of native samplers that its SamplingParams stand for, its grammar, and what they choose.

The grammar is kept apart from the chain, as in llama.cpp's server (common/sampling.cpp): the chain chooses, the grammar
is asked about this one token, and only where it says no about all of them. A token that it does not allow is never
accepted into it: that would throw through ctypes and end the process.
"""

from __future__ import annotations

import ctypes
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from inference.engine import sampling
from inference.engine.backend import Chosen
from inference.engine.llama.candidates import Candidates, log_softmax, most_probable
from inference.engine.llama.library import accept, native, sample
from inference.engine.llama.prefixes import Prefixes
from inference.engine.sampling import SamplerStep
from inference.engine.thoughts import ThoughtGuard
from inference.engine.types import EngineError, SamplingParams, TokenProbs

MAX_GRAMMAR_SECONDS = 1.0
"""Processor time of one choice under a grammar. Grammars are bounded and tried out before they come here; should one
of them still explode in the middle of an answer, the answer ends and its neighbours go on."""

_TEXTS = re.compile(r'"(?:[^"\\]|\\.)*"|\[(?:[^\]\\]|\\.)*\]|#.*')
NO_CANDIDATE = "no_candidate"
DEAD_END = "grammar_dead_end"
TOO_SLOW = "grammar_too_slow"


class SlotSampler:
    """Chooses the tokens of one sequence, and remembers them as far as its samplers look back. free() it."""

    def __init__(
        self,
        vocab: Any,
        params: SamplingParams,
        *,
        prompt: Sequence[int],
        seed: int,
        n_ctx: int,
        end_tokens: tuple[int, ...],
        candidates: Candidates,
        prefixes: Prefixes,
        piece: Callable[[int], bytes],
        shown_piece: Callable[[int], bytes],
    ) -> None:
        """The chain has then seen the prompt; the grammar begins with the answer. candidates: shared by all slots.
        prefixes: of the whole vocabulary.

        Raises EngineError "invalid_sampling" or "invalid_grammar".
        """
        steps = sampling.chain(params, seed=seed, n_ctx=n_ctx, end_tokens=end_tokens)
        self._end_tokens = np.array(end_tokens, np.int32)
        self._banned = _banned(steps)
        self._candidates = candidates
        self._shown = np.array(sorted(set(params.shown_tokens)), np.int32)
        self._piece = _showing(frozenset(params.shown_tokens), piece, shown_piece) if params.shown_tokens else piece
        self._guard = ThoughtGuard(params.thoughts, self._piece) if params.thoughts else None
        self._num_probs = params.num_probs
        self._is_post = params.num_probs > 0 and params.post_sampling_probs
        self._is_greedy = steps[-1].name == "greedy"
        self._is_only_greedy = len(steps) == 1 and self._is_greedy
        self._chain = _chain(vocab, steps)
        self._grammar = None
        self._prefixes: Prefixes | None = None
        if params.grammar is not None:
            self._grammar = native.llama_sampler_init_grammar(vocab, params.grammar.encode(), b"root")
            if not self._grammar:
                self.free()
                raise EngineError("invalid_grammar", "llama.cpp refused the grammar")
            if not _names_tokens(params.grammar):  # else tokens may count that have no text
                self._prefixes = prefixes
        if window := sampling.memory_tokens(steps):
            for token in prompt[-window:]:
                accept(self._chain, token)

    def choose(self, context: Any, row: int, draft: Sequence[int] = ()) -> Chosen:
        """The token after this row of the batch; and where it is the first of the draft, the one after the next row,
        and so on: 1 to len(draft) + 1 tokens, fewer with an error. Each is chosen with the state that the sampler has
        without a draft."""
        is_near = self._guard is not None and self._guard.is_near(len(draft) + 1)
        if self._grammar is not None or self._num_probs or is_near:
            return self._choose_apart(context, row, draft)
        tokens = []
        for offset, guess in enumerate((*draft, None)):
            token = self._sample(context, row + offset)
            tokens.append(token)
            if self._guard is not None:
                self._guard.take(token)
            if token != guess:
                break
        return Chosen(tuple(tokens))

    def _sample(self, context: Any, row: int) -> int:
        """The next token, accepted by the chain. Nothing but "greedy" takes the first of the highest scores, which
        numpy finds without a copy of the vocabulary: 5 us in the place of 85."""
        if self._is_only_greedy:
            logits = self._candidates.logits(context, row)
            best = int(logits.argmax())
            if not np.isnan(logits[best]):  # llama.cpp passes by what is no number
                return best
        token: int = sample(self._chain, context, row)
        return token

    def _choose_apart(self, context: Any, row: int, draft: Sequence[int]) -> Chosen:
        """The same under a grammar, with probabilities, or where thoughts may have to end."""
        tokens: list[int] = []
        probs: list[TokenProbs] = []
        error = None
        for offset, guess in enumerate((*draft, None)):
            started = time.thread_time()
            token = self._next(context, row + offset)
            if token is None:
                error = NO_CANDIDATE if self._grammar is None else DEAD_END
                break
            due = self._due()
            token = token if due is None else due
            if self._num_probs:
                probs.append(self._probs(context, row + offset, token, is_due=due is not None))
            self._accept(token)
            tokens.append(token)
            if self._grammar is not None and time.thread_time() - started > MAX_GRAMMAR_SECONDS:
                error = TOO_SLOW
                break
            if token != guess:
                break
        return Chosen(tuple(tokens), tuple(probs), error)

    def _next(self, context: Any, row: int) -> int | None:
        """The next token, accepted nowhere yet. None: there is none that may be chosen."""
        candidates = self._candidates
        candidates.fill(context, row)
        token = candidates.choose(self._chain)
        if self._grammar is None or (token is not None and self._allows(token)):
            return token
        allowed = candidates.allowed(self._grammar, self._prefixes, self._shown)
        if not len(allowed):
            return None
        if np.isin(allowed, self._end_tokens).all():
            # The answer is complete and cannot go on: it ends, even where ignore_eos or a bias forbids it.
            candidates.fill_with(context, row, allowed)
            return candidates.choose_best()
        # Only what may be chosen: samplers make nonsense of candidates without a probability.
        free = allowed[~np.isin(allowed, self._banned)]
        candidates.fill_with(context, row, free)
        return candidates.choose(self._chain) if len(free) else None

    def _due(self) -> int | None:
        """What ends the thoughts, as soon as the grammar takes it."""
        due = None if self._guard is None else self._guard.due()
        return due if due is None or self._grammar is None or self._allows(due) else None

    def _allows(self, token: int) -> bool:
        """llama.cpp takes a control token for its name, so a grammar of texts would let it through, and it has none."""
        is_silent = self._prefixes is not None and not self._piece(token) and token not in self._end_tokens
        return not is_silent and self._candidates.allows(self._grammar, token)

    def _accept(self, token: int) -> None:
        if self._grammar is not None:
            accept(self._grammar, token)
        accept(self._chain, token)
        if self._guard is not None:
            self._guard.take(token)

    def _probs(self, context: Any, row: int, token: int, *, is_due: bool) -> TokenProbs:
        """As llama.cpp's server reports them: of the model's own logits, whatever bias, grammar and samplers made of
        them; or of what these have left, which is nothing else where the token is due."""
        if not self._is_post:
            logits = self._candidates.logits(context, row)
            places = most_probable(logits, self._num_probs)
            logprob, *others = log_softmax(logits, [token, *places])
            top = [self._one(place, value) for place, value in zip(places, others, strict=True)]
            return TokenProbs(token, logprob, self._piece(token), tuple(top))
        if is_due:
            return TokenProbs(token, 0.0, self._piece(token), (self._one(token, 0.0),))
        ids, shares = self._shares(token)
        logs = np.log(shares, out=np.full(len(shares), -math.inf), where=shares > 0)
        top = [self._one(ids[place], logs[place]) for place in most_probable(shares, self._num_probs)]
        return TokenProbs(token, float(logs[ids == token].max()), self._piece(token), tuple(top))

    def _one(self, token: int, logprob: float) -> TokenProbs:
        return TokenProbs(int(token), float(logprob), self._piece(int(token)))

    def _shares(self, token: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float64]]:
        """The candidates that are left, best first, and the probability of each."""
        left = self._candidates.left()
        left = left[np.argsort(-left["logit"], kind="stable")]
        if self._is_greedy:
            return left["id"], (left["id"] == token).astype(np.float64)
        return left["id"], left["p"].astype(np.float64)

    def free(self) -> None:
        native.llama_sampler_free(self._chain)
        if self._grammar:
            native.llama_sampler_free(self._grammar)


def _showing(
    shown: frozenset[int], piece: Callable[[int], bytes], shown_piece: Callable[[int], bytes]
) -> Callable[[int], bytes]:
    return lambda token: shown_piece(token) if token in shown else piece(token)


def _names_tokens(grammar: str) -> bool:
    """Whether it may name tokens (<...>): there is such a sign outside of its texts and classes."""
    return "<" in grammar and "<" in _TEXTS.sub("", grammar)


def _banned(steps: Sequence[SamplerStep]) -> npt.NDArray[np.int32]:
    """Tokens that the chain never chooses."""
    biases = next((step.arguments[0] for step in steps if step.name == "logit_bias"), ())
    return np.array([token for token, bias in biases if bias == -math.inf], np.int32)


def _chain(vocab: Any, steps: Sequence[SamplerStep]) -> Any:
    """A native chain of these samplers, which owns them."""
    params = native.llama_sampler_chain_default_params()
    params.no_perf = True
    chain = native.llama_sampler_chain_init(params)
    for step in steps:
        sampler = _sampler(vocab, step)
        if not sampler:
            native.llama_sampler_free(chain)
            raise EngineError("invalid_sampling", f"llama.cpp refused the sampler {step.name}")
        native.llama_sampler_chain_add(chain, sampler)
    return chain


def _sampler(vocab: Any, step: SamplerStep) -> Any:
    name, arguments = step.name, step.arguments
    if name == "logit_bias":
        entries = (native.llama_logit_bias * len(arguments[0]))(*arguments[0])
        return native.llama_sampler_init_logit_bias(native.llama_vocab_n_tokens(vocab), len(entries), entries)
    if name == "dry":
        breakers = [text.encode() for text in arguments[-1]]
        array = (ctypes.c_char_p * len(breakers))(*breakers)
        return native.llama_sampler_init_dry(vocab, *arguments[:-1], array, len(breakers))
    if name == "infill":
        return native.llama_sampler_init_infill(vocab)
    if name in ("penalties", "mirostat"):
        return NATIVE_SAMPLERS[name](native.llama_vocab_n_tokens(vocab), *arguments)
    return NATIVE_SAMPLERS[name](*arguments)


NATIVE_SAMPLERS: dict[str, Callable[..., Any]] = {
    "penalties": native.llama_sampler_init_penalties,
    "top_n_sigma": native.llama_sampler_init_top_n_sigma,
    "top_k": native.llama_sampler_init_top_k,
    "typ_p": native.llama_sampler_init_typical,
    "top_p": native.llama_sampler_init_top_p,
    "min_p": native.llama_sampler_init_min_p,
    "xtc": native.llama_sampler_init_xtc,
    "temperature": native.llama_sampler_init_temp_ext,
    "mirostat": native.llama_sampler_init_mirostat,
    "mirostat_v2": native.llama_sampler_init_mirostat_v2,
    "dist": native.llama_sampler_init_dist,
    "greedy": native.llama_sampler_init_greedy,
}

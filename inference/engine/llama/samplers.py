"""A slot's sampler: the chain of native samplers that its SamplingParams stand for, and what it chooses."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

from inference.engine import sampling
from inference.engine.backend import Chosen
from inference.engine.llama.library import accept, native, sample
from inference.engine.sampling import SamplerStep
from inference.engine.types import EngineError, SamplingParams


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
    ) -> None:
        """The chain has then seen the prompt. Raises EngineError "invalid_sampling"."""
        steps = sampling.chain(params, seed=seed, n_ctx=n_ctx, end_tokens=end_tokens)
        self._chain = _chain(vocab, steps)
        if window := sampling.memory_tokens(steps):
            for token in prompt[-window:]:
                accept(self._chain, token)

    def choose(self, context: Any, row: int, draft: Sequence[int] = ()) -> Chosen:
        """The token after this row of the batch; and where it is the first of the draft, the one after the next row,
        and so on: 1 to len(draft) + 1 tokens. Each is chosen with the state that the sampler has without a draft."""
        tokens = []
        for offset, guess in enumerate((*draft, None)):
            token = sample(self._chain, context, row + offset)
            tokens.append(token)
            if token != guess:
                break
        return Chosen(tuple(tokens))

    def free(self) -> None:
        native.llama_sampler_free(self._chain)


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

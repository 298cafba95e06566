"""What the forest of prefixes finds allowed is what llama.cpp allows of the whole vocabulary."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from inference.engine import LlamaBackend
from inference.engine.llama.library import accept, native
from tests.structured.compiling import to_grammar
from tests.structured.corpus import EXAMPLES
from tests.structured.grammars import FINE

pytestmark = pytest.mark.model
NUM_STEPS = 10

GRAMMARS = {
    **{name: grammar for name, grammar in FINE.items() if "<" not in grammar},
    **{example.name: to_grammar(example.schema) for example in EXAMPLES[:12]},
    "characters of several bytes": 'root ::= ("é" | "€" | [α-ω] | "🦉" | "世")+',
}


@pytest.fixture(scope="module")
def backend(model_path: Path) -> Iterator[LlamaBackend]:
    backend = LlamaBackend.load(model_path, n_ctx=64, n_slots=1, n_threads=2)
    yield backend
    backend.free()


@pytest.mark.parametrize("grammar", GRAMMARS.values(), ids=GRAMMARS)
def test_the_same_tokens_are_allowed_at_every_place_of_a_text(backend: LlamaBackend, grammar: str) -> None:
    """Along a random walk; as characters are cut into tokens in every way, it also stops inside of them."""
    chance = random.Random(4)
    silent = [token for token in range(backend.n_vocab) if not backend.piece(token) and not backend.is_end(token)]
    sampler = native.llama_sampler_init_grammar(backend._vocab, grammar.encode(), b"root")
    for _ in range(NUM_STEPS):
        of_all = backend._candidates.allowed(sampler, None)
        expected = of_all[~np.isin(of_all, silent)].tolist()
        assert backend._candidates.allowed(sampler, backend._model.prefixes).tolist() == expected
        going_on = [token for token in expected if not backend.is_end(token)]
        if not going_on:
            break
        accept(sampler, chance.choice(going_on))
    native.llama_sampler_free(sampler)

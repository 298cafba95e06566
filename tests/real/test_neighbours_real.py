"""Company changes nothing: an answer alone is the answer among eight neighbours, some of which leave in the middle.

Every prompt under every adapter vector, with and without drafts. LLMSITE_NEIGHBOUR_PROMPTS=40 asks all prompts; the
suite asks a few of them.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest

from inference import demo_adapters
from inference.engine import AdapterVector, FinishReason, LlamaBackend, SamplingParams
from inference.engine.drafting import DraftPolicy, DraftSettings
from inference.engine.engine import Engine
from inference.engine.llama import DraftModel
from inference.engine.speculative import PromptLookup, Proposer
from inference.engine.tokenizer import Tokenizer
from inference.engine.types import Decoding, Speculation

from .test_engine_real import Run

pytestmark = pytest.mark.model

NUM_PROMPTS = int(os.environ.get("LLMSITE_NEIGHBOUR_PROMPTS", "4"))
NUM_TOGETHER = 9
NUM_ANSWERED = 6
"""Of those together; the others leave before they have an answer."""
MAX_TOKENS = 12
FOLDER = Path(demo_adapters.__file__).parent
FILES = {
    "poet": FOLDER / "smollm2-135m-shakespeare.gguf",
    "clerk": FOLDER / "smollm2-135m-json-reply.gguf",
}
VECTORS: tuple[AdapterVector, ...] = ((), (("poet", 1.0),), (("clerk", 0.5), ("poet", 0.5)))
NO_DRAFTS = Speculation(num_max=0)
OPENINGS = (
    "The capital of France is",
    "one two three four one two three four one two",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "I believe the meaning of life is",
    "Look in thy glass",
    "Once upon a time, in a village by the sea,",
    "Q: What is the tallest mountain?\nA:",
    "Dear Alice,\nthank you for",
)
ENDINGS = ("", " Well,", " In short:", " 1, 2, 3,", "\n\n")
PROMPTS = [opening + ending for ending, opening in product(ENDINGS, OPENINGS)]


@dataclass(frozen=True)
class Case:
    prompt: int
    vector: AdapterVector
    drafts: bool

    def add_to(self, run: Run, request_id: str) -> None:
        """Every other prompt is answered with a temperature and a seed."""
        seeded = SamplingParams(temperature=0.9, seed=self.prompt)
        run.add(
            request_id,
            PROMPTS[self.prompt],
            max_tokens=MAX_TOKENS,
            adapters=self.vector,
            sampling=seeded if self.prompt % 2 else SamplingParams(temperature=0.0),
            decoding=Decoding(speculation=None if self.drafts else NO_DRAFTS),
        )


CASES = [Case(*parts) for parts in product(range(min(NUM_PROMPTS, len(PROMPTS))), VECTORS, (False, True))]


@pytest.fixture(scope="module")
def backend(model_path: Path) -> Iterator[LlamaBackend]:
    backend = LlamaBackend.load(
        model_path, n_ctx=256, n_slots=NUM_TOGETHER, n_threads=2, max_draft_tokens=16 * NUM_TOGETHER
    )
    for digest, path in FILES.items():
        backend.load_adapter(digest, path)
    yield backend
    backend.free()


@pytest.fixture(params=["prompt lookup", "draft model"])
def proposer(request: pytest.FixtureRequest, model_path: Path, backend: LlamaBackend) -> Iterator[Proposer]:
    """The model guesses for itself without its adapters: right where there are none, and wrong now and then."""
    if request.param == "prompt lookup":
        yield PromptLookup()
        return
    draft = DraftModel.load(model_path, backend, n_threads=2)
    yield draft
    draft.free()


def drafting(backend: LlamaBackend, tokenizer: Tokenizer, proposer: Proposer) -> Run:
    run = Run(backend, tokenizer)
    run.engine = Engine(backend, proposer=proposer, draft_settings=DraftSettings(policy=DraftPolicy.ALWAYS))
    return run


def alone(backend: LlamaBackend, tokenizer: Tokenizer, case: Case) -> tuple[int, ...]:
    """Without anybody who could guess."""
    run = Run(backend, tokenizer)
    case.add_to(run, "r")
    return run.finish().tokens("r")


@dataclass(frozen=True)
class Company:
    """Answers, and how many guesses were verified and right in all of them."""

    answers: list[tuple[int, ...]]
    num_drafted: int
    num_accepted: int


def in_company(
    backend: LlamaBackend, tokenizer: Tokenizer, proposer: Proposer, cases: Sequence[Case], chance: random.Random
) -> Company:
    """The answers of up to NUM_ANSWERED cases that come one after the other, among others that leave at some step."""
    run = drafting(backend, tokenizer, proposer)
    leavers = {f"leaver {number}": chance.choice(CASES) for number in range(NUM_TOGETHER - len(cases))}
    everybody = {str(number): case for number, case in enumerate(cases)} | leavers
    arrivals = {name: chance.randrange(6) for name in everybody}
    leavings = {name: arrivals[name] + chance.randrange(1, MAX_TOKENS // 2) for name in leavers}
    step = 0
    while run.engine.has_work or step <= max(arrivals.values()):
        for name, case in everybody.items():
            if arrivals[name] == step:
                case.add_to(run, name)
            if leavings.get(name) == step:
                run.engine.cancel(name)
        run.step()
        step += 1
    run.finish()
    assert any(run.finished(name).reason is FinishReason.CANCELLED for name in leavers)
    receipts = [run.finished(str(number)).receipt for number in range(len(cases))]
    return Company(
        [run.tokens(str(number)) for number in range(len(cases))],
        sum(receipt.drafted_tokens for receipt in receipts),
        sum(receipt.accepted_tokens for receipt in receipts),
    )


@pytest.mark.slow
@pytest.mark.timeout(7200 if NUM_PROMPTS > 8 else 300)
def test_an_answer_alone_is_the_answer_among_eight_neighbours(
    backend: LlamaBackend, tokenizer: Tokenizer, proposer: Proposer
) -> None:
    chance = random.Random(14)
    expected = {(case.prompt, case.vector): alone(backend, tokenizer, case) for case in CASES if not case.drafts}
    different, num_drafted, num_accepted = [], 0, 0
    mixed = chance.sample(CASES, len(CASES))
    for first in range(0, len(mixed), NUM_ANSWERED):
        cases = mixed[first : first + NUM_ANSWERED]
        company = in_company(backend, tokenizer, proposer, cases, chance)
        num_drafted, num_accepted = num_drafted + company.num_drafted, num_accepted + company.num_accepted
        pairs = zip(cases, company.answers, strict=True)
        different += [case for case, tokens in pairs if tokens != expected[case.prompt, case.vector]]
    assert not different
    assert 0 < num_accepted < num_drafted, "guesses were verified, right ones and wrong ones"
    assert len({*expected.values()}) > len(expected) / 2, "the answers have something to differ in"

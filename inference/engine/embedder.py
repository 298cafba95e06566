"""Inputs to embed, beside the sequences that generate: which of them share a step, and what has become of each.

A collaborator of the engine, on its thread: between two steps that generate, one that embeds, so that neither waits for
long and both never compute at once. Inputs of many requests and tenants share a step; adapters take turns.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from inference.engine.backend import EmbeddingBackend, SlotWork, VectorPool
from inference.engine.sequence import Sequence as Request
from inference.engine.types import AdapterVector, Embedded, Embedding, EngineError, GenerationRequest

PIECE_TOKENS = 8
"""Inputs are cut at multiples of this, and the backend fills the last piece up: kernels of a CPU compute so many tokens
together, and those left over in another way. A step may always carry one piece, however little time is left."""


@dataclass(slots=True)
class _Input:
    """One input that has a place. start: of its tokens in the prompt of the request."""

    request: Request
    index: int
    start: int
    length: int
    pool: VectorPool
    num_computed: int = 0

    @property
    def num_pending(self) -> int:
        return self.length - self.num_computed

    @property
    def num_pieces(self) -> int:
        return -(-self.num_pending // PIECE_TOKENS)

    def work(self, place: int, num_tokens: int) -> SlotWork:
        begin = self.start + self.num_computed
        tokens = self.request.tokens[begin : begin + num_tokens]
        return SlotWork(place, self.num_computed, tokens, samples=False)


@dataclass(slots=True)
class _Left:
    """What of a request has no place yet: its inputs from the next one on, which starts at this token."""

    request: Request
    wanted: Embedding
    index: int = 0
    start: int = 0
    num_done: int = 0

    @property
    def length(self) -> int:
        return self.wanted.lengths[self.index] if self.index < len(self.wanted.lengths) else 0


@dataclass(slots=True)
class Step:
    """What one step has done: tokens by request, vectors, and the requests that have all of theirs."""

    num_inputs: int
    num_tokens: dict[str, int]
    embedded: list[Embedded]
    done: list[Request]


class Embedder:
    """The live requests for vectors of one backend. Requests have their turns in a circle, one input at a time."""

    def __init__(self, backend: EmbeddingBackend) -> None:
        self._backend = backend
        self._left: OrderedDict[str, _Left] = OrderedDict()
        self._inputs: dict[int, _Input] = {}

    @property
    def live(self) -> list[Request]:
        return [each.request for each in self._left.values()]

    def get(self, request_id: str) -> Request | None:
        left = self._left.get(request_id)
        return left.request if left else None

    def __len__(self) -> int:
        """Live requests: it is true while there are any."""
        return len(self._left)

    def check(self, request: GenerationRequest, wanted: Embedding) -> None:
        """Raises EngineError "invalid_request" or "prompt_too_long". Reads constants only."""
        if not wanted.lengths or min(wanted.lengths) < 1 or sum(wanted.lengths) != len(request.prompt):
            raise EngineError("invalid_request", "the lengths of the inputs are not those of the prompt")
        if max(wanted.lengths) > self._backend.n_ctx:
            raise EngineError("prompt_too_long", f"an input has more than {self._backend.n_ctx} tokens")

    def add(self, request: Request, wanted: Embedding) -> None:
        self._left[request.request_id] = _Left(request, wanted)

    def drop(self, request_id: str) -> None:
        """Forget a request that has ended, with all of its inputs. One that is not live is ignored."""
        if self._left.pop(request_id, None):
            for place in [each for each, held in self._inputs.items() if held.request.request_id == request_id]:
                self._give_back(place)

    def clear(self) -> None:
        """Forget everything, without touching the backend: it may be broken."""
        self._left.clear()
        self._inputs.clear()

    def set_threads(self, number: int) -> None:
        self._backend.set_threads(number)

    def free(self) -> None:
        self._backend.free()

    def step(self, tokens_within: Callable[[int], int]) -> Step:
        """One step of those whose turn it is. tokens_within(most): how many tokens there is time for."""
        adapters, shares = self._plan(tokens_within)
        places = sorted(shares)  # in the order in which llama.cpp batches sequences together
        work = [self._inputs[place].work(place, shares[place]) for place in places]
        found = self._backend.execute(work, adapters)
        step = Step(len(work), {}, [], [])
        for place, part, rows in zip(places, work, found, strict=True):
            held = self._inputs[place]
            held.pool.add(rows)
            held.num_computed += len(part.tokens)
            request_id = held.request.request_id
            step.num_tokens[request_id] = step.num_tokens.get(request_id, 0) + len(part.tokens)
            if not held.num_pending:
                self._finish(place, held, step)
        return step

    def _finish(self, place: int, held: _Input, step: Step) -> None:
        num_vectors, data = held.pool.result()
        request_id = held.request.request_id
        step.embedded.append(Embedded(request_id, held.index, num_vectors, data))
        self._give_back(place)
        left = self._left[request_id]
        left.num_done += 1
        if left.num_done == len(left.wanted.lengths):
            step.done.append(held.request)

    # plan

    def _plan(self, tokens_within: Callable[[int], int]) -> tuple[AdapterVector, dict[int, int]]:
        """The vector of adapters of the first request that has a place, and tokens by place. There is always one: where
        no place is left, inputs hold them that are not done. Whoever has none keeps its turn, and gets the next."""
        for request_id, left in tuple(self._left.items()):
            adapters = left.request.adapters
            self._seat(adapters)
            if any(each.request is left.request for each in self._inputs.values()):
                self._left.move_to_end(request_id)
                mine = {place: each for place, each in self._inputs.items() if each.request.adapters == adapters}
                return adapters, self._share(mine, tokens_within)
        raise RuntimeError("no input can go on")

    def _seat(self, adapters: AdapterVector) -> None:
        """Places for the next inputs of this vector's requests, in turn."""
        free = [place for place in range(self._backend.n_places) if place not in self._inputs]
        for place, left in zip(free, self._in_turn(adapters), strict=False):
            pool = self._backend.pool(left.wanted)
            self._inputs[place] = _Input(left.request, left.index, left.start, left.length, pool)
            left.index, left.start = left.index + 1, left.start + left.length

    def _in_turn(self, adapters: AdapterVector) -> Iterator[_Left]:
        """Requests that have an input without a place, again and again, from the one whose turn it is."""
        waiting = [each for each in self._left.values() if each.request.adapters == adapters]
        while waiting := [each for each in waiting if each.length]:
            for left in waiting:
                if left.length:
                    yield left

    def _share(self, inputs: dict[int, _Input], tokens_within: Callable[[int], int]) -> dict[int, int]:
        """Tokens by place. Where inputs are not split, as many whole ones as fit; the first one always does."""
        most = self._backend.max_step_tokens
        budget = min(max(tokens_within(most), PIECE_TOKENS), most)
        if not self._backend.splits_inputs:
            return self._whole(inputs, budget, most)
        pieces = self._pieces({place: each.num_pieces for place, each in inputs.items()}, budget // PIECE_TOKENS)
        return {place: min(number * PIECE_TOKENS, inputs[place].num_pending) for place, number in pieces.items()}

    @staticmethod
    def _pieces(pending: dict[int, int], budget: int) -> dict[int, int]:
        """Half of the step for the input that has its place the longest, the rest for the shortest first."""
        oldest = next(iter(pending))
        shares = {oldest: min(pending[oldest], budget if len(pending) == 1 else (budget + 1) // 2)}
        budget -= shares[oldest]
        for place in sorted(pending, key=pending.__getitem__):
            extra = min(pending[place] - shares.get(place, 0), budget)
            if extra > 0:
                shares[place] = shares.get(place, 0) + extra
                budget -= extra
        return shares

    @staticmethod
    def _whole(inputs: dict[int, _Input], budget: int, most: int) -> dict[int, int]:
        shares: dict[int, int] = {}
        for place, each in inputs.items():
            if shares and sum(shares.values()) + each.length > min(budget, most):
                break
            shares[place] = each.length
        return shares

    def _give_back(self, place: int) -> None:
        del self._inputs[place]
        self._backend.clear(place)

"""Who shares a step that embeds, and what becomes of each input: policy, with a fake backend."""

from __future__ import annotations

import numpy as np
import pytest

from inference.engine.embedder import Embedder
from inference.engine.engine import Engine
from inference.engine.fake_backend import FakeBackend
from inference.engine.fake_embedder import FakeEmbedder
from inference.engine.types import (
    AdapterVector,
    Delta,
    Embedded,
    Embedding,
    EngineError,
    Finished,
    GenerationRequest,
    Pooling,
)
from inference.engine.vectors import Pool, normalized

pytestmark = pytest.mark.unit

N_CTX = 64


def asked(name: str, *lengths: int, pooling: Pooling = Pooling.MEAN, **fields: object) -> GenerationRequest:
    prompt = tuple(range(1, sum(lengths) + 1))
    return GenerationRequest(
        request_id=name, prompt=prompt, max_tokens=0, embedding=Embedding(lengths=lengths, pooling=pooling), **fields
    )


class Bench:
    """An engine with a fake embedder, run step by step."""

    def __init__(self, embedder: FakeEmbedder | None = None, **options: object) -> None:
        self.embedder = embedder or FakeEmbedder(N_CTX)
        self.backend = FakeBackend(4, N_CTX, supports_adapters=True, **options)  # type: ignore[arg-type]
        self.engine = Engine(self.backend, embedder=self.embedder)
        self.vectors: dict[str, dict[int, bytes]] = {}
        self.finished: dict[str, Finished] = {}
        self.texts: dict[str, str] = {}

    def add(self, *requests: GenerationRequest) -> None:
        for request in requests:
            self.engine.check(request)
            self.engine.add(request, 0.0)

    def step(self) -> None:
        self.engine.step()
        for event in self.engine.take_events():
            if isinstance(event, Embedded):
                self.vectors.setdefault(event.request_id, {})[event.index] = event.data
            elif isinstance(event, Delta):
                self.texts[event.request_id] = self.texts.get(event.request_id, "") + event.text
            elif isinstance(event, Finished):
                self.finished[event.request_id] = event

    def run(self) -> None:
        for _ in range(1000):
            if not self.engine.has_work:
                return
            self.step()
        raise AssertionError("the engine does not come to an end")


def alone(request: GenerationRequest, embedder: FakeEmbedder | None = None) -> dict[int, bytes]:
    bench = Bench(embedder)
    bench.add(request)
    bench.run()
    return bench.vectors[request.request_id]


def test_inputs_of_several_requests_share_a_step_and_give_what_each_gives_alone() -> None:
    bench = Bench()
    requests = [asked("alice", 5, 9, 3), asked("bob", 7), asked("carol", 4, 6)]
    bench.add(*requests)
    bench.step()
    assert len(bench.embedder.steps[0]) == bench.embedder.n_places
    bench.run()
    for request in requests:
        assert bench.vectors[request.request_id] == alone(request)
        receipt = bench.finished[request.request_id].receipt
        assert (receipt.prompt_tokens, receipt.completion_tokens) == (len(request.prompt), 0)
        assert receipt.num_steps > 0
        assert (receipt.slot_id, receipt.held_tokens) == (None, 0)


def test_one_request_of_many_inputs_does_not_keep_another_waiting() -> None:
    bench = Bench()
    bench.add(asked("alice", *[8] * 200))
    bench.step()
    bench.add(asked("bob", 8))
    for _ in range(3):
        bench.step()
    assert "bob" in bench.finished
    bench.run()
    assert len(bench.vectors["alice"]) == 200


def test_a_long_input_comes_in_pieces_and_gets_its_room_though_short_ones_never_end() -> None:
    bench = Bench(FakeEmbedder(N_CTX, max_step_tokens=16))
    bench.add(*(asked(f"short-{number}", *[5] * 40) for number in range(4)))
    bench.step()
    bench.add(asked("long", N_CTX))
    for _ in range(60):
        bench.step()
    assert "long" in bench.finished
    assert bench.finished["long"].receipt.num_steps > 1
    assert bench.vectors["long"] == alone(asked("long", N_CTX))
    bench.run()


@pytest.mark.parametrize("adapters", [(), (("poet", 1.0),)], ids=["alike", "with an adapter"])
@pytest.mark.parametrize("num_others", range(1, 12))
def test_whoever_finds_no_place_keeps_its_turn(num_others: int, adapters: AdapterVector) -> None:
    """However steps and turns fall together: an input of each other at most comes first, and those that have places."""
    bench = Bench(FakeEmbedder(N_CTX, max_step_tokens=16))
    bench.backend._loaded.add("poet")
    bench.add(*(asked(f"long-{number}", *[N_CTX] * 40) for number in range(num_others)))
    for _ in range(5):
        bench.step()
    before = sum(map(len, bench.vectors.values()))
    bench.add(asked("short", 8, adapters=adapters))
    while "short" not in bench.finished and len(bench.finished) < num_others:
        bench.step()
    assert sum(map(len, bench.vectors.values())) - before <= num_others + bench.embedder.n_places + 1


@pytest.mark.parametrize("pooling", list(Pooling))
def test_every_pooling_is_the_same_however_an_input_is_cut(pooling: Pooling) -> None:
    wide, narrow = FakeEmbedder(N_CTX, max_step_tokens=64), FakeEmbedder(N_CTX, max_step_tokens=8)
    request = asked("one", 50, pooling=pooling)
    found, pieces = alone(request, wide)[0], alone(request, narrow)[0]
    assert len(found) == 4 * 8 * (50 if pooling is Pooling.NONE else 1)
    assert np.allclose(np.frombuffer(found, "<f4"), np.frombuffer(pieces, "<f4"), atol=1e-6)


def test_inputs_of_a_model_that_sees_all_tokens_at_once_are_never_cut() -> None:
    embedder = FakeEmbedder(N_CTX, splits_inputs=False)
    bench = Bench(embedder)
    bench.add(asked("alice", N_CTX, 3, 60), asked("bob", 30, 30))
    bench.run()
    computed = [number for step in embedder.steps for number in step.values()]
    assert sorted(computed) == sorted([N_CTX, 3, 60, 30, 30])
    assert max(sum(step.values()) for step in embedder.steps) <= N_CTX


def test_vectors_of_adapters_take_turns(tmp_path: object) -> None:
    bench = Bench()
    for digest in ("a", "b"):
        bench.backend._loaded.add(digest)
    requests = [
        asked("base", *[6] * 20),
        asked("first", *[6] * 20, adapters=(("a", 1.0),)),
        asked("second", *[6] * 20, adapters=(("b", 0.5),)),
    ]
    bench.add(*requests)
    for _ in range(6):
        bench.step()
    assert set(bench.vectors) == {"base", "first", "second"}
    bench.run()
    assert len({tuple(bench.vectors[each.request_id].values()) for each in requests}) == 3


def test_who_generates_gets_the_same_text_and_a_step_between_all_that_embed() -> None:
    generating = GenerationRequest(request_id="text", prompt=(1, 2, 3), max_tokens=12)
    quiet, busy = Bench(), Bench()
    for bench in (quiet, busy):
        bench.engine._draw_seed = lambda: 7
    quiet.add(generating)
    quiet.run()
    busy.add(asked("alice", *[8] * 100), generating)
    for _ in range(14):
        busy.step()
    assert busy.texts["text"] == quiet.texts["text"]
    assert "alice" not in busy.finished
    busy.run()
    assert len(busy.vectors["alice"]) == 100


def test_a_cancelled_request_leaves_its_places_and_others_go_on() -> None:
    bench = Bench()
    bench.add(asked("alice", N_CTX, N_CTX), asked("bob", 10, 10))
    bench.embedder.max_step_tokens = 8
    bench.step()
    bench.engine.cancel("alice")
    bench.run()
    assert bench.finished["alice"].reason == "cancelled"
    assert len(bench.vectors["bob"]) == 2
    assert bench.embedder._held == {}
    assert bench.engine.num_live == 0


def test_a_deadline_and_the_end_of_the_engine_end_requests_that_embed() -> None:
    bench = Bench()
    bench.add(asked("late", *[8] * 500, deadline=0.0), asked("other", *[8] * 500))
    bench.step()
    assert bench.finished["late"].reason == "deadline"
    bench.engine.end_all("worker_stopping")
    (event,) = bench.engine.take_events()
    assert isinstance(event, Finished)
    assert (event.request_id, event.error) == ("other", "worker_stopping")
    assert not bench.engine.has_work
    bench.engine.free()
    assert bench.embedder.is_freed


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (asked("none"), "invalid_request"),
        (asked("empty", 3, 0), "invalid_request"),
        (asked("long", N_CTX + 1), "prompt_too_long"),
        (
            GenerationRequest(
                request_id="x", prompt=(1,), max_tokens=0, embedding=Embedding(lengths=(2,), pooling=Pooling.MEAN)
            ),
            "invalid_request",
        ),
    ],
)
def test_what_does_not_fit_is_refused(request_: GenerationRequest, code: str) -> None:
    with pytest.raises(EngineError) as caught:
        Bench().engine.check(request_)
    assert caught.value.code == code


def test_an_engine_without_an_embedder_says_so() -> None:
    with pytest.raises(EngineError) as caught:
        Engine(FakeBackend(1, N_CTX)).check(asked("x", 3))
    assert caught.value.code == "embeddings_not_supported"


def test_an_embedder_has_no_live_requests_at_first() -> None:
    assert len(Embedder(FakeEmbedder(N_CTX))) == 0


def test_norms_are_llamacpps() -> None:
    rows = np.array([[3.0, -4.0], [0.0, 0.0]], np.float32)
    assert np.array_equal(normalized(rows, -1), rows)
    assert np.allclose(normalized(rows, 0), [[24570.0, -32760.0], [0, 0]])
    assert np.allclose(normalized(rows, 1), [[3 / 7, -4 / 7], [0, 0]])
    assert np.allclose(normalized(rows, 2), [[0.6, -0.8], [0, 0]])
    assert np.allclose(normalized(rows * 1e30, 64), [[0.75, -1.0], [0, 0]], atol=1e-3)


def test_dimensions_are_cut_before_a_vector_is_made_one_of_length_one() -> None:
    pool = Pool(Embedding(lengths=(1,), pooling=Pooling.LAST, dimensions=2))
    pool.add(np.array([[9.0, 9.0, 9.0], [3.0, -4.0, 12.0]], np.float32))
    number, data = pool.result()
    assert number == 1
    assert np.allclose(np.frombuffer(data, "<f4"), [0.6, -0.8])

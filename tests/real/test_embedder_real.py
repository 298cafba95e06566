"""Vectors by llama.cpp: the real model beside llama-cpp-python's own, and a small encoder made of random numbers."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

import inference
from inference.engine import EngineRunner, Finished, GenerationRequest, LlamaBackend, SamplingParams
from inference.engine.backend import SlotWork
from inference.engine.embedder import PIECE_TOKENS
from inference.engine.tokenizer import Tokenizer
from inference.engine.types import AdapterVector, Delta, Embedded, Embedding, Pooling, TokenEvent
from inference.vetting.inspection import check_header
from inference.vetting.trial import Trial
from tests.inference.gguf_files import ARRAY, STRING, build

pytestmark = [pytest.mark.model, pytest.mark.integration]

TEXTS = ["The cat sits on the mat.", "Interest rates rose again.", "Ships sail over the wide sea. " * 15]
WORDS = ["the", "cat", "sits", "on", "a", "mat", "and", "looks", "at", "sea", "ships", "sail", "wide", "over"]
ADAPTER = Path(inference.__file__).parent / "demo_adapters" / "smollm2-135m-shakespeare.gguf"
N_EMBD, N_FFN, N_ENCODER_CTX = 32, 64, 64


class Running:
    """A backend with an embedder, run by its engine's thread."""

    def __init__(self, backend: LlamaBackend) -> None:
        self.backend = backend
        self.embedder = backend.embedder()
        self._events: list[TokenEvent] = []
        self._changed = threading.Condition()
        self.runner = EngineRunner(backend, sink=self._note, embedder=self.embedder)
        self.runner.start()

    def _note(self, events: Sequence[TokenEvent]) -> None:
        with self._changed:
            self._events += events
            self._changed.notify_all()

    def finished(self, name: str) -> Finished:
        def found() -> Finished | None:
            ends = (each for each in self._events if isinstance(each, Finished) and each.request_id == name)
            return next(ends, None)

        with self._changed:
            end = self._changed.wait_for(found, 120)
        assert end is not None
        return end

    def submit(
        self, name: str, inputs: Sequence[Sequence[int]], pooling: Pooling, adapters: AdapterVector = ()
    ) -> None:
        wanted = Embedding(lengths=tuple(map(len, inputs)), pooling=pooling)
        prompt = tuple(token for tokens in inputs for token in tokens)
        self.runner.submit(
            GenerationRequest(request_id=name, prompt=prompt, max_tokens=0, embedding=wanted, adapters=adapters)
        )

    def vectors(self, name: str, n_embd: int) -> list[Any]:
        end = self.finished(name)
        assert end.error is None
        found = [each for each in self._events if isinstance(each, Embedded) and each.request_id == name]
        found.sort(key=lambda each: each.index)
        return [np.frombuffer(each.data, "<f4").reshape(each.num_vectors, n_embd) for each in found]

    def embed(self, name: str, inputs: Sequence[Sequence[int]], pooling: Pooling, n_embd: int = 576) -> list[Any]:
        self.submit(name, inputs, pooling)
        return self.vectors(name, n_embd)

    def text(self, name: str) -> str:
        self.finished(name)
        return "".join(each.text for each in self._events if isinstance(each, Delta) and each.request_id == name)


@pytest.fixture(scope="module")
def running(model_path: Path) -> Iterator[Running]:
    found = Running(LlamaBackend.load(model_path, n_ctx=256, n_slots=2, n_threads=2))
    yield found
    found.runner.stop()


@pytest.fixture(scope="module")
def inputs(model_path: Path) -> list[list[int]]:
    tokenizer = Tokenizer.load(model_path)
    return [tokenizer.encode(text, add_special=True) for text in TEXTS]


@pytest.mark.parametrize(("pooling", "native"), [(Pooling.MEAN, "MEAN"), (Pooling.LAST, "LAST"), (Pooling.CLS, "CLS")])
def test_a_vector_is_llama_cpp_pythons_own(running: Running, model_path: Path, pooling: Pooling, native: str) -> None:
    texts = [*TEXTS, *(f"The cat sits on the mat{' sea' * number}." for number in (0, 1, 9))]
    tokenizer = Tokenizer.load(model_path)
    inputs = [tokenizer.encode(text, add_special=True) for text in texts]
    assert any(len(tokens) % PIECE_TOKENS == 0 for tokens in inputs)
    found = running.embed(f"own-{native}", inputs, pooling)
    kind = getattr(llama_cpp, f"LLAMA_POOLING_TYPE_{native}")
    options: dict[str, Any] = {"embedding": True, "n_ctx": 256, "n_batch": 256, "n_ubatch": 256, "verbose": False}
    own = llama_cpp.Llama(str(model_path), pooling_type=kind, flash_attn=False, **options)
    try:
        wanted = [own.embed(text, normalize=True) for text in texts]
    finally:
        own.close()
    for mine, theirs, tokens in zip(found, wanted, inputs, strict=True):
        if len(tokens) % PIECE_TOKENS == 0:
            assert np.abs(mine[0] - theirs).max() < 1e-4
        assert mine[0] @ theirs > 0.999  # what is left over is computed in another order, and weights are of 4 bits


def test_company_and_pieces_change_no_bit(running: Running, inputs: list[list[int]]) -> None:
    alone = [running.embed(f"alone-{number}", [each], Pooling.LAST)[0] for number, each in enumerate(inputs)]
    for number in range(4):
        running.submit(f"company-{number}", inputs * 3, Pooling.LAST)
    together = [running.vectors(f"company-{number}", 576) for number in range(4)]
    assert all(np.array_equal(mine, wanted) for each in together for mine, wanted in zip(each, alone * 3, strict=True))


def test_inputs_that_share_a_step_are_what_they_are_alone(running: Running, inputs: list[list[int]]) -> None:
    embedder = running.backend.embedder()
    parts = [SlotWork(place, 0, tokens[:24], False) for place, tokens in enumerate(inputs)]
    try:
        together = [rows.copy() for rows in embedder.execute(parts, ())]
        for part, rows in zip(parts, together, strict=True):
            embedder.clear(part.slot_id)
            (alone,) = embedder.execute([part], ())
            assert alone.shape == (len(part.tokens), 576)
            assert np.array_equal(alone, rows)
    finally:
        embedder.free()


def test_what_is_generated_meanwhile_is_what_is_generated_alone(running: Running, inputs: list[list[int]]) -> None:
    greedy = SamplingParams(temperature=0.0)

    def generate(name: str) -> str:
        prompt = tuple(inputs[0])
        running.runner.submit(GenerationRequest(request_id=name, prompt=prompt, max_tokens=16, sampling=greedy))
        return name

    alone = running.text(generate("text-alone"))
    running.submit("meanwhile", inputs * 6, Pooling.MEAN)
    assert running.text(generate("text-beside")) == alone
    assert len(running.vectors("meanwhile", 576)) == 6 * len(TEXTS)


def test_an_adapter_changes_vectors_of_those_who_ask_for_it_alone(running: Running, inputs: list[list[int]]) -> None:
    plain = running.embed("plain", inputs, Pooling.MEAN)
    running.runner.load_adapter("shakespeare", ADAPTER)
    vectors: list[AdapterVector] = [(("shakespeare", 1.0),), (), (("shakespeare", 0.5),), (("shakespeare", 0.0),)]
    for number, vector in enumerate(vectors):
        running.submit(f"vector-{number}", inputs, Pooling.MEAN, vector)
    whole, base, half, none = (running.vectors(f"vector-{number}", 576) for number in range(4))
    assert all(
        np.array_equal(mine, wanted) for found in (base, none) for mine, wanted in zip(found, plain, strict=True)
    )
    for mine, other, wanted in zip(whole, half, plain, strict=True):
        assert np.abs(mine - wanted).max() > 1e-3
        assert np.abs(mine - other).max() > 1e-3
    running.runner.unload_adapter("shakespeare")
    assert np.array_equal(running.embed("after", inputs, Pooling.MEAN)[0], plain[0])


# An encoder


@pytest.fixture(scope="module")
def encoder_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BERT's architecture with two layers of random numbers, whose tokens see each other in both directions."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"▁{word}" for word in WORDS), "▁.", "."]
    changes: dict[str, Any] = dict.fromkeys(("llama.context_length", "llama.block_count", "llama.embedding_length"))
    changes |= {f"llama.attention.{key}": None for key in ("head_count", "head_count_kv")}
    changes |= {
        "general.architecture": (STRING, "bert"),
        "general.file_type": (4, 0),
        "bert.context_length": (4, N_ENCODER_CTX),
        "bert.embedding_length": (4, N_EMBD),
        "bert.feed_forward_length": (4, N_FFN),
        "bert.block_count": (4, 2),
        "bert.attention.head_count": (4, 2),
        "bert.attention.layer_norm_epsilon": (6, 1e-12),
        "bert.attention.causal": (7, False),
        "bert.pooling_type": (4, 1),
        "tokenizer.ggml.model": (STRING, "bert"),
        "tokenizer.ggml.token_type_count": (4, 2),
        "tokenizer.ggml.tokens": (ARRAY, (STRING, tokens)),
        "tokenizer.ggml.token_type": (ARRAY, (5, [3] * 5 + [1] * (len(tokens) - 5))),
        "tokenizer.ggml.padding_token_id": (4, 0),
        "tokenizer.ggml.unknown_token_id": (4, 1),
        "tokenizer.ggml.bos_token_id": (4, 2),
        "tokenizer.ggml.cls_token_id": (4, 2),
        "tokenizer.ggml.eos_token_id": (4, 3),
        "tokenizer.ggml.seperator_token_id": (4, 3),
        "tokenizer.ggml.mask_token_id": (4, 4),
        "tokenizer.ggml.add_bos_token": None,
        "tokenizer.chat_template": None,
    }
    tensors = _encoder_tensors(len(tokens))
    file = build(changes, tensors=tensors)
    number = sum(int(np.prod(shape)) for _, shape, _ in tensors)
    weights = np.random.default_rng(1).standard_normal(number).astype("<f4") * 0.3
    path = tmp_path_factory.mktemp("encoder") / "encoder.gguf"
    path.write_bytes(file[: -4 * number] + weights.tobytes())
    return path


def _encoder_tensors(n_vocab: int) -> tuple[tuple[str, tuple[int, ...], int], ...]:
    def with_bias(name: str, *shape: int) -> list[tuple[str, tuple[int, ...], int]]:
        return [(f"{name}.weight", shape, 0), (f"{name}.bias", shape[-1:], 0)]

    found = [
        ("token_embd.weight", (N_EMBD, n_vocab), 0),
        ("token_types.weight", (N_EMBD, 2), 0),
        ("position_embd.weight", (N_EMBD, N_ENCODER_CTX), 0),
        *with_bias("token_embd_norm", N_EMBD),
    ]
    for layer in range(2):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            found += with_bias(f"blk.{layer}.{name}", N_EMBD, N_EMBD)
        found += with_bias(f"blk.{layer}.attn_output_norm", N_EMBD)
        found += with_bias(f"blk.{layer}.ffn_up", N_EMBD, N_FFN) + with_bias(f"blk.{layer}.ffn_down", N_FFN, N_EMBD)
        found += with_bias(f"blk.{layer}.layer_output_norm", N_EMBD)
    return tuple(found)


def test_an_encoder_passes_its_trial_and_says_what_it_is(encoder_path: Path, tmp_path: Path) -> None:
    facts = check_header(encoder_path).summary()
    assert (facts["is_causal"], facts["pooling_type"], facts["embedding_length"]) == (False, 1, N_EMBD)
    from inference.gguf.header import write_vocabulary_only

    write_vocabulary_only(encoder_path, tmp_path / "vocabulary.gguf")
    report = Trial().run(encoder_path, tmp_path / "vocabulary.gguf")
    assert report["trained_context"] == N_ENCODER_CTX


def test_an_encoder_gives_llama_cpps_own_vectors_in_any_company(encoder_path: Path) -> None:
    texts = ["the cat sits on a mat", "ships sail over the wide sea", "the cat", "a mat and a cat " * 10]
    tokenizer = Tokenizer.load(encoder_path)
    inputs = [tokenizer.encode(text, add_special=True) for text in texts]
    assert [each[0] for each in inputs] == [2] * 4
    assert inputs[0][-1] == 3
    running = Running(LlamaBackend.load(encoder_path, n_ctx=N_ENCODER_CTX, n_slots=2, n_threads=2))
    try:
        assert not running.embedder.splits_inputs
        found = running.embed("all", inputs * 4, Pooling.MEAN, N_EMBD)
        alone = [running.embed(f"alone-{n}", [each], Pooling.MEAN, N_EMBD)[0] for n, each in enumerate(inputs)]
    finally:
        running.runner.stop()
    options: dict[str, Any] = {"embedding": True, "n_ctx": N_ENCODER_CTX, "verbose": False, "flash_attn": False}
    own = llama_cpp.Llama(str(encoder_path), **options)
    try:
        wanted = [own.embed(text, normalize=True) for text in texts]
    finally:
        own.close()
    for number, vector in enumerate(found):
        assert np.abs(vector[0] - wanted[number % 4]).max() < 1e-4
        assert np.allclose(vector, alone[number % 4], atol=1e-5)

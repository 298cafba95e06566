"""The one file of the engine that calls llama.cpp: one model, one context, one native sequence and sampler per slot.

Everything runs on the engine's thread after load(). KV memory is one stream per sequence (kv_unified off), which is
faster with many sequences; streams are computed together where slot ids are consecutive. Files come from the registry,
which has opened them in a child process first: a hostile GGUF can abort the process that loads it.
"""

from __future__ import annotations

import ctypes
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Read by OpenMP when llama.cpp is loaded. By default its threads spin 300,000 times at every barrier before they sleep:
# next to a single busy process a step of 6 ms then took 200 ms. With 300 spins it took 16 ms, with 1,000 26; alone it
# stays near 7 ms. "active" keeps OpenMP from falling to 100 spins, twice as slow, where several of our threads have
# computed.
os.environ.setdefault("OMP_WAIT_POLICY", "active")
os.environ.setdefault("GOMP_SPINCOUNT", "500")

import llama_cpp as native
import numpy as np

from inference.engine import sampling as sampling_chain
from inference.engine.backend import SlotWork
from inference.engine.costs import CostCurve, measure
from inference.engine.lora_file import write_padded
from inference.engine.sampling import SamplerStep
from inference.engine.types import AdapterVector, EngineError, SamplingParams

logger = logging.getLogger(__name__)

CONTEXT_STEP = 256
"""llama.cpp rounds the context of a sequence up to a multiple of this; our limit is exact and below it."""

MAX_STEP_TOKENS = 512
MAX_CPU_CHUNK = 63
"""From 64 tokens of one sequence on, llama.cpp's attention on a CPU takes another kernel, whose results differ in the
last bits and so in a token now and then. Below, prompts give the same tokens however they are cut."""
KV_TYPES = {"f16": native.GGML_TYPE_F16, "q8_0": native.GGML_TYPE_Q8_0, "q4_0": native.GGML_TYPE_Q4_0}
_FLASH_ATTENTION = {
    None: native.LLAMA_FLASH_ATTN_TYPE_AUTO,
    True: native.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    False: native.LLAMA_FLASH_ATTN_TYPE_DISABLED,
}
_LOG_LEVELS = {3: logging.WARNING, 4: logging.ERROR}
"""ggml's levels (debug 1, info 2, warn 3, error 4, continuation 5) that are forwarded; llama-cpp-python's own table is
of an older numbering."""


@native.llama_log_callback
def _forward_log(level: int, text: bytes, _user_data: object) -> None:
    """Kept at module level: llama.cpp calls it for as long as the process lives."""
    if level in _LOG_LEVELS:
        logger.log(_LOG_LEVELS[level], "llama.cpp: %s", text.decode("utf-8", "replace").rstrip())


def _with_gil(function: Any) -> Any:
    """The same native function, called without letting go of the GIL.

    For calls of microseconds, many a step: with a busy Python thread beside it, each release costs a switch interval
    (a sampler call of 0.04 ms took 5.2 ms).
    """
    library = ctypes.PyDLL(native.llama_cpp._lib._name)
    held = getattr(library, function.__name__)
    held.argtypes, held.restype = function.argtypes, function.restype
    return held


_sample = _with_gil(native.llama_sampler_sample)
_accept = _with_gil(native.llama_sampler_accept)
_piece = _with_gil(native.llama_token_to_piece)


class LlamaBackend:
    """Implements Backend with llama.cpp. Made by load(); n_ctx is the exact limit of a slot in tokens."""

    supports_adapters = True

    def __init__(self, model: Any, context: Any, *, n_ctx: int, n_slots: int, is_on_cpu: bool = True) -> None:
        self.n_ctx = n_ctx
        self.n_slots = n_slots
        self.max_step_tokens = _step_tokens(n_slots)
        self._model = model
        self._context = context
        self._memory = native.llama_get_memory(context)
        self._vocab = native.llama_model_get_vocab(model)
        self.n_vocab: int = native.llama_vocab_n_tokens(self._vocab)
        self._end_tokens = tuple(
            token for token in range(self.n_vocab) if native.llama_vocab_is_eog(self._vocab, token)
        )
        self._is_end = frozenset(self._end_tokens)
        self._pieces: dict[int, bytes] = {}
        self._samplers: dict[int, Any] = {}
        self._adapters: dict[str, Any] = {}
        self._attached: AdapterVector = ()
        self.adapters: frozenset[str] = frozenset()
        self._batch = _Batch(self.max_step_tokens)
        self._is_freed = False
        self.supports_reuse = False
        self._is_on_cpu = is_on_cpu
        self.max_chunk_tokens = MAX_CPU_CHUNK if is_on_cpu else self.max_step_tokens
        self.cost = CostCurve()

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        n_ctx: int,
        n_slots: int,
        n_threads: int | None,
        n_gpu_layers: int = 0,
        kv_type: str = "f16",
        flash_attention: bool | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> LlamaBackend:
        """Load a model and measure its cost curve. n_ctx: tokens per slot; progress: called with 0.0 to 1.0.

        n_threads: None takes one per CPU that this process may use. A context longer than the model was trained with is
        cut to that. Raises EngineError "model_file_missing", "model_file_invalid", "model_options_invalid" or
        "model_does_not_fit", with a message that says what to do.
        """
        _check_options(n_ctx, n_slots, kv_type, flash_attention)
        file = _checked_file(Path(path))
        native.llama_log_set(_forward_log, None)
        native.llama_backend_init()
        model = _load_model(file, n_gpu_layers, progress)
        try:
            n_ctx = _trained_context(model, n_ctx)
            context = _make_context(model, n_ctx, n_slots, n_threads or _usable_cpus(), kv_type, flash_attention)
        except BaseException:
            native.llama_model_free(model)
            raise
        backend = cls(model, context, n_ctx=n_ctx, n_slots=n_slots, is_on_cpu=n_gpu_layers == 0)
        backend._measure()
        return backend

    def open(
        self, slot_id: int, prompt: Sequence[int], sampling: SamplingParams, seed: int, num_cached: int = 0
    ) -> None:
        self.close(slot_id)
        if not native.llama_memory_seq_rm(self._memory, slot_id, num_cached, -1):
            raise RuntimeError(f"slot {slot_id} cannot be cut to {num_cached} tokens")
        steps = sampling_chain.chain(sampling, seed=seed, n_ctx=self.n_ctx, end_tokens=self._end_tokens)
        sampler = self._chain(steps)
        self._samplers[slot_id] = sampler
        if window := sampling_chain.memory_tokens(steps):
            for token in prompt[-window:]:
                _accept(sampler, token)

    def copy(self, source_id: int, target_id: int) -> None:
        """The whole stream: a part of one would abort the process. The data moves with the next decode, in the order of
        the calls and before anything is computed; which tokens a slot holds is known at once, so it can be cut now."""
        native.llama_memory_seq_cp(self._memory, source_id, target_id, -1, -1)

    def execute(self, work: Sequence[SlotWork], adapters: AdapterVector) -> list[tuple[int, ...]]:
        if adapters != self._attached:
            self._attach(adapters)
        rows = self._decode(work)
        context, samplers = self._context, self._samplers
        return [
            (_sample(samplers[part.slot_id], context, row),) if part.samples else ()
            for part, row in zip(work, rows, strict=True)
        ]

    def load_adapter(self, digest: str, path: str | Path) -> None:
        """Between steps, so that nothing is computed while the model changes. A known digest is left alone."""
        if digest in self._adapters:
            return
        file = _checked_file(Path(path), kind="adapter")
        try:
            with tempfile.NamedTemporaryFile(suffix=".gguf") as padded:
                is_padded = self._is_on_cpu and write_padded(file, padded.file)
                source = padded.name if is_padded else file
                adapter = native.llama_adapter_lora_init(self._model, os.fsencode(source))
        except OSError as error:
            raise EngineError("adapter_file_invalid", f"{file} cannot be prepared for this machine: {error}") from error
        if not adapter:
            raise EngineError(
                "adapter_file_invalid",
                f"llama.cpp cannot apply {file} to this model: the file is damaged, or made for another base model",
            )
        self._adapters[digest] = adapter
        self.adapters = frozenset(self._adapters)

    def unload_adapter(self, digest: str) -> None:
        """Detach everything, then free: the context must hold no pointer to what is gone."""
        if digest not in self._adapters:
            return
        self._attach(())
        native.llama_adapter_lora_free(self._adapters.pop(digest))
        self.adapters = frozenset(self._adapters)

    def _attach(self, adapters: AdapterVector) -> None:
        """The whole vector of the next step: what is not named is detached. Costs about 4 ms at the next decode."""
        number = len(adapters)
        handles = (native.llama_adapter_lora_p_ctypes * number)(*(self._adapters[digest] for digest, _ in adapters))
        scales = (ctypes.c_float * number)(*(scale for _, scale in adapters))
        status = native.llama_set_adapters_lora(self._context, handles, number, scales)
        if status != 0:
            raise RuntimeError(f"llama.cpp cannot attach {number} adapters (status {status})")
        self._attached = adapters

    def _decode(self, work: Sequence[SlotWork]) -> list[int]:
        """Compute the step; return the row of each part's last token."""
        rows = self._batch.fill(work)
        status = native.llama_decode(self._context, self._batch.native)
        if status != 0:
            raise RuntimeError(f"llama_decode failed with status {status} for {self._batch.native.n_tokens} tokens")
        native.llama_synchronize(self._context)  # waits without the GIL, so that sampling, with it, never waits
        return rows

    def piece(self, token: int) -> bytes:
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = token_bytes(self._vocab, token)
        return piece

    def is_end(self, token: int) -> bool:
        return token in self._is_end

    def close(self, slot_id: int) -> None:
        if sampler := self._samplers.pop(slot_id, None):
            native.llama_sampler_free(sampler)

    def free(self) -> None:
        if self._is_freed:
            return
        self._is_freed = True
        for slot_id in tuple(self._samplers):
            self.close(slot_id)
        native.llama_free(self._context)
        native.llama_model_free(self._model)  # and the adapters, which belong to it

    def _chain(self, steps: Sequence[SamplerStep]) -> Any:
        """A native chain of these samplers, which owns them."""
        params = native.llama_sampler_chain_default_params()
        params.no_perf = True
        chain = native.llama_sampler_chain_init(params)
        for step in steps:
            sampler = self._sampler(step)
            if not sampler:
                native.llama_sampler_free(chain)
                raise EngineError("invalid_sampling", f"llama.cpp refused the sampler {step.name}")
            native.llama_sampler_chain_add(chain, sampler)
        return chain

    def _sampler(self, step: SamplerStep) -> Any:
        name, arguments = step.name, step.arguments
        if name == "logit_bias":
            entries = (native.llama_logit_bias * len(arguments[0]))(*arguments[0])
            return native.llama_sampler_init_logit_bias(self.n_vocab, len(entries), entries)
        if name == "dry":
            breakers = [text.encode() for text in arguments[-1]]
            array = (ctypes.c_char_p * len(breakers))(*breakers)
            return native.llama_sampler_init_dry(self._vocab, *arguments[:-1], array, len(breakers))
        if name in ("penalties", "mirostat"):
            return _NATIVE_SAMPLERS[name](self.n_vocab, *arguments)
        return _NATIVE_SAMPLERS[name](*arguments)

    def _measure(self) -> None:
        """Measure what steps cost, with one sequence in slot 0, and empty the slot again."""

        def step(num_tokens: int) -> None:
            native.llama_memory_seq_rm(self._memory, 0, -1, -1)
            self._decode([SlotWork(0, 0, [0] * num_tokens, True)])

        most = min(self.max_step_tokens, self.n_ctx)
        self.cost = measure(step, most=most)
        self.supports_reuse = self._can_trim()
        native.llama_memory_seq_rm(self._memory, 0, -1, -1)
        logger.info("cost of a step, (tokens, seconds): %s", self.cost.points)

    def _can_trim(self) -> bool:
        """Whether slot 0 can forget its last token and keep those before: recurrent models cannot."""
        if native.llama_model_is_recurrent(self._model) or native.llama_model_is_hybrid(self._model):
            return False
        native.llama_memory_seq_rm(self._memory, 0, -1, -1)
        self._decode([SlotWork(0, 0, [0, 0], True)])
        return (
            bool(native.llama_memory_seq_rm(self._memory, 0, 1, -1))
            and native.llama_memory_seq_pos_max(self._memory, 0) == 0
        )


class _Batch:
    """A llama_batch over arrays of our own, filled in place for every step."""

    def __init__(self, size: int) -> None:
        self._tokens = np.zeros(size, np.int32)
        self._positions = np.zeros(size, np.int32)
        self._slot_ids = np.zeros(size, np.int32)
        self._outputs = np.zeros(size, np.int8)
        self._one_each = np.ones(size, np.int32)
        self._slot_id_pointers = (self._slot_ids.ctypes.data + 4 * np.arange(size)).astype(np.uintp)
        self.native = native.llama_batch(
            n_tokens=0,
            token=self._tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            pos=self._positions.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            n_seq_id=self._one_each.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            seq_id=self._slot_id_pointers.ctypes.data_as(ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
            logits=self._outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def fill(self, work: Sequence[SlotWork]) -> list[int]:
        """Write the step into the batch; return the row of each part's last token, the only one to ask for logits."""
        end = 0
        last_rows = []
        for part in work:
            start, end = end, end + len(part.tokens)
            self._tokens[start:end] = part.tokens
            self._positions[start:end] = range(part.start, part.start + len(part.tokens))
            self._slot_ids[start:end] = part.slot_id
            self._outputs[start:end] = 0
            self._outputs[end - 1] = part.samples
            last_rows.append(end - 1)
        self.native.n_tokens = end
        return last_rows


_NATIVE_SAMPLERS: dict[str, Callable[..., Any]] = {
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


def token_bytes(vocab: Any, token: int) -> bytes:
    """The text of a token as bytes; control tokens have none."""
    size = 64
    while True:
        buffer = ctypes.create_string_buffer(size)
        length = _piece(vocab, token, buffer, size, 0, False)
        if length >= 0:
            return buffer.raw[:length]
        size = -length


def _step_tokens(n_slots: int) -> int:
    """Room for every slot's next token and a prompt chunk beside them."""
    return max(MAX_STEP_TOKENS, 2 * n_slots)


def _usable_cpus() -> int:
    """CPUs that this process may run on; more threads than that only wait for each other."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_options(n_ctx: int, n_slots: int, kv_type: str, flash_attention: bool | None) -> None:
    problems = []
    if n_ctx < 2:
        problems.append(f"n_ctx is {n_ctx}, a slot needs at least 2 tokens")
    most = native.llama_max_parallel_sequences()
    if not 1 <= n_slots <= most:
        problems.append(f"n_slots is {n_slots}, it must be between 1 and {most}")
    if kv_type not in KV_TYPES:
        problems.append(f"kv_type is {kv_type!r}, it must be one of {', '.join(KV_TYPES)}")
    if kv_type != "f16" and flash_attention is False:
        problems.append(f"kv_type {kv_type} needs flash attention: leave flash_attention unset or switch it on")
    if problems:
        raise EngineError("model_options_invalid", "; ".join(problems))


def _checked_file(path: Path, kind: str = "model") -> Path:
    """The path of something that at least begins like a GGUF file. kind: model or adapter, for the error."""
    missing = "model_file_missing" if kind == "model" else "adapter_file_invalid"
    if not path.is_file():
        raise EngineError(missing, f"there is no {kind} file at {path}: check the path of the served {kind}")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise EngineError(missing, f"the {kind} file {path} cannot be read: {error.strerror}") from error
    if magic != b"GGUF":
        raise EngineError(f"{kind}_file_invalid", f"{path} is not a GGUF file: download or convert the {kind} again")
    return path


def _load_model(path: Path, n_gpu_layers: int, progress: Callable[[float], None] | None) -> Any:
    params = native.llama_model_default_params()
    params.n_gpu_layers = n_gpu_layers

    @native.llama_progress_callback
    def report(fraction: float, _user_data: object) -> bool:
        if progress is not None:
            progress(fraction)
        return True

    params.progress_callback = report
    model = native.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise EngineError(
            "model_file_invalid",
            f"llama.cpp cannot load {path}: the file is damaged, or of an architecture this version does not know; "
            "the log says which",
        )
    if not native.llama_model_has_decoder(model) or native.llama_model_has_encoder(model):
        native.llama_model_free(model)
        raise EngineError("model_file_invalid", f"{path} is no decoder-only model: it cannot generate text here")
    return model


def _trained_context(model: Any, n_ctx: int) -> int:
    trained = native.llama_model_n_ctx_train(model)
    if 0 < trained < n_ctx:
        logger.warning("n_ctx %d is more than the model was trained with; it is served with %d", n_ctx, trained)
        return int(trained)
    return n_ctx


def _make_context(
    model: Any, n_ctx: int, n_slots: int, n_threads: int, kv_type: str, flash_attention: bool | None
) -> Any:
    """A context with a KV stream per slot. Raises EngineError "model_does_not_fit"."""
    params = native.llama_context_default_params()
    params.n_ctx = n_slots * -(-n_ctx // CONTEXT_STEP) * CONTEXT_STEP
    params.n_seq_max = n_slots
    params.n_batch = _step_tokens(n_slots)
    params.n_ubatch = min(params.n_batch, MAX_STEP_TOKENS)
    params.n_outputs_max = n_slots  # one row of logits a sequence; sizes the compute buffer
    params.n_threads = params.n_threads_batch = n_threads
    params.kv_unified = False
    params.type_k = params.type_v = KV_TYPES[kv_type]
    # A quantized V cache works with flash attention only, and "auto" may switch it off.
    params.flash_attn_type = _FLASH_ATTENTION[True if kv_type != "f16" else flash_attention]
    params.no_perf = True
    context = native.llama_init_from_model(model, params)
    if not context:
        raise EngineError(
            "model_does_not_fit",
            f"no context for {n_slots} slots of {n_ctx} tokens: lower n_ctx or n_slots, or use kv_type q8_0",
        )
    if native.llama_n_ctx_seq(context) < n_ctx:
        native.llama_free(context)
        raise EngineError("model_does_not_fit", f"llama.cpp gives a slot fewer than {n_ctx} tokens: lower n_ctx")
    return context

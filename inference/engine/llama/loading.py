"""From a file to a native model and its context, or an error that says what to do.

Files come from the registry, which has opened them in a child process first: a hostile GGUF can abort the process that
loads it.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inference.engine.llama.library import native
from inference.engine.types import EngineError

logger = logging.getLogger(__name__)

CONTEXT_STEP = 256
"""llama.cpp rounds the context of a sequence up to a multiple of this; our limit is exact and below it."""

MAX_STEP_TOKENS = 512
CPU_EMBEDDING_TOKENS = 128
"""More at once are no faster on a CPU. Every one has a row of scores, 200 KB to 1 MB, twice."""
KV_TYPES = {"f16": native.GGML_TYPE_F16, "q8_0": native.GGML_TYPE_Q8_0, "q4_0": native.GGML_TYPE_Q4_0}
_FLASH_ATTENTION = {
    None: native.LLAMA_FLASH_ATTN_TYPE_AUTO,
    True: native.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    False: native.LLAMA_FLASH_ATTN_TYPE_DISABLED,
}


def step_tokens(n_slots: int) -> int:
    """Room for every slot's next token and a prompt chunk beside them."""
    return max(MAX_STEP_TOKENS, 2 * n_slots)


def usable_cpus() -> int:
    """CPUs that this process may run on; more threads than that only wait for each other."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_options(n_ctx: int, n_slots: int, kv_type: str, flash_attention: bool | None) -> None:
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


def checked_file(path: Path, kind: str = "model") -> Path:
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


def load_model(path: Path, n_gpu_layers: int, progress: Callable[[float], None] | None) -> Any:
    """A native model. Raises EngineError, and what `progress` raises, which ends the load."""
    params = native.llama_model_default_params()
    params.n_gpu_layers = n_gpu_layers
    raised: list[Exception] = []

    @native.llama_progress_callback
    def report(fraction: float, _user_data: object) -> bool:
        try:
            if progress is not None:
                progress(fraction)
        except Exception as error:  # noqa: BLE001 (it cannot cross llama.cpp, and is raised below)
            raised.append(error)
        return not raised

    params.progress_callback = report
    model = native.llama_model_load_from_file(os.fsencode(path), params)
    if raised:
        if model:
            native.llama_model_free(model)
        raise raised[0]
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


def meta(model: Any, key: str) -> str | None:
    """A value of the file's header, as llama.cpp writes it; None where it is not there or long."""
    buffer = ctypes.create_string_buffer(256)
    length = native.llama_model_meta_val_str(model, key.encode(), buffer, len(buffer))
    return buffer.value.decode("utf-8", "replace") if 0 <= length < len(buffer) else None


def is_causal(model: Any) -> bool:
    """Whether tokens see only those before them, so that an input can be computed piece by piece."""
    architecture = meta(model, "general.architecture")
    return meta(model, f"{architecture}.attention.causal") != "false"


def embedding_tokens(model: Any, n_ctx: int, *, is_on_cpu: bool) -> int:
    """Tokens of the largest step that gives vectors: the smaller, the less memory for scores that nobody reads. Where
    tokens see those behind them, a whole input is one step."""
    least = CPU_EMBEDDING_TOKENS if is_on_cpu else MAX_STEP_TOKENS
    return least if is_causal(model) else max(n_ctx, least)


def make_embedding_context(model: Any, n_ctx: int, n_places: int, n_threads: int, *, step_tokens: int) -> Any:
    """A context whose tokens all give vectors, with a KV stream for each place; where a whole input is one step, it
    must not be divided as streams are, and one is enough. Raises EngineError "model_does_not_fit"."""
    params = native.llama_context_default_params()
    params.kv_unified = not is_causal(model)
    room = max(n_ctx, step_tokens) if params.kv_unified else n_ctx
    params.n_ctx = -(-room // CONTEXT_STEP) * CONTEXT_STEP * (1 if params.kv_unified else n_places)
    params.n_seq_max = n_places
    params.n_batch = params.n_ubatch = step_tokens
    params.n_threads = params.n_threads_batch = n_threads
    params.embeddings = True
    params.pooling_type = native.LLAMA_POOLING_TYPE_NONE
    # With flash attention a CPU takes another kernel from 64 tokens on: the same text differed by 0.9 % in company.
    # Without, a vector is the same to the last bit however texts are batched and cut.
    params.flash_attn_type = native.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.no_perf = True
    context = native.llama_init_from_model(model, params)
    if not context:
        raise EngineError("model_does_not_fit", f"no context for embeddings of {n_ctx} tokens: lower n_ctx")
    return context


def trained_context(model: Any, n_ctx: int) -> int:
    trained = native.llama_model_n_ctx_train(model)
    if 0 < trained < n_ctx:
        logger.warning("n_ctx %d is more than the model was trained with; it is served with %d", n_ctx, trained)
        return int(trained)
    return n_ctx


def make_context(
    model: Any, n_ctx: int, n_slots: int, n_threads: int, kv_type: str, flash_attention: bool | None, num_outputs: int
) -> Any:
    """A context with a KV stream per slot. num_outputs: rows of logits of one step, which size the compute buffer.
    Raises EngineError "model_does_not_fit"."""
    params = native.llama_context_default_params()
    params.n_ctx = n_slots * -(-n_ctx // CONTEXT_STEP) * CONTEXT_STEP
    params.n_seq_max = n_slots
    params.n_batch = step_tokens(n_slots)
    params.n_ubatch = min(params.n_batch, MAX_STEP_TOKENS)
    params.n_outputs_max = num_outputs
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

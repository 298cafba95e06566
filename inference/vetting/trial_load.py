"""The child that opens an unknown model first: `python -m inference.vetting.trial_load`, JSON in and out.

No Django, no secrets in its environment. A hostile file may crash it, loop in it or fill its memory: it runs under
limits that it sets on itself, and dies with its parent. inference/vetting/trial.py starts it and reads its exit.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

SAMPLE = 'The registry reads this line once, écrit 1 ligne: {"ok": true}\n'
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
MAX_OUTPUT_BYTES = 16 << 20
TRIAL_CONTEXT = 256
TRIAL_TOKENS = 8
THREAD_STACK_BYTES = 1 << 20


class Unfit(Exception):
    """The file loads or not, but cannot be served; the message is the reason."""


def main() -> None:
    answer_with(lambda question: examine(Path(question["path"]), Path(question["vocabulary"])))


def answer_with(examiner: Callable[[dict[str, Any]], dict[str, Any]]) -> NoReturn:
    """Read the question, set the limits, write what `examiner` finds or why it is unfit, and end the process."""
    start_again_with_small_stacks()
    question = json.load(sys.stdin)
    tie_to(question["parent"])
    limit(question["max_memory_bytes"], question["cpu_seconds"])
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # llama.cpp must not write into the answer
    try:
        report: dict[str, Any] = {"ok": True, **examiner(question)}
    except Unfit as error:
        report = {"ok": False, "reason": str(error)}
    except ImportError as error:
        report = {"ok": False, "reason": f"llama.cpp is not usable here ({error}): run `make install`"}
    answer.write(json.dumps(report))
    answer.flush()
    os._exit(0)  # nothing to tidy up, and no destructor that could crash after the answer


def start_again_with_small_stacks() -> None:
    """llama.cpp checks every tensor in a thread of its own, hundreds at once on a busy machine, and 8 MiB of address
    space for each stack met the limit below. Their size is fixed when a process starts: so it starts once more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    if sys.platform == "linux" and (soft == resource.RLIM_INFINITY or soft > THREAD_STACK_BYTES):
        resource.setrlimit(resource.RLIMIT_STACK, (THREAD_STACK_BYTES, hard))
        os.execv(sys.executable, sys.orig_argv)


def tie_to(parent: int) -> None:
    """Be killed when the parent dies; leave at once if it already has."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def limit(memory_bytes: int, cpu_seconds: int, file_bytes: int = MAX_OUTPUT_BYTES) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    if sys.platform == "linux":  # elsewhere the address space holds more than the process uses
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))


def examine(path: Path, vocabulary: Path) -> dict[str, Any]:
    """Load, decode a few tokens, and see that the vocabulary file tokenizes alike. Raises Unfit."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    model = load(path, vocab_only=False)
    vocab = llama_cpp.llama_model_get_vocab(model)
    tokens = tokenize(vocab, SAMPLE)
    if not tokens:
        raise Unfit("its tokenizer makes no tokens of plain text")
    if llama_cpp.llama_model_has_encoder(model) or not llama_cpp.llama_model_has_decoder(model):
        raise Unfit("it is an encoder, not a text generating model")
    if is_causal(model):
        decode(model, tokens[:TRIAL_TOKENS])
    else:
        embed(model, tokens[:TRIAL_TOKENS])
    if tokenize(llama_cpp.llama_model_get_vocab(load(vocabulary, vocab_only=True)), SAMPLE) != tokens:
        raise Unfit("its tokenizer needs the weights")
    return {
        "vocabulary_size": llama_cpp.llama_vocab_n_tokens(vocab),
        "trained_context": llama_cpp.llama_model_n_ctx_train(model),
        "bos_token_id": llama_cpp.llama_vocab_bos(vocab),
        "eos_token_id": llama_cpp.llama_vocab_eos(vocab),
        "add_bos_token": bool(llama_cpp.llama_vocab_get_add_bos(vocab)),
        "recurrent": bool(llama_cpp.llama_model_is_recurrent(model)),
    }


def load(path: Path, *, vocab_only: bool, check: bool = True, n_gpu_layers: int = 0) -> Any:
    """check: look at every weight for numbers that are none. Raises Unfit."""
    import llama_cpp

    params = llama_cpp.llama_model_default_params()
    params.vocab_only = vocab_only
    params.n_gpu_layers = n_gpu_layers
    params.check_tensors = check and not vocab_only
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise Unfit("llama.cpp cannot load it")
    return model


def tokenize(vocab: Any, text: str) -> list[int]:
    import llama_cpp

    data = text.encode()
    room = (llama_cpp.llama_token * (len(data) + 8))()
    count = llama_cpp.llama_tokenize(vocab, data, len(data), room, len(room), False, False)
    return list(room[: max(0, count)])


def decode(model: Any, tokens: list[int]) -> None:
    """One step; every score must be a number, so half-written weights do not pass."""
    scores_after(make_context(model), tokens)


def is_causal(model: Any) -> bool:
    """False for models whose tokens see those behind them, which give vectors and no text."""
    return meta(model, f"{meta(model, 'general.architecture')}.attention.causal") != "false"


def meta(model: Any, key: str) -> str:
    import llama_cpp

    buffer = ctypes.create_string_buffer(256)
    llama_cpp.llama_model_meta_val_str(model, key.encode(), buffer, len(buffer))
    return buffer.value.decode("utf-8", "replace")


def embed(model: Any, tokens: list[int]) -> None:
    """One step that gives vectors. Raises Unfit."""
    import llama_cpp

    context = make_context(model, embeddings=True)
    array = (llama_cpp.llama_token * len(tokens))(*tokens)
    if status := llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(tokens))):
        raise Unfit(f"its first step failed with status {status}")
    found = llama_cpp.llama_get_embeddings(context)
    size = llama_cpp.llama_model_n_embd_out(model) * len(tokens)
    if not found or not all(math.isfinite(number) for number in found[:size]):
        raise Unfit("its first step gave vectors that are not numbers: the weights are damaged")


def make_context(model: Any, *, embeddings: bool = False) -> Any:
    import llama_cpp

    params = llama_cpp.llama_context_default_params()
    if embeddings:
        params.embeddings, params.pooling_type = True, llama_cpp.LLAMA_POOLING_TYPE_NONE
    params.n_ctx = params.n_batch = params.n_ubatch = TRIAL_CONTEXT
    params.n_threads = params.n_threads_batch = 2
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise Unfit("llama.cpp cannot make a context for it")
    return context


def scores_after(context: Any, tokens: list[int]) -> list[float]:
    """One step from what the context holds: the score of every token of the vocabulary as the next. Raises Unfit."""
    import llama_cpp

    array = (llama_cpp.llama_token * len(tokens))(*tokens)  # the batch points into it
    batch = llama_cpp.llama_batch_get_one(array, len(tokens))
    if status := llama_cpp.llama_decode(context, batch):
        raise Unfit(f"its first step failed with status {status}")
    scores = llama_cpp.llama_get_logits_ith(context, -1)
    model = llama_cpp.llama_get_model(context)
    size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    found = scores[:size] if scores else []
    if not found or not all(math.isfinite(score) for score in found):
        raise Unfit("its first step gave scores that are not numbers: the weights are damaged")
    return found


if __name__ == "__main__":
    main()

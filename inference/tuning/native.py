"""The child that runs llama.cpp for one step: `python -m inference.tuning.native`, a JSON question on standard input.

It answers with JSON lines: {"part": 0.5} as it goes on, and a last one with what it found or why it could not. No
Django, no secrets in its environment; limits are set before llama.cpp is loaded. inference/tuning/steps.py starts and
kills it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inference.tuning.choice import NUM_SEQUENCES, SPEED_CONTEXT
from inference.vetting.trial_load import MAX_OUTPUT_BYTES, Unfit, limit, load, tie_to, tokenize

WINDOW_TOKENS = 256
LEAD_TOKENS = 64
"""The first tokens of a window have too little before them to be guessed; they are not counted."""
SCORED_TOKENS = 64
"""Tokens of one step whose scores are kept at once: a row of scores is as long as the vocabulary."""
MAX_PASSAGE_TOKENS = 4096
PROMPT_TOKENS = 252
"""Of a measured prompt; in pieces as the engine cuts them."""
DECODE_START = 64
"""Tokens before the first that is decoded."""
PATIENCE_SECONDS = 1.0
"""The longest step that is measured, by the engine's own cost curve."""
LEAST_STEPS = 4
LOUD = 3
"""From this level of ggml's on (3: warning, 4: error) its words go to the parent."""
TENSOR_LINE = re.compile(rb"\[ *(\d+)/ *(\d+)\]")

Tell = Callable[[float], None]
"""How much of the step is done, 0.0 to 1.0."""


def main() -> None:
    question = json.load(sys.stdin)
    tie_to(question["parent"])
    limit(question["max_memory_bytes"], question["cpu_seconds"], question["max_file_bytes"] or MAX_OUTPUT_BYTES)
    be_the_first_to_die()
    answer = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # llama.cpp must not write into the answer

    def tell(part: float) -> None:
        answer.write(json.dumps({"part": round(part, 4)}) + "\n")

    try:
        found: dict[str, Any] = {"ok": True, **JOBS[question["job"]](question, tell)}
    except Unfit as error:
        found = {"ok": False, "reason": str(error)}
    except ImportError as error:
        found = {"ok": False, "reason": f"llama.cpp is not usable here ({error}): run `make install`"}
    answer.write(json.dumps(found) + "\n")
    answer.flush()
    os._exit(0)  # no destructor that could crash after the answer


def be_the_first_to_die() -> None:
    """Where memory runs out in spite of all, the kernel takes this process and not a worker."""
    with contextlib.suppress(OSError):  # not on every system
        Path("/proc/self/oom_score_adj").write_text("1000")


def quantize(question: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """Write `path` in another format to `target`. Raises Unfit where llama.cpp refuses the format."""
    import llama_cpp as native

    @native.llama_log_callback
    def listen(level: int, text: bytes, _user_data: object) -> None:
        if step := TENSOR_LINE.match(text):
            tell(int(step[1]) / int(step[2]))
        elif level >= LOUD:
            sys.stderr.write(text.decode(errors="replace"))

    native.llama_log_set(listen, None)
    native.llama_backend_init()
    params = native.llama_model_quantize_default_params()
    params.ftype = question["file_type"]
    params.nthread = question["n_threads"]
    params.allow_requantize = True
    source, target = os.fsencode(question["path"]), os.fsencode(question["target"])
    if status := native.llama_model_quantize(source, target, ctypes.byref(params)):
        sys.stderr.flush()
        raise Unfit(f"llama.cpp refuses the format (status {status})")
    return {}


def perplexity(question: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """`losses`: for each counted token of the passage, minus the logarithm of the probability that the model gave it.

    Windows of the passage, each from an empty context, as llama.cpp's own tool does. `most_windows` bounds it.
    """
    import llama_cpp as native

    native.llama_backend_init()
    model = load(Path(question["path"]), vocab_only=False, check=False, n_gpu_layers=question["n_gpu_layers"])
    vocab = native.llama_model_get_vocab(model)
    tokens = tokenize(vocab, question["passage"])[:MAX_PASSAGE_TOKENS]
    context = scoring_context(model, question["n_threads"])
    start = [native.llama_vocab_bos(vocab)] if native.llama_vocab_get_add_bos(vocab) else []
    size = min(WINDOW_TOKENS, native.llama_n_ctx(context)) - len(start)
    windows = [tokens[at : at + size] for at in range(0, len(tokens), size)][: question["most_windows"]]
    windows = [start + window for window in windows if len(window) == size]
    if not windows:
        raise Unfit(f"its tokenizer makes only {len(tokens)} tokens of the passage: too few to compare")
    losses: list[float] = []
    for number, window in enumerate(windows):
        losses += losses_of(context, window, native.llama_vocab_n_tokens(vocab))
        tell((number + 1) / len(windows))
    return {"losses": losses}


def scoring_context(model: Any, n_threads: int) -> Any:
    import llama_cpp as native

    params = native.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = WINDOW_TOKENS
    params.n_threads = params.n_threads_batch = n_threads
    context = native.llama_init_from_model(model, params)
    if not context:
        raise Unfit("llama.cpp cannot make a context for it")
    return context


def losses_of(context: Any, window: list[int], n_vocab: int) -> list[float]:
    """Of the tokens of one window from LEAD_TOKENS on. Raises Unfit where scores are not numbers."""
    import llama_cpp as native
    import numpy as np

    native.llama_memory_clear(native.llama_get_memory(context), True)
    found: list[float] = []
    for begin in range(0, len(window) - 1, SCORED_TOKENS):
        part = window[begin : begin + SCORED_TOKENS]
        scores = decode_with_scores(context, part, begin, n_vocab)
        following = np.array(window[begin + 1 : begin + 1 + len(part)])
        scores = scores[: len(following)]
        top = scores.max(axis=1, keepdims=True)
        losses = np.log(np.exp(scores - top).sum(axis=1)) + top[:, 0] - scores[np.arange(len(following)), following]
        found += [float(loss) for place, loss in enumerate(losses) if begin + place + 1 >= LEAD_TOKENS]
    if not all(np.isfinite(found)):
        raise Unfit("its scores are not numbers: the format does not suit this model")
    return found


def decode_with_scores(context: Any, tokens: list[int], begin: int, n_vocab: int) -> Any:
    """The scores of the whole vocabulary after each of these tokens, as an array of rows."""
    import llama_cpp as native
    import numpy as np

    batch = native.llama_batch_init(len(tokens), 0, 1)
    try:
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place] = token, begin + place
            batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, 1
        batch.n_tokens = len(tokens)
        if status := native.llama_decode(context, batch):
            raise Unfit(f"a step failed with status {status}")
        flat = native.llama_get_logits(context)
        return np.ctypeslib.as_array(flat, shape=(len(tokens), n_vocab)).astype(np.float64)
    finally:
        native.llama_batch_free(batch)


def speed(question: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """Tokens per second of the engine itself: a prompt, one sequence decoding, eight of them. Raises Unfit."""
    from inference.engine.llama import LlamaBackend
    from inference.engine.types import EngineError

    try:
        backend = LlamaBackend.load(
            question["path"],
            n_ctx=SPEED_CONTEXT,
            n_slots=NUM_SEQUENCES,
            n_threads=question["n_threads"],
            n_gpu_layers=question["n_gpu_layers"],
            kv_type=question["kv_type"],
            flash_attention=question["flash_attention"],
        )
    except EngineError as error:
        raise Unfit(str(error)) from error
    seconds = question["seconds"]
    found = {}
    for number, (name, measure) in enumerate(
        (("prompt", prompt_speed), ("decode_1", decode_speed(1)), ("decode_8", decode_speed(NUM_SEQUENCES)))
    ):
        found[name] = measure(backend, seconds)
        tell((number + 1) / 3)
    return found


def prompt_speed(backend: Any, seconds: float) -> float:
    piece = max(1, backend.cost.tokens_within(PATIENCE_SECONDS, most=min(backend.max_chunk_tokens, PROMPT_TOKENS)))
    most = min(PROMPT_TOKENS, backend.n_ctx)
    restart(backend, 1, [])
    compute(backend, 0, 0, piece)  # the first step after a change is slower
    begun, num_tokens, at = time.perf_counter(), 0, piece
    while num_tokens < 2 * piece or time.perf_counter() - begun < seconds:
        if at + piece > most:
            restart(backend, 1, [])
            at = 0
        compute(backend, 0, at, piece)
        at += piece
        num_tokens += piece
    return num_tokens / (time.perf_counter() - begun)


def decode_speed(num_sequences: int) -> Callable[[Any, float], float]:
    """The measure of so many sequences that each get one token a step. Prompts in between are not timed."""
    from inference.engine.backend import SlotWork

    def measure(backend: Any, seconds: float) -> float:
        begin = min(DECODE_START, backend.n_ctx // 4)
        at, spent, steps = backend.n_ctx, 0.0, -2
        while steps < LEAST_STEPS or spent < seconds:
            if at >= backend.n_ctx:
                at = fill(backend, num_sequences, begin)
            begun = time.perf_counter()
            backend.execute([SlotWork(slot, at, [token_at(slot + at)], True) for slot in range(num_sequences)], ())
            at += 1
            steps += 1
            if steps > 0:  # two steps to warm up
                spent += time.perf_counter() - begun
        return num_sequences * steps / spent

    return measure


def fill(backend: Any, num_sequences: int, num_tokens: int) -> int:
    """Give each of the first slots so many tokens; where the next one goes."""
    restart(backend, num_sequences, [token_at(place) for place in range(num_tokens)])
    piece = max(1, backend.cost.tokens_within(PATIENCE_SECONDS, most=backend.max_chunk_tokens))
    for slot in range(num_sequences):
        for at in range(0, num_tokens, piece):
            compute(backend, slot, at, min(piece, num_tokens - at))
    return num_tokens


def restart(backend: Any, num_sequences: int, prompt: list[int]) -> None:
    from inference.engine.types import SamplingParams

    for slot in range(num_sequences):
        backend.open(slot, prompt, SamplingParams(temperature=0.0), 1)


def compute(backend: Any, slot: int, at: int, num_tokens: int) -> None:
    from inference.engine.backend import SlotWork

    backend.execute([SlotWork(slot, at, [token_at(place) for place in range(at, at + num_tokens)], True)], ())


def token_at(place: int) -> int:
    """Any token will do: time does not depend on which. Small numbers exist in every vocabulary."""
    return 100 + place % 100


JOBS: dict[str, Callable[[dict[str, Any], Tell], dict[str, Any]]] = {
    "quantize": quantize,
    "perplexity": perplexity,
    "speed": speed,
}


if __name__ == "__main__":
    main()

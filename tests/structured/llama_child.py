"""llama.cpp's own reading of grammars, in a process that may die: `python -m tests.structured.llama_child MODEL`.

Reads a JSON list of {grammar, texts}, writes a JSON list of {accepted, matches} in the same order. Loads the
vocabulary alone. Only tests start it.
"""

from __future__ import annotations

import ctypes
import json
import math
import sys
from pathlib import Path
from typing import Any

import llama_cpp


def load_vocabulary(path: str) -> tuple[Any, Any]:
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(path.encode(), params)
    return model, llama_cpp.llama_model_get_vocab(model)


def tokens_of(vocab: Any, text: str) -> list[int]:
    raw = text.encode()
    tokens = (llama_cpp.llama_token * (len(raw) + 8))()
    count = llama_cpp.llama_tokenize(vocab, raw, len(raw), tokens, len(tokens), False, False)
    return list(tokens[:count])


def allows(sampler: Any, token: int) -> bool:
    data = (llama_cpp.llama_token_data * 1)(llama_cpp.llama_token_data(id=token, logit=0.0, p=0.0))
    array = llama_cpp.llama_token_data_array(data=data, size=1, selected=-1, sorted=False)
    llama_cpp.llama_sampler_apply(sampler, ctypes.byref(array))
    return not math.isinf(data[0].logit)


def spells(vocab: Any, tokens: list[int], text: str) -> bool:
    """Whether the tokens are the text: a small vocabulary lacks the bytes of rare characters."""
    piece = ctypes.create_string_buffer(256)
    raw = b""
    for token in tokens:
        length = llama_cpp.llama_token_to_piece(vocab, token, piece, len(piece), 0, True)
        raw += piece.raw[:length]
    return raw == text.encode()


def matches(vocab: Any, sampler: Any, text: str) -> bool | None:
    """Whether the grammar lets the text through token by token, and an end after it; None if no tokens spell it."""
    tokens = tokens_of(vocab, text)
    if not spells(vocab, tokens, text):
        return None
    llama_cpp.llama_sampler_reset(sampler)
    for token in tokens:
        if not allows(sampler, token):
            return False
        llama_cpp.llama_sampler_accept(sampler, token)
    return allows(sampler, llama_cpp.llama_vocab_eos(vocab))


def answer(vocab: Any, order: dict[str, Any]) -> dict[str, Any]:
    sampler = llama_cpp.llama_sampler_init_grammar(vocab, order["grammar"].encode(), b"root")
    if not sampler:
        return {"accepted": False, "matches": []}
    try:
        return {"accepted": True, "matches": [matches(vocab, sampler, text) for text in order["texts"]]}
    finally:
        llama_cpp.llama_sampler_free(sampler)


def main() -> None:
    llama_cpp.llama_backend_init()
    model, vocab = load_vocabulary(sys.argv[1])
    answers = [answer(vocab, order) for order in json.load(sys.stdin)]
    Path(sys.argv[2]).write_text(json.dumps(answers))
    llama_cpp.llama_model_free(model)


if __name__ == "__main__":
    main()

"""llama.cpp as this package calls it: imported once, its log forwarded, short calls made with the GIL held."""

from __future__ import annotations

import ctypes
import logging
import os
from typing import Any

# Read by OpenMP when llama.cpp is loaded. By default its threads spin 300,000 times at every barrier before they sleep:
# next to a single busy process a step of 6 ms then took 200 ms. With 300 spins it took 16 ms, with 1,000 26; alone it
# stays near 7 ms. "active" keeps OpenMP from falling to 100 spins, twice as slow, where several of our threads have
# computed.
os.environ.setdefault("OMP_WAIT_POLICY", "active")
os.environ.setdefault("GOMP_SPINCOUNT", "500")

import llama_cpp as native

__all__ = [
    "accept",
    "apply",
    "apply_slowly",
    "forward_log",
    "logits_address",
    "native",
    "piece",
    "sample",
    "token_bytes",
    "token_texts",
]

logger = logging.getLogger(__name__)

_LOG_LEVELS = {3: logging.WARNING, 4: logging.ERROR}
"""ggml's levels (debug 1, info 2, warn 3, error 4, continuation 5) that are forwarded; llama-cpp-python's own table is
of an older numbering."""


@native.llama_log_callback
def forward_log(level: int, text: bytes, _user_data: object) -> None:
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


sample = _with_gil(native.llama_sampler_sample)
accept = _with_gil(native.llama_sampler_accept)
apply = _with_gil(native.llama_sampler_apply)
apply_slowly = native.llama_sampler_apply
"""The same for what takes milliseconds, during which other threads go on."""
logits_address = _with_gil(native.llama_get_logits_ith)
logits_address.restype = ctypes.c_void_p
piece = _with_gil(native.llama_token_to_piece)


def token_bytes(vocab: Any, token: int, *, special: bool = False) -> bytes:
    """The text of a token as bytes; control tokens have none, unless special."""
    size = 64
    while True:
        buffer = ctypes.create_string_buffer(size)
        length = piece(vocab, token, buffer, size, 0, special)
        if length >= 0:
            return buffer.raw[:length]
        size = -length


def token_texts(vocab: Any) -> list[bytes]:
    """What each token of a vocabulary is written as."""
    return [native.llama_vocab_get_text(vocab, token) for token in range(native.llama_vocab_n_tokens(vocab))]

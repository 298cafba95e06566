"""What a model's memory can do, found by trying: recurrent, hybrid and sliding-window models differ.

Called once at load, before any request: slot 0 is used, and empty afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from inference.engine.backend import Abilities
from inference.engine.llama.library import native

NUM_TOKENS = 4


def probe(model: Any, context: Any, decode: Callable[[int, int], None]) -> Abilities:
    """decode(start, n) computes n tokens of slot 0 from this position on."""
    memory = native.llama_get_memory(context)
    native.llama_memory_seq_rm(memory, 0, -1, -1)
    decode(0, NUM_TOKENS)
    reasons = {}
    if problem := _trim_problem(model, memory):
        reasons = {"trim": problem, "copy": problem}
    if not native.llama_memory_can_shift(memory):
        reasons["shift"] = "positions of this model's memory cannot be moved"
    elif "trim" in reasons:
        reasons["shift"] = reasons["trim"]
    if problem := _save_problem(context, memory):
        reasons["save"] = problem
    native.llama_memory_seq_rm(memory, 0, -1, -1)
    return Abilities(**{name: name not in reasons for name in ("trim", "copy", "shift", "save")}, reasons=reasons)


def _trim_problem(model: Any, memory: Any) -> str:
    if native.llama_model_is_recurrent(model) or native.llama_model_is_hybrid(model):
        return "a recurrent memory cannot forget its last tokens alone"
    if native.llama_model_n_swa(model) > 0:
        return "a sliding window has forgotten tokens that an earlier position needs"
    trims = native.llama_memory_seq_rm(memory, 0, NUM_TOKENS - 1, -1)
    if not trims or native.llama_memory_seq_pos_max(memory, 0) != NUM_TOKENS - 2:
        return "llama.cpp refuses to cut this memory"
    return ""


def _save_problem(context: Any, memory: Any) -> str:
    """Slot 0 is saved and read again."""
    before = native.llama_memory_seq_pos_max(memory, 0)
    size = native.llama_state_seq_get_size(context, 0)
    buffer = (native.ctypes.c_uint8 * size)()
    if not size or native.llama_state_seq_get_data(context, buffer, size, 0) != size:
        return "llama.cpp gives no state of this memory"
    native.llama_memory_seq_rm(memory, 0, -1, -1)
    if not native.llama_state_seq_set_data(context, buffer, size, 0):
        return "llama.cpp does not read its own state of this memory"
    if native.llama_memory_seq_pos_max(memory, 0) != before:
        return "a state that was read again holds other tokens"
    return ""

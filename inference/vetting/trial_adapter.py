"""The child that opens an unknown adapter first: `python -m inference.vetting.trial_adapter`, JSON in and out.

It loads the base model and the adapter, and measures what the adapter does: scores with it, and without it again. The
limits are those of inference/vetting/trial_load.py; inference/vetting/trial.py starts it and reads its exit.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from inference.vetting.trial_load import SAMPLE, Unfit, answer_with, load, make_context, scores_after, tokenize


def main() -> None:
    answer_with(lambda question: examine(Path(question["path"]), Path(question["base"])))


def examine(path: Path, base: Path) -> dict[str, float]:
    """effect: the largest change of a score at scale 1. residue: the largest left once it is detached. Raises Unfit."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    model = load(base, vocab_only=False, check=False)  # it was checked when it was registered
    adapter = llama_cpp.llama_adapter_lora_init(model, str(path).encode())  # before the context, which reserves for it
    if not adapter:
        raise Unfit("llama.cpp cannot apply it to the base model")
    context = make_context(model)
    tokens = tokenize(llama_cpp.llama_model_get_vocab(model), SAMPLE)
    without = scores_from_nothing(context, tokens)
    attach(context, [adapter])
    attached = scores_from_nothing(context, tokens)
    attach(context, [])
    detached = scores_from_nothing(context, tokens)
    return {"effect": distance(without, attached), "residue": distance(without, detached)}


def scores_from_nothing(context: Any, tokens: list[int]) -> list[float]:
    import llama_cpp

    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    return scores_after(context, tokens)


def attach(context: Any, adapters: list[Any]) -> None:
    """These adapters at scale 1 and no others. Raises Unfit."""
    import llama_cpp

    handles = (llama_cpp.llama_adapter_lora_p_ctypes * len(adapters))(*adapters)
    scales = (ctypes.c_float * len(adapters))(*(1.0 for _ in adapters))
    if status := llama_cpp.llama_set_adapters_lora(context, handles, len(adapters), scales):
        raise Unfit(f"llama.cpp cannot attach it (status {status})")


def distance(before: list[float], after: list[float]) -> float:
    """The largest difference of two lists of scores."""
    return max(abs(a - b) for a, b in zip(before, after, strict=True))


if __name__ == "__main__":
    main()

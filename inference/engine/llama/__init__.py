"""The engine's real backend, on llama.cpp. In the engine, this package and the tokenizer alone import llama_cpp."""

from inference.engine.llama.backend import LlamaBackend
from inference.engine.llama.draft import DraftModel

__all__ = ["DraftModel", "LlamaBackend"]

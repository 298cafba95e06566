"""A loaded model and the adapters loaded into it, for one or several contexts.

Contexts read the model while they compute. Whoever loads or unloads an adapter sees to it that none of them does:
between steps of the one engine's thread, or with all lanes halted (gate.py).
"""

from __future__ import annotations

import ctypes
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from inference.engine.llama.library import native, token_bytes
from inference.engine.llama.loading import checked_file
from inference.engine.llama.prefixes import Prefixes
from inference.engine.lora_file import write_padded
from inference.engine.types import AdapterVector, EngineError

Detach = Callable[[], None]
"""Takes all adapters off a context."""


class SharedModel:
    """A native model, freed with the last of its contexts. native: its handle; is_on_cpu: no layer is on a GPU.

    pieces: of its vocabulary, the bytes of each token's text. end_tokens: those that end an answer.
    """

    def __init__(self, model: Any, *, is_on_cpu: bool = True) -> None:
        self.native = model
        self.is_on_cpu = is_on_cpu
        self.adapters: dict[str, Any] = {}
        self.digests: frozenset[str] = frozenset()
        """Of the loaded adapters. Any thread may read it."""
        self.vocab = native.llama_model_get_vocab(model)
        tokens = range(native.llama_vocab_n_tokens(self.vocab))
        self.end_tokens = tuple(token for token in tokens if native.llama_vocab_is_eog(self.vocab, token))
        self.pieces = [token_bytes(self.vocab, token) for token in tokens]
        self.prefixes = Prefixes(self.pieces, self.end_tokens)
        self._lock = threading.Lock()
        self._contexts: list[Detach] = []
        self._num_contexts = 0

    def join(self, detach: Detach) -> None:
        """Another context uses the model."""
        with self._lock:
            self._contexts.append(detach)
            self._num_contexts += 1

    @contextmanager
    def leaving(self, detach: Detach) -> Iterator[None]:
        """Free a context inside; with the last one goes the model."""
        with self._lock:
            self._contexts.remove(detach)
        yield
        with self._lock:
            self._num_contexts -= 1
            is_last = not self._num_contexts
        if is_last:
            native.llama_model_free(self.native)  # and the adapters, which belong to it

    def attach(self, context: Any, adapters: AdapterVector) -> None:
        """The whole vector of the context's next step: what is not named is detached. Costs about 4 ms at the next
        decode."""
        number = len(adapters)
        handles = (native.llama_adapter_lora_p_ctypes * number)(*(self.adapters[digest] for digest, _ in adapters))
        scales = (ctypes.c_float * number)(*(scale for _, scale in adapters))
        status = native.llama_set_adapters_lora(context, handles, number, scales)
        if status != 0:
            raise RuntimeError(f"llama.cpp cannot attach {number} adapters (status {status})")

    def load_adapter(self, digest: str, path: str | Path) -> None:
        """A known digest is left alone. Raises EngineError "adapter_file_invalid"; then nothing has changed."""
        if digest in self.adapters:
            return
        file = checked_file(Path(path), kind="adapter")
        try:
            with tempfile.NamedTemporaryFile(suffix=".gguf") as padded:
                is_padded = self.is_on_cpu and write_padded(file, padded.file)
                source = padded.name if is_padded else file
                adapter = native.llama_adapter_lora_init(self.native, os.fsencode(source))
        except OSError as error:
            raise EngineError("adapter_file_invalid", f"{file} cannot be prepared for this machine: {error}") from error
        if not adapter:
            raise EngineError(
                "adapter_file_invalid",
                f"llama.cpp cannot apply {file} to this model: the file is damaged, or made for another base model",
            )
        self.adapters[digest] = adapter
        self.digests = frozenset(self.adapters)

    def unload_adapter(self, digest: str) -> None:
        """Detach everything everywhere, then free: no context must hold a pointer to what is gone."""
        if digest not in self.adapters:
            return
        with self._lock:
            for detach in self._contexts:
                detach()
        native.llama_adapter_lora_free(self.adapters.pop(digest))
        self.digests = frozenset(self.adapters)

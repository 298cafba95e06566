"""The adapters that one loaded model holds in a worker: loaded ahead, or when a request needs them, and unloaded again.

Files come from the registry (adapters.files_of). Called on task threads with requests and on the upkeep thread with the
registry's news; each wait here is for the engine's thread, which loads between two steps.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from django.db import connection

from inference.catalog.adapters import AdapterFile
from inference.engine.lanes import Runner
from inference.engine.types import EngineError, GenerationRequest, effective

logger = logging.getLogger(__name__)

MAX_AHEAD = 32
"""Adapters that are loaded before anybody asks."""
MAX_LOADED = 64
"""Beyond these, the one that was used longest ago makes room."""

ReadFiles = Callable[[], Sequence[AdapterFile]]


class AdapterShelf:
    """One lock guards the order of loading, submitting and unloading: what a request needs is there when it arrives."""

    def __init__(self, read: ReadFiles) -> None:
        self._read = read
        self._lock = threading.Lock()
        self._paths: dict[str, Path] = {}
        self._used: dict[str, None] = {}
        """Digests in order of their latest use."""
        self._unfit: set[str] = set()
        """Could not be loaded ahead; tried again only when a request asks."""

    def submit(self, runner: Runner, request: GenerationRequest) -> None:
        """Hand a request to the engine with its adapters loaded. Raises EngineError.

        "adapter_not_loaded" is of an adapter that is not registered any more, "adapter_file_invalid" of a broken file.
        """
        wanted = [digest for digest, _ in effective(request.adapters)]
        if not wanted:
            runner.submit(request)
            return
        with self._lock:
            for digest in wanted:
                self._load(runner, digest)
                self._used.pop(digest, None)
                self._used[digest] = None
            self._make_room(runner, keep=wanted)
            runner.submit(request)

    def follow(self, runner: Runner) -> None:
        """Unload what is registered no longer, as soon as nothing uses it, and load ahead what is new."""
        files = self._read()
        with self._lock:
            self._paths = {file.digest: file.path for file in files}
            self._unfit &= self._paths.keys()
            for digest in runner.adapters - self._paths.keys():
                self._unload(runner, digest)
        for file in files[:MAX_AHEAD]:
            if file.digest not in runner.adapters and file.digest not in self._unfit:
                self._load_ahead(runner, file)

    def _load_ahead(self, runner: Runner, file: AdapterFile) -> None:
        try:
            with self._lock:
                runner.load_adapter(file.digest, file.path)
        except EngineError as error:
            self._unfit.add(file.digest)
            logger.error("adapter %s could not be loaded: %s", file.name, error)

    def _load(self, runner: Runner, digest: str) -> None:
        if digest in runner.adapters:
            return
        if digest not in self._paths:
            try:
                self._paths = {file.digest: file.path for file in self._read()}
            finally:
                connection.close()  # a thread may serve for hours, and there are more of them than connections
        path = self._paths.get(digest)
        if path is None:
            raise EngineError("adapter_not_loaded", f"adapter {digest} is not registered for this model")
        runner.load_adapter(digest, path)

    def _make_room(self, runner: Runner, *, keep: Iterable[str]) -> None:
        loaded = runner.adapters
        spare = [digest for digest in self._used if digest in loaded and digest not in set(keep)]
        never_used = [digest for digest in loaded if digest not in self._used]
        for digest in [*never_used, *spare][: max(0, len(loaded) - MAX_LOADED)]:
            self._unload(runner, digest)

    def _unload(self, runner: Runner, digest: str) -> None:
        try:
            runner.unload_adapter(digest)
        except EngineError as error:
            logger.debug("adapter %s stays for now: %s", digest, error)
        else:
            self._used.pop(digest, None)

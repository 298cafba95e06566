"""What the registry's commands share: a model as a row of a table, and a progress bar for hashing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from inference.catalog.model_memory import memory_of
from inference.models import ServedModel
from inference.vetting.inspection import Progress as Hashed


def as_row(row: ServedModel) -> dict[str, Any]:
    """JSON about one model, for operators; path, digest, sizes and file type are those of what is served."""
    variant = row.active_variant
    file = variant or row
    estimate = memory_of(row, variant)
    return {
        "name": row.name,
        "aliases": row.aliases,
        "default": row.is_default,
        "path": file.path,
        "digest": file.digest,
        "size_bytes": file.size_bytes,
        "variant": variant.name if variant else None,
        "architecture": row.metadata.get("architecture"),
        "quantization": file.metadata.get("quantization"),
        "num_parameters": row.metadata.get("num_parameters", 0),
        "trained_context": row.metadata.get("context_length"),
        "n_ctx": row.n_ctx,
        "n_slots": row.n_slots,
        "n_lanes": row.n_lanes,
        "n_threads": file.n_threads or row.n_threads,
        "n_gpu_layers": row.n_gpu_layers,
        "kv_type": row.kv_type,
        "context_shift": row.context_shift,
        "draft_kind": row.draft_kind,
        "draft_model": row.draft_model.name if row.draft_model else None,
        "load_mode": row.load_mode,
        "keep_alive_seconds": row.keep_alive_seconds,
        "is_pinned": row.is_pinned,
        "visibility": row.visibility,
        "pool": row.pool,
        "memory_bytes": estimate.total_bytes,
    }


@contextmanager
def hashing(console: Console, *, hidden: bool) -> Iterator[Hashed]:
    """A bar that follows the bytes hashed; several files one after the other share it."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=hidden or not console.is_terminal) as bar:
        task = bar.add_task("reading the file", total=None)

        def advance(done: int, total: int) -> None:
            bar.update(
                task, completed=done, total=total, description="loading it on trial" if done == total else "hashing"
            )

        yield advance

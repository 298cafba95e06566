"""What the web process holds for the API between its start and its stop: stream reader, reaper, feeder, threads."""

from __future__ import annotations

import asyncio
import gc

from django.db import connections
from django.urls import get_resolver

from accounts.trail import refusal_log
from inference.api import following, presence
from inference.api.hop import shared_hop
from inference.api.openai import feeder
from inference.imports import importer
from inference.tokenizers.pool import grammar_pool, tokenizer_pool
from inference.tuning import optimizer
from inference.upkeep import housekeeping, reaper

GC_THRESHOLDS = (20_000, 20, 50)
"""Requests make little garbage that is cyclic; the defaults would look for it some ten times a second under load."""


async def open_api() -> None:
    """Before the first request: import every view, start the reader and the reaper, leave what is loaded to no GC."""
    get_resolver().url_patterns  # noqa: B018 the URL table imports all views
    shared_hop()
    await following.reader().start()
    await asyncio.to_thread(presence.start)
    reaper.start()
    feeder.start()
    housekeeping.start()
    importer.start()
    optimizer.start()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


async def close_api() -> None:
    """After the last request, in reverse."""
    await feeder.stop()
    await asyncio.to_thread(optimizer.stop)
    await asyncio.to_thread(importer.stop)
    await asyncio.to_thread(housekeeping.stop)
    await asyncio.to_thread(reaper.stop)
    await following.close_reader()
    await asyncio.to_thread(shared_hop().close)
    shared_hop.cache_clear()
    await asyncio.to_thread(refusal_log.write_rest)
    await asyncio.to_thread(presence.stop)
    await asyncio.to_thread(tokenizer_pool().close)
    await asyncio.to_thread(grammar_pool().close)
    connections.close_all()

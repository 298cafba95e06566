"""A body from the wire to a file, piece by piece, never whole in memory. On the event loop; the disk in threads.

For views that read the body themselves (llmsite/guard.py says which): who sends it is known before a byte is read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import IO, Protocol

from accounts.trail.refusals import Refusal

PIECE_BYTES = 1 << 20
"""Written to disk at once, in a thread."""
PIECE_SECONDS = 10.0
"""A client that sends nothing for so long has gone."""


class Source(Protocol):
    """llmsite/doors.py's Upload."""

    is_broken: bool

    async def read(self) -> bytes: ...


async def copy_body(
    source: Source,
    file: IO[bytes],
    check: Callable[[int], None],
    note: Callable[[int], Awaitable[None]] | None = None,
) -> int:
    """What comes, to its end; returns its bytes. check: raises what ends it, for bytes before they are written. note:
    hears of bytes that are written. Raises Refusal where the client stops in between, TimeoutError where it is silent.
    """
    piece, num_bytes = bytearray(), 0
    while True:
        async with asyncio.timeout(PIECE_SECONDS):
            data = await source.read()
        num_bytes += len(data)
        check(num_bytes)
        piece += data
        if len(piece) >= PIECE_BYTES or not data:
            await asyncio.to_thread(file.write, bytes(piece))
            piece.clear()
            if note is not None:
                await note(num_bytes)
        if not data:
            break
    if source.is_broken:
        raise Refusal("bad_request", "The connection was closed before the file was complete.")
    return num_bytes

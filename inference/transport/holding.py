"""Who reads a request, how long it goes on without, and what is kept so that its answer can be worded again. Pure.

Made by the web at admission, written with the ticket (queue.py), obeyed by the Lua scripts: `leave`, `join`, `sweep`.
"""

from __future__ import annotations

from dataclasses import dataclass

from inference.transport.ticket import Ticket

TO_THE_END = -1.0
"""Patience of a request that goes on without any reader."""
KEPT_SECONDS = 600
"""Of events whose holder says nothing: a finished stream can be read again for this long."""

VECTORS_KEPT_SECONDS = 60
"""Of vectors, which are large and nobody resumes."""
BATCH_KEPT_SECONDS = 2 * 86400
"""Of a batch's line: whoever feeds the batch may be away for a while. Once the line is written down, it goes."""

Position = tuple[int, int, float]
"""A place in a request's events: the event's milliseconds and number, and the frame of those that it became."""
START: Position = (0, 0, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """What the web has to do with a request. Without a web nobody holds it, and it is never given up for that."""

    web: str = ""
    """The web process that reads; when it dies, its requests have no reader."""
    patience_seconds: float = 0.0
    """How long the request goes on without a reader; then it is cancelled. TO_THE_END is for ever."""
    keep_seconds: int = KEPT_SECONDS
    """Events can be read for this long after the end."""
    path: str = ""
    """Where the request was posted; empty where its answer is not to be worded again."""
    body: bytes = b""
    """What was posted. It holds the prompt, and is kept as long as the events."""
    record: str = ""
    """Redis key of the idempotency record that this request answers (idempotency.py)."""

    def question(self, ticket: Ticket) -> bytes:
        """Neither a ticket's header nor a path has a line break."""
        return b"\n".join([ticket.header(), self.path.encode(), self.body]) if self.path else b""


@dataclass(frozen=True, slots=True)
class Question:
    """A request as it was posted: with its events, all that any process needs to word its answer again."""

    ticket: Ticket
    """Without its prompt."""
    path: str
    body: bytes
    is_background: bool

    @staticmethod
    def parse(data: bytes, patience: float) -> Question:
        """Raises TicketError for one of another version."""
        header, path, body = data.split(b"\n", 2)
        return Question(Ticket.parse(header), path.decode(), body, patience < 0)

"""What admission must know of the batch that a request is a line of."""

from __future__ import annotations

from dataclasses import dataclass, field

from accounts.identity.principals import Principal


@dataclass(slots=True, kw_only=True)
class BatchTerms:
    """Made by the feeder for a line."""

    batch_id: str
    principal: Principal
    expires_at: float
    """Unix seconds; a line that has no slot by then gets none."""
    only_begun: bool = False
    """The batch ends: what has a ticket may have its answer, nothing else is begun."""
    request_ids: list[str] = field(default_factory=list)
    """Written by admission: the tickets of this line."""

"""What became of a request, from everything that is kept of it. For `manage.py explain` and the console; blocking."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import redis

from accounts import redis_client
from accounts.ledger.prices import money
from accounts.models import LedgerEntry
from accounts.trail import refusal_log
from inference import settlement
from inference.models import Receipt
from inference.transport.queue import ticket_queue

MAX_PARTS = 200


def explain(request_id: str) -> dict[str, Any] | None:
    """Refusal, receipts, ledger and state in the queue; None where nothing is known of it. Four queries at most."""
    refusal = refusal_log.find(request_id)
    receipts = _receipts(request_id)
    ids = [request_id, *(receipt.request_id for receipt in receipts)]
    entries = list(LedgerEntry.objects.of_requests(ids).order_by("id")[: 4 * MAX_PARTS])
    state, problem = _state(request_id) if not receipts else (None, None)
    if refusal is None and not receipts and not entries and state is None:
        return None
    return {
        "id": request_id,
        "sentence": _sentence(refusal, receipts, state),
        "refusal": None if refusal is None else {**refusal_log.as_json(refusal), "tenant": refusal.tenant_id},
        "state": state,
        "receipts": [_receipt(each) for each in receipts],
        "ledger": [_entry(each) for each in entries],
        **({"problem": problem} if problem else {}),
    }


def tenant_of(found: Mapping[str, Any]) -> int | None:
    """Whose request it is, by what `explain` found; None where only the ledger knows it."""
    known = (found["refusal"], found["state"], *found["receipts"])
    return next((each["tenant"] for each in known if each is not None and each["tenant"]), None)


def _receipts(request_id: str) -> list[Receipt]:
    """Those of its parts where it has several: their ids follow from its own."""
    ids = [request_id, *(f"{request_id}.{number}" for number in range(MAX_PARTS))]
    found = list(Receipt.objects.filter(pk__in=ids).order_by("request_id"))
    if found:
        return found
    try:
        ended = settlement.pending(redis_client.client(), request_id)
    except redis.RedisError:
        return []
    return [] if ended is None else [settlement.receipt_row(*ended)]


def _state(request_id: str) -> tuple[dict[str, Any] | None, str | None]:
    try:
        state = ticket_queue().state(request_id)
    except redis.RedisError:
        return None, "Redis does not answer: whether it waits or runs is unknown."
    if state is None:
        return None, None
    return {"state": state.state, "position": state.position, "pool": state.pool, "tenant": state.tenant_id}, None


def _sentence(refusal: Any, receipts: list[Receipt], state: dict[str, Any] | None) -> str:
    if refusal is not None:
        why = refusal.message or f"It was refused with the code {refusal.code}, see docs/errors.md."
        frees = (
            f" The same request could pass from {refusal.frees_at:%Y-%m-%d %H:%M:%S} UTC on."
            if refusal.frees_at
            else ""
        )
        return f"Refused at {refusal.created_at:%Y-%m-%d %H:%M:%S} UTC: {why}{frees}"
    if not receipts:
        return f"It is {state['state']}." if state else "It is in the ledger; its receipt is gone."
    first = receipts[0]
    reason = first.error_code or first.finish_reason
    tokens = sum(each.charged_tokens for each in receipts)
    parts = f" in {len(receipts)} parts" if len(receipts) > 1 else ""
    return (
        f"Served by {first.model}{parts}: {first.status}, {reason}; {tokens:,} tokens charged, "
        f"{first.queue_seconds:.2f} s in the queue, {first.total_seconds:.2f} s in all."
    )


def _receipt(row: Receipt) -> dict[str, Any]:
    names = (
        "request_id",
        "status",
        "finish_reason",
        "error_code",
        "model",
        "route",
        "cached",
        "prompt_tokens",
        "cached_tokens",
        "completion_tokens",
        "charged_tokens",
        "queue_seconds",
        "prefill_seconds",
        "decode_seconds",
        "total_seconds",
        "worker",
        "created_at",
        "finished_at",
    )
    return {**{name: getattr(row, name) for name in names}, "tenant": row.tenant_id}


def _entry(row: LedgerEntry) -> dict[str, Any]:
    return {
        "kind": row.kind,
        "request_id": row.request_id,
        "reserved_tokens": row.reserved_tokens,
        "used_tokens": row.used_tokens,
        "used_requests": row.used_requests,
        "cost": money(row.cost_nanos),
        "tenant_committed_after": row.tenant_committed_after,
        "tenant_limit": row.tenant_limit,
        "key_committed_after": row.key_committed_after,
        "key_limit": row.key_limit,
        "reason": row.reason,
        "created_at": row.created_at,
    }

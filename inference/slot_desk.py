"""The worker's end of slot_actions.py: carries out what is asked about slots, and answers.

Orders come from the thread that listens to Redis; each is carried out on a thread of a small pool, where it may wait
for its slot, and a tenant has few at once. Answers are counts and times.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import orjson
import redis
from django.db import connection

from inference.engine.types import EngineError
from inference.hosted import HostedModel
from inference.slot_actions import ANSWER_TTL_SECONDS, SlotOrder
from inference.slot_files import SlotFileError, tenant_of

logger = logging.getLogger(__name__)

NUM_THREADS = 8
MAX_PENDING = 32
MAX_PENDING_PER_TENANT = 2
WORDS = {"save": "Unable to save slot", "restore": "Unable to restore slot", "erase": "Unable to erase slot"}


class SlotDesk:
    """`find` gives the hosted model of an id, or None."""

    def __init__(self, client: redis.Redis, find: Callable[[int], HostedModel | None]) -> None:
        self._client = client
        self._find = find
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="slots")
        self._lock = threading.Lock()
        self._pending: Counter[int | None] = Counter()

    def take(self, data: bytes) -> None:
        """An order has come; anything else is dropped. Never blocks."""
        try:
            order = SlotOrder.parse(data)
        except (ValueError, TypeError):
            logger.warning("something that is no order about slots was dropped")
            return
        with self._lock:
            most = MAX_PENDING_PER_TENANT if order.tenant_id is not None else MAX_PENDING
            fits = self._pending[order.tenant_id] < most and self._pending.total() < MAX_PENDING
            self._pending[order.tenant_id] += fits
        if fits:
            self._pool.submit(self._serve, order)
        else:
            refusal = _refusal("service_unavailable", "Other actions on slots are not done yet. Try again.")
            self._pool.submit(self._answer, order, refusal)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _serve(self, order: SlotOrder) -> None:
        try:
            answer = self._outcome(order)
        finally:
            with self._lock:
                self._pending[order.tenant_id] -= 1
            connection.close()
        self._answer(order, answer)

    def _outcome(self, order: SlotOrder) -> dict[str, Any]:
        model = self._find(order.model_id)
        if model is None:
            return _refusal("llm_unavailable", "This worker does not hold the model.")
        try:
            return _carry_out(model, order)
        except EngineError as error:
            return _refusal_of(order, error)
        except SlotFileError as error:
            return _refusal("bad_request", f"{WORDS[order.action]}: {error}.")
        except Exception:  # a thread's border: whoever asks must hear of it
            logger.exception("an action on a slot failed")
            return _refusal("internal_error", WORDS.get(order.action, "The slots cannot be read"))

    def _answer(self, order: SlotOrder, answer: dict[str, Any]) -> None:
        try:
            with self._client.pipeline(transaction=False) as pipe:
                pipe.rpush(order.answer_to, orjson.dumps(answer))
                pipe.expire(order.answer_to, ANSWER_TTL_SECONDS)
                pipe.execute()
        except redis.RedisError as error:
            logger.warning("an answer about slots could not be given: %s", error)


def _carry_out(model: HostedModel, order: SlotOrder) -> dict[str, Any]:
    """Raises EngineError, SlotFileError or OSError."""
    if order.action == "list" or order.tenant_id is None:
        reports = model.slots(order.tenant_id)
        tenants = [None if each.scope is None else tenant_of(each.scope) for each in reports]
        return {"slots": [{**asdict(each), "tenant": t} for each, t in zip(reports, tenants, strict=True)]}
    tenant_id, number, seconds = order.tenant_id, order.number, order.wait_seconds
    started = time.perf_counter()
    if order.action == "erase":
        return {"tokens": model.erase_slot(tenant_id, number, seconds)}
    act = model.save_slot if order.action == "save" else model.restore_slot
    tokens, num_bytes = act(tenant_id, number, order.label, seconds)
    return {"tokens": tokens, "bytes": num_bytes, "ms": (time.perf_counter() - started) * 1000}


def _refusal_of(order: SlotOrder, error: EngineError) -> dict[str, Any]:
    words = WORDS.get(order.action, "The slots cannot be read")
    if error.code == "not_supported":
        return _refusal("capability_disabled", f"This model's slots cannot be saved: {error}.")
    if error.code == "state_invalid":
        return _refusal("bad_request", f"{words}: {error}.")
    if error.code == "slot_busy":
        return _refusal("service_unavailable", f"{words}: {error}. Try again.")
    if error.code == "invalid_request":
        return _refusal("bad_request", f"Invalid slot ID: {error}")
    return _refusal("llm_unavailable", f"{words}: {error}.")


def _refusal(code: str, message: str) -> dict[str, Any]:
    return {"code": code, "message": message}

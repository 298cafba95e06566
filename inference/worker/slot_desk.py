"""The worker's end of inference/slots/actions.py: carries out what is asked about slots, and answers.

Orders come from the thread that listens to Redis. What may have to wait for a slot or a model has a thread each, and a
tenant few of them; what only looks has threads of its own, so nobody's waiting keeps others from looking. Answers are
counts and times.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

import orjson
import redis
from django.db import connection

from inference.engine.types import EngineError
from inference.slots.actions import ANSWER_TTL_SECONDS, SlotOrder
from inference.slots.files import SlotFileError, SlotFiles, tenant_of
from inference.worker.hosted import HostedModel

logger = logging.getLogger(__name__)

MAX_PENDING = 32
MAX_PENDING_PER_TENANT = 2
NUM_LOOKING = 4
MOST_FILES = 200
WORDS = {"save": "Unable to save slot", "restore": "Unable to restore slot", "erase": "Unable to erase slot"}


Using = Callable[[HostedModel, float], AbstractContextManager[None]]
"""A model is loaded inside; raises EngineError if it is not within so many seconds."""


class SlotDesk:
    """`find` gives the hosted model of an id, or None; `files` are the states on this machine's disk."""

    def __init__(
        self, client: redis.Redis, find: Callable[[int], HostedModel | None], using: Using, files: SlotFiles
    ) -> None:
        self._client = client
        self._find, self._using, self._files = find, using, files
        self._waiting = ThreadPoolExecutor(MAX_PENDING, thread_name_prefix="slots")
        self._looking = ThreadPoolExecutor(NUM_LOOKING, thread_name_prefix="slots-look")
        self._lock = threading.Lock()
        self._pending: Counter[int | None] = Counter()

    def take(self, data: bytes) -> None:
        """An order has come; anything else is dropped. Never blocks."""
        try:
            order = SlotOrder.parse(data)
        except (ValueError, TypeError):
            logger.warning("something that is no order about slots was dropped")
            return
        deadline = time.monotonic() + order.wait_seconds
        if order.action == "list":
            self._looking.submit(self._look, order)
            return
        with self._lock:
            most = MAX_PENDING_PER_TENANT if order.tenant_id is not None else MAX_PENDING
            fits = self._pending[order.tenant_id] < most and self._pending.total() < MAX_PENDING
            self._pending[order.tenant_id] += fits
        if fits:
            self._waiting.submit(self._serve, order, deadline)
        else:
            refusal = _refusal("service_unavailable", "Other actions on slots are not done yet. Try again.")
            self._looking.submit(self._answer, order, refusal)

    def close(self) -> None:
        self._waiting.shutdown(wait=False, cancel_futures=True)
        self._looking.shutdown(wait=False, cancel_futures=True)

    def _look(self, order: SlotOrder) -> None:
        self._answer(order, self._outcome(order, 0.0))

    def _serve(self, order: SlotOrder, deadline: float) -> None:
        try:
            answer = self._outcome(order, deadline)
        finally:
            with self._lock:
                self._pending[order.tenant_id] -= 1
            connection.close()
        self._answer(order, answer)

    def _outcome(self, order: SlotOrder, deadline: float) -> dict[str, Any]:
        if order.action in ("files", "forget"):
            return self._of_disk(order)
        model = self._find(order.model_id)
        if order.action == "leave":
            return self._leave(order, model, deadline)
        if model is None:
            return _refusal("llm_unavailable", "This worker does not hold the model.")
        try:
            if order.action == "list":
                return _list(model, order)
            with self._using(model, _left(deadline)):
                return _carry_out(model, order, _left(deadline))
        except EngineError as error:
            return _refusal_of(order, error)
        except SlotFileError as error:
            return _refusal("bad_request", f"{WORDS[order.action]}: {error}.")
        except Exception:  # a thread's border: whoever asks must hear of it
            logger.exception("an action on a slot failed")
            return _refusal("internal_error", WORDS.get(order.action, "The slots cannot be read"))

    def _of_disk(self, order: SlotOrder) -> dict[str, Any]:
        try:
            if order.action == "files":
                return {"files": [asdict(each) for each in self._files.listing(MOST_FILES)]}
            is_gone = order.tenant_id is not None and self._files.forget(order.tenant_id, order.label)
        except (SlotFileError, OSError) as error:
            return _refusal("bad_request", f"The saved states cannot be reached: {error}.")
        return {"removed": is_gone}

    def _leave(self, order: SlotOrder, model: HostedModel | None, deadline: float) -> dict[str, Any]:
        """Memory first: what is unloaded meanwhile is kept on disk."""
        if order.tenant_id is None:
            return _refusal("bad_request", "Say which tenant leaves.")
        try:
            if model is not None and model.is_in_memory:
                model.forget_tenant(order.tenant_id, _left(deadline))
            self._files.forget_tenant(order.tenant_id)
        except EngineError as error:
            return _refusal_of(order, error)
        except OSError as error:
            return _refusal("internal_error", f"The saved states cannot be removed: {error}.")
        return {"removed": True}

    def _answer(self, order: SlotOrder, answer: dict[str, Any]) -> None:
        try:
            with self._client.pipeline(transaction=False) as pipe:
                pipe.rpush(order.answer_to, orjson.dumps(answer))
                pipe.expire(order.answer_to, ANSWER_TTL_SECONDS)
                pipe.execute()
        except redis.RedisError as error:
            logger.warning("an answer about slots could not be given: %s", error)


def _list(model: HostedModel, order: SlotOrder) -> dict[str, Any]:
    """Of a model that is not loaded: nothing. Raises EngineError."""
    reports = model.slots(order.tenant_id)
    tenants = [None if each.scope is None else tenant_of(each.scope) for each in reports]
    return {"slots": [{**asdict(each), "tenant": t} for each, t in zip(reports, tenants, strict=True)]}


def _left(deadline: float) -> float:
    """Whoever asked waits for one time, whatever it goes by on: a load, or others' requests."""
    return max(0.0, deadline - time.monotonic())


def _carry_out(model: HostedModel, order: SlotOrder, seconds: float) -> dict[str, Any]:
    """With the model loaded; its slot is waited for so long. Raises EngineError, SlotFileError or OSError."""
    if order.tenant_id is None:
        raise EngineError("invalid_request", "a slot belongs to a tenant")
    tenant_id, number = order.tenant_id, order.number
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

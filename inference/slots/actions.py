"""A question about slots, from the web to the worker that holds the model, and its answer: two small forms on Redis.

The question goes by publish, so that a worker which is not there is known at once; the answer comes on a list of its
own, which Redis forgets. Neither holds a token: labels of files and counts alone. Bounded in time at both ends.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any, Literal

import orjson
import redis.asyncio
from django.conf import settings

from accounts.trail.refusals import Refusal
from inference.catalog.served import Served
from inference.transport.queue import ticket_queue

Action = Literal["list", "save", "restore", "erase", "files", "forget", "leave"]
"""files and forget: states on the worker's disk, of any model; leave: all of a tenant, there and in the memory of one
model, if it is loaded; the others: slots of one."""
WAIT_SECONDS = 60.0
"""A model that is not loaded and a slot that is busy are waited for so long together; a long answer takes its time."""
MARGIN_SECONDS = 10.0
"""For the work itself: a state is read or written."""
ANSWER_TTL_SECONDS = 60
ABILITIES = ("trim", "copy", "shift", "save")


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotOrder:
    """tenant_id: whose slots; None, for lists alone, is everybody's. label: of a state; to forget one, its file's name.
    answer_to: the list that the answer goes to."""

    action: Action
    model_id: int
    tenant_id: int | None
    number: int = 0
    label: str = ""
    wait_seconds: float = WAIT_SECONDS
    answer_to: str = ""

    def to_bytes(self) -> bytes:
        return orjson.dumps(self)

    @staticmethod
    def parse(data: bytes) -> SlotOrder:
        """Raises ValueError or TypeError for anything else."""
        return SlotOrder(**orjson.loads(data))


def channel_of(worker_id: str) -> str:
    return f"slot-actions:{worker_id}"


def worker_of(served: Served) -> tuple[str, dict[str, Any]]:
    """The worker that is asked, and its report of the model. Of several replicas it is always the same one: the first.

    Blocking. Raises Refusal "llm_unavailable".
    """
    found = [
        (worker.worker_id, model)
        for worker in ticket_queue().workers()
        for model in worker.info.get("models", [])
        if worker.pool == served.pool and model["id"] == served.id and not worker.info.get("stopping")
    ]
    if not found:
        raise Refusal("llm_unavailable", f"No worker holds the model {served.name!r} now.", retry_after=2)
    return next((each for each in found if each[1]["state"] == "ready"), found[0])


def abilities_of(served: Served) -> dict[str, bool | str] | None:
    """What the memory of the model can do where it is loaded: true, or why not; None where nobody knows. Blocking."""
    try:
        _, report = worker_of(served)
    except Refusal:
        return None
    cannot = report.get("cannot")
    return None if cannot is None else {name: cannot.get(name, True) for name in ABILITIES}


def is_sleeping(served: Served) -> bool:
    """The worker that is asked for it has it in no memory, and loads it for its next request. Blocking."""
    try:
        _, report = worker_of(served)
    except Refusal:
        return False
    return bool(report["state"] == "unloaded")


async def ask(worker_id: str, order: SlotOrder) -> dict[str, Any]:
    """The worker's answer. Raises Refusal: what the worker refuses, or "service_unavailable" if it says nothing."""
    answer_to = f"slot-answer:{secrets.token_hex(12)}"
    sent = SlotOrder(**{**orjson.loads(order.to_bytes()), "answer_to": answer_to})
    seconds = order.wait_seconds + MARGIN_SECONDS
    client = redis.asyncio.Redis.from_url(
        settings.REDIS_URL, socket_timeout=seconds + 5.0, socket_connect_timeout=1.0, max_connections=1
    )
    async with client:
        if not await client.publish(channel_of(worker_id), sent.to_bytes()):
            raise Refusal("service_unavailable", "The worker of this model has gone. Try again.", retry_after=2)
        reply = await client.blpop([answer_to], timeout=int(seconds))
    if reply is None:
        raise Refusal("service_unavailable", "The worker of this model does not answer.", retry_after=2)
    answer: dict[str, Any] = orjson.loads(reply[1])
    if code := answer.get("code"):
        retry_after = 1 if code == "service_unavailable" else None
        raise Refusal(code, answer["message"], retry_after=retry_after)
    return answer

"""What the tests of the request flow share: tickets, a served model without a file, a worker with a fake engine."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import redis

from accounts.identity.principals import Principal
from accounts.limits.precedence import Limits
from inference.catalog import registry
from inference.catalog.served import Served
from inference.engine.backend import Backend
from inference.engine.fake_backend import FakeBackend
from inference.intake.admission import Admitted, admit
from inference.models import ServedModel
from inference.orders import GenerateOrder
from inference.transport.stream import stream_key
from inference.transport.ticket import Ticket
from inference.worker.worker import WorkerHost
from tests.timing import PATIENCE_SECONDS, wait_for

POOL = "default"
PROMPT = tuple(range(100, 110))


def new_id() -> str:
    return uuid.uuid4().hex


def ticket(**changes: Any) -> Ticket:
    """A ticket of tenant 1 for model 1; nothing of it is in the database."""
    now = time.time()
    values: dict[str, Any] = {
        "request_id": new_id(),
        "tenant_id": 1,
        "key_id": 1,
        "quota_key_id": 1,
        "pool": POOL,
        "model_id": 1,
        "model_name": "small",
        "model_digest": "d" * 64,
        "num_prompt_tokens": len(PROMPT),
        "prompt": PROMPT,
        "max_tokens": 16,
        "route": "/v1/generate",
        "created_at": now,
        "queue_deadline_at": now + 60,
        "deadline_at": now + 120,
        "reserved_tokens": 26,
        "entered_tokens": 26,
    }
    return Ticket(**{**values, **changes})


def principal_of(customer: Any, **limits: int | None) -> Principal:
    """The customer's key as the flow sees it, with `limits` on its tenant."""
    tenant, key = customer.tenant, customer.key
    return Principal(
        key_id=key.pk,
        quota_key_id=key.pk,
        public_id=key.public_id,
        key_name=key.name,
        tenant_id=tenant.pk,
        tenant_name=tenant.name,
        plan_name=tenant.plan.name,
        role="standard",
        scopes=frozenset({"generate"}),
        tenant_limits=replace(tenant.limits, **limits) if limits else tenant.limits,
        key_limits=Limits(),
    )


def register(name: str = "small", **options: Any) -> ServedModel:
    """A served model whose file does not exist: for fake engines and prompts that are tokens already."""
    values = {"n_ctx": 256, "n_slots": 4, "is_default": True, "path": "/nowhere.gguf", "digest": "d" * 64}
    row = ServedModel.objects.create(name=name, **{**values, **options})
    registry.forget()
    return row


def order(**changes: Any) -> GenerateOrder:
    return GenerateOrder(**{"prompt": PROMPT, "max_tokens": 16, **changes})


def admitted(principal: Principal, request_id: str | None = None, **changes: Any) -> Admitted:
    answer = admit(principal, order(**changes), request_id=request_id or new_id(), route="/v1/generate")
    assert isinstance(answer, Admitted)
    return answer


def fake_load(seconds_per_step: float = 0.0, **options: Any) -> Callable[[Served], Backend]:
    return lambda served: FakeBackend(served.n_slots, served.n_ctx, seconds_per_step, **options)


@contextmanager
def worker(
    client: redis.Redis, *, threads: int = 0, load: Callable[[Served], Backend] | None = None, **options: Any
) -> Iterator[WorkerHost]:
    """A worker in this process without Celery: `threads` take tickets as Celery's would when the bell rings."""
    host = WorkerHost(POOL, client=client, load=load or fake_load(), **options)
    host.start()
    closing = threading.Event()

    def answer_the_bell() -> None:
        while not closing.wait(0.005):
            host.serve()

    bells = [threading.Thread(target=answer_the_bell, daemon=True) for _ in range(threads)]
    for bell in bells:
        bell.start()
    try:
        yield host
    finally:
        closing.set()
        host.stop(0.0, 5.0)  # what it leaves would go on in the next test
        for bell in bells:
            bell.join(PATIENCE_SECONDS)


def events(client: redis.Redis, request_id: str) -> list[dict[str, Any]]:
    """What the request's stream holds now."""
    import orjson

    return [orjson.loads(values[b"e"]) for _, values in client.xrange(stream_key(request_id))]


def finish(client: redis.Redis, request_id: str, seconds: float = PATIENCE_SECONDS) -> dict[str, Any]:
    """Wait for the last event of a request."""

    def last() -> dict[str, Any] | None:
        return next((event for event in events(client, request_id) if event["t"] == "finished"), None)

    found: dict[str, Any] = wait_for(last, seconds)
    return found


def text_of(found: Sequence[dict[str, Any]]) -> str:
    return "".join(event["text"] for event in found if event["t"] == "delta")

"""All that Redis keeps of a tenant's requests: tickets, streams, kept answers, cached completions. Blocking.

Counters of rates and places stay: they are numbers, and end within minutes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

import redis

from inference.transport.queue import ticket_key
from inference.transport.stream import stream_key

T = TypeVar("T")
CHUNK = 500


def forget_tenant(client: redis.Redis, tenant_id: int, request_ids: Iterable[str]) -> int:
    """How many keys were removed. request_ids: of requests whose ticket may have gone before their stream. Nothing of
    the tenant may run. Idempotent; raises redis.RedisError."""
    names = {*_names(client, tenant_id)}
    for request_id in (*_requests(client, tenant_id), *request_ids):
        names.update((ticket_key(request_id), stream_key(request_id)))
    return sum(client.unlink(*chunk) for chunk in _chunks(sorted(names)))


def _names(client: redis.Redis, tenant_id: int) -> Iterator[str]:
    yield from (f"completions:{tenant_id}", f"kept:{tenant_id}:order", f"kept:{tenant_id}:sizes")
    for pattern in (f"completion:{tenant_id}:*", f"idem:{tenant_id}:*"):
        yield from (name.decode() for name in client.scan_iter(match=pattern, count=CHUNK))


def _requests(client: redis.Redis, tenant_id: int) -> Iterator[str]:
    """Ids of tickets that are the tenant's."""
    for chunk in _chunks(client.scan_iter(match=ticket_key("*"), count=CHUNK)):
        with client.pipeline(transaction=False) as pipe:
            for name in chunk:
                pipe.hget(name, "tenant")
            owners = pipe.execute()
        of_it = (name for name, owner in zip(chunk, owners, strict=True) if owner == str(tenant_id).encode())
        yield from (name.decode().removeprefix(ticket_key("")) for name in of_it)


def _chunks(found: Iterable[T]) -> Iterator[list[T]]:
    rest = iter(found)
    while chunk := list(islice(rest, CHUNK)):
        yield chunk

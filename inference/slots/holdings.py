"""What workers hold in memory and on disk, for whom, and to drop it: for operators, by the console and the command.

Workers are asked as `GET /slots` asks them (actions.py), all at once: of each model that is loaded, and of the disk of
each machine. At most MOST_MODELS models and MOST_HOSTS machines; names come from three queries. Counts and names of
tenants and adapters alone: no token of anybody. What is dropped is noted in the audit log. Blocking.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from asgiref.sync import async_to_sync

from accounts.models import Tenant
from accounts.trail import audit_log
from accounts.trail.refusals import Refusal
from inference.models import Adapter, ServedModel
from inference.slots import actions
from inference.slots.actions import SlotOrder
from inference.transport.queue import WorkerInfo, ticket_queue

MOST_MODELS = 20
MOST_HOSTS = 10
LIST_SECONDS = 2.0
DROP_SECONDS = 5.0
"""A busy slot is waited for so long."""

Answer = dict[str, Any] | Refusal


@dataclass(slots=True)
class Names:
    tenants: dict[int, str] = field(default_factory=dict)
    adapters: dict[str, str] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, answers: Iterable[Answer]) -> Names:
        """Three queries, whatever there is."""
        told = [each for each in answers if not isinstance(each, Refusal)]
        slots = [slot for each in told for slot in each.get("slots", ())]
        files = [file for each in told for file in each.get("files", ())]
        owners = {slot["tenant"] for slot in slots} | {file["tenant_id"] for file in files}
        digests = {digest for slot in slots for digest, _ in slot["adapters"]}
        loaded = {file["model_digest"] for file in files}
        return cls(
            dict(Tenant.objects.filter(pk__in=owners - {None}).values_list("pk", "name")),
            dict(Adapter.objects.filter(digest__in=digests).values_list("digest", "name")),
            dict(ServedModel.objects.filter(digest__in=loaded).values_list("digest", "name")),
        )


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in the memory of a worker. report: of its heartbeat. answer: to `list` of actions.py."""

    worker: str
    report: dict[str, Any]
    answer: Answer


@dataclass(frozen=True, slots=True)
class Disk:
    """Of a machine, asked through one of its workers. answer: to `files` of actions.py."""

    host: str
    worker: str
    answer: Answer

    def files(self) -> Iterator[dict[str, Any]]:
        if not isinstance(self.answer, Refusal):
            yield from self.answer["files"]


@dataclass(frozen=True, slots=True)
class Holdings:
    loaded: Sequence[Loaded]
    disks: Sequence[Disk]
    names: Names


def look() -> Holdings:
    """Raises redis.RedisError."""
    workers = ticket_queue().workers()
    loaded, hosts = _loaded(workers), _by_host(workers)
    everybodys = SlotOrder(action="list", model_id=0, tenant_id=None, wait_seconds=LIST_SECONDS)
    asked = [(worker, replace(everybodys, model_id=report["id"])) for worker, report in loaded]
    asked += [(worker, replace(everybodys, action="files")) for worker in hosts.values()]
    answers = _ask_all(asked)
    return Holdings(
        [Loaded(*which, answer) for which, answer in zip(loaded, answers, strict=False)],
        [Disk(*which, answer) for which, answer in zip(hosts.items(), answers[len(loaded) :], strict=True)],
        Names.of(answers),
    )


def erase(tenant: Tenant, worker: str, model: ServedModel, number: int) -> int:
    """A slot of a tenant, by its number there, forgets what it holds; the tokens that it held. Waits for a request
    that runs in it. Raises Refusal or redis.RedisError."""
    order = SlotOrder(action="erase", model_id=model.pk, tenant_id=tenant.pk, number=number, wait_seconds=DROP_SECONDS)
    tokens = int(_ask(worker, order)["tokens"])
    audit_log.acted(tenant, {f"slot {number} of {model.name}": (f"{tokens} tokens", None)})
    return tokens


def forget(tenant: Tenant, worker: str, name: str) -> bool:
    """Remove a saved state from the disk of a worker; False where it was gone. Raises Refusal or redis.RedisError."""
    order = SlotOrder(action="forget", model_id=0, tenant_id=tenant.pk, label=name, wait_seconds=DROP_SECONDS)
    is_removed = bool(_ask(worker, order)["removed"])
    if is_removed:
        audit_log.acted(tenant, {"saved state": (name, None)})
    return is_removed


def leave(tenant: Tenant) -> list[str]:
    """Have every worker forget all of a tenant, in memory and on disk; which could not, and why. Raises
    redis.RedisError."""
    order = SlotOrder(action="leave", model_id=0, tenant_id=tenant.pk, wait_seconds=DROP_SECONDS)
    rest = {
        worker.worker_id: [order, *(replace(order, model_id=model["id"]) for model in worker.info.get("models", ()))]
        for worker in ticket_queue().workers()
    }
    problems = []
    while rest:  # one at a time of each worker: it takes few of a tenant at once
        asked = [(worker, orders.pop()) for worker, orders in rest.items()]
        told = zip(rest, _ask_all(asked), strict=True)
        problems += [f"{worker}: {answer.message}" for worker, answer in told if isinstance(answer, Refusal)]
        rest = {worker: orders for worker, orders in rest.items() if orders}
    return problems


def _loaded(workers: Iterable[WorkerInfo]) -> list[tuple[str, dict[str, Any]]]:
    found = [(each.worker_id, model) for each in workers for model in each.info.get("models", ())]
    return [(worker, model) for worker, model in found if model["state"] in ("ready", "retiring")][:MOST_MODELS]


def _by_host(workers: Iterable[WorkerInfo]) -> dict[str, str]:
    """Machine → one worker that is asked about its disk."""
    found = {str(each.info.get("host") or each.worker_id): each.worker_id for each in workers}
    return dict(sorted(found.items())[:MOST_HOSTS])


def _ask(worker: str, order: SlotOrder) -> dict[str, Any]:
    """Raises Refusal or redis.RedisError."""
    (answer,) = _ask_all([(worker, order)])
    if isinstance(answer, Refusal):
        raise answer
    return answer


@async_to_sync
async def _ask_all(asked: Sequence[tuple[str, SlotOrder]]) -> list[Answer]:
    async def answer(worker_id: str, order: SlotOrder) -> Answer:
        try:
            return await actions.ask(worker_id, order)
        except Refusal as refusal:
            return refusal

    return await asyncio.gather(*(answer(worker, order) for worker, order in asked))

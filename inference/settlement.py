"""From the end of a request to the ledger: what it costs, its receipt, and telling accounts exactly once.

How a request ended is decided by whoever appends its last event (stream.py); the same step files its outcome under
`settlements` in Redis. Settlers write outcomes to the database in groups and strike them off afterwards: the worker
those that it made, the sweep those whose maker died. Writing twice is harmless, so nothing is lost and nothing doubled.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from typing import Any

import orjson
import redis
from django.db import DatabaseError, InterfaceError, OperationalError, connection

from accounts import redis_client
from accounts.ledger import quotas
from accounts.ledger.quotas import ReleaseOrder, SettleOrder
from accounts.trail.refusals import Refusal
from inference import metrics
from inference.engine.types import Finished, FinishReason
from inference.models import Receipt
from inference.transport.completion_cache import Completion
from inference.transport.ticket import Ticket, TicketError, adapter_scales

logger = logging.getLogger(__name__)

GROUP_SIZE = 128
GROUP_SECONDS = 0.03
"""An outcome waits so long for others to share its transaction: nobody waits for it, and the database is spared."""
ORPHAN_SECONDS = 2.0
"""An outcome that its maker has not settled for so long is settled by anybody."""
PUT_OFF_SECONDS = 60.0
"""What the database refuses while it is there is tried again after so long, behind all others."""
SETTLING_SECONDS = 10.0
"""A process that settles what others have left, and dies at it, keeps the rest from doing so for so long."""
MAX_KEPT = 10_000
AWAY = (Refusal, OperationalError, InterfaceError)
"""What says that the database takes nothing at all now."""
OF_ITS_OWN_MAKING = frozenset({"grammar_dead_end", "grammar_too_slow"})
"""Errors that the request's grammar brought about."""
WHOLE = (FinishReason.EOS, FinishReason.STOP, FinishReason.LENGTH)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a request ended and what it costs. Fields are the receipt's; times are Unix seconds."""

    status: str
    finish_reason: str
    error_code: str = ""
    charged_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    total_seconds: float = 0.0
    num_steps: int = 0
    mean_batch_size: float = 0.0
    mean_decode_batch_size: float = 0.0
    seed: int | None = None
    worker: str = ""
    digests: dict[str, str] = field(default_factory=dict)
    finished_at: float = 0.0

    @property
    def is_charged(self) -> bool:
        """Failures are free; so is what was cancelled before anything was computed."""
        return self.status != Receipt.Status.FAILED and (self.charged_tokens > 0 or self.status != "cancelled")

    def to_bytes(self) -> bytes:
        return orjson.dumps(self)

    @staticmethod
    def parse(data: bytes) -> Outcome:
        """Raises ValueError or TypeError for anything else. Fields of a later version are left out."""
        values = orjson.loads(data)
        return Outcome(**{name: value for name, value in values.items() if name in OUTCOME_NAMES})


OUTCOME_NAMES = frozenset(item.name for item in fields(Outcome))


def outcome_of(
    ticket: Ticket,
    finished: Finished,
    *,
    worker: str,
    now: float,
    leased_at: float,
    digests: dict[str, str] | None = None,
) -> Outcome:
    """The price of a request that an engine ended.

    Whole answers, cancelled ones and those cut by their deadline cost the prompt and every token generated; errors
    cost nothing, and neither does what ended before its first step. A prompt that several answers of one request have
    in common is paid by the first of them: where that one fails, nobody pays for it. A stream that its own grammar led
    to a dead end has been read, so it costs what one that was cancelled does: else a grammar could be written to stream
    for nothing. One that was cancelled with an error was ended by the operator, or by what its tenant lost.
    """
    receipt = finished.receipt
    is_error = finished.reason is FinishReason.ERROR
    failed = is_error and not (ticket.stream and finished.error in OF_ITS_OWN_MAKING)
    computed = receipt.num_steps > 0 and not failed
    if failed:
        status = Receipt.Status.FAILED
    else:
        status = Receipt.Status.COMPLETED if finished.reason in WHOLE else Receipt.Status.CANCELLED
    return Outcome(
        status=status.value,
        finish_reason=finished.reason.value,
        error_code=(finished.error or ("error" if is_error else ""))[:64],
        charged_tokens=ticket.charged_prompt_tokens + receipt.completion_tokens if computed else 0,
        prompt_tokens=ticket.num_prompt_tokens,
        cached_tokens=receipt.cached_tokens,
        completion_tokens=receipt.completion_tokens,
        drafted_tokens=receipt.drafted_tokens,
        accepted_tokens=receipt.accepted_tokens,
        queue_seconds=max(0.0, leased_at - ticket.created_at) + receipt.queue_seconds,
        prefill_seconds=receipt.prefill_seconds,
        decode_seconds=receipt.decode_seconds,
        total_seconds=max(0.0, now - ticket.created_at),
        num_steps=receipt.num_steps,
        mean_batch_size=_mean(receipt.batch_sequences, receipt.num_steps),
        mean_decode_batch_size=_mean(receipt.decode_batch_sequences, receipt.decode_steps),
        seed=receipt.seed,
        worker=worker[:64],
        digests=digests or {},
        finished_at=now,
    )


def outcome_without_engine(ticket: Ticket, why: str, *, now: float) -> Outcome:
    """The price of a request that no engine ended: nothing. why: cancelled, or the code of the error."""
    cancelled = why == "cancelled"
    waited = max(0.0, now - ticket.created_at)
    return Outcome(
        status=(Receipt.Status.CANCELLED if cancelled else Receipt.Status.FAILED).value,
        finish_reason=(FinishReason.CANCELLED if cancelled else FinishReason.ERROR).value,
        error_code="" if cancelled else why[:64],
        prompt_tokens=ticket.num_prompt_tokens,
        queue_seconds=waited if why != "worker_lost" else 0.0,
        total_seconds=waited,
        finished_at=now,
    )


def _mean(total: int, number: int) -> float:
    return total / number if number else 0.0


def completion_of(ticket: Ticket, finished: Finished, output: str) -> Completion | None:
    """What the completion cache may keep: whole answers, not those that a quota or a failure cut short."""
    if ticket.cache_key is None or ticket.clamped or finished.reason not in WHOLE or not output:
        return None
    return Completion(
        output=output,
        finish_reason=finished.reason.value,
        stop_word=finished.stop_word,
        prompt_tokens=ticket.num_prompt_tokens,
        completion_tokens=finished.receipt.completion_tokens,
    )


def receipt_row(ticket: Ticket, outcome: Outcome) -> Receipt:
    """The row that GET /v1/requests/{id} and the admin show."""
    values = {name: getattr(outcome, name) for name in OUTCOME_NAMES if name != "finished_at"}
    return Receipt(
        request_id=ticket.request_id,
        tenant_id=ticket.tenant_id,
        key_id=ticket.key_id,
        parent_id=ticket.parent_id,
        model=ticket.model_name,
        model_digest=ticket.model_digest,
        adapters=adapter_scales(ticket.adapter_names, ticket.adapters),
        aliases=[list(pair) for pair in ticket.aliases],
        route=ticket.route,
        created_at=_moment(ticket.created_at),
        finished_at=_moment(outcome.finished_at),
        **values,
    )


def _moment(unix_seconds: float) -> datetime:
    return datetime.fromtimestamp(unix_seconds, UTC)


def _order(ticket: Ticket, outcome: Outcome) -> SettleOrder | ReleaseOrder:
    now, records = _moment(outcome.finished_at), (receipt_row(ticket, outcome),)
    if not outcome.is_charged:
        reason = outcome.error_code or outcome.finish_reason
        return ReleaseOrder(
            request_id=ticket.request_id, reason=reason, now=now, model=ticket.model_name, records=records
        )
    return SettleOrder(
        request_id=ticket.request_id,
        charged_tokens=outcome.charged_tokens,
        prompt_tokens=ticket.charged_prompt_tokens,
        cached_tokens=min(outcome.cached_tokens, ticket.charged_prompt_tokens),
        completion_tokens=outcome.completion_tokens,
        model=ticket.model_name,
        adapters="+".join(ticket.adapter_names),
        operation=operation_of(ticket.route),
        now=now,
        reason=outcome.finish_reason,
        records=records,
        uncharged_records=lambda: (receipt_row(ticket, replace(outcome, charged_tokens=0)),),
    )


def operation_of(route: str) -> str:
    """What usage is listed under: completions or embeddings."""
    return "embeddings" if "embedding" in route else "completions"


Ended = tuple[Ticket, Outcome]


def settle_many(ended: Sequence[Ended]) -> list[bool]:
    """One transaction for all; False for those that were settled before.

    Raises Refusal service_unavailable or DatabaseError where the database did not take it: nothing has happened then.
    """
    settled = quotas.settle_many([_order(ticket, outcome) for ticket, outcome in ended])
    metrics.SETTLEMENT_GROUP.observe(len(ended))
    for (ticket, outcome), is_new in zip(ended, settled, strict=True):
        if is_new:
            _count(ticket, outcome)
    return settled


def _count(ticket: Ticket, outcome: Outcome) -> None:
    model = ticket.model_name
    metrics.ENDED.labels(model, outcome.status, outcome.finish_reason).inc()
    metrics.TOKENS.labels("prompt", model).inc(outcome.prompt_tokens if outcome.num_steps else 0)
    metrics.TOKENS.labels("completion", model).inc(outcome.completion_tokens)
    for alias, adapter in ticket.aliases:
        metrics.ALIAS_REQUESTS.labels(model, alias, adapter, outcome.status).inc()
        if outcome.num_steps and not ticket.is_batch:
            seconds = outcome.queue_seconds + outcome.prefill_seconds
            metrics.ALIAS_FIRST_TOKEN_SECONDS.labels(model, alias, adapter).observe(seconds)
    if outcome.num_steps:
        metrics.BATCH_SIZE.labels(model).observe(outcome.mean_batch_size)
        if not ticket.is_batch:  # its wait is the queue's purpose
            metrics.QUEUE_SECONDS.labels(model).observe(outcome.queue_seconds)


# Outcomes in Redis


def settle_filed(client: redis.Redis, ended: Sequence[Ended]) -> int:
    """Settle these and strike them off in Redis; how many. Raises AWAY where the database is away, and RedisError.

    One that the database refuses by itself holds up nobody: it stays in Redis, behind the others, until it is taken.
    """
    refused: set[str] = set()
    try:
        settle_many(ended)
    except AWAY:
        raise
    except Exception as error:  # noqa: BLE001 - each outcome gets the error of its own
        logger.warning("a group of %d outcomes failed and is settled one by one: %s", len(ended), error)
        refused = {each[0].request_id for each in ended if not _is_settled(each)}
    settled = [ticket.request_id for ticket, _ in ended if ticket.request_id not in refused]
    if settled:
        strike_off(client, settled)
    if refused:  # xx: another may have settled it meanwhile
        client.zadd("unsettled", dict.fromkeys(refused, time.time() + PUT_OFF_SECONDS), xx=True)
    return len(settled)


def leave_to_sweep(client: redis.Redis, request_ids: Sequence[str]) -> None:
    """Nobody else settles these outcomes: the next sweep does, without waiting for their maker."""
    client.zadd("unsettled", dict.fromkeys(request_ids, time.time() - ORPHAN_SECONDS), xx=True)


def _is_settled(ended: Ended) -> bool:
    try:
        settle_many([ended])
    except AWAY:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, the others must be settled
        logger.error("request %s cannot be settled, it is tried again later: %s", ended[0].request_id, error)
        return False
    return True


def pending(client: redis.Redis, request_id: str) -> Ended | None:
    """The outcome of a request that has ended and is not in the database yet."""
    record: Any = client.hget("settlements", request_id)
    return None if record is None else _parse(record)


def unsettled(client: redis.Redis, request_ids: Sequence[str]) -> set[str]:
    """Of these, the ones that have ended and are not in the database yet. One round trip."""
    records: list[Any] = client.hmget("settlements", request_ids) if request_ids else []
    return {each for each, record in zip(request_ids, records, strict=True) if record is not None}


def settle_pending(client: redis.Redis, *, older_than_seconds: float = 0.0, most: int = GROUP_SIZE) -> int:
    """Settle outcomes that wait in Redis, whoever made them; how many have gone from there. Raises as settle_filed."""
    until = f"{time.time() - older_than_seconds:.6f}" if older_than_seconds else "+inf"
    ids: Any = client.zrange("unsettled", "-inf", until, byscore=True, offset=0, num=most)
    if not ids:
        return 0
    records: list[Any] = client.hmget("settlements", ids)
    found = [record and _parse(record) for record in records]
    dropped = [each for each, item in zip(ids, found, strict=True) if not item]
    if dropped:
        strike_off(client, dropped)
    ended = [item for item in found if item]
    return len(dropped) + (settle_filed(client, ended) if ended else 0)


def settle_all_pending(client: redis.Redis, *, older_than_seconds: float = 0.0) -> int:
    """As settle_pending, until none is left. One process at a time: else all would write the same, and a database that
    is slow already would have as much again to do for each of them. 0 where another is at it."""
    milliseconds = int(SETTLING_SECONDS * 1000)
    if not client.set("settling", 1, nx=True, px=milliseconds):
        return 0
    total = 0
    try:
        while number := settle_pending(client, older_than_seconds=older_than_seconds):
            total += number
            if number < GROUP_SIZE:
                break
            client.pexpire("settling", milliseconds)
    finally:
        client.delete("settling")  # after a long wait it may be another's: two at once are harmless
    return total


def catch_up() -> int:
    """Before a question about usage: settle what has ended this moment; how many. Never raises.

    Without Redis or the database the answer is as old as the last group, or the question fails by itself.
    """
    try:
        return settle_pending(redis_client.client())
    except (Refusal, DatabaseError, redis.RedisError) as error:
        logger.warning("ended requests are settled later: %s", error)
        return 0


def strike_off(client: redis.Redis, request_ids: Sequence[str | bytes]) -> None:
    """These are in the database. One round trip."""
    with client.pipeline(transaction=False) as pipe:
        pipe.hdel("settlements", *request_ids)
        pipe.zrem("unsettled", *request_ids)
        pipe.execute()


def _parse(record: bytes) -> Ended | None:
    header, _, outcome = record.partition(b"\n")
    try:
        return Ticket.parse(header), Outcome.parse(outcome)
    except (TicketError, ValueError, TypeError) as error:
        logger.error("an outcome is dropped, its reservation runs out by itself: %s", error)
        return None


class Settler:
    """The worker's settling thread: what ends within GROUP_SECONDS, or while a transaction runs, is one transaction."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._news = threading.Condition()
        self._ended: list[Ended] = []
        self._is_busy = False
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="settler", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, ticket: Ticket, outcome: Outcome) -> None:
        """Settle soon. Beyond MAX_KEPT it is left to the sweep, which finds it in Redis."""
        with self._news:
            if len(self._ended) < MAX_KEPT:
                self._ended.append((ticket, outcome))
                self._news.notify()

    def flush(self, timeout_seconds: float) -> bool:
        """Wait until everything submitted is in the database."""
        with self._news:
            return self._news.wait_for(lambda: not self._ended and not self._is_busy, timeout_seconds)

    def stop(self, timeout_seconds: float) -> None:
        """Settle what is left, if the database lets it in so many seconds; the rest is in Redis."""
        deadline = time.monotonic() + timeout_seconds
        self.flush(timeout_seconds)
        with self._news:
            self._stopping = True
            self._news.notify()
        if self._thread.ident is not None:  # told to stop before it began
            self._thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        pause = 0.0
        while True:
            with self._news:
                self._is_busy = False
                self._news.notify_all()
                self._news.wait_for(lambda: self._ended or self._stopping)
                if self._stopping:
                    break
                self._news.wait_for(lambda: self._stopping or len(self._ended) >= GROUP_SIZE, GROUP_SECONDS)
                group, self._ended = self._ended[:GROUP_SIZE], self._ended[GROUP_SIZE:]
                self._is_busy = True
            pause = 0.0 if self._settle(group) else min(2.0, pause * 2 or 0.1)
            if pause:
                time.sleep(pause)
        connection.close()

    def _settle(self, group: list[Ended]) -> bool:
        try:
            settle_filed(self._client, group)
        except AWAY as error:
            logger.warning("settlement waits for the database: %s", error)
            connection.close()
            self._put_back(group)
            return False
        except redis.RedisError as error:
            logger.warning("settled outcomes stay in Redis until the sweep: %s", error)
        except Exception:  # the thread must outlive a defect
            logger.exception("a group of %d outcomes was left to the sweep", len(group))
            return False
        return True

    def _put_back(self, group: Iterable[Ended]) -> None:
        with self._news:
            self._ended[:0] = group

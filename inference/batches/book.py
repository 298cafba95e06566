"""The only writer of batches and their lines: every change of a state is an UPDATE that says whether it happened.

Blocking; called by the feeder's hops, the views and the console. Everything may be repeated after a crash: lines of a
batch are written once by their number, an answer counts once, files of results have ids that follow from the batch's.
"""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice
from typing import Any

import orjson
from django.conf import settings
from django.db import transaction
from django.db.models import F, Q

from accounts import redis_client
from accounts.identity.principals import Principal
from accounts.ledger import quotas
from accounts.ledger.quotas import ReleaseOrder
from accounts.ledger.turn import turn
from accounts.models import Reservation, Tenant
from accounts.trail import audit_log
from accounts.trail.refusals import Refusal
from inference import settlement
from inference.batches import files, lines
from inference.batches.lines import Line, Problem
from inference.batches.models import Batch, BatchLine, StoredFile

logger = logging.getLogger(__name__)

State, Status = BatchLine.State, Batch.Status
CANCELLABLE = (Status.VALIDATING, Status.IN_PROGRESS)
WINDOWS = {"24h": 24 * 3600}
MAX_PROBLEMS = 100
ROWS_AT_ONCE = 500
ENDINGS = {
    Status.EXPIRED: ("batch_expired", "This request could not be executed before the completion window expired."),
    Status.CANCELLED: ("batch_cancelled", "This request was not executed, because the batch was cancelled."),
    Status.FAILED: ("batch_failed", "This request was not executed, because the batch failed."),
}
"""What stands in the error file for a line that nobody answered."""


@dataclass(frozen=True, slots=True)
class Answer:
    """How a line ended. text: its line of a result file."""

    batch_id: str
    number: int
    is_completed: bool
    text: str


def create(
    principal: Principal,
    *,
    endpoint: str,
    input_file_id: str,
    completion_window: str,
    metadata: dict[str, str] | None,
    output_seconds: int | None,
    now: datetime,
    record: str = "",
    fingerprint: str = "",
) -> tuple[Batch, bool]:
    """(a batch that the feeder will look at, whether it is new). record: of an Idempotency-Key; the batch that was
    created with it before is the answer again. Raises Refusal: file_not_found, bad_request, batch_limit_exceeded,
    idempotency_key_conflict.
    """
    with turn(), transaction.atomic():
        # Those of a tenant one after the other: else several at once would all see that one more may be open.
        Tenant.objects.select_for_update(no_key=True).get(pk=principal.tenant_id)
        if record and (before := _created_before(principal.tenant_id, record, fingerprint)):
            return before, False
        row = files.find(principal.tenant_id, input_file_id)
        if row.purpose != StoredFile.Purpose.BATCH:
            raise Refusal("bad_request", f"{row.id} was not uploaded with the purpose batch.", field="input_file_id")
        most = settings.CONFIG.open_batches
        if Batch.objects.filter(tenant_id=principal.tenant_id, status__in=files.OPEN_STATES)[:most].count() >= most:
            raise Refusal(
                "batch_limit_exceeded",
                f"{most} batches have not ended, as many as may be: wait for one, or cancel it.",
                limit="open_batches",
                value=most,
            )
        batch = Batch(
            id=files.new_id("batch_"),
            tenant_id=principal.tenant_id,
            key_id=principal.key_id,
            endpoint=endpoint,
            input_file_id=row.id,
            completion_window=completion_window,
            metadata=metadata,
            output_seconds=output_seconds,
            idempotency_record=record,
            idempotency_print=fingerprint,
            created_at=now,
            expires_at=now + timedelta(seconds=WINDOWS[completion_window]),
        )
        batch.save(force_insert=True)
    return batch, True


def _created_before(tenant_id: int, record: str, fingerprint: str) -> Batch | None:
    batch = Batch.objects.filter(tenant_id=tenant_id, idempotency_record=record).first()
    if batch is not None and batch.idempotency_print != fingerprint:
        raise Refusal(
            "idempotency_key_conflict",
            "This Idempotency-Key was used with another body. Use a new key for a new request.",
        )
    return batch


def find(tenant_id: int, batch_id: str) -> Batch:
    """Raises Refusal batch_not_found, also for another tenant's."""
    row = Batch.objects.filter(pk=batch_id[:40], tenant_id=tenant_id).first()
    if row is None:
        raise Refusal("batch_not_found", f"No such Batch object: {batch_id[:40]}", field="batch_id")
    return row


def cancel(batch_id: str, now: datetime) -> bool:
    """What waits is dropped, what runs may end. False where it had ended, or was ending."""
    with turn():
        return _move(
            batch_id,
            CANCELLABLE,
            status=Status.CANCELLING,
            ends_as=Status.CANCELLED,
            cancelling_at=now,
        )


def cancel_by_hand(batch: Batch, now: datetime) -> bool:
    """As `cancel`, by an operator: the audit log has it."""
    is_new = cancel(batch.pk, now)
    if is_new:
        audit_log.acted(batch, {"status": (batch.status, Status.CANCELLING)})
    return is_new


def end(batch_id: str, ends_as: str, now: datetime, problems: Sequence[Problem] = ()) -> bool:
    """Nothing new is begun; its files are written when what runs has ended."""
    with turn():
        return _move(
            batch_id,
            CANCELLABLE,
            status=Status.FINALIZING,
            ends_as=ends_as,
            finalizing_at=now,
            errors=[problem.as_error() for problem in problems],
        )


def _move(batch_id: str, before: Iterable[str], **values: Any) -> bool:
    return Batch.objects.filter(pk=batch_id, status__in=tuple(before)).update(**values) == 1


# Validation


def validate(batch: Batch, now: datetime) -> None:
    """Lines become rows and the batch is in progress, or it has failed and says why. May be repeated."""
    config = settings.CONFIG
    problems: list[Problem] = []
    rows: list[BatchLine] = []
    num_lines = 0
    try:
        with files.open_bytes(files.find(batch.tenant_id, batch.input_file_id)) as file:
            found = lines.read(file, batch.endpoint, max_lines=config.batch_lines, max_line_bytes=config.max_body_bytes)
            for item in found:
                if isinstance(item, Problem):
                    problems.append(item)
                    if len(problems) >= MAX_PROBLEMS:
                        break
                elif not problems:
                    num_lines += 1
                    rows.append(_row(batch, item))
                    if len(rows) >= ROWS_AT_ONCE:
                        _insert(rows)
                        rows = []
    except Refusal as refusal:
        problems.append(Problem(refusal.code, refusal.message, "input_file_id"))
    if problems:
        _fail(batch, problems, now)
        return
    _insert(rows)
    with turn():
        _move(batch.id, [Status.VALIDATING], status=Status.IN_PROGRESS, num_lines=num_lines, in_progress_at=now)


def _row(batch: Batch, line: Line) -> BatchLine:
    return BatchLine(
        batch=batch, number=line.number, custom_id=line.custom_id, offset=line.offset, size_bytes=line.size
    )


def _insert(rows: list[BatchLine]) -> None:
    with turn():
        BatchLine.objects.bulk_create(rows, ignore_conflicts=True)


def _fail(batch: Batch, problems: Sequence[Problem], now: datetime) -> None:
    errors = [problem.as_error() for problem in problems]
    with turn(), transaction.atomic():
        if _move(batch.id, [Status.VALIDATING], status=Status.FAILED, errors=errors, failed_at=now):
            BatchLine.objects.filter(batch=batch).delete()


# Feeding


def waiting(batch: Batch, most: int, besides: Iterable[int] = ()) -> list[BatchLine]:
    """The first lines without an answer, but for those in hand."""
    rows = BatchLine.objects.filter(batch=batch, state=State.WAITING).order_by("number")
    return list(rows.exclude(number__in=tuple(besides))[:most])


def record(answers: Sequence[Answer]) -> int:
    """One transaction; an answer to a line that has one is dropped. How many counted."""
    counts: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
    with turn(), transaction.atomic():
        for answer in answers:
            moved = BatchLine.objects.filter(
                batch_id=answer.batch_id, number=answer.number, state=State.WAITING
            ).update(state=State.COMPLETED if answer.is_completed else State.FAILED, answer=answer.text)
            counts[answer.batch_id][0 if answer.is_completed else 1] += moved
        for batch_id, (completed, failed) in sorted(counts.items()):
            Batch.objects.filter(pk=batch_id).update(
                num_completed=F("num_completed") + completed, num_failed=F("num_failed") + failed
            )
    return sum(map(sum, counts.values()))


# Ending


def finalize(batch: Batch, now: datetime) -> None:
    """Results become files, and the rows of the lines go. `batch` is ending and nothing of it is in hand.

    Idempotent: the files' ids follow from the batch's, and only the last step says that it has ended.
    """
    _release_rest(batch, now)
    _close_lines(batch)
    output_id = _write(batch, "output", State.COMPLETED, now)
    error_id = _write(batch, "error", State.FAILED, now)
    ends_as = str(batch.ends_as)
    with turn(), transaction.atomic():
        if _move(
            batch.id,
            [Status.FINALIZING, Status.CANCELLING],
            status=ends_as,
            output_file_id=output_id,
            error_file_id=error_id,
            **{f"{ends_as}_at": now},
        ):
            BatchLine.objects.filter(batch=batch).delete()


def _release_rest(batch: Batch, now: datetime) -> None:
    """Reservations of lines that were taken back while the database was away.

    Not those of lines that have just ended, whose outcome is on its way to the ledger: they would be free of charge.
    """
    prefix = batch.id.removeprefix("batch_") + "-"
    rows = Reservation.objects.filter(pk__gte=prefix, pk__lt=prefix + "~", state=Reservation.State.OPEN)
    ids = list(rows.values_list("pk", flat=True)[:ROWS_AT_ONCE])
    ended = settlement.unsettled(redis_client.client(), ids)
    rest = [ReleaseOrder(request_id=each, reason="batch ended", now=now) for each in ids if each not in ended]
    quotas.release_many(rest)


def _close_lines(batch: Batch) -> None:
    """Lines that nobody answered fail; what they say follows from the batch's end."""
    with turn(), transaction.atomic():
        if batch.in_progress_at is None:  # cancelled before its lines were counted
            BatchLine.objects.filter(batch=batch).delete()
        closed = BatchLine.objects.filter(batch=batch, state=State.WAITING).update(state=State.FAILED)
        Batch.objects.filter(pk=batch.pk).update(num_failed=F("num_failed") + closed)


def _write(batch: Batch, kind: str, state: str, now: datetime) -> str:
    """The id of the file; empty where no line ended so."""
    rows = BatchLine.objects.filter(batch=batch, state=state).order_by("number").iterator(ROWS_AT_ONCE)
    first = next(rows, None)
    if first is None:
        return ""
    file_id = "file-" + hashlib.sha256(f"{batch.id} {kind}".encode()).hexdigest()[:24]
    if StoredFile.objects.filter(pk=file_id).exists():
        return file_id
    with files.scratch(batch.tenant_id) as place:
        with files.create(place) as file:
            file.write(_text(batch, first))
            while chunk := list(islice(rows, ROWS_AT_ONCE)):
                file.write(b"".join(_text(batch, row) for row in chunk))
            size = file.tell()
        files.keep(
            place,
            StoredFile(
                id=file_id,
                tenant_id=batch.tenant_id,
                key_id=batch.key_id,
                purpose=StoredFile.Purpose.BATCH_OUTPUT,
                filename=f"{batch.id}_{kind}.jsonl",
                size_bytes=size,
                created_at=now,
                expires_at=files.lifetime(now, batch.output_seconds),
            ),
        )
    return file_id


def _text(batch: Batch, row: BatchLine) -> bytes:
    if row.answer:
        return row.answer.encode() + b"\n"
    code, message = ENDINGS[Status(batch.ends_as)]
    error = {"code": code, "message": message}
    return orjson.dumps(answer_line(batch.id, row.number, row.custom_id, error=error)) + b"\n"


def answer_line(
    batch_id: str,
    number: int,
    custom_id: str,
    *,
    response: dict[str, Any] | None = None,
    error: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """https://platform.openai.com/docs/api-reference/batch/request-output"""
    line_id = f"batch_req_{batch_id.removeprefix('batch_')}-{number}"
    return {"id": line_id, "custom_id": custom_id, "response": response, "error": error}


# What is open


def open_batches() -> list[Batch]:
    """In order of arrival."""
    rows = Batch.objects.filter(status__in=files.OPEN_STATES).select_related("key")
    return list(rows.order_by("created_at", "id")[:1000])


def counts() -> tuple[dict[str, int], int]:
    """(open batches by status, lines of them without an answer), for metrics."""
    rows = Batch.objects.filter(status__in=files.OPEN_STATES)
    by_status = {str(status): 0 for status in files.OPEN_STATES}
    num_lines = 0
    for status, total, done, failed in rows.values_list("status", "num_lines", "num_completed", "num_failed"):
        by_status[status] += 1
        num_lines += total - done - failed
    return by_status, num_lines


def of_tenant(tenant_id: int, after: str | None, most: int) -> list[Batch]:
    """Newest first, those behind `after`. Raises Refusal batch_not_found for an unknown one."""
    rows = Batch.objects.filter(tenant_id=tenant_id).order_by("-created_at", "-id")
    if after is not None:
        mark = find(tenant_id, after)
        rows = rows.filter(Q(created_at__lt=mark.created_at) | Q(created_at=mark.created_at, id__lt=mark.id))
    return list(rows[:most])

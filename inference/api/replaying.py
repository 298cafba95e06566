"""The answer of a request that was admitted before, worded again: for whoever resumes its stream, asks a second time
with the same Idempotency-Key, or fetches what went on in the background.

What was posted goes through the same view as the first time, which is given the admission that has happened in the
place of a new one. So any process can do it, in the dialect in which it was asked, from the events that Redis keeps.
"""

from __future__ import annotations

from typing import Any

import orjson
from django.http import HttpRequest, HttpResponseBase
from django.urls import resolve
from rest_framework.request import Request

from inference.api import cancelling, presence
from inference.api.async_view import AsyncAPIView, Later, Outcome
from inference.transport.holding import START, Position, Question
from inference.transport.queue import ticket_queue


class ReplayableView(AsyncAPIView):
    """A view that can word again what was answered before."""

    replayed: Question | None = None
    """The request whose answer is worded again; then nothing is admitted."""
    after: Position = START
    """What the reader of that answer has seen."""
    is_followable: bool = False
    """It has one answer, and any process can word it from its events."""
    model_asked: str | None = None
    """Adapter and all; None where the request names none."""


def replay(
    by: AsyncAPIView, question: Question, *, stream: bool | None = None, after: Position = START
) -> tuple[ReplayableView, Later]:
    """The view that words it, and its answer. stream: as a stream or as a whole, however it was asked for.

    by: the view that was asked now; it has the principal. Blocking. What is wrong has a status in the answer.
    """
    request_id = question.ticket.request_id
    view: ReplayableView = resolve(question.path).func.cls()  # type: ignore[attr-defined]
    view.http_request = _posted(question, stream)
    view.request_id, view.log_fields, view.principal = request_id, by.log_fields, by.principal
    view.replayed, view.after = question, after
    view.request = Request(view.http_request)
    by.log_fields["replayed_request_id"] = request_id
    ticket_queue().join(request_id, presence.web_id())
    outcome: Outcome | Exception
    try:
        outcome = view._handler(view.http_request)(view.request)
    except Exception as error:  # noqa: BLE001 - the view's border: its dialect words what went wrong
        cancelling.leave(request_id)
        outcome = error

    async def run() -> HttpResponseBase:
        try:
            if isinstance(outcome, Exception):
                raise outcome
            response = await outcome.run() if isinstance(outcome, Later) else outcome
        except Exception as error:  # noqa: BLE001 - the same
            response = view.refused(error)
        response.headers["x-request-id"] = request_id
        return response

    return view, Later(run, abandon=outcome.abandon if isinstance(outcome, Later) else lambda: None)


def _posted(question: Question, stream: bool | None) -> HttpRequest:
    """What named no model has that of its answer: another may be the default by now."""
    fields: dict[str, Any] = orjson.loads(question.body)
    if fields.get("model") is None:
        fields["model"] = question.ticket.model_name
    if stream is not None:
        fields["stream"] = stream
    request = HttpRequest()
    request.method, request.path = "POST", question.path
    request._body = orjson.dumps(fields)
    return request

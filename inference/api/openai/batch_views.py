"""/v1/batches: create, look, cancel. The work is the feeder's (feeder.py)."""

from __future__ import annotations

from django.http import HttpResponse
from django.utils import timezone
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework.request import Request

from accounts.trail.refusals import Refusal
from inference.api.async_view import json_response
from inference.api.errors import wrong_field
from inference.api.generation import IDEMPOTENCY_KEY
from inference.api.openai import feeder
from inference.api.openai.base import OpenAIView
from inference.api.openai.batch_endpoints import ENDPOINTS
from inference.api.openai.file_schemas import BatchBody, BatchList, BatchQuery, BatchReply, batch_object, page
from inference.api.openai.file_views import read_query
from inference.api.repeating import REPLAYED
from inference.batches import book
from inference.intake import idempotency

LIST_PARAMETERS = [
    OpenApiParameter("limit", int, description="1 to 100."),
    OpenApiParameter("after", str, description="The last id of the page before."),
]


class BatchesView(OpenAIView):
    """Create a batch, or list those that are there."""

    route = "/v1/batches"

    @extend_schema(
        operation_id="batches_create",
        summary="Run a file",
        request=BatchBody,
        parameters=[IDEMPOTENCY_KEY],
        responses=BatchReply,
    )
    def post(self, request: Request) -> HttpResponse:
        body = self.parse(BatchBody)
        principal = self.admit_to_view()
        if body.endpoint not in ENDPOINTS:
            raise wrong_field("endpoint", f"must be one of {', '.join(ENDPOINTS)}")
        after, key = body.output_expires_after, request.META.get("HTTP_IDEMPOTENCY_KEY")
        place = (
            None if key is None else idempotency.place_of(principal.tenant_id, self.route, key, self.http_request.body)
        )
        batch, is_new = book.create(
            principal,
            endpoint=body.endpoint,
            input_file_id=body.input_file_id,
            completion_window=body.completion_window,
            metadata=body.metadata,
            output_seconds=after.seconds if after else None,
            now=timezone.now(),
            record=place.record if place else "",
            fingerprint=place.fingerprint if place else "",
        )
        feeder.wake()
        return json_response(batch_object(batch), headers={} if is_new else {REPLAYED: "true"})

    @extend_schema(
        operation_id="batches_list",
        summary="The tenant's batches",
        parameters=LIST_PARAMETERS,
        responses=BatchList,
    )
    def get(self, request: Request) -> HttpResponse:
        principal = self.admit_to_view()
        query: BatchQuery = read_query(BatchQuery, request)
        rows = book.of_tenant(principal.tenant_id, query.after, query.limit + 1)
        return json_response(page([batch_object(row) for row in rows], query.limit))


class BatchView(OpenAIView):
    """One batch: its state, and how far it is."""

    route = "/v1/batches/{id}"

    @extend_schema(operation_id="batches_retrieve", summary="One batch", responses=BatchReply)
    def get(self, request: Request, batch_id: str) -> HttpResponse:
        return json_response(batch_object(book.find(self.admit_to_view().tenant_id, batch_id)))


class BatchCancelView(OpenAIView):
    """Begin nothing more of a batch."""

    route = "/v1/batches/{id}/cancel"

    @extend_schema(operation_id="batches_cancel", summary="Cancel a batch", request=None, responses=BatchReply)
    def post(self, request: Request, batch_id: str) -> HttpResponse:
        batch = book.find(self.admit_to_view().tenant_id, batch_id)
        if not book.cancel(batch.id, timezone.now()):
            batch.refresh_from_db()
            if batch.status != book.Status.CANCELLING:
                raise Refusal("conflict", f"Cannot cancel a batch with status '{batch.status}'.", field="batch_id")
        feeder.wake()
        return json_response(batch_object(book.find(batch.tenant_id, batch.id)))

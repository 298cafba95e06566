"""/v1/files: what a tenant stores for its batches, and what batches stored for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from datetime import datetime
from functools import partial
from typing import IO, Any
from urllib.parse import quote

from django.conf import settings
from django.db.models import Q
from django.http import HttpResponse, HttpResponseBase, StreamingHttpResponse
from django.utils import timezone
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, extend_schema
from pydantic import BaseModel
from rest_framework.parsers import MultiPartParser
from rest_framework.request import Request

from accounts.identity.principals import Principal
from accounts.trail.refusals import Refusal
from inference.api.async_view import Later, json_response
from inference.api.hop import shared_hop
from inference.api.openai import uploads
from inference.api.openai.base import OpenAIView
from inference.api.openai.file_schemas import (
    DeletedReply,
    FileForm,
    FileList,
    FileQuery,
    FileReply,
    FileUpload,
    file_object,
    page,
)
from inference.api.spooling import Source
from inference.batches import files
from inference.batches.models import StoredFile

READ_BYTES = 1 << 18
LIST_PARAMETERS = [
    OpenApiParameter("purpose", str),
    OpenApiParameter("limit", int, description="1 to 10000."),
    OpenApiParameter("order", str, enum=["asc", "desc"]),
    OpenApiParameter("after", str, description="The last id of the page before."),
]


def read_query(form: type[BaseModel], request: Request) -> Any:
    """Raises pydantic.ValidationError."""
    return form.model_validate(request.query_params.dict())


class FilesView(OpenAIView):
    """Upload a file, or list those that are there."""

    route = "/v1/files"
    parser_classes = [MultiPartParser]  # for the OpenAPI document

    @extend_schema(
        operation_id="files_upload", summary="Upload the input of a batch", request=FileUpload, responses=FileReply
    )
    def post(self, request: Request) -> Later:
        """Who sends it, and has it room? Then it is read."""
        principal = self.admit_to_view()
        content_type = self.http_request.headers.get("Content-Type", "")
        if not content_type.startswith("multipart/form-data"):
            raise Refusal("unsupported_media_type", "Send the file as multipart/form-data.")
        length = self.http_request.headers.get("Content-Length", "")
        num_bytes = int(length) if length.isdigit() and len(length) < 16 else 0
        if num_bytes > _max_bytes() + uploads.MAX_FORM_BYTES:
            raise uploads.too_large(_max_bytes())
        files.check_room(principal, num_bytes)
        return Later(partial(self._read, principal, content_type), abandon=lambda: None)

    async def _read(self, principal: Principal, content_type: str) -> HttpResponseBase:
        self.stage = "upload"
        source: Source = self.http_request.upload  # type: ignore[attr-defined]
        with uploads.one_more(principal.tenant_id), files.scratch(principal.tenant_id) as spooled:
            await uploads.spool(source, spooled, _max_bytes())
            row = await shared_hop().run(
                lambda: _store(principal, spooled, content_type, timezone.now()), abandon=lambda _: None
            )
        return json_response(file_object(row))

    @extend_schema(
        operation_id="files_list", summary="The files of this tenant", parameters=LIST_PARAMETERS, responses=FileList
    )
    def get(self, request: Request) -> HttpResponse:
        principal = self.admit_to_view()
        query: FileQuery = read_query(FileQuery, request)
        rows = StoredFile.objects.filter(tenant_id=principal.tenant_id, expires_at__gt=timezone.now())
        if query.purpose is not None:
            rows = rows.filter(purpose=query.purpose)
        rising = query.order == "asc"
        if query.after is not None:
            mark = files.find(principal.tenant_id, query.after)
            sign = "gt" if rising else "lt"
            rows = rows.filter(
                Q(**{f"created_at__{sign}": mark.created_at})
                | Q(**{"created_at": mark.created_at, f"id__{sign}": mark.id})
            )
        rows = rows.order_by("created_at", "id") if rising else rows.order_by("-created_at", "-id")
        return json_response(page([file_object(row) for row in rows[: query.limit + 1]], query.limit))


def _max_bytes() -> int:
    return int(settings.CONFIG.batch_file_mb) << 20


def _store(principal: Principal, spooled: Any, content_type: str, now: datetime) -> StoredFile:
    with files.scratch(principal.tenant_id) as place:
        fields, filename, size = uploads.take_apart(spooled, content_type, place, _max_bytes())
        form = FileForm.model_validate(fields)
        if size == 0:
            raise Refusal("bad_request", "The file is empty.", field="file")
        files.check_room(principal, size)
        after = form.expires_after
        row = StoredFile(
            id=files.new_id("file-"),
            tenant_id=principal.tenant_id,
            key_id=principal.key_id,
            purpose=form.purpose,
            filename=filename,
            size_bytes=size,
            created_at=now,
            expires_at=files.lifetime(now, after.seconds if after else None),
        )
        return files.keep(place, row)


class FileView(OpenAIView):
    """One file."""

    route = "/v1/files/{id}"

    @extend_schema(operation_id="files_retrieve", summary="What is known of a file", responses=FileReply)
    def get(self, request: Request, file_id: str) -> HttpResponse:
        return json_response(file_object(files.find(self.admit_to_view().tenant_id, file_id)))

    @extend_schema(operation_id="files_delete", summary="Remove a file", responses={200: DeletedReply})
    def delete(self, request: Request, file_id: str) -> HttpResponse:
        row = files.find(self.admit_to_view().tenant_id, file_id)
        files.delete(row)
        return json_response({"id": row.id, "object": "file", "deleted": True})


class FileContentView(OpenAIView):
    """Its bytes."""

    route = "/v1/files/{id}/content"

    @extend_schema(
        operation_id="files_content",
        summary="The content of a file",
        responses={(200, "application/octet-stream"): OpenApiTypes.BINARY},
    )
    def get(self, request: Request, file_id: str) -> Later:
        row = files.find(self.admit_to_view().tenant_id, file_id)
        content = files.open_bytes(row)
        return Later(partial(_send, row, content), abandon=content.close)


async def _send(row: StoredFile, content: IO[bytes]) -> HttpResponseBase:
    response = StreamingHttpResponse(_pieces(content), content_type="application/octet-stream")
    response.headers["Content-Length"] = str(row.size_bytes)
    response.headers["Content-Disposition"] = f"attachment; filename*=UTF-8''{quote(row.filename, safe='')}"
    response.headers["X-Content-Type-Options"] = "nosniff"
    response._resource_closers.append(content.close)  # type: ignore[attr-defined]
    return response


async def _pieces(content: IO[bytes]) -> AsyncGenerator[bytes]:
    while piece := await asyncio.to_thread(content.read, READ_BYTES):
        yield piece

"""Bodies, queries and answers of /v1/files and /v1/batches."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from inference.batches.book import WINDOWS
from inference.batches.models import Batch, StoredFile

MAX_METADATA = 16
MAX_LIST = 1 << 16
MAX_SECONDS = 30 * 86400
LENIENT = ConfigDict(extra="ignore", frozen=True)
"""As with OpenAI, fields that nobody knows are left out; numbers of queries and of multipart bodies are texts."""
Id = Annotated[str, Field(min_length=1, max_length=64)]
Seconds = Annotated[int, Field(ge=3600, le=MAX_SECONDS)]


class ExpiresAfter(BaseModel):
    """How long what is stored is kept."""

    model_config = LENIENT

    anchor: Literal["created_at"]
    seconds: Seconds


class FileForm(BaseModel):
    """What goes with an upload, beside the file itself."""

    model_config = LENIENT

    purpose: Annotated[str, Field(max_length=64)]
    expires_after: ExpiresAfter | None = None

    @field_validator("purpose")
    @classmethod
    def _is_batch(cls, value: str) -> str:
        if value != "batch":
            raise PydanticCustomError("value_error", "this server stores files for batches alone: use batch")
        return value


class FileUpload(FileForm):
    """multipart/form-data, for the OpenAPI document."""

    file: Annotated[bytes, Field(max_length=1 << 34, json_schema_extra={"format": "binary"})]


class FileQuery(BaseModel):
    model_config = LENIENT

    purpose: Annotated[str, Field(max_length=64)] | None = None
    limit: Annotated[int, Field(ge=1, le=10_000)] = 10_000
    order: Literal["asc", "desc"] = "desc"
    after: Id | None = None


class BatchQuery(BaseModel):
    model_config = LENIENT

    limit: Annotated[int, Field(ge=1, le=100)] = 20
    after: Id | None = None


class BatchBody(BaseModel):
    model_config = LENIENT

    input_file_id: Id
    endpoint: Annotated[str, Field(max_length=64)]
    completion_window: Annotated[str, Field(max_length=8)]
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = Field(
        None, max_length=MAX_METADATA
    )
    output_expires_after: ExpiresAfter | None = None

    @field_validator("completion_window")
    @classmethod
    def _is_a_window(cls, value: str) -> str:
        if value not in WINDOWS:
            raise PydanticCustomError("value_error", "must be {windows}", {"windows": " or ".join(WINDOWS)})
        return value


# Answers


class FileReply(BaseModel):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"]
    status_details: None


class DeletedReply(BaseModel):
    id: str
    object: Literal["file"]
    deleted: Literal[True]


class FileList(BaseModel):
    object: Literal["list"]
    data: list[FileReply]
    first_id: str | None
    last_id: str | None
    has_more: bool


class BatchProblem(BaseModel):
    code: str
    message: str
    param: str | None
    line: int | None


class BatchProblems(BaseModel):
    object: Literal["list"]
    data: list[BatchProblem]


class RequestCounts(BaseModel):
    total: int
    completed: int
    failed: int


class BatchReply(BaseModel):
    id: str
    object: Literal["batch"]
    endpoint: str
    errors: BatchProblems | None
    input_file_id: str
    completion_window: str
    status: Literal[
        "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
    ]
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None


class BatchList(BaseModel):
    object: Literal["list"]
    data: list[BatchReply]
    first_id: str | None
    last_id: str | None
    has_more: bool


MOMENTS = ("in_progress", "expires", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")


def file_object(row: StoredFile) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "file",
        "bytes": row.size_bytes,
        "created_at": int(row.created_at.timestamp()),
        "expires_at": int(row.expires_at.timestamp()),
        "filename": row.filename,
        "purpose": row.purpose,
        "status": "processed",
        "status_details": None,
    }


def batch_object(row: Batch) -> dict[str, Any]:
    moments = {f"{name}_at": getattr(row, f"{name}_at") for name in MOMENTS}
    return {
        "id": row.id,
        "object": "batch",
        "endpoint": row.endpoint,
        "errors": {"object": "list", "data": row.errors} if row.errors else None,
        "input_file_id": row.input_file_id,
        "completion_window": row.completion_window,
        "status": row.status,
        "output_file_id": row.output_file_id or None,
        "error_file_id": row.error_file_id or None,
        "created_at": int(row.created_at.timestamp()),
        **{name: None if moment is None else int(moment.timestamp()) for name, moment in moments.items()},
        "request_counts": {"total": row.num_lines, "completed": row.num_completed, "failed": row.num_failed},
        "metadata": row.metadata,
    }


def page(objects: list[dict[str, Any]], limit: int) -> dict[str, Any]:
    """objects: one more than the page has, where there is one."""
    data = objects[:limit]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": len(objects) > limit,
    }

"""POST /v1/embeddings: a vector for each text."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

from drf_spectacular.utils import extend_schema
from pydantic import BaseModel, Field, field_validator
from rest_framework.request import Request

from inference.api.async_view import Outcome
from inference.api.embedding import (
    MAX_INPUTS,
    Asked,
    EmbeddingView,
    TokenInput,
    Vectors,
    check_input,
    inputs_of,
    numbers,
)
from inference.api.errors import OPENAI_EMBEDDINGS
from inference.api.generation import ALL_OR_NOTHING, IDEMPOTENCY_KEY
from inference.api.llamacpp.schemas import Hard, Text
from inference.api.native.schemas import AdapterBody, ModelName
from inference.api.openai.base import OpenAIView
from inference.api.openai.schemas import LENIENT
from inference.catalog.adapters import MAX_VECTOR
from inference.catalog.served import Served

MAX_DIMENSIONS = 1 << 16


class EmbeddingsBody(BaseModel):
    """POST /v1/embeddings."""

    model_config = LENIENT

    input: Text | TokenInput | Annotated[list[Text | TokenInput], Field(max_length=MAX_INPUTS)] = Field(
        description="A text, token ids, or an array of texts or of arrays of token ids."
    )
    model: ModelName | None = None
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="base64: 32-bit floats, little-endian. Absent is float."
    )
    dimensions: Annotated[int, Hard(1, MAX_DIMENSIONS)] | None = Field(
        None, description="Only so many first numbers of each vector, made one of length 1 again."
    )
    user: str | None = Field(None, max_length=1000)
    adapters: Annotated[list[AdapterBody], Field(max_length=MAX_VECTOR)] | None = Field(
        None, description="LoRA adapters by name; absent is the tenant's default, [] is none."
    )

    @field_validator("input", mode="before")
    @classmethod
    def _check_kind(cls, value: Any) -> Any:
        return check_input(value, mixes=False)

    def inputs(self) -> list[str | tuple[str | int, ...]]:
        return inputs_of(self.input)

    def asked(self) -> Asked:
        named = None if self.adapters is None else tuple((each.name, each.scale) for each in self.adapters)
        return Asked(model=self.model, inputs=self.inputs(), adapters=named, dimensions=self.dimensions, pools=True)


class EmbeddingObject(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingsReply(BaseModel):
    object: Literal["list"]
    data: list[EmbeddingObject]
    model: str
    usage: EmbeddingUsage


class EmbeddingsView(OpenAIView, EmbeddingView):
    """A vector of length 1 for each input, in their order."""

    route = "/v1/embeddings"
    errors = OPENAI_EMBEDDINGS

    @extend_schema(
        operation_id="embeddings",
        summary="OpenAI's embeddings",
        request=EmbeddingsBody,
        parameters=[ALL_OR_NOTHING, IDEMPOTENCY_KEY],
        responses={200: EmbeddingsReply},
    )
    def post(self, request: Request) -> Outcome:
        body = self.parse(EmbeddingsBody)
        encode = _base64 if body.encoding_format == "base64" else numbers

        def reply(served: Served, vectors: Vectors) -> dict[str, Any]:
            return {
                "object": "list",
                "data": [
                    {"object": "embedding", "index": index, "embedding": encode(vector)}
                    for index, (vector,) in enumerate(vectors.inputs)
                ],
                "model": body.model or served.name,
                "usage": {"prompt_tokens": vectors.prompt_tokens, "total_tokens": vectors.prompt_tokens},
            }

        return self.embed(request, body.asked(), reply)


def _base64(vector: bytes) -> str:
    return base64.b64encode(vector).decode()

"""POST /embedding and /embeddings: vectors of texts in llama.cpp's words, one a token where nothing is pooled."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from drf_spectacular.utils import extend_schema, extend_schema_view
from pydantic import BaseModel, Field, field_validator, model_validator
from rest_framework.request import Request

from inference.api.async_view import Outcome
from inference.api.embedding import (
    MAX_INPUTS,
    Asked,
    EmbeddingView,
    MixedInput,
    Vectors,
    check_input,
    inputs_of,
    numbers,
)
from inference.api.errors import LLAMA, wrong_field
from inference.api.generation import ALL_OR_NOTHING, IDEMPOTENCY_KEY
from inference.api.llamacpp.schemas import FORM, Hard, LlamaErrorReply, LoraBody, Text
from inference.api.native.schemas import ModelName
from inference.catalog.adapters import MAX_VECTOR
from inference.catalog.served import Served
from inference.engine.types import EUCLIDEAN, MAX_NORM

Input = Text | MixedInput | Annotated[list[Text | MixedInput], Field(max_length=MAX_INPUTS)]
DESCRIPTION = "A text, token ids, texts and token ids in one array; or an array of such inputs."


class EmbeddingBody(BaseModel):
    """POST /embedding: either content or input."""

    model_config = FORM

    content: Input | None = Field(None, description=DESCRIPTION)
    input: Input | None = Field(None, description="Another name of content.")
    model: ModelName | None = None
    embd_normalize: Annotated[int, Hard(-1, MAX_NORM)] | None = Field(
        None,
        description="Of pooled vectors. -1: as they are; 0: the largest is 32760; p: the p-norm is 1. Absent is 2.",
    )
    encoding_format: Literal["float"] | None = None
    lora: Annotated[list[LoraBody], Field(max_length=MAX_VECTOR)] | None = Field(
        None, description="Absent is the tenant's default, [] is none."
    )

    @field_validator("content", "input", mode="before")
    @classmethod
    def _check_kind(cls, value: Any) -> Any:
        return None if value is None else check_input(value, mixes=True)

    @model_validator(mode="after")
    def _says_it_once(self) -> Self:
        if (self.content is None) == (self.input is None):
            raise wrong_field("content", "give either content or input")
        return self

    def asked(self) -> Asked:
        content = self.content if self.content is not None else self.input
        return Asked(
            model=self.model,
            inputs=inputs_of(content or ""),
            adapters=None if self.lora is None else tuple((each.id, each.scale) for each in self.lora),
            normalize=EUCLIDEAN if self.embd_normalize is None else self.embd_normalize,
            field="input" if self.content is None else "content",
        )


class EmbeddingReply(BaseModel):
    """Of one input; the answer is an array of these."""

    index: int
    embedding: list[list[float]] = Field(description="One vector, or one for each token where nothing is pooled.")


class EmbeddingsView(EmbeddingView):
    """An array, one object for each input."""

    tag = "llama.cpp"
    errors = LLAMA
    error_reply = LlamaErrorReply
    route = "/embedding"

    @extend_schema(
        operation_id="embedding",
        summary="llama.cpp's embeddings",
        request=EmbeddingBody,
        parameters=[ALL_OR_NOTHING, IDEMPOTENCY_KEY],
        responses={200: EmbeddingReply},
    )
    def post(self, request: Request) -> Outcome:
        return self.embed(request, self.parse(EmbeddingBody).asked(), _reply)


@extend_schema_view(post=extend_schema(operation_id="embedding_many"))
class OtherEmbeddingsView(EmbeddingsView):
    """The same under llama.cpp's other name for it."""


def _reply(_served: Served, vectors: Vectors) -> list[dict[str, Any]]:
    return [
        {"index": index, "embedding": [numbers(vector) for vector in each]} for index, each in enumerate(vectors.inputs)
    ]

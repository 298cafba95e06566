"""POST /tokenize and /detokenize, GET and POST /lora-adapters, GET /props: what a tenant sees of one model.

They run in the hop; the model is the one that body or query name, else the default.
"""

from __future__ import annotations

from typing import ClassVar

from django.http import HttpResponse
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework.request import Request

from inference.api.async_view import AsyncAPIView, json_response
from inference.api.errors import LLAMA, wrong_field
from inference.api.llamacpp import replies
from inference.api.llamacpp.schemas import (
    MAX_PIECED_TOKENS,
    DetokenizeBody,
    DetokenizeReply,
    LlamaErrorReply,
    LoraReply,
    LoraVectorBody,
    PropsReply,
    SuccessReply,
    TokenizeBody,
    TokenizeReply,
)
from inference.catalog import adapters, granting
from inference.catalog.served import Served
from inference.engine.types import SamplingParams
from inference.intake import admission
from inference.slots import actions as slot_actions
from inference.tokenizers import pool

MODEL = OpenApiParameter("model", str, OpenApiParameter.QUERY, description="Absent is the default model.")


class ModelView(AsyncAPIView):
    """What the views of this dialect that do not generate have in common."""

    tag = "llama.cpp"
    errors = LLAMA
    error_reply = LlamaErrorReply
    scopes: ClassVar[tuple[str, ...]] = ("generate",)

    def model(self, name: str | None) -> Served:
        """By any name of the list of models: one with an adapter is the model, seen from here. Raises Refusal."""
        served, _ = adapters.resolve_model(name, self.admit_to_view())
        return served


class TokenizeView(ModelView):
    """The tokens of a text."""

    route = "/tokenize"

    @extend_schema(operation_id="tokenize", summary="Tokens of a text", request=TokenizeBody, responses=TokenizeReply)
    def post(self, request: Request) -> HttpResponse:
        body = self.parse(TokenizeBody)
        served = self.model(body.model)
        tokenizers = pool.tokenizer_pool()
        tokens = tokenizers.encode(served, body.content, add_special=bool(body.add_special))
        if not body.with_pieces:
            return json_response({"tokens": tokens})
        if len(tokens) > MAX_PIECED_TOKENS:
            raise wrong_field("with_pieces", f"is for texts of {MAX_PIECED_TOKENS} tokens at most")
        pairs = zip(tokens, tokenizers.pieces(served, tokens), strict=True)
        return json_response({"tokens": [{"id": token, "piece": piece} for token, piece in pairs]})


class DetokenizeView(ModelView):
    """The text of tokens."""

    route = "/detokenize"

    @extend_schema(
        operation_id="detokenize", summary="Text of tokens", request=DetokenizeBody, responses=DetokenizeReply
    )
    def post(self, request: Request) -> HttpResponse:
        body = self.parse(DetokenizeBody)
        served = self.model(body.model)
        return json_response({"content": pool.tokenizer_pool().decode(served, body.tokens, special=True)})


class LoraAdaptersView(ModelView):
    """The tenant's adapters and its own default scales: no other tenant's requests change with them."""

    route = "/lora-adapters"

    @extend_schema(operation_id="lora_adapters", summary="Adapters", parameters=[MODEL], responses={200: LoraReply})
    def get(self, request: Request) -> HttpResponse:
        principal = self.admit_to_view()
        served = self.model(request.query_params.get("model"))
        scales = {adapter.id: scale for adapter, scale in adapters.default_vector(principal, served)}
        content = [
            {
                "id": adapter.position,
                "path": adapter.name,  # where files lie is the operator's business
                "scale": scales.get(adapter.id, 0.0),
                "task_name": adapter.task_name,
                "prompt_prefix": adapter.prompt_prefix,
            }
            for adapter in sorted(adapters.granted(principal, served), key=lambda each: each.position)
        ]
        return json_response(content)

    @extend_schema(
        operation_id="set_lora_adapters",
        summary="The tenant's default scales",
        parameters=[MODEL],
        request=LoraVectorBody,
        responses=SuccessReply,
    )
    def post(self, request: Request) -> HttpResponse:
        body = self.parse(LoraVectorBody)
        principal = self.admit_to_view()
        served = self.model(request.query_params.get("model"))
        granting.set_default_vector(principal, served, body.wanted())
        return json_response({"success": True})


class PropsView(ModelView):
    """The model as a request meets it."""

    route = "/props"

    @extend_schema(operation_id="props", summary="Properties of a model", parameters=[MODEL], responses=PropsReply)
    def get(self, request: Request) -> HttpResponse:
        principal = self.admit_to_view()
        served = self.model(request.query_params.get("model"))
        content = {
            "default_generation_settings": {
                "n_ctx": admission.context_of(principal, served),
                "params": replies.generation_settings(SamplingParams(), wanted_tokens=-1, draft_kind=served.draft_kind),
            },
            "total_slots": served.num_slots,
            "model_alias": served.name,
            "model_path": served.name,  # where files lie is the operator's business
            "model_ftype": served.quantization,
            "modalities": {"vision": False, "audio": False},
            "endpoint_slots": True,
            "endpoint_props": False,
            "endpoint_metrics": True,
            "webui": False,
            "chat_template": served.chat_template or "",
            "bos_token": _text_of(served, served.bos_token_id),
            "eos_token": _text_of(served, served.eos_token_id),
            "build_info": "llmsite",
            "is_sleeping": slot_actions.is_sleeping(served),
            "context_shift": served.context_shift,
            "abilities": slot_actions.abilities_of(served),
        }
        return json_response(content)


def _text_of(served: Served, token: int | None) -> str:
    return "" if token is None else pool.tokenizer_pool().decode(served, (token,), special=True)

"""POST /apply-template: a conversation as the prompt that the model would see. Nothing is generated or charged."""

from __future__ import annotations

from django.http import HttpResponse
from drf_spectacular.utils import extend_schema
from rest_framework.request import Request

from inference.api.async_view import json_response
from inference.api.llamacpp.model_views import ModelView
from inference.api.llamacpp.template_schemas import ApplyTemplateBody, ApplyTemplateReply
from inference.tokenizers import pool


class ApplyTemplateView(ModelView):
    """Rendered and not tokenized. As text it cannot say which signs are special tokens: send messages for an answer."""

    route = "/apply-template"

    @extend_schema(
        operation_id="apply_template",
        summary="The prompt of a conversation",
        request=ApplyTemplateBody,
        responses=ApplyTemplateReply,
    )
    def post(self, request: Request) -> HttpResponse:
        body = self.parse(ApplyTemplateBody)
        served = self.model(body.model)
        prompt = body.chat_prompt(body.messages)
        return json_response({"prompt": pool.tokenizer_pool().render(served, served.template_for(prompt), prompt)})

"""GET /v1/models/{id}: one of the models that `GET /v1/models` lists, or an alias of one."""

from __future__ import annotations

from django.http import HttpResponse
from drf_spectacular.utils import extend_schema
from rest_framework.request import Request

from inference.api.async_view import json_response
from inference.api.native.account_views import openai_model, states_of
from inference.api.openai.base import OpenAIView
from inference.api.openai.schemas import ModelReply
from inference.catalog import adapters


class ModelView(OpenAIView):
    """A model, or a model with one of its adapters, under the name that was asked for."""

    route = "/v1/models/{id}"
    scopes = ("generate", "usage", "operator")

    @extend_schema(operation_id="model", summary="One model of this key", responses=ModelReply)
    def get(self, request: Request, model: str) -> HttpResponse:
        served, _ = adapters.resolve_model(model, self.admit_to_view())
        found = openai_model(served, states_of([served])[served.id])
        return json_response({**found, "id": model, "display_name": model})

"""Which endpoints a batch may name: the one such table. A view in it hands `self.batch` on to admission."""

from __future__ import annotations

from inference.api.openai import embedding_views, response_views, views
from inference.api.openai.base import OpenAIView

ENDPOINTS: dict[str, type[OpenAIView]] = {
    "/v1/chat/completions": views.ChatCompletionsView,
    "/v1/completions": views.CompletionsView,
    "/v1/embeddings": embedding_views.EmbeddingsView,
    "/v1/responses": response_views.ResponsesView,
}

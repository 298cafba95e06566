"""The API's URL table: one line per endpoint, one block per dialect."""

from __future__ import annotations

from django.urls import include, path, re_path
from django.views.generic import RedirectView
from rest_framework.routers import SimpleRouter

from inference.api import health, metrics_view
from inference.api.anthropic import views as anthropic
from inference.api.llamacpp import embedding_views as llama_embeddings
from inference.api.llamacpp import model_views as llama_models
from inference.api.llamacpp import slot_views as llama_slots
from inference.api.llamacpp import template_views as llama_templates
from inference.api.llamacpp import views as llama
from inference.api.native import account_views, admission_view, usage_views, views
from inference.api.openai import batch_views as openai_batches
from inference.api.openai import embedding_views as openai_embeddings
from inference.api.openai import file_views as openai_files
from inference.api.openai import model_views as openai_models
from inference.api.openai import response_views as responses
from inference.api.openai import views as openai
from inference.api.operator import adapter_views as operator_adapters
from inference.api.operator import documents, import_views, organization
from inference.api.operator import model_views as operator_models
from inference.api.operator import views as operator

router = SimpleRouter(trailing_slash=False)
router.register("plans", operator.PlanViewSet, basename="admin-plan")
router.register("tenants", operator.TenantViewSet, basename="admin-tenant")
router.register("keys", operator.KeyViewSet, basename="admin-key")
router.register("quotas", operator.QuotaViewSet, basename="admin-quota")
router.register("prices", operator.PriceViewSet, basename="admin-price")
router.register("limit-rules", operator.LimitRuleViewSet, basename="admin-limit-rule")
router.register("quota-raises", operator.QuotaRaiseViewSet, basename="admin-quota-raise")
router.register("refusals", operator.RefusalViewSet, basename="admin-refusal")
router.register("ledger", operator.LedgerViewSet, basename="admin-ledger")
router.register("batches", operator.BatchViewSet, basename="admin-batch")
router.register("imports", import_views.ImportViewSet, basename="admin-import")
router.register("models", operator.ServedModelViewSet, basename="admin-model")
router.register("variants", operator_adapters.VariantViewSet, basename="admin-variant")
router.register("adapters", operator_adapters.AdapterViewSet, basename="admin-adapter")
router.register("aliases", operator_adapters.AliasViewSet, basename="admin-alias")

REQUEST_ID = r"(?P<request_id>[0-9A-Za-z-]{1,48}(?:\.[0-9]{1,4})?)"
RESPONSE_ID = r"(?P<response_id>[0-9A-Za-z_-]{1,128})"

STORED_ID = r"(?P<file_id>[0-9A-Za-z_-]{1,64})"
BATCH_ID = r"(?P<batch_id>[0-9A-Za-z_-]{1,64})"

urlpatterns = [
    # health and metrics
    path("healthz", health.HealthView.as_view(), name="healthz"),
    path("health", health.HealthView.as_view()),
    path("v1/health", health.HealthView.as_view()),
    path("v1/healthz", health.HealthView.as_view()),
    path("readyz", health.ReadyView.as_view(), name="readyz"),
    path("v1/readyz", health.ReadyView.as_view()),
    path("modelz", health.ModelzView.as_view(), name="modelz"),
    path("metrics", metrics_view.MetricsView.as_view(), name="metrics"),
    # native
    path("v1/generate", views.GenerateView.as_view(), name="generate"),
    path("v1/generate/batch", views.GenerateBatchView.as_view(), name="generate-batch"),
    path("v1/models", account_views.ModelsView.as_view(), name="models"),
    path("models", account_views.ShortModelsView.as_view()),
    path("v1/me", account_views.MeView.as_view(), name="me"),
    path("v1/me/usage", usage_views.UsageView.as_view(), name="me-usage"),
    path("v1/me/statements", usage_views.StatementsView.as_view(), name="me-statements"),
    re_path(r"^v1/me/statements/(?P<month>[0-9-]{1,10})$", usage_views.StatementView.as_view(), name="me-statement"),
    path("v1/me/refusals", usage_views.RefusalsView.as_view(), name="me-refusals"),
    path("v1/admission", admission_view.AdmissionView.as_view(), name="admission"),
    re_path(rf"^v1/requests/{REQUEST_ID}$", account_views.RequestView.as_view(), name="request"),
    re_path(rf"^v1/requests/{REQUEST_ID}/events$", account_views.EventsView.as_view(), name="request-events"),
    re_path(rf"^v1/requests/{REQUEST_ID}/cancel$", account_views.CancelView.as_view(), name="request-cancel"),
    # OpenAI
    path("v1/chat/completions", openai.ChatCompletionsView.as_view(), name="chat-completions"),
    path("chat/completions", openai.ShortChatCompletionsView.as_view()),
    path("v1/chat/completions/input_tokens", openai.ChatInputTokensView.as_view(), name="chat-input-tokens"),
    path("chat/completions/input_tokens", openai.ShortChatInputTokensView.as_view()),
    path("v1/completions", openai.CompletionsView.as_view(), name="text-completions"),
    path("v1/responses", responses.ResponsesView.as_view(), name="responses"),
    path("responses", responses.ShortResponsesView.as_view()),
    path("v1/responses/input_tokens", responses.InputTokensView.as_view(), name="responses-input-tokens"),
    path("responses/input_tokens", responses.ShortInputTokensView.as_view()),
    re_path(rf"^v1/responses/{RESPONSE_ID}$", responses.ResponseView.as_view(), name="response"),
    re_path(rf"^v1/responses/{RESPONSE_ID}/cancel$", responses.CancelResponseView.as_view(), name="response-cancel"),
    re_path(rf"^v1/responses/{RESPONSE_ID}/input_items$", responses.InputItemsView.as_view(), name="response-items"),
    path("v1/embeddings", openai_embeddings.EmbeddingsView.as_view(), name="embeddings"),
    re_path(r"^v1/models/(?P<model>.{1,300})$", openai_models.ModelView.as_view(), name="model"),
    path("v1/files", openai_files.FilesView.as_view(), name="files"),
    re_path(rf"^v1/files/{STORED_ID}$", openai_files.FileView.as_view(), name="file"),
    re_path(rf"^v1/files/{STORED_ID}/content$", openai_files.FileContentView.as_view(), name="file-content"),
    path("v1/batches", openai_batches.BatchesView.as_view(), name="batches"),
    re_path(rf"^v1/batches/{BATCH_ID}$", openai_batches.BatchView.as_view(), name="batch"),
    re_path(rf"^v1/batches/{BATCH_ID}/cancel$", openai_batches.BatchCancelView.as_view(), name="batch-cancel"),
    # Anthropic
    path("v1/messages", anthropic.MessagesView.as_view(), name="messages"),
    path("v1/messages/count_tokens", anthropic.CountTokensView.as_view(), name="messages-count-tokens"),
    # llama.cpp
    path("completion", llama.CompletionView.as_view(), name="completion"),
    path("completions", llama.CompletionsView.as_view()),
    path("infill", llama.InfillView.as_view(), name="infill"),
    path("embedding", llama_embeddings.EmbeddingsView.as_view(), name="embedding"),
    path("embeddings", llama_embeddings.OtherEmbeddingsView.as_view()),
    path("tokenize", llama_models.TokenizeView.as_view(), name="tokenize"),
    path("apply-template", llama_templates.ApplyTemplateView.as_view(), name="apply-template"),
    path("detokenize", llama_models.DetokenizeView.as_view(), name="detokenize"),
    path("lora-adapters", llama_models.LoraAdaptersView.as_view(), name="lora-adapters"),
    path("slots", llama_slots.SlotsView.as_view(), name="slots"),
    re_path(r"^slots/(?P<id_slot>[^/]{1,64})$", llama_slots.SlotActionView.as_view(), name="slot-action"),
    path("props", llama_models.PropsView.as_view(), name="props"),
    # operator
    path(
        "v1/organization/usage/completions",
        organization.CompletionsUsageView.as_view(),
        name="organization-completions",
    ),
    path(
        "v1/organization/usage/embeddings", organization.EmbeddingsUsageView.as_view(), name="organization-embeddings"
    ),
    path("v1/organization/costs", organization.CostsView.as_view(), name="organization-costs"),
    path("v1/admin/usage", operator.UsageView.as_view(), name="admin-usage"),
    path("v1/admin/logs", operator.LogsView.as_view(), name="admin-logs"),
    path("v1/admin/stats", operator.StatsView.as_view(), name="admin-stats"),
    path("v1/admin/reports/summary", operator.SummaryView.as_view(), name="admin-summary"),
    path("v1/admin/models/load", operator_models.LoadView.as_view(), name="admin-models-load"),
    path("v1/admin/models/unload", operator_models.UnloadView.as_view(), name="admin-models-unload"),
    path("v1/admin/models/pin", operator_models.PinView.as_view(), name="admin-models-pin"),
    re_path(
        r"^v1/admin/imports/(?P<import_id>[0-9]{1,18})/content$",
        import_views.ImportContentView.as_view(),
        name="admin-import-content",
    ),
    path("v1/admin/", include(router.urls)),
    # documents
    path("openapi.json", documents.SchemaView.as_view(), name="schema"),
    path("docs/", documents.DocsView.as_view(url_name="schema"), name="docs"),
    path("", RedirectView.as_view(pattern_name="docs", permanent=False)),
]

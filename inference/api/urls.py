"""The API's URL table: one line per endpoint, one block per dialect."""

from __future__ import annotations

from django.urls import include, path, re_path
from django.views.generic import RedirectView
from drf_spectacular.views import SpectacularJSONAPIView, SpectacularSwaggerView
from rest_framework.routers import SimpleRouter

from inference.api import health, metrics_view
from inference.api.llamacpp import model_views as llama_models
from inference.api.llamacpp import slot_views as llama_slots
from inference.api.llamacpp import template_views as llama_templates
from inference.api.llamacpp import views as llama
from inference.api.native import account_views, views
from inference.api.openai import model_views as openai_models
from inference.api.openai import views as openai
from inference.api.operator import views as operator

router = SimpleRouter(trailing_slash=False)
router.register("plans", operator.PlanViewSet, basename="admin-plan")
router.register("tenants", operator.TenantViewSet, basename="admin-tenant")
router.register("keys", operator.KeyViewSet, basename="admin-key")
router.register("quotas", operator.QuotaViewSet, basename="admin-quota")
router.register("ledger", operator.LedgerViewSet, basename="admin-ledger")
router.register("models", operator.ServedModelViewSet, basename="admin-model")

REQUEST_ID = r"(?P<request_id>[0-9A-Za-z-]{1,48}(?:\.[0-9]{1,4})?)"

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
    path("v1/me/usage", account_views.UsageView.as_view(), name="me-usage"),
    re_path(rf"^v1/requests/{REQUEST_ID}$", account_views.RequestView.as_view(), name="request"),
    re_path(rf"^v1/requests/{REQUEST_ID}/cancel$", account_views.CancelView.as_view(), name="request-cancel"),
    # OpenAI
    path("v1/chat/completions", openai.ChatCompletionsView.as_view(), name="chat-completions"),
    path("chat/completions", openai.ShortChatCompletionsView.as_view()),
    path("v1/completions", openai.CompletionsView.as_view(), name="text-completions"),
    re_path(r"^v1/models/(?P<model>.{1,300})$", openai_models.ModelView.as_view(), name="model"),
    # llama.cpp
    path("completion", llama.CompletionView.as_view(), name="completion"),
    path("completions", llama.CompletionsView.as_view()),
    path("infill", llama.InfillView.as_view(), name="infill"),
    path("tokenize", llama_models.TokenizeView.as_view(), name="tokenize"),
    path("apply-template", llama_templates.ApplyTemplateView.as_view(), name="apply-template"),
    path("detokenize", llama_models.DetokenizeView.as_view(), name="detokenize"),
    path("lora-adapters", llama_models.LoraAdaptersView.as_view(), name="lora-adapters"),
    path("slots", llama_slots.SlotsView.as_view(), name="slots"),
    re_path(r"^slots/(?P<id_slot>[^/]{1,64})$", llama_slots.SlotActionView.as_view(), name="slot-action"),
    path("props", llama_models.PropsView.as_view(), name="props"),
    # operator
    path("v1/admin/usage", operator.UsageView.as_view(), name="admin-usage"),
    path("v1/admin/logs", operator.LogsView.as_view(), name="admin-logs"),
    path("v1/admin/stats", operator.StatsView.as_view(), name="admin-stats"),
    path("v1/admin/reports/summary", operator.SummaryView.as_view(), name="admin-summary"),
    path("v1/admin/", include(router.urls)),
    # documents
    path("openapi.json", SpectacularJSONAPIView.as_view(), name="schema"),
    path("docs/", SpectacularSwaggerView.as_view(url_name="schema"), name="docs"),
    path("", RedirectView.as_view(pattern_name="docs", permanent=False)),
]

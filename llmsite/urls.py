"""The URL table: the only place that reaches inference.api, but for the playground, which asks the API from within."""

from __future__ import annotations

from django.contrib import admin
from django.urls import include, path

from llmsite.console import (
    corrections,
    dashboard,
    favicon,
    live_requests,
    model_preview,
    one_request,
    playground,
    settings_check,
    slots,
)

urlpatterns = [
    path("favicon.ico", favicon.icon, name="favicon"),
    path("admin/board/", admin.site.admin_view(dashboard.part), name="console-board"),
    path("admin/playground/", admin.site.admin_view(playground.page), name="console-playground"),
    path("admin/playground/run/", admin.site.admin_view(playground.run), name="console-playground-run"),
    path("admin/requests/", admin.site.admin_view(live_requests.page), name="console-live-requests"),
    path("admin/requests/cancel/", admin.site.admin_view(live_requests.cancel), name="console-cancel-request"),
    path("admin/requests/<str:request_id>/", admin.site.admin_view(one_request.page), name="console-request"),
    path("admin/requests/<str:request_id>/replay/", admin.site.admin_view(one_request.replay), name="console-replay"),
    path("admin/slots/", admin.site.admin_view(slots.page), name="console-slots"),
    path("admin/slots/erase/", admin.site.admin_view(slots.erase), name="console-erase-slot"),
    path("admin/slots/forget/", admin.site.admin_view(slots.forget), name="console-forget-state"),
    path("admin/settings/", admin.site.admin_view(settings_check.page), name="console-settings"),
    path("admin/models/<int:model_id>/", admin.site.admin_view(model_preview.page), name="console-model"),
    path("admin/models/<int:model_id>/order/", admin.site.admin_view(model_preview.order), name="console-model-order"),
    path("admin/correct/<int:period_id>/", admin.site.admin_view(corrections.page), name="console-correction"),
    path("admin/", admin.site.urls),
    path("", include("inference.api.urls")),
]
handler400 = "inference.api.errors.bad_request"
handler403 = "inference.api.errors.permission_denied"
handler404 = "inference.api.errors.not_found"
handler500 = "inference.api.errors.server_error"

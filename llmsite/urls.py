"""The URL table: the only place that reaches inference.api."""

from __future__ import annotations

from django.contrib import admin
from django.urls import include, path

urlpatterns = [
    path("admin/", admin.site.urls),
    path("", include("inference.api.urls")),
]
handler400 = "inference.api.errors.bad_request"
handler403 = "inference.api.errors.permission_denied"
handler404 = "inference.api.errors.not_found"
handler500 = "inference.api.errors.server_error"

"""The OpenAPI document and its page: public, and counted by address, for the document takes work to make."""

from __future__ import annotations

from typing import Any

from drf_spectacular.views import SpectacularJSONAPIView, SpectacularSwaggerSplitView
from rest_framework.request import Request

from accounts.limits import throttling


class SchemaView(SpectacularJSONAPIView):
    """/openapi.json"""

    def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
        throttling.count_anonymous(str(request.META.get("REMOTE_ADDR", "")))
        super().initial(request, *args, **kwargs)


class DocsView(SpectacularSwaggerSplitView):
    """/docs/, and its script as a file: a page that holds no script needs no leave for scripts in pages."""

    def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
        throttling.count_anonymous(str(request.META.get("REMOTE_ADDR", "")))
        super().initial(request, *args, **kwargs)

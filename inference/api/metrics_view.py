"""/metrics: the process's registry, or all processes' together where PROMETHEUS_MULTIPROC_DIR names their folder.

Open to the networks of METRICS_ALLOWED_NETWORKS when they come directly, else to operator keys.
"""

from __future__ import annotations

import ipaddress
import os
from functools import lru_cache

from django.conf import settings
from django.http import HttpRequest, HttpResponse
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import extend_schema
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest, multiprocess
from rest_framework.request import Request

from inference.api.async_view import AsyncAPIView

FORWARDING_HEADERS = ("HTTP_FORWARDED", "HTTP_X_FORWARDED_", "HTTP_X_REAL_IP", "HTTP_VIA")


class MetricsView(AsyncAPIView):
    """Prometheus text."""

    route = "/metrics"
    scopes = ("operator",)

    def authenticate(self, request: Request) -> None:
        if not _comes_from_allowed_network(self.http_request):
            super().authenticate(request)
            self.admit_to_view()

    @extend_schema(responses={(200, "text/plain"): OpenApiTypes.STR}, summary="Metrics in Prometheus' text form")
    def get(self, request: Request) -> HttpResponse:
        return HttpResponse(generate_latest(_registry()), content_type=CONTENT_TYPE_LATEST)


def _registry() -> CollectorRegistry:
    """With several processes, what each wrote to its files; a worker's counters are in there too."""
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return REGISTRY
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return registry


@lru_cache(maxsize=1)
def _networks() -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    return tuple(ipaddress.ip_network(text) for text in settings.CONFIG.metrics_allowed_networks)


def _comes_from_allowed_network(request: HttpRequest) -> bool:
    """Whoever forwards for others is no member of the network himself: then a key is asked for."""
    if any(name.startswith(FORWARDING_HEADERS) for name in request.META):
        return False
    try:
        address = ipaddress.ip_address(request.META.get("REMOTE_ADDR", ""))
    except ValueError:
        return False
    return any(address in network for network in _networks())

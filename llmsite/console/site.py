"""The console's site: django-unfold's, open to everyone with a role, each page behind accounts/pages/role_admin.py."""

from __future__ import annotations

from typing import Any

from django.contrib.admin.apps import AdminConfig
from django.core.paginator import InvalidPage
from django.http import Http404, HttpRequest
from unfold.sites import UnfoldAdminSite


class ConsoleSite(UnfoldAdminSite):
    def has_permission(self, request: HttpRequest) -> bool:
        from accounts.identity import roles  # apps are not ready when this module is read

        return roles.may_enter(request.user)

    def search(self, request: HttpRequest, extra_context: dict[str, Any] | None = None) -> Any:
        """django-unfold's own fails at a page that is none."""
        try:
            return super().search(request, extra_context)
        except (InvalidPage, ValueError) as error:
            raise Http404("There is no such page.") from error

    def register(self, model_or_iterable: Any, admin_class: Any = None, **options: Any) -> None:
        from unfold.admin import ModelAdmin

        from accounts.pages.role_admin import guarded

        super().register(model_or_iterable, guarded(admin_class or ModelAdmin), **options)


class ConsoleConfig(AdminConfig):
    """INSTALLED_APPS names it in the place of django.contrib.admin."""

    default_site = "llmsite.console.site.ConsoleSite"

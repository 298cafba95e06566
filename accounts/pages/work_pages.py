"""Pages of rows whose work goes on by itself: an import, a search for the fastest file.

Such a page shows itself anew (static/llmsite/background.js) from an address of its own, and has buttons that post to
others. Synchronous views of the admin.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from django.contrib import messages
from django.core.exceptions import PermissionDenied
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import redirect
from django.urls import URLPattern, path
from django.utils.decorators import method_decorator
from django.utils.safestring import SafeString
from django.views.decorators.http import require_POST

from accounts.pages import console

if TYPE_CHECKING:
    from django.contrib.admin import ModelAdmin

    Base = ModelAdmin[Any]
else:
    Base = object


class WorkPages(Base):
    """Before ModelAdmin. Addresses `<id>/state/`, `<id>/cancel/` and one for each other of `buttons`."""

    buttons: ClassVar[tuple[str, ...]] = ("cancel_this",)
    """Views of one row, named `<verb>_this`."""
    cancelled: ClassVar[str]
    """What is said of a row that was cancelled."""

    @abstractmethod
    def shown(self, row: Any) -> SafeString:
        """The part of a row's page that changes."""

    @abstractmethod
    def cancel_row(self, row: Any) -> bool:
        """False where it had ended already."""

    @abstractmethod
    def has_cancel_permission(self, request: HttpRequest) -> bool: ...

    @property
    def page(self) -> str:
        return f"{self.opts.app_label}_{self.opts.model_name}"

    def get_urls(self) -> list[URLPattern]:
        views = {"state": self.state_page, **{name: getattr(self, name) for name in self.buttons}}
        own = [
            path(
                f"<int:object_id>/{name.removesuffix('_this')}/",
                self.admin_site.admin_view(view),
                name=f"{self.page}_{name}",
            )
            for name, view in views.items()
        ]
        return [*own, *super().get_urls()]

    def state_page(self, request: HttpRequest, object_id: int) -> HttpResponse:
        """The part of a page that changes, alone."""
        if not self.has_view_permission(request):
            raise PermissionDenied
        return HttpResponse(self.shown(self.row(request, object_id)))

    @method_decorator(require_POST)
    def cancel_this(self, request: HttpRequest, object_id: int) -> HttpResponse:
        """The button of its page. Raises PermissionDenied or Http404."""
        if not self.has_cancel_permission(request):
            raise PermissionDenied
        if self.cancel_row(self.row(request, object_id)):
            self.message_user(request, self.cancelled, messages.SUCCESS)
        else:
            self.message_user(request, "It had ended already: nothing was cancelled.", messages.WARNING)
        return redirect(console.change_page(self.page, object_id))

    def row(self, request: HttpRequest, object_id: int) -> Any:
        """Raises Http404."""
        found = self.get_queryset(request).filter(pk=object_id).first()
        if found is None:
            raise Http404
        return found

"""The operator's pages for batches and stored files: read-only; a batch can be cancelled, no content is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from django.contrib import admin, messages
from django.contrib.admin.utils import quote, unquote
from django.core.exceptions import PermissionDenied
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect
from django.urls import URLPattern, path, reverse
from django.utils import timezone
from django.utils.decorators import method_decorator
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from django.views.decorators.http import require_POST
from unfold.contrib.filters.admin import AutocompleteSelectFilter
from unfold.decorators import display

from accounts.pages import console
from accounts.pages.kept_rows import ReadOnlyAdmin
from inference.batches import book
from inference.batches.models import Batch, StoredFile

TONES = {
    "completed": "success",
    "in_progress": "info",
    "validating": "info",
    "finalizing": "info",
    "cancelling": "warning",
    "cancelled": "",
    "expired": "warning",
    "failed": "danger",
}


@admin.register(Batch)
class BatchAdmin(ReadOnlyAdmin):
    """Lines, answers and metadata are not shown: they are content."""

    list_display = ("id", "tenant", "standing", "progress", "endpoint", "created_at", "expires_at")
    list_select_related = ("tenant",)
    list_filter = ("status", ("tenant", AutocompleteSelectFilter))
    search_fields = ("id__exact",)
    search_help_text = "The whole id of a batch"
    list_per_page = 50
    ordering = ("-created_at",)
    actions = ("cancel",)
    readonly_fields = ("standing", "progress", "problems", "cancel_button")
    fieldsets = (
        (None, {"fields": ("id", "tenant", "key", "endpoint", "standing", "progress", "problems")}),
        ("Files", {"fields": ("input_file_id", "output_file_id", "error_file_id")}),
        (
            "Time",
            {
                "fields": (
                    ("created_at", "expires_at"),
                    ("in_progress_at", "finalizing_at"),
                    ("completed_at", "failed_at"),
                    ("cancelling_at", "cancelled_at"),
                    "expired_at",
                )
            },
        ),
    )

    @display(description="State", label=TONES, ordering="status")
    def standing(self, row: Batch) -> str:
        return str(row.status)

    @admin.display(description="Lines")
    def progress(self, row: Batch) -> SafeString:
        failed = f", {row.num_failed} failed" if row.num_failed else ""
        part = 100 * (row.num_completed + row.num_failed) / row.num_lines if row.num_lines else 0
        return console.labelled_bar(f"{row.num_completed} of {row.num_lines} done{failed}", part)

    @admin.display(description="Errors")
    def problems(self, row: Batch) -> SafeString | str:
        """Why it failed as a whole; those of lines are in its error file."""
        told = [(each.get("line") or "file", each.get("message", "")) for each in row.errors[: book.MAX_PROBLEMS]]
        listed = format_html_join("", "<dt>{}</dt><dd>{}</dd>", told)
        return format_html('<dl class="console-facts">{}</dl>', listed) if told else "none"

    def has_cancel_permission(self, request: HttpRequest) -> bool:
        return request.user.has_perm("inference.change_batch")

    def running_now(self, rows: Sequence[Batch]) -> Mapping[Any, str]:
        done = ((row, row.num_completed + row.num_failed) for row in rows)
        return {row.pk: f"{row.status}, {number:,} of {row.num_lines:,} lines done" for row, number in done}

    @admin.action(description="Cancel", permissions=["cancel"])
    def cancel(self, request: HttpRequest, queryset: QuerySet[Batch]) -> None:
        number = sum(book.cancel_by_hand(batch, timezone.now()) for batch in queryset)
        self.message_user(request, f"{number} cancelled; what had ended stays as it is.", messages.SUCCESS)

    def get_fieldsets(self, request: HttpRequest, obj: Batch | None = None) -> Any:
        """With the button for those who may cancel, while there is something to cancel."""
        may = obj is not None and obj.status in book.CANCELLABLE and self.has_cancel_permission(request)
        return ((None, {"fields": ("cancel_button",)}), *self.fieldsets) if may else self.fieldsets

    @admin.display(description="Do")
    def cancel_button(self, row: Batch) -> SafeString:
        """Sends the page's form, with its token, to another address."""
        return format_html(
            '<button type="submit" class="console-link" formaction="{}" data-confirm="{}">Cancel</button>',
            reverse("admin:inference_batch_cancel_this", args=[quote(row.pk)]),
            "Cancel this batch? Lines that run may end, the others are not begun.",
        )

    def get_urls(self) -> list[URLPattern]:
        view = self.admin_site.admin_view(self.cancel_this)
        return [path("<path:object_id>/cancel/", view, name="inference_batch_cancel_this"), *super().get_urls()]

    @method_decorator(require_POST)
    def cancel_this(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """The button of the batch's page. Raises PermissionDenied or Http404."""
        if not self.has_cancel_permission(request):
            raise PermissionDenied
        batch = self.get_object(request, unquote(object_id))
        if batch is not None and book.cancel_by_hand(batch, timezone.now()):
            self.message_user(request, f"{batch} is being cancelled.", messages.SUCCESS)
        else:
            self.message_user(request, "It had ended already: nothing was cancelled.", messages.WARNING)
        return redirect(console.change_page("inference_batch", object_id))


@admin.register(StoredFile)
class StoredFileAdmin(ReadOnlyAdmin):
    """Their content is the tenants': it cannot be read here."""

    list_display = ("id", "tenant", "purpose", "size_bytes", "created_at", "expires_at")
    list_select_related = ("tenant",)
    list_filter = ("purpose", ("tenant", AutocompleteSelectFilter))
    search_fields = ("id__exact",)
    search_help_text = "The whole id of a file"
    list_per_page = 50
    ordering = ("-created_at",)
    fields = ("id", "tenant", "key", "purpose", "size_bytes", "created_at", "expires_at")

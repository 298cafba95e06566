"""The operator's pages of imports: begin one, send its file, see how far it is, cancel it.

A page shows itself anew while its import goes on (static/llmsite/background.js): the part that changes is `shown`,
which the page holds and the address `state/` answers with. Writes go through desk.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django import forms
from django.contrib import admin, messages
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.urls import reverse
from django.utils.html import format_html
from django.utils.safestring import SafeString
from unfold.admin import ModelAdmin
from unfold.decorators import display
from unfold.widgets import UnfoldAdminSelectWidget

from accounts.pages import console
from accounts.pages.work_pages import WorkPages
from inference.imports import addresses, desk, importer, quarantine, upload_tokens
from inference.imports.models import ModelImport
from inference.models import ServedModel
from inference.vetting.inspection import RegistrationError

if TYPE_CHECKING:
    FormBase = forms.ModelForm[ModelImport]
else:
    FormBase = forms.ModelForm

State = ModelImport.State
TONES = {
    State.RECEIVING: "info",
    State.QUEUED: "info",
    State.READING: "info",
    State.HASHING: "info",
    State.LOADING: "info",
    State.READY: "success",
    State.REFUSED: "danger",
    State.CANCELLED: "warning",
}


class ImportForm(FormBase):
    """Everything that is known to be wrong before a byte has come is an error of its field."""

    user: Any = None
    visibility = forms.ChoiceField(
        choices=[("", "As usual for its kind"), *ServedModel.Visibility.choices],
        required=False,
        label="Who may use it",
        widget=UnfoldAdminSelectWidget,
    )

    class Meta:
        model = ModelImport
        fields = ("kind", "name", "base_model", "url", "sha256", "visibility", "replaces", "is_default")
        labels = {
            "url": "Fetch it from",
            "sha256": "SHA-256",
            "base_model": "Base model",
            "replaces": "Replace the one that has this name",
            "is_default": "Make it the default model",
        }
        help_texts = {
            "base_model": "Of an adapter.",
            "url": "An address, or owner/repository:file.gguf. Empty: you send a file from the next page.",
            "sha256": "Where it is known: another file is refused before it is loaded.",
        }

    def clean(self) -> dict[str, Any] | None:
        cleaned = super().clean() or {}
        if not self.errors:
            try:
                self.instance = desk.prepare(desk.Asked(**cleaned))
            except RegistrationError as error:
                for field, texts in error.fields.items():
                    self.add_error(field if field in self.fields else None, texts)
        return cleaned

    def _post_clean(self) -> None:
        """desk.prepare has made the row."""


@admin.register(ModelImport)
class ModelImportAdmin(WorkPages, ModelAdmin):
    """Uploads and downloads of models and adapters."""

    form = ImportForm
    cancelled = "It is cancelled; what had come is removed."
    list_display = ("name", "kind", "standing", "progress", "asked_by", "created")
    list_filter = ("state", "kind")
    search_fields = ("name",)
    list_per_page = 50
    ordering = ("-id",)
    actions = ("cancel",)
    autocomplete_fields = ("base_model",)
    fields_for_asking = (
        (None, {"fields": ("kind", "name", "base_model")}),
        ("Where it comes from", {"fields": ("url", "sha256")}),
        ("What becomes of it", {"fields": ("visibility", "replaces", "is_default")}),
    )
    readonly_fields = ("progress", "upload", "cancel_button", "source", "size", "created")

    class Media:
        js = ("llmsite/background.js",)

    def get_fieldsets(self, request: HttpRequest, obj: ModelImport | None = None) -> Any:
        """Of one that is there: what it has, and the choice of a file while it waits for one."""
        if obj is None:
            return self.fields_for_asking
        now = ["progress"]
        if obj.state == State.RECEIVING and obj.is_upload:
            now.append("upload")
        if obj.is_open and self.has_cancel_permission(request):
            now.append("cancel_button")
        asked = [name for name in ("base_model", "sha256") if getattr(obj, name)]
        return (
            ("Now", {"fields": now}),
            ("What was asked for", {"fields": ("kind", "name", *asked, "source", "asked_by", "created")}),
            ("The file", {"fields": ("size", "digest") if obj.digest else ("size",)}),
        )

    def has_change_permission(self, request: HttpRequest, obj: ModelImport | None = None) -> bool:
        """The row is the importer's; what a person can do is to send the file, and to cancel."""
        return obj is None and super().has_change_permission(request)

    def has_delete_permission(self, request: HttpRequest, obj: ModelImport | None = None) -> bool:
        return False

    def has_cancel_permission(self, request: HttpRequest) -> bool:
        return bool(request.user.has_perm("inference.change_modelimport"))

    def get_object(self, request: HttpRequest, object_id: str, from_field: str | None = None) -> ModelImport | None:
        """It knows who looks at it, for the token of an upload."""
        row: ModelImport | None = super().get_object(request, object_id, from_field)
        if row is not None and self.has_add_permission(request):
            row.sender_id = request.user.pk  # type: ignore[attr-defined]
        return row

    def get_queryset(self, request: HttpRequest) -> QuerySet[ModelImport]:
        rows: QuerySet[ModelImport] = super().get_queryset(request)
        return rows.select_related("base_model")

    def save_model(self, request: HttpRequest, obj: ModelImport, form: Any, change: bool) -> None:
        desk.begin(obj)
        importer.wake()

    def response_add(
        self, request: HttpRequest, obj: ModelImport, post_url_continue: str | None = None
    ) -> HttpResponse:
        return HttpResponseRedirect(console.change_page("inference_modelimport", obj.pk))

    def shown(self, row: ModelImport) -> SafeString:
        return shown(row)

    def cancel_row(self, row: ModelImport) -> bool:
        return desk.cancel(row)

    # What the pages show

    @display(description="State", label=TONES, ordering="state")
    def standing(self, row: ModelImport) -> tuple[str, str]:
        return row.state, row.get_state_display()

    @admin.display(description="Progress")
    def progress(self, row: ModelImport) -> SafeString:
        return shown(row)

    @admin.display(description="Send its file")
    def upload(self, row: ModelImport) -> SafeString | str:
        """The choice of a file, for whoever may add imports; the token is theirs."""
        sender_id = getattr(row, "sender_id", None)
        if row.state != State.RECEIVING or not row.is_upload or sender_id is None:
            return "-"
        return format_html(
            '<div class="console-upload" data-upload="{}" data-token="{}" data-import-id="{}">'
            '<input type="file" accept=".gguf" aria-label="File"> '
            '<button type="button" class="play-button">Upload</button> '
            '<progress max="100" value="0" hidden></progress> <span role="status"></span></div>',
            reverse("admin-import-content", args=[row.pk]),
            upload_tokens.make(row.pk, sender_id),
            row.pk,
        )

    @admin.display(description="Do")
    def cancel_button(self, row: ModelImport) -> SafeString:
        """Sends the page's form, with its token, to another address."""
        return format_html(
            '<button type="submit" class="console-link" formaction="{}" data-confirm="{}">Cancel</button>',
            reverse("admin:inference_modelimport_cancel_this", args=[row.pk]),
            "Cancel this import? What has come is removed.",
        )

    @admin.display(description="From")
    def source(self, row: ModelImport) -> str:
        return addresses.shown(row.url) or "an upload"

    @admin.display(description="Size")
    def size(self, row: ModelImport) -> str:
        return "-" if row.total_bytes is None else console.size(row.total_bytes)

    @admin.display(description="Begun (UTC)", ordering="created_at")
    def created(self, row: ModelImport) -> SafeString | str:
        return console.moment(row.created_at)

    # What they change

    @admin.action(description="Cancel", permissions=["cancel"])
    def cancel(self, request: HttpRequest, queryset: QuerySet[ModelImport]) -> None:
        number = sum(desk.cancel(row) for row in queryset)
        self.message_user(request, f"{number} cancelled; what had ended stays as it is.", messages.SUCCESS)


def shown(row: ModelImport) -> SafeString:
    """How far an import is. `data-state`: the address of just this; `data-open`: it will be something else soon;
    `data-received`: where an upload goes on."""
    is_receiving_upload = row.state == State.RECEIVING and row.is_upload
    received = quarantine.received(row.pk) if is_receiving_upload else row.received_bytes
    return format_html(
        '<div class="console-import" data-state="{}" data-received="{}"{}>{}</div>',
        reverse("admin:inference_modelimport_state", args=[row.pk]),
        received,
        SafeString(" data-open") if row.is_open else "",
        _sentence(row, received),
    )


def _sentence(row: ModelImport, received: int) -> SafeString | str:
    if row.state == State.REFUSED:
        return format_html('<span class="console-bad">Refused: {}</span>', row.problem)
    if row.state == State.READY:
        return format_html("Ready: {}", console.link(_page_of(row), row.name))
    if row.state == State.RECEIVING and row.is_upload and not received:
        return "Waits for its file."
    if row.state not in (State.RECEIVING, State.HASHING) or not row.total_bytes:
        return row.get_state_display()
    done = received if row.state == State.RECEIVING else row.checked_bytes
    text = f"{row.get_state_display()}: {console.size(done)} of {console.size(row.total_bytes)}{_speed(row, done)}"
    return console.labelled_bar(text, 100 * done / row.total_bytes)


def _speed(row: ModelImport, done: int) -> str:
    if row.bytes_per_second < 1 or row.total_bytes is None:
        return ""
    left = (row.total_bytes - done) / row.bytes_per_second
    return f", {console.size(row.bytes_per_second)}/s, {console.seconds(max(0.0, left))} left"


def _page_of(row: ModelImport) -> str:
    if row.kind == ModelImport.Kind.MODEL:
        return console.listing("inference_servedmodel", q=row.name)
    return console.listing("inference_adapter", q=row.name)

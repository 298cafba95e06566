"""The operator's pages of searches for the fastest file: begin one, see how far it is, cancel it, serve what it found.

A page shows itself anew while its search goes on (static/llmsite/background.js). Writes go through desk.py and
catalog/variants.py; the work is the optimizer's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django import forms
from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied
from django.db.models import QuerySet
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.shortcuts import redirect
from django.urls import reverse
from django.utils.decorators import method_decorator
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from django.views.decorators.http import require_POST
from unfold.admin import ModelAdmin
from unfold.decorators import display

from accounts.pages import console
from accounts.pages.work_pages import WorkPages
from inference.catalog import variants
from inference.models import ModelVariant
from inference.tuning import desk, optimizer, report
from inference.tuning.models import Optimization
from inference.vetting.inspection import RegistrationError

if TYPE_CHECKING:
    FormBase = forms.ModelForm[Optimization]
else:
    FormBase = forms.ModelForm

State = Optimization.State
TONES = {State.RUNNING: "info", State.DONE: "success", State.FAILED: "danger", State.CANCELLED: "warning"}
BOUNDED = ("min_gain", "max_perplexity_increase")
LASTING = ("max_minutes", "rounds", "seconds")
HOW = ("formats", "tunes_settings", BOUNDED, LASTING)
PAGE = "inference_optimization"


class OptimizationForm(FormBase):
    class Meta:
        model = Optimization
        fields = ("base_model", "formats", "tunes_settings", *BOUNDED, *LASTING)
        labels = {
            "base_model": "Model",
            "tunes_settings": "Try other settings, too",
            "max_perplexity_increase": "Perplexity may rise by (%)",
            "min_gain": "Speed must gain (%)",
            "max_minutes": "Minutes at most",
            "seconds": "Seconds of each speed",
        }
        help_texts = {
            "formats": "Such as Q4_0,Q8_0. Empty: what suits the model's own.",
            "tunes_settings": "Numbers of threads and flash attention, for the best file.",
            "max_perplexity_increase": "A format whose perplexity rises by more may not win.",
            "min_gain": "What gains less may not win. Below 0 it may be slower by so much.",
            "max_minutes": "Then what is measured decides.",
            "rounds": "Measurements of each.",
        }


@admin.register(Optimization)
class OptimizationAdmin(WorkPages, ModelAdmin):
    """The web measures on its own machine; one search at a time."""

    form = OptimizationForm
    cancelled = "It is cancelled; nothing of it is kept."
    buttons = ("cancel_this", "activate_this")
    list_display = ("name", "standing", "progress", "asked_by", "created")
    list_filter = ("state",)
    search_fields = ("name",)
    list_per_page = 50
    ordering = ("-id",)
    actions = ("cancel",)
    autocomplete_fields = ("base_model",)
    readonly_fields = ("progress", "created", "table", "kept", "cancel_button", "activate_button")

    class Media:
        js = ("llmsite/background.js",)

    def get_fieldsets(self, request: HttpRequest, obj: Optimization | None = None) -> Any:
        """Of one that is there: how far it is or what it found, with the buttons for those who may press them."""
        if obj is None:
            return (
                (None, {"fields": ("base_model", "formats", "tunes_settings")}),
                ("What may win", {"fields": (BOUNDED,)}),
                ("How long", {"fields": (LASTING,)}),
            )
        now = ["progress"]
        if obj.state == State.RUNNING and self.has_cancel_permission(request):
            now.append("cancel_button")
        if obj.result is not None:
            now += ["table", "kept"]
            if self.has_activate_permission(request):
                now.append("activate_button")
        return (
            (None, {"fields": now}),
            ("What was asked for", {"fields": ("name", *HOW, ("asked_by", "created"), "host")}),
        )

    def has_change_permission(self, request: HttpRequest, obj: Optimization | None = None) -> bool:
        """The row is the optimizer's; what a person can do is to cancel."""
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Optimization | None = None) -> bool:
        return False

    def has_cancel_permission(self, request: HttpRequest) -> bool:
        return bool(request.user.has_perm("inference.change_optimization"))

    def has_activate_permission(self, request: HttpRequest) -> bool:
        """As of a variant: what is served is a matter of the model."""
        return bool(request.user.has_perm("inference.change_servedmodel"))

    # Begin

    def add_view(self, request: HttpRequest, form_url: str = "", extra_context: Any = None) -> HttpResponse:
        try:
            page: HttpResponse = super().add_view(request, form_url, extra_context)
            return page
        except RegistrationError as error:  # one runs: the list shows which
            self.message_user(request, error.message, messages.ERROR)
            return redirect(console.listing(PAGE))

    def save_model(self, request: HttpRequest, obj: Optimization, form: Any, change: bool) -> None:
        desk.ask(obj)

    def response_add(
        self, request: HttpRequest, obj: Optimization, post_url_continue: str | None = None
    ) -> HttpResponse:
        optimizer.wake()
        return HttpResponseRedirect(console.change_page(PAGE, obj.pk))

    # What the pages show

    @display(description="State", label=TONES, ordering="state")
    def standing(self, row: Optimization) -> tuple[str, str]:
        return row.state, row.get_state_display()

    @admin.display(description="Progress")
    def progress(self, row: Optimization) -> SafeString:
        return shown(row)

    @admin.display(description="Begun (UTC)", ordering="created_at")
    def created(self, row: Optimization) -> SafeString | str:
        return console.moment(row.created_at)

    @admin.display(description="Measured")
    def table(self, row: Optimization) -> SafeString:
        heads = format_html_join("", "<th>{}</th>", ((each,) for each in report.HEADINGS))
        lines = (
            (format_html_join("", '<td data-label="{}">{}</td>', zip(report.HEADINGS, line, strict=True)),)
            for line in report.cells(row.result or {})
        )
        body = format_html_join("", "<tr>{}</tr>", lines)
        return format_html(
            '<table class="console-table console-measured is-stacked">'
            "<thead><tr>{}</tr></thead><tbody>{}</tbody></table>",
            heads,
            body,
        )

    @admin.display(description="Kept")
    def kept(self, row: Optimization) -> SafeString:
        result = row.result or {}
        requantized = report.REQUANTIZED.format(source=result["source"]["format"]) if result["requantized"] else ""
        said = (report.kept(result), report.settings_tried(result), *result["notes"], requantized)
        return format_html_join("", "<p>{}</p>", ((text,) for text in said if text))

    @admin.display(description="Do")
    def cancel_button(self, row: Optimization) -> SafeString:
        return _button(row, "cancel", "Cancel", "Cancel it? Nothing of what was measured is kept.")

    @admin.display(description="Do")
    def activate_button(self, row: Optimization) -> SafeString | str:
        """The button while the variant is there; a link to where one goes back."""
        found = variant_of(row)
        if found is None:
            return "There is no variant of it to serve." if (row.result or {}).get("variant") else "-"
        if found.is_active:
            listed = console.listing("inference_modelvariant", base_model__id__exact=found.base_model_id)
            return format_html("{} is served. {}", found.name, console.link(listed, "Variants"))
        text = f"Serve {found.base_model} from {found.name}"
        return _button(row, "activate", text, f"{text}? Its own file can be served again at any time.")

    # Addresses of one search

    def shown(self, row: Optimization) -> SafeString:
        return shown(row)

    def cancel_row(self, row: Optimization) -> bool:
        return desk.cancel(row)

    @admin.action(description="Cancel", permissions=["cancel"])
    def cancel(self, request: HttpRequest, queryset: QuerySet[Optimization]) -> None:
        number = sum(desk.cancel(row) for row in queryset)
        self.message_user(request, f"{number} cancelled; what had ended stays as it is.", messages.SUCCESS)

    @method_decorator(require_POST)
    def activate_this(self, request: HttpRequest, object_id: int) -> HttpResponse:
        """The other button. Raises PermissionDenied or Http404."""
        if not self.has_activate_permission(request):
            raise PermissionDenied
        found = variant_of(self.row(request, object_id))
        if found is None:
            raise Http404
        try:
            variants.activate(found)
        except RegistrationError as error:
            self.message_user(request, error.message, messages.ERROR)
        else:
            self.message_user(request, f"{found.base_model} is served from {found.name} now.", messages.SUCCESS)
        return redirect(console.change_page(PAGE, object_id))


def variant_of(row: Optimization) -> ModelVariant | None:
    """What it kept, unless that was removed, or replaced by a later search."""
    kept = (row.result or {}).get("variant")
    if kept is None or row.base_model_id is None:
        return None
    rows = ModelVariant.objects.select_related("base_model").filter(base_model_id=row.base_model_id)
    return rows.filter(name=kept["name"], digest=kept["digest"]).first()


def shown(row: Optimization) -> SafeString:
    """How far it is. `data-state`: the address of just this; `data-open`: it will be something else soon."""
    return format_html(
        '<div class="console-import" data-state="{}"{}>{}</div>',
        reverse(f"admin:{PAGE}_state", args=[row.pk]),
        SafeString(" data-open") if row.state == State.RUNNING else "",
        _sentence(row),
    )


def _sentence(row: Optimization) -> SafeString | str:
    if row.state == State.FAILED:
        return format_html('<span class="console-bad">Failed: {}</span>', row.problem)
    if row.state == State.CANCELLED:
        return "Cancelled: nothing is kept."
    if row.state == State.DONE:
        return _found(row)
    if not row.steps_total:
        return "Waits to be begun."
    done = min(row.steps_total, row.steps_done + row.part)
    step = min(row.steps_done + 1, row.steps_total)
    return console.labelled_bar(f"Step {step} of {row.steps_total}: {row.step}", 100 * done / row.steps_total)


def _found(row: Optimization) -> str:
    result = row.result or {}
    variant = result.get("variant")
    return f"Kept {variant['name']}, {result['gain']:.2f} times as fast." if variant else report.NOTHING_BETTER


def _button(row: Optimization, name: str, text: str, question: str) -> SafeString:
    """Sends the page's form, with its token, to another address."""
    return format_html(
        '<button type="submit" class="console-link" formaction="{}" data-confirm="{}">{}</button>',
        reverse(f"admin:{PAGE}_{name}_this", args=[row.pk]),
        question,
        text,
    )

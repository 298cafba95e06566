"""Pages of variants of models. Writes go through catalog/variants.py."""

from __future__ import annotations

from django.contrib import admin, messages
from django.db.models import QuerySet
from django.http import HttpRequest
from unfold.admin import ModelAdmin

from accounts.pages import console
from inference.catalog import variants
from inference.models import ModelVariant, ServedModel
from inference.vetting.inspection import RegistrationError


@admin.register(ModelVariant)
class ModelVariantAdmin(ModelAdmin):
    """What `manage.py optimize_model` kept. Activating one swaps the file that its model is served from."""

    list_display = ("name", "base_model", "file_type", "is_active", "gain", "perplexity", "created_at")
    list_select_related = ("base_model",)
    list_filter = ("base_model", "is_active")
    actions = ("activate", "serve_own_file")
    fields = (
        "base_model",
        "name",
        "is_active",
        "gain",
        "perplexity",
        "path",
        "size",
        "digest",
        "source_digest",
        "n_threads",
        "flash_attention",
        "created_at",
    )

    @admin.display(description="File type")
    def file_type(self, row: ModelVariant) -> str:
        return str(row.metadata.get("quantization", ""))

    @admin.display(description="Speed")
    def gain(self, row: ModelVariant) -> str:
        gained = row.measured.get("gain")
        return f"{gained:.2f} times the model's own" if gained else "not measured"

    @admin.display(description="Perplexity")
    def perplexity(self, row: ModelVariant) -> str:
        percent = row.measured.get("perplexity_increase_percent")
        return "not measured" if percent is None else f"{percent:+.2f} %"

    @admin.display(description="Size of the file")
    def size(self, row: ModelVariant) -> str:
        return console.megabytes(row.size_bytes)

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: ModelVariant | None = None) -> bool:
        return False

    def delete_model(self, request: HttpRequest, obj: ModelVariant) -> None:
        variants.remove([obj.pk])

    def delete_queryset(self, request: HttpRequest, queryset: QuerySet[ModelVariant]) -> None:
        variants.remove(queryset.values_list("pk", flat=True))

    def has_change_servedmodel_permission(self, request: HttpRequest) -> bool:
        """What is served is a matter of the model."""
        return bool(request.user.has_perm("inference.change_servedmodel"))

    @admin.action(description="Serve it under the model's name", permissions=["change_servedmodel"])
    def activate(self, request: HttpRequest, queryset: QuerySet[ModelVariant]) -> None:
        chosen = list(queryset.select_related("base_model")[:2])
        if len(chosen) != 1:
            self.message_user(request, "Choose exactly one variant.", messages.ERROR)
            return
        try:
            variants.activate(chosen[0])
        except RegistrationError as error:
            self.message_user(request, error.message, messages.ERROR)
            return
        self.message_user(request, f"{chosen[0].base_model} is served from {chosen[0].name} now.", messages.SUCCESS)

    @admin.action(description="Serve the model's own file again", permissions=["change_servedmodel"])
    def serve_own_file(self, request: HttpRequest, queryset: QuerySet[ModelVariant]) -> None:
        for base in ServedModel.objects.filter(variants__in=queryset).distinct():
            variants.revert(base)
            self.message_user(request, f"{base} is served from its own file.", messages.SUCCESS)

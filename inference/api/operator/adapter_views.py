"""The operator's adapters, aliases and variants of models. Rows change through the rooms that own them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from django.db import transaction
from django.utils import timezone
from drf_spectacular.utils import extend_schema
from rest_framework import mixins, viewsets
from rest_framework.decorators import action
from rest_framework.request import Request
from rest_framework.response import Response

from accounts.trail.refusals import Refusal
from inference.api.errors import field_error, validation_refusal
from inference.api.operator.adapter_serializers import (
    AdapterSerializer,
    AliasChangeForm,
    AliasForm,
    AliasSerializer,
    CompareQuery,
    ComparisonSerializer,
    ForceForm,
    GrantForm,
    RegisterAdapterForm,
    VariantSerializer,
)
from inference.api.operator.base import OperatorView
from inference.api.operator.paging import Pages, read_query
from inference.api.operator.serializers import Form
from inference.catalog import adapter_rows, aliases, granting, variants, version_figures
from inference.models import Adapter, AdapterAlias, ModelVariant, ServedModel
from inference.vetting.inspection import RegistrationError

CONTRADICTIONS = frozenset(
    {"conflict", "adapter_in_use", "alias_loses_tenants", "alias_not_found", "variant_stale", "variant_file_changed"}
)
"""They are about what exists, and not about the body."""


@contextmanager
def refusing(field: str) -> Iterator[None]:
    """What the registry refuses, in the words of the API. field: of the body, where the registry names none."""
    try:
        yield
    except RegistrationError as error:
        if error.code in CONTRADICTIONS:
            raise Refusal("conflict", error.message) from error
        named = error.fields if error.fields.keys() != {"path"} else {field: [error.message]}
        listed = [field_error((name,), text, error.code) for name, texts in named.items() for text in texts]
        raise validation_refusal(listed) from error


def asked(form: type[Form], request: Request) -> dict[str, Any]:
    found = form(data=request.data)
    found.is_valid(raise_exception=True)
    return dict(found.validated_data)


class AdapterViewSet(OperatorView, mixins.RetrieveModelMixin, mixins.ListModelMixin, viewsets.GenericViewSet[Adapter]):
    """LoRA adapters. POST registers a file by its path on the server: it is read, hashed, and its effect is proven."""

    queryset = (
        Adapter.objects.select_related("base_model", "owner")
        .prefetch_related("grants__tenant")
        .order_by("base_model__name", "name")
    )
    serializer_class = AdapterSerializer
    pagination_class = Pages
    http_method_names = ["get", "post", "patch", "delete"]

    @extend_schema(request=RegisterAdapterForm, responses={201: AdapterSerializer})
    def create(self, request: Request) -> Response:
        """Register a file, or register it anew under the same name."""
        form = RegisterAdapterForm(data=request.data)
        form.is_valid(raise_exception=True)
        values = dict(form.validated_data)
        with refusing("path"):
            row = adapter_rows.register(values.pop("path"), values.pop("model"), values.pop("name"), **values)
        return self._reply(row.pk, status=201)

    @extend_schema(request=AdapterSerializer, responses=AdapterSerializer)
    def partial_update(self, request: Request, pk: str = "") -> Response:
        """Change options; the file stays."""
        row = self.get_object()
        form = AdapterSerializer(row, data=request.data, partial=True)
        form.is_valid(raise_exception=True)
        with refusing("name"):
            adapter_rows.save(row.base_model, row.name, None, **form.validated_data)
        return self._reply(row.pk)

    @extend_schema(responses={204: None})
    def destroy(self, request: Request, pk: str = "") -> Response:
        """Forget an adapter with its grants; its file and its receipts stay. 409 where an alias leads to it."""
        with refusing("name"):
            adapter_rows.remove([self.get_object().pk])
        return Response(status=204)

    @extend_schema(request=GrantForm, responses=AdapterSerializer)
    @action(detail=True, methods=["post"])
    def grant(self, request: Request, pk: str = "") -> Response:
        """A tenant may use it, at the id after its last one. What is granted keeps its id."""
        row = self.get_object()
        with refusing("tenant"):
            granting.grant(row, asked(GrantForm, request)["tenant"])
        return self._reply(row.pk)

    @extend_schema(request=GrantForm, responses=AdapterSerializer)
    @action(detail=True, methods=["post"])
    def revoke(self, request: Request, pk: str = "") -> Response:
        """For this tenant it does not exist any more; what it has running ends."""
        row = self.get_object()
        granting.revoke(row, asked(GrantForm, request)["tenant"])
        return self._reply(row.pk)

    def _reply(self, pk: int, status: int = 200) -> Response:
        return Response(AdapterSerializer(self.get_queryset().get(pk=pk)).data, status=status)


class VariantViewSet(
    OperatorView, mixins.RetrieveModelMixin, mixins.ListModelMixin, viewsets.GenericViewSet[ModelVariant]
):
    """What `optimize_model` made of models: other files and settings, of which one may be served."""

    queryset = ModelVariant.objects.select_related("base_model").order_by("base_model__name", "name")
    serializer_class = VariantSerializer
    pagination_class = Pages
    http_method_names = ["get", "post", "delete"]

    @extend_schema(request=None, responses=VariantSerializer)
    @action(detail=True, methods=["post"])
    def activate(self, request: Request, pk: str = "") -> Response:
        """Serve it under the model's name. 409 where the model or the file has changed since it was made."""
        row = self.get_object()
        with refusing("name"):
            variants.activate(row)
        return Response(VariantSerializer(row).data)

    @extend_schema(request=None, responses=VariantSerializer)
    @action(detail=True, methods=["post"])
    def revert(self, request: Request, pk: str = "") -> Response:
        """Serve the model's own file again, whichever variant is active."""
        row = self.get_object()
        variants.revert(row.base_model)
        return Response(VariantSerializer(self.get_object()).data)

    @extend_schema(responses={204: None})
    def destroy(self, request: Request, pk: str = "") -> Response:
        """Forget it; its file stays. A model whose active variant goes is served from its own file."""
        variants.remove([self.get_object().pk])
        return Response(status=204)


class AliasViewSet(
    OperatorView, mixins.RetrieveModelMixin, mixins.ListModelMixin, viewsets.GenericViewSet[AdapterAlias]
):
    """Names that tenants ask for in the place of an adapter's: the version that answers, and one on trial."""

    queryset = AdapterAlias.objects.select_related("base_model", "target", "canary", "previous").order_by(
        "base_model__name", "name"
    )
    serializer_class = AliasSerializer
    pagination_class = Pages
    http_method_names = ["get", "post", "patch", "delete"]

    @extend_schema(request=AliasForm, responses={201: AliasSerializer})
    def create(self, request: Request) -> Response:
        """Make a name, and point it at a version. 409 for one that is there."""
        values = asked(AliasForm, request)
        base, name = values["model"], values["name"]
        if aliases.find(base, name) is not None:
            raise Refusal("conflict", f"There is an alias {base.name}:{name[:64]}: change that one.")
        return self._write(base, name, values, status=201)

    @extend_schema(request=AliasChangeForm, responses=AliasSerializer)
    def partial_update(self, request: Request, pk: str = "") -> Response:
        """Point it elsewhere, try a version out on a share, or end that."""
        row = self.get_object()
        return self._write(row.base_model, row.name, asked(AliasChangeForm, request))

    @extend_schema(responses={204: None})
    def destroy(self, request: Request, pk: str = "") -> Response:
        """Forget the name; its versions stay."""
        aliases.remove([self.get_object().pk])
        return Response(status=204)

    @extend_schema(request=ForceForm, responses=AliasSerializer)
    @action(detail=True, methods=["post"])
    def promote(self, request: Request, pk: str = "") -> Response:
        """What is on trial answers everything."""
        row = self.get_object()
        with refusing("canary"):
            aliases.promote(row, force=asked(ForceForm, request)["force"])
        return self._reply(row.base_model, row.name)

    @extend_schema(request=None, responses=AliasSerializer)
    @action(detail=True, methods=["post"], url_path="roll-back")
    def roll_back(self, request: Request, pk: str = "") -> Response:
        """End the trial, or, where there is none, return to the version before. Asking twice goes no further."""
        row = self.get_object()
        with refusing("target"):
            aliases.roll_back(row)
        return self._reply(row.base_model, row.name)

    @extend_schema(parameters=[CompareQuery], responses=ComparisonSerializer)
    @action(detail=True, methods=["get"], pagination_class=None)
    def compare(self, request: Request, pk: str = "") -> Response:
        """Outcomes, times and speed of the versions, of the newest requests that came by this name."""
        row, hours = self.get_object(), read_query(CompareQuery, request)["hours"]
        found = version_figures.compare(row, timezone.now(), hours)
        return Response({"alias": str(row), "hours": hours, "versions": found})

    def _write(self, base: ServedModel, name: str, values: dict[str, Any], status: int = 200) -> Response:
        """All of it or nothing."""
        with refusing("target"), transaction.atomic():
            if "target" in values:
                row = aliases.point(base, name, aliases.version_of(base, values["target"]), force=values["force"])
            else:
                row = self.get_object()
            if values.get("canary", ...) is None:
                aliases.end_trial(row)
            elif "canary" in values or "share" in values:
                canary = aliases.version_of(base, values["canary"], "canary") if "canary" in values else row.canary
                if canary is None:
                    raise validation_refusal([field_error(("canary",), "Name the version to try out.", "missing")])
                aliases.try_out(row, canary, values.get("share", row.share))
        return self._reply(base, name, status)

    def _reply(self, base: ServedModel, name: str, status: int = 200) -> Response:
        return Response(AliasSerializer(aliases.find(base, name)).data, status=status)

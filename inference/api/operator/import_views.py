"""/v1/admin/imports: models and adapters that come by upload or from an address, and how far their checks are."""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from contextlib import ExitStack
from functools import partial
from typing import IO, Any

from django.db.models import QuerySet
from django.http import HttpResponseBase
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework import mixins, serializers, viewsets
from rest_framework.request import Request
from rest_framework.response import Response

from accounts.models import Scope
from accounts.trail.refusals import Refusal
from inference.api.async_view import AsyncAPIView, Later, json_response
from inference.api.hop import shared_hop
from inference.api.operator.base import OperatorView, registration_refusal
from inference.api.operator.paging import Pages
from inference.api.spooling import Source, copy_body
from inference.imports import desk, importer, quarantine, upload_tokens
from inference.imports.models import ModelImport
from inference.models import ServedModel
from inference.vetting.inspection import RegistrationError

MAX_BYTES = 1 << 50
CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,15})-([0-9]{1,15})/([0-9]{1,15})")
RANGE_PARAMETER = OpenApiParameter(
    "Content-Range",
    str,
    OpenApiParameter.HEADER,
    description="`bytes 1000-4999/5000` to go on after the `received_bytes` that are there. Absent: the whole file.",
)


class ImportForm(serializers.Serializer[Any]):
    """POST /v1/admin/imports. With `url` it is fetched; without, its bytes are to be uploaded."""

    kind = serializers.ChoiceField(choices=ModelImport.Kind.choices, default=ModelImport.Kind.MODEL)
    name = serializers.CharField(max_length=100, help_text="What requests will call it.")
    base_model = serializers.SlugRelatedField(
        slug_field="name",
        queryset=ServedModel.objects.all(),
        required=False,
        allow_null=True,
        help_text="An adapter's.",
    )
    url = serializers.CharField(
        max_length=2000, required=False, allow_blank=True, help_text="An address, or owner/repository:file.gguf."
    )
    sha256 = serializers.CharField(max_length=64, required=False, allow_blank=True)
    size_bytes = serializers.IntegerField(min_value=1, max_value=MAX_BYTES, required=False, help_text="Of an upload.")
    visibility = serializers.ChoiceField(choices=ServedModel.Visibility.choices, required=False)
    replaces = serializers.BooleanField(
        default=False, help_text="true: it may take the place of the one that has its name."
    )
    is_default = serializers.BooleanField(default=False)


class ImportSerializer(serializers.ModelSerializer[ModelImport]):
    base_model = serializers.SlugRelatedField[ServedModel](slug_field="name", read_only=True)

    class Meta:
        model = ModelImport
        fields = [
            "id",
            "kind",
            "name",
            "base_model",
            "url",
            "sha256",
            "state",
            "problem_code",
            "problem",
            "total_bytes",
            "received_bytes",
            "checked_bytes",
            "bytes_per_second",
            "digest",
            "asked_by",
            "created_at",
            "updated_at",
        ]
        read_only_fields = fields


class ImportViewSet(
    OperatorView, mixins.RetrieveModelMixin, mixins.ListModelMixin, viewsets.GenericViewSet[ModelImport]
):
    """Models and adapters on their way in, newest first."""

    queryset = ModelImport.objects.select_related("base_model").order_by("-id")
    serializer_class = ImportSerializer
    pagination_class = Pages

    def get_queryset(self) -> QuerySet[ModelImport]:
        return ModelImport.objects.select_related("base_model").order_by("-id")

    @extend_schema(request=ImportForm, responses={201: ImportSerializer})
    def create(self, request: Request) -> Response:
        """Begin an import; `state` says how far it is. Bytes of an upload go to `/v1/admin/imports/{id}/content`."""
        form = ImportForm(data=request.data)
        form.is_valid(raise_exception=True)
        try:
            row = desk.ask(desk.Asked(**form.validated_data))
        except RegistrationError as error:
            raise registration_refusal(error) from error
        importer.wake()
        return Response(ImportSerializer(row).data, status=201)

    @extend_schema(responses=ImportSerializer)
    def destroy(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        """Cancel it, and remove what has come. 409 where it has ended; what is registered stays."""
        row = self.get_object()
        if not desk.cancel(row):
            raise Refusal("conflict", f"An import that is {row.state} cannot be cancelled.")
        row.refresh_from_db()
        return Response(ImportSerializer(row).data)


class ImportContentView(AsyncAPIView):
    """The bytes of an upload, onto the disk as they come."""

    route = "/v1/admin/imports/{id}/content"
    scopes = (Scope.OPERATOR,)
    tag = "operator"

    def authenticate(self, request: Request) -> None:
        """A page of the console has a token in place of a key."""
        token = self.http_request.headers.get(upload_tokens.HEADER)
        if token is None:
            super().authenticate(request)
            return
        self.stage = "authentication"
        assert self.http_request.resolver_match is not None
        import_id = int(self.http_request.resolver_match.kwargs["import_id"])
        self.log_fields["user"] = upload_tokens.check(token, import_id)

    @extend_schema(
        operation_id="admin_imports_content",
        summary="Upload its file, or go on with it",
        parameters=[RANGE_PARAMETER],
        request={"application/octet-stream": OpenApiTypes.BINARY},
        responses=ImportSerializer,
    )
    def put(self, request: Request, import_id: str) -> Later:
        """Who sends it, is it wanted, and is there room? Then it is read."""
        if self.principal is not None:
            self.admit_to_view()
        row = ModelImport.objects.filter(pk=int(import_id)).first()
        if row is None:
            raise Refusal("not_found", f"There is no import {import_id}.")
        start, total = self._range()
        held = ExitStack()
        try:
            file = _open(row, held, start, total)
        except BaseException:
            held.close()
            raise
        return Later(partial(self._read, row, file, held, start, total), abandon=held.close)

    def _range(self) -> tuple[int, int]:
        """The first byte that comes, and how many the file has. Raises Refusal."""
        headers = self.http_request.headers
        length = headers.get("Content-Length", "")
        if not length.isdigit() or not 0 < int(length[:18]) <= MAX_BYTES:
            raise Refusal("bad_request", "Send Content-Length: room for the file is looked for before it is read.")
        text = headers.get("Content-Range")
        if text is None:
            return 0, int(length)
        found = CONTENT_RANGE.fullmatch(text)
        first, last, total = (int(each) for each in found.groups()) if found else (0, 0, 0)
        if not 0 <= first <= last == total - 1 or last - first + 1 != int(length):
            raise Refusal(
                "bad_request",
                "Content-Range is `bytes FIRST-LAST/TOTAL`: all that is left, Content-Length bytes of it.",
            )
        return first, total

    async def _read(
        self, row: ModelImport, file: IO[bytes], held: ExitStack, start: int, total: int
    ) -> HttpResponseBase:
        self.stage = "upload"
        source: Source = self.http_request.upload  # type: ignore[attr-defined]
        tell = importer.Progress(row, "received_bytes", threading.Event(), None)
        noted_at = 0.0

        async def note(num_bytes: int) -> None:
            nonlocal noted_at
            now = asyncio.get_running_loop().time()
            if now - noted_at >= importer.NOTE_SECONDS:
                noted_at = now
                await shared_hop().run(lambda: tell(start + num_bytes), abandon=lambda _: None)

        try:
            with held:
                await copy_body(source, file, partial(_check_end, total - start), note)
                await asyncio.to_thread(quarantine.sync, file)
                answer = await shared_hop().run(partial(_arrived, row, total), abandon=lambda _: None)
        except desk.Over as error:
            raise Refusal("conflict", "The import was cancelled.") from error
        except Refusal:
            await shared_hop().run(partial(_note_received, row), abandon=lambda _: None)
            raise
        except TimeoutError as error:
            await shared_hop().run(partial(_note_received, row), abandon=lambda _: None)
            raise Refusal("request_timeout", "The file did not come in time: go on after what is there.") from error
        except OSError as error:
            text = f"The file cannot be written: {error.strerror}."
            raise registration_refusal(RegistrationError("state_unwritable", text, {"file": [text]})) from error
        importer.wake()
        return json_response(answer)


def _open(row: ModelImport, held: ExitStack, start: int, total: int) -> IO[bytes]:
    """The file, to go on at its end; `held` then holds the import, and the file. Raises Refusal."""
    if not held.enter_context(quarantine.held(row.pk)):
        raise Refusal("conflict", "Somebody else uploads this file, or it is being checked.")
    row.refresh_from_db()
    if row.state != ModelImport.State.RECEIVING or not row.is_upload:
        raise Refusal("conflict", f"An import that is {row.state} takes no bytes.")
    have = quarantine.received(row.pk)
    if start not in (0, have):
        raise Refusal("conflict", f"{have} bytes are there: go on with the next one.", received_bytes=have)
    try:
        quarantine.check_size(total)
        quarantine.check_room(total - have, desk.promised(but=row.pk))
        place = quarantine.make_folder(row.pk) / quarantine.ONE_FILE
        file = held.enter_context(quarantine.open_to_write(place, keep=start))
        desk.note(row, total_bytes=total, received_bytes=start)
    except RegistrationError as error:
        raise registration_refusal(error) from error
    except desk.Over as error:
        raise Refusal("conflict", "The import was cancelled.") from error
    return file


def _check_end(most: int, num_bytes: int) -> None:
    if num_bytes > most:
        raise Refusal("bad_request", "More bytes came than Content-Length says.")


def _note_received(row: ModelImport) -> None:
    """It broke off: what is there can be gone on after."""
    with contextlib.suppress(desk.Over):
        desk.note(row, received_bytes=quarantine.received(row.pk), bytes_per_second=0.0)


def _arrived(row: ModelImport, total: int) -> dict[str, Any]:
    desk.note(row, state=ModelImport.State.QUEUED, received_bytes=total, bytes_per_second=0.0)
    return dict(ImportSerializer(row).data)

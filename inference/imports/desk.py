"""The book of imports: who may begin one, what is written while it goes on, how it ends. Every write is conditional.

An import that has ended is never written again: whoever still works on it hears so (Over) at its next word. Called by
the console, the operator's API, commands and the importer.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

from django.conf import settings
from django.core.exceptions import ValidationError
from django.db import transaction
from django.db.models import F, Q, QuerySet, Sum
from django.utils import timezone

from accounts.ledger import retention
from accounts.trail import audit_log
from inference.imports import quarantine
from inference.imports.addresses import Policy, absolute_url, checked, parts_at
from inference.imports.fetching import Wanted
from inference.imports.models import ModelImport
from inference.models import Adapter, ServedModel, adapter_name_validator, model_name_validator
from inference.vetting.inspection import RegistrationError

MAX_OPEN = 20
SHA256 = re.compile(r"[0-9a-f]{64}")
State = ModelImport.State


class Over(Exception):
    """The import has ended meanwhile: it was cancelled, or another process ended it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """An import as somebody wants it. url: as `addresses.absolute_url` takes it; empty: it will be uploaded.

    base_model: an adapter's. size_bytes: of an upload, where it is known. visibility: empty is the registry's default.
    """

    kind: str
    name: str
    url: str = ""
    base_model: ServedModel | None = None
    sha256: str = ""
    visibility: str = ""
    replaces: bool = False
    is_default: bool = False
    is_attended: bool = False
    size_bytes: int | None = None


def policy() -> Policy:
    """What the settings allow."""
    config = settings.CONFIG
    networks = tuple(ipaddress.ip_network(each) for each in config.fetch_private_networks)
    return Policy(hosts=tuple(config.fetch_hosts), private_networks=networks, tokens=tuple(config.fetch_tokens))


def url_of(text: str) -> str:
    """The allowed address that is meant. Raises RegistrationError."""
    url = absolute_url(text, settings.CONFIG.model_hub_url)
    checked(url, policy())
    return url


def ask(asked: Asked) -> ModelImport:
    """Write down a new import; its bytes are to come. Raises RegistrationError, and then nothing has changed."""
    row = prepare(asked)
    begin(row)
    return row


def begin(row: ModelImport) -> None:
    """Write down what `prepare` has made, and who asked for it in the audit log: an address without its query."""
    with transaction.atomic():
        row.save(force_insert=True)
        source = row.url.partition("?")[0] or "an upload"
        audit_log.acted(row, {"asked for": (None, {"kind": row.kind, "name": row.name, "from": source})})


def prepare(asked: Asked) -> ModelImport:
    """The row of an import that may begin, not written yet. Raises RegistrationError."""
    _check_words(asked)
    check_name(asked.kind, asked.name, asked.base_model, replaces=asked.replaces)
    if ModelImport.objects.filter(state__in=ModelImport.OPEN).count() >= MAX_OPEN:
        raise RegistrationError(
            "too_many_imports", f"{MAX_OPEN} imports are open, as many as may be: wait for them, or cancel some."
        )
    url = url_of(asked.url) if asked.url else ""
    if asked.size_bytes is not None:
        quarantine.check_room(asked.size_bytes, promised())
    who = audit_log.actor()
    files = [Wanted(name=name, url=each) for name, each in parts_at(url)] if url else []
    return ModelImport(
        kind=asked.kind,
        name=asked.name,
        base_model=asked.base_model,
        url=url,
        sha256=asked.sha256,
        visibility=asked.visibility,
        replaces=asked.replaces,
        is_default=asked.is_default,
        is_attended=asked.is_attended,
        total_bytes=asked.size_bytes,
        files=[asdict(each) for each in files] or [asdict(Wanted(name=quarantine.ONE_FILE, url=""))],
        asked_by_kind=who.kind[:16],
        asked_by=who.name[:150],
    )


def _check_words(asked: Asked) -> None:
    is_adapter = asked.kind == ModelImport.Kind.ADAPTER
    if asked.kind not in ModelImport.Kind.values:
        raise _wrong("kind", f"Use one of {', '.join(ModelImport.Kind.values)}.")
    try:
        (adapter_name_validator if is_adapter else model_name_validator)(asked.name)
    except ValidationError as error:
        raise _wrong("name", " ".join(error.messages)) from error
    if is_adapter and asked.base_model is None:
        raise _wrong("base_model", "Choose the model that the adapter is for.")
    if not is_adapter and asked.base_model is not None:
        raise _wrong("base_model", "Only an adapter has a base model.")
    if is_adapter and asked.is_default:
        raise _wrong("is_default", "Only a model can be the default.")
    if asked.sha256 and not SHA256.fullmatch(asked.sha256):
        raise _wrong("sha256", "A SHA-256 is 64 digits and letters from a to f.")
    if asked.visibility not in ("", *ServedModel.Visibility.values):
        raise _wrong("visibility", f"Use one of {', '.join(ServedModel.Visibility.values)}.")


def _wrong(field: str, message: str) -> RegistrationError:
    return RegistrationError("invalid", message, {field: [message]})


def check_name(kind: str, name: str, base: ServedModel | None, *, replaces: bool) -> None:
    """Raises RegistrationError where the name is another's, and it may not take its place."""
    is_adapter = kind == ModelImport.Kind.ADAPTER
    rows = Adapter.objects.filter(base_model=base, name=name) if is_adapter else ServedModel.objects.filter(name=name)
    if not replaces and rows.exists():
        text = f"There is a {kind} {name!r} already: choose another name, or let this one take its place."
        raise RegistrationError("name_taken", text, {"name": [text]})


def promised(but: int | None = None) -> int:
    """Bytes that are still to come for all open imports but one."""
    rows = ModelImport.objects.filter(state=State.RECEIVING, total_bytes__gt=F("received_bytes"))
    rows = rows if but is None else rows.exclude(pk=but)
    return int(rows.aggregate(number=Sum(F("total_bytes") - F("received_bytes"), default=0))["number"])


TO_BE_FETCHED = Q(state=State.RECEIVING) & ~Q(url="")


def due() -> QuerySet[ModelImport]:
    """What the importer has to do: fetch, or check what is there."""
    rows = ModelImport.objects.filter(state__in=ModelImport.OPEN, is_attended=False)
    return rows.exclude(state=State.RECEIVING, url="").select_related("base_model").order_by("pk")


def is_to_be_fetched(row: ModelImport) -> bool:
    return row.state == State.RECEIVING and not row.is_upload


def note(row: ModelImport, **values: Any) -> None:
    """Write fields of an open import. Raises Over."""
    now = timezone.now()
    if not ModelImport.objects.filter(pk=row.pk, state__in=ModelImport.OPEN).update(**values, updated_at=now):
        raise Over
    for name, value in {**values, "updated_at": now}.items():
        setattr(row, name, value)


def refuse(row: ModelImport, error: RegistrationError) -> None:
    """It ends, and nothing of it is kept but the reason. Whoever calls it holds the import. Raises Over."""
    note(row, state=State.REFUSED, problem_code=error.code, problem=error.message[:2000], bytes_per_second=0.0)
    quarantine.remove(row.pk)


def cancel(row: ModelImport) -> bool:
    """Whether it was open. Its bytes go, at the latest when who works on it hears of it. The audit log has it."""
    was = row.state
    try:
        note(row, state=State.CANCELLED, bytes_per_second=0.0)
    except Over:
        return False
    audit_log.acted(row, {"state": (was, State.CANCELLED)})
    with quarantine.held(row.pk) as is_ours:
        if is_ours:
            quarantine.remove(row.pk)
    return True


def sweep(now: datetime) -> int:
    """End imports that nobody goes on with, remove what belongs to none, and forget old rows; how many. Idempotent."""
    horizon = now - timedelta(hours=settings.CONFIG.import_hours)
    number = 0
    for row in ModelImport.objects.filter(state__in=ModelImport.OPEN, updated_at__lt=horizon):
        with quarantine.held(row.pk) as is_ours:
            if is_ours:
                number += _abandon(row)
    known = set(ModelImport.objects.filter(state__in=ModelImport.OPEN).values_list("pk", flat=True))
    number += quarantine.sweep_strays(known)
    if days := settings.CONFIG.audit_days:
        old = ModelImport.objects.filter(updated_at__lt=now - timedelta(days=days)).exclude(state__in=ModelImport.OPEN)
        number += retention.delete_in_chunks(old)
    return number


def _abandon(row: ModelImport) -> bool:
    hours = settings.CONFIG.import_hours
    try:
        refuse(row, RegistrationError("import_abandoned", f"Nobody went on with it for {hours} hours."))
    except Over:
        return False
    return True

"""Keys are issued, rotated and revoked here, and nowhere else; the admin, the commands and the operator API call it.

The text of a key leaves `issue` and `rotate` once and is kept nowhere. Every change is announced to all processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

from django.conf import settings
from django.db import transaction
from django.db.models import Q
from django.db.models.functions import Coalesce, Least
from django.utils import timezone

from accounts.identity import keys
from accounts.identity.known_keys import announce_change
from accounts.models import DEFAULT_SCOPES, APIKey, Tenant

MAX_OVERLAP_SECONDS = 90 * 86400


class IssuingError(ValueError):
    """What was asked of a key cannot be done; the message says why."""


def issue(
    tenant: Tenant,
    name: str,
    scopes: Sequence[str] | None = None,
    limits: Mapping[str, int | None] | None = None,
    expires_at: datetime | None = None,
    *,
    allowed_models: Sequence[str] | None = None,
    allowed_adapters: Sequence[str] | None = None,
    now: datetime | None = None,
) -> tuple[APIKey, str]:
    """A new key and its text; without a list of models or adapters it may use all that its tenant may.

    Raises ValidationError for unknown scopes or limits and for lists that are none, IssuingError for a past expiry.
    """
    moment = now or timezone.now()
    key = APIKey(
        tenant=tenant,
        name=name,
        scopes=list(DEFAULT_SCOPES if scopes is None else scopes),
        limit_overrides=dict(limits or {}),
        allowed_models=None if allowed_models is None else list(allowed_models),
        allowed_adapters=None if allowed_adapters is None else list(allowed_adapters),
        expires_at=expires_at,
        created_at=moment,
    )
    if expires_at is not None and expires_at <= moment:
        raise IssuingError("A key must expire in the future.")
    return key, save_new(key)


def rotate(key: APIKey, overlap_seconds: float = 0, *, now: datetime | None = None) -> tuple[APIKey, str]:
    """A successor with the same name, rights, limits, expiry, and the same quota; the old key ends after the overlap.

    With no overlap the old key is revoked at once. Raises IssuingError where the key is no longer active.
    """
    if not 0 <= overlap_seconds <= MAX_OVERLAP_SECONDS:
        raise IssuingError(f"The overlap must be 0 to {MAX_OVERLAP_SECONDS} seconds.")
    moment = now or timezone.now()
    successor = APIKey(
        tenant_id=key.tenant_id,
        name=key.name,
        scopes=key.scopes,
        limit_overrides=key.limit_overrides,
        allowed_models=key.allowed_models,
        allowed_adapters=key.allowed_adapters,
        expires_at=key.expires_at,
        quota_key_id=key.first_id,
        rotated_from=key,
        created_at=moment,
    )
    with transaction.atomic():
        text = save_new(successor)
        ends_at = moment + timedelta(seconds=overlap_seconds)
        active = APIKey.objects.filter(Q(expires_at__isnull=True) | Q(expires_at__gt=moment), revoked_at__isnull=True)
        old = active.filter(pk=key.pk)
        if overlap_seconds:
            changed = old.update(expires_at=Least(Coalesce("expires_at", ends_at), ends_at))
        else:
            changed = old.update(revoked_at=moment)
        if not changed:
            raise IssuingError("Only an active key can be rotated: this one is revoked or has expired.")
        announce_change(key.public_id)
    key.refresh_from_db(fields=["expires_at", "revoked_at"])
    return successor, text


def revoke(key: APIKey, *, now: datetime | None = None) -> bool:
    """False where it was revoked before. Running streams of the key end within a second, in every process."""
    with transaction.atomic():
        changed = APIKey.objects.filter(pk=key.pk, revoked_at__isnull=True).update(revoked_at=now or timezone.now())
        announce_change(key.public_id)
    key.refresh_from_db(fields=["revoked_at"])
    return bool(changed)


def find(text: str) -> APIKey:
    """The key that an operator means by its text, its shown form `llms_..._…`, its public id or its row number.

    Raises APIKey.DoesNotExist.
    """
    words = text.strip().split("_")
    public_id = words[1] if len(words) > 1 and words[0] == keys.PREFIX else text.strip()
    query = Q(public_id=public_id)
    if public_id.isdecimal() and len(public_id) < 12:
        query |= Q(pk=int(public_id))
    return APIKey.objects.select_related("tenant").get(query)


def save_new(key: APIKey) -> str:
    """Gives an unsaved key its id and its secret and saves it; returns its text. Raises ValidationError."""
    new = keys.generate()
    key.public_id = new.public_id
    key.pepper_id, key.secret_hash = keys.digest(new.secret, keys.parse_peppers(settings.KEY_PEPPER))
    key.full_clean(exclude=["tenant", "rotated_from", "quota_key"])
    key.save(force_insert=True)  # announced, as a process may have remembered that there is no such key
    return new.text

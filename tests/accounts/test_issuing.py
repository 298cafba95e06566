"""Issue, rotate, revoke: a secret is seen once, a quota is never renewed by rotating."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.core.exceptions import ValidationError
from django.db.models import JSONField

from accounts.identity import issuing, key_rows, keys
from accounts.models import APIKey
from tests.conftest import Cast

pytestmark = [pytest.mark.integration, pytest.mark.django_db]

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)


def test_only_the_hash_of_a_secret_is_kept(cast: Cast) -> None:
    parsed = keys.parse(cast.alice.text)
    assert parsed is not None
    row = APIKey.objects.filter(pk=cast.alice.key.pk).values().get()
    assert parsed.secret not in repr(row)
    assert row["public_id"] == parsed.public_id
    assert cast.alice.key.display == f"llms_{parsed.public_id}_…"
    assert parsed.secret not in str(cast.alice.key)


@pytest.mark.parametrize("wrong", [{"scopes": ["root"]}, {"scopes": []}, {"limits": {"rpm": 1}}, {"name": ""}])
def test_a_wrong_scope_or_limit_or_name_issues_nothing(cast: Cast, wrong: dict[str, Any]) -> None:
    number = APIKey.objects.count()
    with pytest.raises(ValidationError):
        issuing.issue(cast.alice.tenant, **{"name": "second", **wrong})
    assert APIKey.objects.count() == number


def test_a_key_cannot_be_born_expired(cast: Cast) -> None:
    with pytest.raises(issuing.IssuingError, match="future"):
        issuing.issue(cast.alice.tenant, "late", expires_at=NOW, now=NOW)


def test_rotating_without_overlap_revokes_at_once(cast: Cast) -> None:
    old = cast.alice.key
    new, text = issuing.rotate(old)
    assert old.revoked_at is not None
    assert new.rotated_from == old and new.quota_key == old and new.tenant == old.tenant
    assert (new.name, new.scopes, new.limit_overrides) == (old.name, old.scopes, old.limit_overrides)
    assert text != cast.alice.text and keys.parse(text) is not None


def test_a_successor_has_every_right_and_bound_of_the_old_key_and_no_other(cast: Cast) -> None:
    old = cast.alice.key
    for field in APIKey._meta.concrete_fields:
        if isinstance(field, JSONField) and field.null:  # lists of names: null would be every one
            setattr(old, field.attname, ["small"])
    old.scopes, old.limit_overrides, old.expires_at = ["usage"], {"concurrent_requests": 2}, NOW + timedelta(days=1)
    old.save()
    new, _ = issuing.rotate(old, 3600, now=NOW)
    of_its_own = {"id", "public_id", "secret_hash", "pepper_id", "quota_key", "rotated_from"}
    of_its_own |= {"expires_at", "last_used_at", "created_at"}
    for field in APIKey._meta.concrete_fields:
        if field.name not in of_its_own:
            assert getattr(new, field.attname) == getattr(old, field.attname), field.name
    assert new.expires_at == NOW + timedelta(days=1)
    assert key_rows.principal_of(new).allowed_models == {"small"}


def test_rotating_with_overlap_lets_both_work(cast: Cast) -> None:
    old = cast.alice.key
    issuing.rotate(old, 3600, now=NOW)
    assert old.revoked_at is None and old.expires_at == NOW + timedelta(hours=1)
    assert old.is_active(NOW) and not old.is_active(NOW + timedelta(hours=1))


def test_an_overlap_never_prolongs_a_key(cast: Cast) -> None:
    end = NOW + timedelta(minutes=5)
    key, _ = issuing.issue(cast.alice.tenant, "short", expires_at=end, now=NOW)
    successor, _ = issuing.rotate(key, 3600, now=NOW)
    assert key.expires_at == end and successor.expires_at == end


def test_all_keys_of_a_chain_share_the_quota_of_the_first(cast: Cast) -> None:
    second, _ = issuing.rotate(cast.alice.key)
    third, _ = issuing.rotate(second)
    assert third.quota_key == cast.alice.key and third.rotated_from == second


def test_a_revoked_or_expired_key_cannot_be_rotated(cast: Cast) -> None:
    issuing.revoke(cast.alice.key)
    short, _ = issuing.issue(cast.bob.tenant, "short", expires_at=NOW + timedelta(seconds=1), now=NOW)
    number = APIKey.objects.count()
    for key in (cast.alice.key, short):
        with pytest.raises(issuing.IssuingError, match="active"):
            issuing.rotate(key, now=NOW + timedelta(days=1))
    with pytest.raises(issuing.IssuingError, match="overlap"):
        issuing.rotate(cast.bob.key, -1)
    assert APIKey.objects.count() == number


def test_revoking_twice_says_so(cast: Cast) -> None:
    assert issuing.revoke(cast.alice.key)
    first = cast.alice.key.revoked_at
    assert not issuing.revoke(cast.alice.key)
    assert cast.alice.key.revoked_at == first


def test_a_key_is_found_by_whatever_an_operator_has(cast: Cast) -> None:
    key = cast.alice.key
    for text in (cast.alice.text, key.display, key.public_id, str(key.pk), f" {key.public_id}\n"):
        assert issuing.find(text) == key
    with pytest.raises(APIKey.DoesNotExist):
        issuing.find("llms_nobodynobody_…")

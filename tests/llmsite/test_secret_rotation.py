"""Another SECRET_KEY, with the one of before in SECRET_KEY_FALLBACKS: nobody notices; without it, all of it is void."""

from __future__ import annotations

from typing import Any

import pytest
from django.contrib.auth.models import User
from django.core import signing
from django.test import Client

from accounts.trail.refusals import Refusal
from inference.imports import upload_tokens
from inference.worker import hosted
from tests.in_process import InProcessSite
from tests.inference.test_replay import again, asked, why_not

pytestmark = [pytest.mark.integration, pytest.mark.django_db]
NEW = "another secret key for tests alone, of more than fifty characters"


def rotate(settings: Any, *, keeps_old: bool = True) -> None:
    settings.SECRET_KEY_FALLBACKS = [settings.SECRET_KEY] if keeps_old else []
    settings.SECRET_KEY = NEW


def signed_in(client: Client) -> bool:
    return client.get("/admin/").status_code == 200


def test_sessions_go_on_and_are_sealed_anew(client: Client, settings: Any) -> None:
    client.force_login(User.objects.create_superuser("olga", password="a long password for tests"))
    assert signed_in(client)
    rotate(settings)
    assert signed_in(client), "the old key still verifies"
    settings.SECRET_KEY_FALLBACKS = []
    assert signed_in(client), "that page gave the session a seal of the new key"


def test_without_the_old_key_sessions_end(client: Client, settings: Any) -> None:
    client.force_login(User.objects.create_superuser("olga", password="a long password for tests"))
    rotate(settings, keeps_old=False)
    assert not signed_in(client)


def test_tokens_of_uploads_are_good_until_the_old_key_goes(settings: Any) -> None:
    olga = User.objects.create_superuser("olga", password="a long password for tests")
    token = upload_tokens.make(7, olga.pk)
    rotate(settings)
    assert upload_tokens.check(token, 7) == "olga"
    newer = upload_tokens.make(7, olga.pk)
    assert signing.loads(newer, key=NEW, fallback_keys=[], salt=upload_tokens.SALT) == [7, olga.pk]
    settings.SECRET_KEY_FALLBACKS = []
    assert upload_tokens.check(newer, 7) == "olga"
    with pytest.raises(Refusal):
        upload_tokens.check(token, 7)


def test_workers_read_states_of_slots_with_the_keys_of_the_settings(settings: Any) -> None:
    """The files themselves: tests/inference/test_slot_files.py."""
    before = hosted.slot_files()._keys
    rotate(settings)
    new, old = hosted.slot_files()._keys
    assert [old] == before != [new]


@pytest.mark.api
def test_receipts_of_before_are_replayed(site: InProcessSite, settings: Any) -> None:
    body = {"prompt": "one two three", "max_new_tokens": 8}
    receipt = asked(site, "/v1/generate", body)
    rotate(settings)
    assert again(receipt, body).verdict == "same"
    settings.SECRET_KEY_FALLBACKS = []
    assert why_not(receipt, body) == "prompt_differs"

"""What lets a page of the console send the bytes of one import: signed, for one person, for some hours.

The page's request comes by the API's door, which knows no session; a foreign site cannot make such a token.
"""

from __future__ import annotations

from django.contrib.auth import get_user_model
from django.core import signing

from accounts.trail.refusals import Refusal

HEADER = "X-Upload-Token"
SALT = "llmsite upload of an import"
LIFETIME_SECONDS = 12 * 3600
MAX_CHARACTERS = 500


def make(import_id: int, user_id: int) -> str:
    return signing.dumps([import_id, user_id], salt=SALT)


def check(token: str, import_id: int) -> str:
    """The name of the person, who may still do this. Raises Refusal. A query."""
    try:
        found, user_id = signing.loads(token[:MAX_CHARACTERS], salt=SALT, max_age=LIFETIME_SECONDS)
    except (signing.BadSignature, TypeError, ValueError) as error:
        raise Refusal("forbidden", "The page is too old to upload from: load it again.") from error
    user = get_user_model().objects.filter(pk=user_id).first()
    if found != import_id or user is None or not user.has_perm("inference.add_modelimport"):
        raise Refusal("forbidden", "You may not upload this file.")
    return user.get_username()

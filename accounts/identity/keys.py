"""The text of an API key: made, read and compared. Pure: no database, no Redis, no settings.

    llms_<public id, 12 characters>_<secret, 32 characters><checksum, 6 characters>

all in base62. The public id finds the row, the checksum (CRC-32 of everything before it) lets a mistyped key be refused
without a query, and of the secret only its HMAC-SHA-256 under a pepper is kept.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import string
import zlib
from dataclasses import dataclass, field
from functools import lru_cache

PREFIX = "llms"
ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
PUBLIC_ID_LENGTH = 12
SECRET_LENGTH = 32
CHECKSUM_LENGTH = 6
KEY_LENGTH = len(PREFIX) + 1 + PUBLIC_ID_LENGTH + 1 + SECRET_LENGTH + CHECKSUM_LENGTH
SHAPE = re.compile(
    rf"{PREFIX}_([0-9A-Za-z]{{{PUBLIC_ID_LENGTH}}})_([0-9A-Za-z]{{{SECRET_LENGTH}}})([0-9A-Za-z]{{{CHECKSUM_LENGTH}}})"
)
NO_HASH = "0" * 64
"""Compared with where there is no row, so that an unknown key costs what a wrong secret costs."""


@dataclass(frozen=True, slots=True)
class ParsedKey:
    """A text in the right shape; whether it is anybody's key is not known yet."""

    public_id: str
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class NewKey:
    """A fresh key. `text` is what its owner sees, once."""

    text: str = field(repr=False)
    public_id: str
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Pepper:
    """A server-side secret beside the hashes, so that a stolen database alone cannot check a guess."""

    id: str
    secret: bytes = field(repr=False)


Peppers = tuple[Pepper, ...]
"""The first is used for new keys; the others still verify old ones."""


def generate() -> NewKey:
    """A key with 190 random bits in its secret."""
    public_id = _random(PUBLIC_ID_LENGTH)
    secret = _random(SECRET_LENGTH)
    body = f"{PREFIX}_{public_id}_{secret}"
    return NewKey(body + checksum(body), public_id, secret)


def parse(text: str) -> ParsedKey | None:
    """None for anything that `generate` cannot have made. CRC-32 finds every edit of one character."""
    if len(text) != KEY_LENGTH:
        return None
    match = SHAPE.fullmatch(text)
    if match is None or checksum(text[:-CHECKSUM_LENGTH]) != match[3]:
        return None
    return ParsedKey(match[1], match[2])


def checksum(body: str) -> str:
    """CRC-32 of the ASCII text as six base62 digits."""
    number = zlib.crc32(body.encode("ascii"))
    digits = []
    for _ in range(CHECKSUM_LENGTH):
        number, rest = divmod(number, len(ALPHABET))
        digits.append(ALPHABET[rest])
    return "".join(reversed(digits))


@lru_cache(maxsize=8)
def parse_peppers(text: str) -> Peppers:
    """Reads "id:secret,id2:secret2". Raises ValueError where an id or a secret is missing."""
    peppers = []
    for part in text.split(","):
        pepper_id, _, secret = part.strip().partition(":")
        if not pepper_id or not secret:
            raise ValueError("peppers are written as id:secret, separated by commas")
        peppers.append(Pepper(pepper_id, secret.encode()))
    return tuple(peppers)


def digest(secret: str, peppers: Peppers) -> tuple[str, str]:
    """(pepper id, hexadecimal HMAC-SHA-256) under the current pepper."""
    return peppers[0].id, _hmac(secret, peppers[0])


def verify(secret: str, pepper_id: str, expected: str, peppers: Peppers) -> bool:
    """Whether the secret has this hash; one HMAC and one comparison in constant time, whatever the answer.

    A pepper that is no longer configured verifies nothing.
    """
    pepper = next((each for each in peppers if each.id == pepper_id), None)
    matches = hmac.compare_digest(_hmac(secret, pepper or peppers[0]), expected)
    return matches and pepper is not None


def _hmac(secret: str, pepper: Pepper) -> str:
    return hmac.new(pepper.secret, secret.encode("ascii"), hashlib.sha256).hexdigest()


def _random(length: int) -> str:
    return "".join(secrets.choice(ALPHABET) for _ in range(length))

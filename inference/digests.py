"""Digests that a receipt keeps in place of content: whether a prompt, settings or an answer are the same as then.

HMACs with a key of the installation, over the request's id too: without the secret key they say nothing about a text,
and the same text in two requests has two digests. Pure but for that key; on task threads and the engine's.
"""

from __future__ import annotations

import hmac
from array import array
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from typing import Any

import orjson

from inference.engine.types import AdapterVector, Decoding, SamplingParams

DIGEST_CHARACTERS = 32


@lru_cache(maxsize=16)
def _key(secret: str) -> bytes:
    return hmac.digest(secret.encode(), b"llmsite digests of receipts", "sha256")


class TokenDigest:
    """Of token ids as they come. `what` keeps a prompt apart from an answer."""

    def __init__(self, secret: str, request_id: str, what: str) -> None:
        self._hmac = hmac.new(_key(secret), f"{what}\0{request_id}\0".encode(), "sha256")

    def update(self, tokens: Sequence[int]) -> None:
        """Microseconds: the engine's thread calls it."""
        self._hmac.update(array("i", tokens).tobytes())

    def hexdigest(self) -> str:
        return self._hmac.hexdigest()[:DIGEST_CHARACTERS]


def prompt_digest(secret: str, request_id: str, prompt: Sequence[int]) -> str:
    digest = TokenDigest(secret, request_id, "prompt")
    digest.update(prompt)
    return digest.hexdigest()


def _plain(value: object) -> object:
    """1 and 1.0 are one number: a ticket reads what was written as a whole number as a float."""
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return repr(float(value)) if is_number else value  # type: ignore[arg-type]


def settings_digest(
    secret: str,
    request_id: str,
    sampling: SamplingParams,
    decoding: Decoding,
    stop: Sequence[str],
    adapters: AdapterVector,
) -> str:
    """Of everything but the prompt that decides which tokens come. Not the seed, which the receipt has; not what says
    where and how fast."""
    shift = decoding.context_shift and (decoding.num_keep, decoding.num_discard)
    values = asdict(replace(sampling, seed=None))
    if sampling.thoughts is None:  # receipts of before they could be bounded do not have it in theirs
        del values["thoughts"]
    parts: list[Any] = [values, shift, list(stop), adapters]
    if decoding.min_indent:  # the same
        parts.append(decoding.min_indent)
    data = orjson.dumps(_plain(parts), option=orjson.OPT_SORT_KEYS)
    return hmac.digest(_key(secret), f"settings\0{request_id}\0".encode() + data, "sha256").hex()[:DIGEST_CHARACTERS]

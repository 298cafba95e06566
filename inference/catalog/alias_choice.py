"""Which version of an aliased adapter answers a request: a function of who asks and of what is said, and of no clock.

Pure. The same conversation of a tenant gets the same version for as long as the alias stays as it is, on every process
and machine, and a larger share only adds to those that the canary answers. So the prompt cache, which holds prompts by
adapter, stays of use. docs/registry.md has the rule in words.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from itertools import takewhile

from inference.chat.prompt import ChatPrompt, Message
from inference.orders import GenerateOrder

NUM_BUCKETS = 10_000


def goes_to_canary(*, tenant_id: int, alias_id: int, canary_id: int, share: int, session: bytes) -> bool:
    """share: percent, 0 to 100. Another canary meets other conversations, so nobody is always the first to try."""
    if share <= 0 or share >= 100:
        return share >= 100
    text = b"%d:%d:%d:" % (tenant_id, alias_id, canary_id) + session
    bucket = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) % NUM_BUCKETS
    return bucket * 100 < share * NUM_BUCKETS


def session_of(order: GenerateOrder) -> bytes:
    """What a tenant's request has in common with those that belong together with it.

    The session that the client names; else how the conversation begins, up to the user's first message, which each of
    its turns repeats; else the whole text. All vectors of a tenant are of one version: others could not be compared.
    """
    if order.embedding is not None:
        return b""
    if order.session:
        return b"session:" + order.session.encode()
    if isinstance(order.prompt, str):
        return b"prompt:" + order.prompt.encode()
    if isinstance(order.prompt, ChatPrompt):
        return b"chat:" + "\0".join(_beginning(order.prompt)).encode()
    return b"tokens:" + array("q", order.prompt).tobytes()


def _beginning(prompt: ChatPrompt) -> Iterator[str]:
    def is_before(message: Message) -> bool:
        return message.role != "user"

    before = list(takewhile(is_before, prompt.messages))
    for message in prompt.messages[: len(before) + 1]:
        yield f"{message.role}:{message.content or ''}"

"""Keys that are kept in memory for ten seconds, and who makes them forgotten before that.

A change is announced on commit: a counter in Redis moves and the channel `accounts:changed` names the key. One daemon
thread of each process reads the counter three times a second and forgets everything when it has moved; while Redis is
out of reach, rows are kept for one second only. Any thread asks; rows themselves are read by key_rows.py.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict
from datetime import datetime

import redis
from django.db import transaction

from accounts.identity.principals import Credential
from accounts.redis_client import client

logger = logging.getLogger(__name__)

CHANNEL = "accounts:changed"
"""Carries the public id of a key that changed, or EVERYTHING. At most once: for whoever wants to act at once."""
VERSION_KEY = "accounts:version"
EVERYTHING = "*"

KEEP_SECONDS = 10.0
KEEP_SECONDS_WITHOUT_REDIS = 1.0
POLL_SECONDS = 0.3
REDIS_IS_AWAY_AFTER_SECONDS = 1.0
MAX_KNOWN = 20_000
MAX_UNKNOWN = 5_000


class CredentialCache:
    """Public id → credential, or None for "there is no such key". Bounded, least recently used first out.

    Unknown ids have a table of their own, so that guessing cannot push out the keys in use.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[str, tuple[float, Credential | None]] = OrderedDict()
        self._unknown: OrderedDict[str, tuple[float, Credential | None]] = OrderedDict()
        self._generation = 0

    @property
    def generation(self) -> int:
        """Moves with every `forget`: what was read from the database before that must not be stored after it."""
        return self._generation

    def get(self, public_id: str, max_age_seconds: float, now: float) -> tuple[bool, Credential | None]:
        """(whether it is in the cache and young enough, the credential)."""
        with self._lock:
            for table in (self._known, self._unknown):
                entry = table.get(public_id)
                if entry is not None and now - entry[0] < max_age_seconds:
                    table.move_to_end(public_id)
                    return True, entry[1]
        return False, None

    def put(self, public_id: str, credential: Credential | None, generation: int, now: float) -> None:
        with self._lock:
            if generation != self._generation:
                return
            table, size = (self._unknown, MAX_UNKNOWN) if credential is None else (self._known, MAX_KNOWN)
            table[public_id] = (now, credential)
            table.move_to_end(public_id)
            if len(table) > size:
                table.popitem(last=False)

    def swap(self, public_id: str, old: Credential, new: Credential) -> bool:
        """Compare-and-set; the age stays. False where another thread was first, or the row has been forgotten."""
        with self._lock:
            entry = self._known.get(public_id)
            if entry is None or entry[1] is not old:
                return False
            self._known[public_id] = (entry[0], new)
            return True

    def forget(self, public_id: str = EVERYTHING) -> None:
        with self._lock:
            self._generation += 1
            for table in (self._known, self._unknown):
                if public_id == EVERYTHING:
                    table.clear()
                else:
                    table.pop(public_id, None)


class ChangeWatcher:
    """The daemon thread that reads the counter. One per process, started by the first look-up."""

    def __init__(self, cache: CredentialCache) -> None:
        self._cache = cache
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._process_id = 0
        self._stop = threading.Event()
        self._version: bytes | None = None
        self._answered_at = float("-inf")
        self._owes = False

    def ensure_started(self) -> None:
        if self._thread is not None and self._process_id == os.getpid():
            return
        with self._lock:
            if self._thread is not None and self._process_id == os.getpid():
                return
            self._process_id = os.getpid()
            self._stop = threading.Event()
            self._thread = threading.Thread(target=self._run, args=(self._stop,), name="accounts-changes", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """For tests: the next look-up starts it again."""
        with self._lock:
            thread, self._thread = self._thread, None
            self._stop.set()
        if thread is not None and thread.is_alive():
            thread.join(timeout=5)
        self._answered_at = float("-inf")

    def keep_seconds(self) -> float:
        """How old a row may be: short unless the counter was read just now."""
        return KEEP_SECONDS_WITHOUT_REDIS if self._is_away() else KEEP_SECONDS

    def owe(self) -> None:
        """An announcement did not reach Redis: the counter moves as soon as it answers again."""
        self._owes = True

    def poll(self) -> None:
        """Reads the counter once, and forgets every row if it moved or was out of reach; raises redis.RedisError."""
        if self._owes:
            client().incr(VERSION_KEY)
            self._owes = False
        version = client().get(VERSION_KEY)
        if version != self._version or self._is_away():
            self._version = version if isinstance(version, bytes) else None
            self._cache.forget()
        self._answered_at = time.monotonic()

    def _is_away(self) -> bool:
        return time.monotonic() - self._answered_at > REDIS_IS_AWAY_AFTER_SECONDS

    def _run(self, stop: threading.Event) -> None:
        is_away = False
        while not stop.is_set():
            try:
                self.poll()
                is_away = False
            except (redis.RedisError, OSError) as error:
                if not is_away:
                    logger.warning("redis is out of reach, keys are kept in memory for a second only: %s", error)
                is_away = True
            stop.wait(POLL_SECONDS)


CACHE = CredentialCache()
WATCHER = ChangeWatcher(CACHE)


def current(credential: Credential, now: datetime) -> Credential:
    """With the limits of this moment: where a rule began or ended, the principal is made anew. No query."""
    changed = credential.at(now)
    if changed is not credential:  # where another thread was first, this one has its own copy
        CACHE.swap(credential.principal.public_id, credential, changed)
    return changed


def announce_change(*public_ids: str) -> None:
    """After the transaction commits, every process forgets these keys within a second. EVERYTHING for plans."""
    transaction.on_commit(lambda: _announce(public_ids))


def _announce(public_ids: tuple[str, ...]) -> None:
    for public_id in public_ids:
        CACHE.forget(public_id)
    if not public_ids:
        return
    try:
        with client().pipeline(transaction=False) as pipe:
            pipe.incr(VERSION_KEY)
            for public_id in public_ids:
                pipe.publish(CHANNEL, public_id)
            pipe.execute()
    except redis.RedisError as error:
        logger.warning("a change of keys was not announced, other processes see it within 10 s: %s", error)
        WATCHER.owe()

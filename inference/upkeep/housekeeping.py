"""What the month needs done now and then: quota alerts, statements, totals of days, what is kept too long.

A daemon thread of the web, apart from the reaper, whose rounds must be quick. A lease in Redis lets one web process at
a time do a round; two at once would be harmless. Each round is bounded: what is left over is for the next.
"""

from __future__ import annotations

import logging
import threading
from datetime import UTC, datetime, timedelta

import redis
from django.conf import settings
from django.db import DatabaseError, connection

from accounts import redis_client
from accounts.ledger import alerts, day_totals, retention, statements
from inference.models import Receipt
from inference.upkeep import leftovers

logger = logging.getLogger(__name__)

EVERY_SECONDS = 60.0
MOST_ROWS = 20_000
"""Deleted in a round, of each kind."""
LEASE = "housekeeping"
ALERTS_LEASE = "housekeeping:alerts"
ALL_ALERTS_SECONDS = 3600
"""Between two times that all periods are looked at for alerts, and not those alone that have moved."""
WIPE_LEASE = "housekeeping:wipe"
WIPE_SECONDS = 3600
"""Between two times that the logs of the embedded stores are written anew."""


def round_of_work(now: datetime) -> dict[str, int]:
    """One round; what was done, by name. Raises DatabaseError."""
    return {
        "alerts": alerts.notice(now),
        "mails": alerts.mail(now),
        "statements": statements.close_due(now),
        "days": day_totals.close_due(now),
        **purge(now, most=MOST_ROWS),
    }


def purge(now: datetime, *, most: int | None = None) -> dict[str, int]:
    """Deletes what is older than LEDGER_DAYS, RECEIPT_DAYS, REFUSAL_DAYS and AUDIT_DAYS; how many rows."""
    found = before(now)
    done = {"ledger": 0, "receipts": 0, "refusals": 0, "audit": 0}
    if "ledger" in found:
        done["ledger"] = retention.purge_ledger(found["ledger"], now, most)
    if "receipts" in found:
        old = Receipt.objects.filter(created_at__lt=found["receipts"])
        done["receipts"] = retention.delete_in_chunks(old, most)
    if "refusals" in found:
        done["refusals"] = retention.purge_refusals(found["refusals"], most)
    if "audit" in found:
        done["audit"] = retention.purge_audit(found["audit"], most)
    return done


def before(now: datetime) -> dict[str, datetime]:
    """Kind → the moment before which its rows go; without those that are kept for ever."""
    config = settings.CONFIG
    days = {"ledger": config.ledger_days, "receipts": config.receipt_days, "refusals": config.refusal_days}
    days["audit"] = config.audit_days
    return {name: now - timedelta(days=number) for name, number in days.items() if number}


class Housekeeper:
    """Does a round a minute until it is stopped."""

    def __init__(self, client: redis.Redis, *, every_seconds: float = EVERY_SECONDS) -> None:
        self._client = client
        self._every_seconds = every_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="housekeeping", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(5)

    def _run(self) -> None:
        while not self._stop.wait(self._every_seconds):
            try:
                if self._client.set(LEASE, "1", nx=True, ex=max(1, int(self._every_seconds) - 1)):
                    done = round_of_work(datetime.now(UTC))
                    if self._client.set(ALERTS_LEASE, "1", nx=True, ex=ALL_ALERTS_SECONDS):
                        done["alerts"] += alerts.notice_all(datetime.now(UTC))
                    if self._client.set(WIPE_LEASE, "1", nx=True, ex=WIPE_SECONDS):
                        leftovers.wipe(self._client)
                    if any(done.values()):
                        logger.info("housekeeping: %s", done)
            except (redis.RedisError, DatabaseError) as error:
                logger.warning("housekeeping waits: %s", error)
            except Exception:
                logger.exception("housekeeping failed")
            finally:
                connection.close()


_housekeeper: Housekeeper | None = None


def start() -> None:
    """The housekeeper of this process; the web calls it when it starts. Idempotent."""
    global _housekeeper
    if _housekeeper is None:
        _housekeeper = Housekeeper(redis_client.client())
        _housekeeper.start()


def stop() -> None:
    global _housekeeper
    housekeeper, _housekeeper = _housekeeper, None
    if housekeeper is not None:
        housekeeper.stop()

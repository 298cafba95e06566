"""The worker's desk for slots: who waits keeps nobody else from looking, and waits for one time in all."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest

from inference.engine.types import EngineError
from inference.slots.actions import SlotOrder
from inference.slots.files import SlotFiles
from inference.worker.slot_desk import MAX_PENDING_PER_TENANT, SlotDesk

pytestmark = pytest.mark.integration


class Model:
    """Its slots are busy until `free` is set."""

    def __init__(self) -> None:
        self.free = threading.Event()
        self.waits: list[float] = []

    def slots(self, tenant_id: int | None) -> list[Any]:
        return []

    def erase_slot(self, tenant_id: int, number: int, seconds: float) -> int:
        self.waits.append(seconds)
        if not self.free.wait(seconds):
            raise EngineError("slot_busy", "a request still runs in this slot")
        return 7


def order(action: Any, tenant_id: int, answer_to: str, wait_seconds: float = 30.0) -> bytes:
    return SlotOrder(
        action=action, model_id=1, tenant_id=tenant_id, answer_to=answer_to, wait_seconds=wait_seconds
    ).to_bytes()


def answer(valkey: Any, name: str, seconds: int = 20) -> dict[str, Any]:
    found = valkey.blpop([name], timeout=seconds)
    assert found is not None, f"no answer on {name}"
    return dict(orjson.loads(found[1]))


@pytest.fixture
def desk(valkey: Any, tmp_path: Path) -> Iterator[tuple[SlotDesk, Model]]:
    model = Model()

    @contextmanager
    def using(model: Any, seconds: float) -> Iterator[None]:
        time.sleep(0.2)  # a load
        yield

    files = SlotFiles(tmp_path, "a secret", tenant_bytes=1 << 20, max_age_days=7)
    found = SlotDesk(valkey, lambda model_id: model, using, files)  # type: ignore[arg-type,return-value]
    yield found, model
    model.free.set()
    found.close()


def test_whoever_waits_keeps_nobody_from_looking_or_from_hearing_no(desk: tuple[SlotDesk, Model], valkey: Any) -> None:
    at, model = desk
    for tenant in range(1, 9):
        for number in range(MAX_PENDING_PER_TENANT):
            at.take(order("erase", tenant, f"erase-{tenant}-{number}"))
    at.take(order("list", 100, "list"))
    assert answer(valkey, "list") == {"slots": []}
    at.take(order("erase", 1, "one-too-many"))
    assert answer(valkey, "one-too-many")["code"] == "service_unavailable"
    assert not model.free.is_set()
    model.free.set()
    for tenant in range(1, 9):
        for number in range(MAX_PENDING_PER_TENANT):
            assert answer(valkey, f"erase-{tenant}-{number}") == {"tokens": 7}


def test_a_load_and_a_busy_slot_share_one_time(desk: tuple[SlotDesk, Model], valkey: Any) -> None:
    at, model = desk
    at.take(order("erase", 1, "late", wait_seconds=1.5))
    refusal = answer(valkey, "late")
    assert (refusal["code"], len(model.waits)) == ("service_unavailable", 1)
    assert 0 <= model.waits[0] <= 1.3

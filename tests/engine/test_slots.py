"""Slots: who owns which, and which one is best to take."""

from __future__ import annotations

import pytest

from inference.engine.slots import SlotTable, best_free
from inference.engine.types import AdapterVector

pytestmark = pytest.mark.unit


def test_a_taken_slot_is_busy_until_its_owner_gives_it_back() -> None:
    table = SlotTable(2)
    table.take(1, "alice")
    assert (table.free, table.num_busy) == (frozenset({0}), 1)
    table.give_back(1, "alice")
    assert (table.free, table.num_busy) == (frozenset({0, 1}), 0)


@pytest.mark.parametrize("slot_id", [0, 2, -1])
def test_a_busy_or_unknown_slot_cannot_be_taken(slot_id: int) -> None:
    table = SlotTable(2)
    table.take(0, "alice")
    with pytest.raises(ValueError, match="not free"):
        table.take(slot_id, "bob")


def test_nobody_gives_back_the_slot_of_another() -> None:
    table = SlotTable(2)
    table.take(0, "alice")
    with pytest.raises(ValueError, match="does not belong"):
        table.give_back(0, "charlie")
    assert table.num_busy == 1


def test_an_engine_without_slots_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one slot"):
        SlotTable(0)


@pytest.mark.parametrize(
    ("free", "chosen"),
    [
        ({0, 1, 2, 3}, 0),
        ({1, 2, 3}, 1),
        ({0, 1, 3}, 1),  # next to busy 2, as is 3: the lower
        ({2, 3, 0}, 0),  # busy 1: both neighbours tie, the lower
        ({1}, 1),
        ({0, 2}, 2),  # between busy 1 and 3
    ],
)
def test_the_best_slot_leaves_no_hole(free: set[int], chosen: int) -> None:
    assert best_free(free, dict.fromkeys(set(range(4)) - free, ()), ()) == chosen


def test_each_vector_has_neighbours_of_its_own() -> None:
    busy: dict[int, AdapterVector] = {}
    poet: AdapterVector = (("poet", 1.0),)
    for vector in (poet, (), poet, (), poet, ()):
        busy[best_free(set(range(8)) - busy.keys(), busy, vector)] = vector
    assert busy == {0: poet, 1: poet, 2: poet, 7: (), 6: (), 5: ()}

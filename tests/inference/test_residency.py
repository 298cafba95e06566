"""Which model goes for which, in numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.worker.residency import Place, Plan, Resident, Want, has_room, obstacle, patience, plan

pytestmark = pytest.mark.unit

NOW = 100.0


def loaded(number: int, size: int = 10, **values: Any) -> Resident:
    return Resident(id=number, num_bytes=size, place=Place.IN, **values)


def wanted(number: int, size: int = 10, **values: Any) -> Resident:
    return Resident(
        id=number, num_bytes=size, place=Place.OUT, **{"want": Want.TICKET, "wanted_at": NOW - 5.0, **values}
    )


def test_what_fits_is_loaded_and_nobody_goes() -> None:
    assert plan([loaded(1), wanted(2)], 20, NOW) == Plan(load=2)


def test_the_least_recently_used_idle_model_goes_first() -> None:
    models = [loaded(1, used_at=3.0), loaded(2, used_at=1.0), loaded(3, used_at=2.0), wanted(4)]
    assert plan(models, 30, NOW) == Plan(unload=((2, "memory"),), waiting=(4,))


def test_only_as_many_go_as_must() -> None:
    models = [loaded(1, used_at=1.0), loaded(2, used_at=2.0), loaded(3, used_at=3.0), wanted(4, 15)]
    assert [each for each, _ in plan(models, 30, NOW).unload] == [1, 2]


def test_nobody_goes_in_vain() -> None:
    """Idle models stay while those that work keep the rest of the room."""
    models = [loaded(1), loaded(2, is_busy=True, loaded_at=NOW), wanted(3, 20)]
    assert plan(models, 20, NOW) == Plan(waiting=(3,))


def test_a_busy_model_is_asked_to_end_after_the_patience_of_the_one_that_waits() -> None:
    models = [loaded(1, is_busy=True), wanted(2, wanted_at=NOW - 1.0, patience=2.0)]
    assert plan(models, 10, NOW) == Plan(waiting=(2,))
    assert plan(models, 10, NOW + 1.0) == Plan(waiting=(2,), retire=(1,))


def test_a_model_that_was_just_loaded_works_for_a_while_whoever_waits() -> None:
    models = [loaded(1, num_waiting=3, loaded_at=NOW - 1.0, patience=2.0), wanted(2, wanted_at=0.0)]
    assert plan(models, 10, NOW) == Plan(waiting=(2,))
    assert plan(models, 10, NOW + 1.0).retire == (1,)


def test_a_model_that_goes_is_unloaded_once_it_is_idle_and_then_the_other_comes() -> None:
    going = Resident(id=1, num_bytes=10, place=Place.GOING, is_busy=True)
    assert plan([going, wanted(2)], 10, NOW) == Plan(waiting=(2,))
    going = Resident(id=1, num_bytes=10, place=Place.GOING)
    assert plan([going, wanted(2)], 10, NOW) == Plan(unload=((1, "memory"),), waiting=(2,))
    assert plan([Resident(id=1, num_bytes=10, place=Place.OUT), wanted(2)], 10, NOW) == Plan(load=2)


def test_who_waits_for_longest_comes_first_and_small_ones_use_the_room_meanwhile() -> None:
    models = [loaded(1, is_busy=True, loaded_at=NOW), wanted(2, 20, wanted_at=1.0), wanted(3, 5, wanted_at=2.0)]
    assert plan(models, 20, NOW) == Plan(load=3, waiting=(2,))
    assert plan([wanted(1, wanted_at=2.0), wanted(2, wanted_at=1.0)], 10, NOW).load == 2


def test_idle_time_unloads_what_nobody_waits_for() -> None:
    models = [loaded(1, unload_at=NOW), loaded(2, unload_at=NOW + 1), loaded(3, unload_at=NOW, num_waiting=1)]
    assert plan([*models, loaded(4, unload_at=NOW, is_busy=True)], 100, NOW) == Plan(unload=((1, "idle"),))


def test_a_pinned_model_stays() -> None:
    models = [loaded(1, is_pinned=True, unload_at=0.0), wanted(2)]
    assert plan(models, 10, NOW) == Plan(waiting=(2,))
    assert obstacle(models[1], models, 10) is not None
    assert "pinned ones hold" in str(obstacle(models[1], models, 10))


def test_what_can_never_fit_is_told_in_megabytes() -> None:
    model = wanted(1, 3_000_000_000)
    assert obstacle(model, [model], 2e9) == "it needs 3,000 MB, and models may have 2,000 MB (MODEL_MEMORY_MB)"
    assert obstacle(model, [model], math.inf) is None


def test_an_eager_model_takes_the_place_of_none() -> None:
    assert plan([loaded(1), wanted(2, want=Want.EAGER)], 10, NOW) == Plan(left_out=(2,))
    assert plan([loaded(1), wanted(2, want=Want.EAGER)], 20, NOW) == Plan(load=2)


def test_the_operators_unload_waits_for_what_runs() -> None:
    assert plan([loaded(1, is_dismissed=True, is_busy=True)], 10, NOW) == Plan(retire=(1,))
    assert plan([loaded(1, is_dismissed=True, is_pinned=True)], 10, NOW) == Plan(unload=((1, "operator"),))


def test_room_is_what_is_free_and_what_idle_models_hold() -> None:
    model = wanted(3, 15)
    assert has_room(model, [loaded(1), model], 20)
    assert not has_room(model, [loaded(1, is_busy=True), model], 20)
    assert not has_room(model, [loaded(1, is_pinned=True), model], 20)


def test_patience_is_two_loads_within_bounds() -> None:
    assert [patience(0.1), patience(4.0), patience(1000.0)] == [1.0, 8.0, 30.0]


resident = st.builds(
    Resident,
    id=st.integers(0, 9),
    num_bytes=st.integers(1, 30),
    place=st.sampled_from(Place),
    is_busy=st.booleans(),
    num_waiting=st.integers(0, 2),
    used_at=st.floats(0, 200),
    loaded_at=st.floats(0, 100),
    unload_at=st.floats(0, 200) | st.just(math.inf),
    is_pinned=st.booleans(),
    is_dismissed=st.booleans(),
    want=st.sampled_from(Want) | st.none(),
    wanted_at=st.floats(0, 100),
)


@given(st.lists(resident, max_size=8, unique_by=lambda each: each.id), st.integers(1, 60))
def test_whatever_there_is_no_busy_model_is_unloaded_and_the_budget_holds(models: list[Resident], budget: int) -> None:
    found = plan(models, budget, NOW)
    known = {each.id: each for each in models}
    gone = [known[each] for each, _ in found.unload]
    assert not any(each.is_busy for each in gone)
    assert all(each.is_dismissed or each.place is Place.GOING for each in gone if each.is_pinned)
    if found.load is not None:
        held = sum(each.occupies for each in models)
        assert held + known[found.load].num_bytes <= budget
        assert known[found.load].place is Place.OUT

"""How long a draft pays: integers, chances and a cost curve; no model."""

from __future__ import annotations

from typing import Any

import pytest

from inference.engine.costs import CostCurve
from inference.engine.drafting import MAX_DRAFT, UNSEEN_CHANCE, Acceptance, Draftable, DraftPolicy, DraftTerms, lengths
from inference.engine.plan import Candidate, ScheduleView
from inference.engine.scheduler import MIN_PREFILL_TOKENS, schedule

SLOW = CostCurve(((1, 0.0056), (2, 0.0106), (4, 0.0183), (8, 0.0334), (16, 0.0615)))
"""Bound by arithmetic: as measured on two cores with Q4_1."""
FAST = CostCurve(((1, 0.0050), (2, 0.0079), (4, 0.0114), (8, 0.0200), (16, 0.0342)))
"""The same with repacked Q4_0."""
FLAT = CostCurve(((1, 0.010), (64, 0.011)))
"""Bound by reading the weights, as on a GPU."""


def wants(chance: float, *, most: int = 16, least: int = 0, behind: int = 0) -> Draftable:
    return Draftable(least, most, (chance,) * MAX_DRAFT, behind)


def planned(cost: CostCurve, *each: Draftable, useful: int | None = None, room: int = 512, **terms: Any) -> list[int]:
    wanted = {str(index): one for index, one in enumerate(each)}
    found = lengths(
        wanted,
        DraftTerms(**{"most": 256, **terms}),
        cost,
        num_useful=len(each) if useful is None else useful,
        room=room,
    )
    return [found.num_drafted.get(request_id, 0) for request_id in wanted]


def test_guesses_that_are_wrong_are_not_made() -> None:
    for cost in (SLOW, FAST, FLAT):
        assert planned(cost, wants(0.0)) == [0]


def test_a_guess_pays_where_it_is_likely_enough_for_what_a_step_costs() -> None:
    assert planned(SLOW, wants(0.7)) == [0]
    assert planned(FAST, wants(0.7))[0] > 0
    assert planned(FLAT, wants(0.7))[0] > planned(FAST, wants(0.7))[0]


def test_the_longer_the_more_likely_the_guesses_are() -> None:
    found = [planned(FAST, wants(chance))[0] for chance in (0.3, 0.6, 0.8, 0.95, 1.0)]
    assert found == sorted(found)
    assert found[0] == 0
    assert found[-1] == 16


def test_the_best_step_is_found_beyond_one_that_is_worse() -> None:
    """Two tokens cost twice as much as one, sixteen hardly more than two: a short draft is worst."""
    stairs = CostCurve(((1, 0.01), (2, 0.02), (16, 0.021)))
    assert planned(stairs, wants(0.9, most=1)) == [0]
    assert planned(stairs, wants(0.9))[0] > 4


def test_the_likely_guesses_of_one_come_before_the_unlikely_ones_of_another() -> None:
    sure, unsure = planned(FAST, wants(0.95), wants(0.4))
    assert sure > unsure


def test_a_full_step_has_less_room_for_guesses_than_an_empty_one() -> None:
    assert planned(FAST, wants(0.8), useful=1)[0] > planned(FAST, wants(0.8), useful=16)[0]


def test_no_draft_is_shorter_than_wanted() -> None:
    assert planned(FLAT, wants(0.5, least=4, most=8))[0] in (0, *range(4, 9))
    assert planned(FLAT, wants(0.99, least=4, most=8))[0] >= 4
    assert planned(SLOW, wants(0.5, least=4, most=8)) == [0]


def test_all_together_never_exceed_what_the_step_can_verify() -> None:
    for policy in DraftPolicy:
        for most in (0, 1, 3, 7, 40):
            assert sum(planned(FLAT, *[wants(1.0)] * 3, most=most, policy=policy)) <= most
            assert sum(planned(FLAT, *[wants(1.0)] * 3, room=most, policy=policy)) <= most


def test_always_drafts_whatever_it_costs_and_shares_what_room_there_is() -> None:
    always = {"policy": DraftPolicy.ALWAYS}
    assert planned(SLOW, wants(0.0), **always) == [16]
    assert planned(SLOW, wants(0.0), wants(0.0, most=2), most=12, **always) == [10, 2]
    assert planned(SLOW, wants(0.0, least=8), wants(0.0, least=2), most=8, **always) == [0, 8]


def test_steps_that_take_no_time_have_all_the_guesses_that_there_are() -> None:
    assert planned(CostCurve(), wants(0.7), wants(0.2)) == [16, 16]


def test_the_time_of_guessing_counts() -> None:
    guessing = CostCurve(((1, 0.002), (8, 0.004)))
    dear = CostCurve(((1, 0.05),))
    free, cheap, never = (planned(FLAT, wants(0.8), guessing=cost)[0] for cost in (CostCurve(), guessing, dear))
    assert free > cheap > never == 0


def probe(seconds: float, *each: Draftable, turn: int = 0) -> tuple[dict[str, int], float]:
    wanted = {str(index): one for index, one in enumerate(each)}
    terms = DraftTerms(most=256, probe_seconds=seconds)
    found = lengths(wanted, terms, SLOW, num_useful=len(each), room=512, turn=turn)
    return found.num_drafted, found.probe_seconds


def test_saved_time_pays_for_one_guess_more_than_pays() -> None:
    drafts, seconds = probe(0.01, wants(0.1))
    assert drafts == {"0": 1}
    assert seconds == pytest.approx(0.005)
    assert probe(0.004, wants(0.1)) == ({}, 0.0)


def test_a_probe_is_as_long_as_a_draft_must_be_and_pays_for_catching_up() -> None:
    assert probe(0.05, wants(0.1, least=3))[0] == {"0": 3}
    behind = lengths(
        {"0": wants(0.1, behind=100)},
        DraftTerms(most=8, probe_seconds=0.05, guessing=CostCurve(((1, 0.001),))),
        SLOW,
        num_useful=1,
        room=512,
    )
    assert behind.num_drafted == {}


def test_a_long_text_is_not_read_for_a_short_answer() -> None:
    guessing = CostCurve(((1, 0.001), (64, 0.04)))
    for behind, left, drafts in ((0, 10, True), (100, 10, False), (100, 200, True), (5000, 200, False)):
        each = Draftable(0, 8, (1.0,) * MAX_DRAFT, behind, left)
        assert bool(planned(FAST, each, guessing=guessing)[0]) == drafts
    always = {"policy": DraftPolicy.ALWAYS, "guessing": guessing}
    assert planned(FAST, Draftable(0, 8, (1.0,), 5000, 10), **always) == [8]


def test_probes_go_round() -> None:
    assert [set(probe(0.01, wants(0.1), wants(0.1), turn=turn)[0]) for turn in range(3)] == [{"0"}, {"1"}, {"0"}]


def test_acceptance_follows_what_comes_and_knows_nothing_behind_a_wrong_guess() -> None:
    seen = Acceptance()
    for _ in range(40):
        seen.observe(4, 2)
    assert seen.chances[0] > 0.95
    assert seen.chances[1] > 0.95
    assert seen.chances[2] < 0.05
    assert seen.chances[3] == UNSEEN_CHANCE
    copy = seen.copy()
    copy.observe(1, 0)
    assert copy.chances[0] < seen.chances[0]


def test_a_draft_that_is_right_to_its_end_says_nothing_of_the_next_position() -> None:
    seen = Acceptance()
    seen.observe(2, 2)
    assert seen.chances[2] == UNSEEN_CHANCE
    seen.observe(MAX_DRAFT + 5, MAX_DRAFT + 5)
    assert len(seen.chances) == MAX_DRAFT


# In the plan of a step


def decoding(request_id: str, **fields: Any) -> Candidate:
    return Candidate(request_id, 1, is_decoding=True, **fields)


def view(*running: Candidate, draftable: dict[str, Draftable], **fields: Any) -> ScheduleView:
    terms = DraftTerms(most=64, policy=DraftPolicy.ALWAYS)
    return ScheduleView(running=running, draftable=draftable, draft_terms=terms, num_slots=4, **fields)


def test_only_sequences_of_the_step_draft() -> None:
    plan = schedule(
        view(
            decoding("own"),
            decoding("other", adapters=(("poet", 1.0),)),
            draftable={"own": wants(1.0, most=4), "other": wants(1.0, most=4)},
        )
    )
    assert plan.num_drafted == {"own": 4}
    assert plan.num_tokens == {"own": 1}


def test_prompts_get_what_drafts_leave_of_the_step_and_never_starve() -> None:
    cost = CostCurve(((1, 0.001), (100, 0.1)))
    prompt = Candidate("p", 500)
    fields: dict[str, Any] = {"cost": cost, "step_seconds": 0.05, "max_step_tokens": 64}
    without = schedule(view(decoding("a"), prompt, draftable={}, **fields))
    beside = schedule(view(decoding("a"), prompt, draftable={"a": wants(1.0)}, **fields))
    assert beside.num_drafted == {"a": 16}
    assert beside.num_tokens["p"] == without.num_tokens["p"] - 16
    crowded = schedule(view(decoding("a"), prompt, draftable={"a": wants(1.0, most=64)}, **fields))
    assert crowded.num_tokens["p"] >= MIN_PREFILL_TOKENS
    assert sum(crowded.num_tokens.values()) + sum(crowded.num_drafted.values()) <= 64


def test_a_prompt_in_the_step_outweighs_uncertain_guesses() -> None:
    cost = CostCurve(((1, 0.005), (16, 0.034), (64, 0.136)))
    fields: dict[str, Any] = {"cost": cost, "num_slots": 4, "draft_terms": DraftTerms(most=64)}
    draftable = {"a": wants(0.8)}
    alone = schedule(ScheduleView(running=(decoding("a"),), draftable=draftable, **fields))
    beside = schedule(ScheduleView(running=(decoding("a"), Candidate("p", 500)), draftable=draftable, **fields))
    assert sum(beside.num_drafted.values()) < sum(alone.num_drafted.values())

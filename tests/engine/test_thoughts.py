"""Thoughts that are bounded: when the tag behind them is due, and that drafts and company change nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from inference.engine import SamplingParams
from inference.engine.engine import Engine
from inference.engine.fake_backend import PIECES, FakeBackend
from inference.engine.sampling import check
from inference.engine.thoughts import ThoughtGuard
from inference.engine.types import EngineError, ThoughtBound
from tests.engine.test_drafts import always, rehearsed, requests, run

pytestmark = pytest.mark.unit

TEXTS: list[str | bytes] = [
    "</",
    "think",
    ">",
    "a",
    "<think>",
    "\n",
    "</think>",
    "é".encode()[:1],
    "é".encode()[1:],
    "x</th",
    "ink> y",
    "b",
]
BOUND = ThoughtBound(num_tokens=3, start="<think>", end="</think>", end_tokens=(0, 1, 2), is_open=True)


def piece(token: int) -> bytes:
    text = TEXTS[token]
    return text if isinstance(text, bytes) else text.encode()


def chosen(wanted: list[str | bytes], bound: ThoughtBound = BOUND) -> list[str | bytes]:
    """What comes where the model wants these, and is overruled where something is due."""
    guard = ThoughtGuard(bound, piece)
    found: list[str | bytes] = []
    for text in wanted:
        token = guard.due()
        token = TEXTS.index(text) if token is None else token
        guard.take(token)
        found.append(TEXTS[token])
    return found


def test_after_so_many_tokens_the_tag_comes_and_then_the_model_is_free() -> None:
    assert chosen(["a"] * 8) == ["a", "a", "a", "</", "think", ">", "a", "a"]
    assert chosen(["a"] * 5, replace(BOUND, num_tokens=0)) == ["</", "think", ">", "a", "a"]


@pytest.mark.parametrize("end", [["</think>"], ["</", "think", ">"], ["x</th", "ink> y"]])
def test_thoughts_that_end_by_themselves_are_left_alone_however_the_tag_is_spelled(end: list[str | bytes]) -> None:
    bound = replace(BOUND, num_tokens=4)
    said: list[str | bytes] = ["a", *end, *["b"] * 9]
    assert chosen(said, bound) == said


def test_a_tag_whose_beginning_the_model_has_written_already_is_written_whole() -> None:
    assert chosen(["a", "a", "</", "think", "a", "a", "b"]) == ["a", "a", "</", "</", "think", ">", "b"]


def test_a_character_is_not_cut_in_two() -> None:
    first, second = "é".encode()[:1], "é".encode()[1:]
    assert chosen(["a", "a", first, second, "a", "a", "a", "b"]) == ["a", "a", first, second, "</", "think", ">", "b"]


def test_where_the_prompt_opens_none_the_answer_may_and_nothing_else_is_a_thought() -> None:
    closed = replace(BOUND, is_open=False)
    begun: list[str | bytes] = ["\n", "<think>", "a", "a", "a"]
    assert chosen([*begun, "a", "a", "a", "b"], closed) == [*begun, "</", "think", ">", "b"]
    others: list[list[str | bytes]] = [["a", "<think>", *["a"] * 9], ["</think>", *["a"] * 9]]
    for said in others:
        assert chosen(said, closed) == said


def test_a_grammar_that_has_other_words_gets_the_whole_tag_afterwards() -> None:
    """What was due and was not taken is due again, from its beginning."""
    guard = ThoughtGuard(replace(BOUND, num_tokens=0), piece)
    for token, due in ((3, 0), (0, 0), (3, 1), (0, 0), (1, 1), (2, 2)):
        assert guard.due() == due
        guard.take(token)
    assert (guard.is_over, guard.due()) == (True, None)


def test_it_says_beforehand_whether_a_token_may_be_due() -> None:
    guard = ThoughtGuard(BOUND, piece)
    assert [guard.is_near(number) for number in (1, 3, 4)] == [False, False, True]
    for _ in range(3):
        guard.take(3)
    assert guard.is_near(1)
    guard.take(6)
    assert not guard.is_near(100)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_tokens": -1},
        {"start": ""},
        {"end": "x" * 65},
        {"end_tokens": ()},
        {"end_tokens": (300,)},
        {"end_tokens": (-1,)},
    ],
)
def test_a_bound_that_makes_no_sense_is_refused(changes: dict[str, object]) -> None:
    check(SamplingParams(thoughts=BOUND), 256)
    with pytest.raises(EngineError, match=r"thoughts"):
        check(SamplingParams(thoughts=replace(BOUND, **changes)), 256)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 19])
@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_drafts_and_company_change_nothing(num_tokens: int, rate: float) -> None:
    end = (PIECES.index(b" river"), PIECES.index(b" light"))
    bound = replace(BOUND, num_tokens=num_tokens, end_tokens=end)
    wanted = requests(max_tokens=40, sampling=SamplingParams(seed=3, thoughts=bound))
    free = run(Engine(FakeBackend(4, 512)), *(replace(each, sampling=SamplingParams(seed=3)) for each in wanted))
    plain = run(Engine(FakeBackend(4, 512)), *wanted)
    drafted = run(Engine(FakeBackend(4, 512), proposer=rehearsed(wanted, rate), draft_settings=always()), *wanted)
    for request in wanted:
        tokens, before = plain.tokens(request.request_id), free.tokens(request.request_id)
        assert tokens[:num_tokens] == before[:num_tokens]
        assert tokens[num_tokens : num_tokens + 2] == end
        assert tokens[num_tokens + 2 :] == before[num_tokens + 2 :]
        assert drafted.tokens(request.request_id) == tokens

"""Thoughts and answers told apart: the same however the text is cut into pieces, and nothing lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.chat.thinking import FAMILIES, THINK, Spoken, Tags, ThoughtSplitter, tags_of

pytestmark = pytest.mark.unit


def split(*pieces: str, tags: Tags = THINK, is_open: bool = False) -> tuple[str, str]:
    splitter = ThoughtSplitter(tags, is_open=is_open)
    found = sum((splitter.feed(piece) for piece in pieces), Spoken()) + splitter.finish()
    return found.thought, found.said


@pytest.mark.parametrize(
    ("text", "thought", "said"),
    [
        ("<think>\nTwo and two.\n</think>\n\nFour.", "Two and two.", "Four."),
        ("\n<think></think>Four.", "", "Four."),
        ("Four.", "", "Four."),
        ("  Four <think>no</think>", "", "  Four <think>no</think>"),
        ("<think>not ended", "not ended", ""),
        ("<think>not ended </thi", "not ended </thi", ""),
        ("<thin air", "", "<thin air"),
        ("<thi", "", "<thi"),
        ("<think>a < b\n\n and c </think> yes </think>", "a < b\n\n and c", "yes </think>"),
        ("", "", ""),
        ("   ", "", "   "),
    ],
)
def test_thoughts_come_first(text: str, thought: str, said: str) -> None:
    assert split(text) == (thought, said)
    assert split(*text) == (thought, said)


def test_a_prompt_may_have_opened_them_already() -> None:
    assert split("hm\n</think>\nYes", is_open=True) == ("hm", "Yes")
    assert THINK.are_open_in("assistant\n<think>\n")
    assert not THINK.are_open_in("assistant\n<think>\n\n</think>\n\n")
    assert not THINK.are_open_in("assistant\n")


@pytest.mark.parametrize("tags", FAMILIES)
def test_a_template_says_which_tags_its_model_writes(tags: Tags) -> None:
    assert tags_of(f"{{% if thinking %}}{tags.start}{{% endif %}}{{{{ '{tags.end}' }}}}") == tags
    assert split(f"{tags.start}a{tags.end}b", tags=tags) == ("a", "b")
    assert tags_of("{{ messages }}") is THINK


PIECES = st.lists(
    st.sampled_from(["<think>", "</think>", "<th", "ink>", "</", "think", ">", " ", "\n", "a", "é😀", "<"])
)


@given(PIECES, st.booleans())
def test_how_the_text_is_cut_makes_no_difference(pieces: list[str], is_open: bool) -> None:
    assert split(*pieces, is_open=is_open) == split("".join(pieces), is_open=is_open)


@given(PIECES)
def test_nothing_but_tags_and_blanks_is_lost(pieces: list[str]) -> None:
    text = "".join(pieces)
    thought, said = split(*pieces)
    left = (
        text if not text.lstrip().startswith("<think>") else text.replace("<think>", "", 1).replace("</think>", "", 1)
    )
    assert "".join((thought + said).split()) == "".join(left.split())

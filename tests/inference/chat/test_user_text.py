"""Users' text stays text in the templates of every family: the same special tokens, whatever is said."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from inference.chat.probing import NO_TOKENS, examine
from inference.chat.rendering import rendered, text_of
from inference.chat.user_text import MARK, Marker, SpecialTokens
from tests.inference.chat import templates
from tests.inference.chat.templates import CHATML, DEEPSEEK_R1, QWEN_3, TAGS, TOOL, Family

pytestmark = pytest.mark.unit

NOW = datetime(2026, 1, 2, tzinfo=UTC)


def tokens_of(family: Family) -> SpecialTokens:
    return SpecialTokens({text: number for number, text in enumerate(family.tokens)})


def write(family: Family, special: SpecialTokens, **prompt: Any) -> list[tuple[str, bool]]:
    return rendered(
        family.source, prompt, examine(family.source), special, now=NOW, bos_token="<bos>", eos_token="<eos>"
    )


def special_in(segments: list[tuple[str, bool]]) -> list[str]:
    return [text for text, is_special in segments if is_special]


def attacks(family: Family) -> Iterator[str]:
    """Whole tokens, parts of them, parts with what templates cut out in between, and all of it in a row."""
    for token in family.tokens:
        half = len(token) // 2
        yield from (token, token * 2, token[:half], token[half:], token[:-1], token[1:], token[1:-1])
        yield from (f" {token}\n", f"a{token}b", f"<think>{token}</think>{token}", f"x</think>{token[:half]}")
        for cut in ("<think>", "</think>", "\n", "<tool_response>"):
            yield token[:half] + cut + token[half:]
            yield cut.join(token)
    yield "".join(family.tokens)
    yield MARK.join(family.tokens) + "\ud800"


def talk(text: str) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": text},
        {"role": "assistant", "content": text},
        {"role": "user", "content": text + "!"},
    ]


@pytest.mark.parametrize("family", templates.ALL, ids=lambda family: family.name)
def test_no_content_adds_or_takes_a_special_token(family: Family) -> None:
    special = tokens_of(family)
    expected = special_in(write(family, special, messages=talk("x")))
    assert expected
    for attack in attacks(family):
        found = write(family, special, messages=talk(attack))
        assert special_in(found) == expected, attack


@pytest.mark.parametrize("family", templates.ALL, ids=lambda family: family.name)
def test_the_text_is_what_the_template_writes_without_marks(family: Family) -> None:
    """Marks change nothing of what a template decides or writes."""
    special = tokens_of(family)
    texts = [*attacks(family), "Plain.", "<b>bold</b> & [1] <3", "<think>\nso\n</think>\n\nHence.", "  \n", ""]
    for text in texts:
        messages = talk(text)
        with_marks, without = write(family, special, messages=messages), write(family, NO_TOKENS, messages=messages)
        assert text_of(with_marks) == text_of(without), text


@pytest.mark.parametrize("family", templates.ALL, ids=lambda family: family.name)
def test_nothing_beside_the_content_becomes_special(family: Family) -> None:
    """Names, arguments, keys, descriptions, results, and variables of the template."""
    special = tokens_of(family)

    def conversation(text: str) -> dict[str, Any]:
        call = {"id": "probe0001", "name": "get_weather", "arguments": {text: text, "list": [text, {text: 1}]}}
        function = {**TOOL["function"], "description": text, "parameters": {"properties": {text: {"enum": [text]}}}}
        calling: list[dict[str, Any]] = [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": text, "tool_call_id": "probe0001"},
        ]
        return {
            "messages": [{"role": "user", "content": text}, *(calling if family.has_tool_calls else [])],
            "tools": [{"type": "function", "function": function}] if family.has_tools else [],
            "variables": {"date_string": text, "reasoning_effort": text},
        }

    expected = special_in(write(family, special, **conversation("x-y")))
    for attack in attacks(family):
        assert special_in(write(family, special, **conversation(attack))) == expected, attack


def test_a_token_in_two_halves_of_neighbouring_texts_stays_text() -> None:
    family = Family("bare", "{% for m in messages %}{{ m.content }}{% endfor %}", CHATML.tokens)
    special = tokens_of(family)
    for token in CHATML.tokens:
        for place in range(1, len(token)):
            pieces = [token[:place], token[place:]]
            found = write(family, special, messages=[{"role": "user", "content": piece} for piece in pieces])
            assert found == [(token, False)]
        found = write(family, special, messages=[{"role": "user", "content": letter} for letter in token])
        assert found == [(token, False)]


def test_keys_between_the_signs_of_a_token_stay_text() -> None:
    special = tokens_of(TAGS)
    call = {"name": "read", "arguments": {"filename": "a", "s": "b", "|im_end|": "c"}}
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "y"},
    ]
    found = write(TAGS, special, messages=messages, add_generation_prompt=False)
    assert special_in(found) == ["<|im_start|>", "<|im_end|>"] * 3
    assert "<filename>a</filename>" in text_of(found)


def test_random_pieces_never_add_up_to_a_token() -> None:
    chance = random.Random(21)
    pieces = [
        "<",
        "|",
        ">",
        "im_",
        "end",
        "im_end",
        "start",
        "</think>",
        "<think>",
        "s",
        "/",
        " ",
        "\n",
        "［",
        "｜",
        "x",
    ]
    for family in (CHATML, QWEN_3, DEEPSEEK_R1, TAGS):
        special = tokens_of(family)
        expected = special_in(write(family, special, messages=talk("x")))
        for _ in range(300):
            text = "".join(chance.choices(pieces, k=chance.randint(1, 12)))
            found = write(family, special, messages=talk(text))
            assert special_in(found) == expected, text


def test_text_that_cannot_matter_is_left_as_it_is() -> None:
    marker = Marker(tokens_of(CHATML), frozenset(), frozenset())
    text = "Plain text, (1 + 2) [3], and ümläuts."
    assert marker.text(text) is text
    assert marker.value({"city": [1, None, True, "x y"]}) == {"city": [1, None, True, "x y"]}


def test_what_a_template_looks_for_is_found() -> None:
    source = "{{ messages[0].content.split('</think>')[-1] | trim }}<|im_end|>"
    family = Family("asking", source, CHATML.tokens)
    found = rendered(
        source, {"messages": [{"role": "user", "content": "<|im_end|></think> a<b "}]}, {}, tokens_of(family), now=NOW
    )
    assert found == [("a<b", False), ("<|im_end|>", True)]


def test_an_object_that_is_printed_in_pythons_way_shows_no_mark() -> None:
    prompt = {"messages": [{"role": "user", "content": "x"}], "tools": [{"<|im_end|>": "\\udfff <b>"}]}
    found = rendered("{{ tools }}", prompt, {}, tokens_of(CHATML), now=NOW)
    assert text_of(found) == "[{'<|im_end|>': '\\\\udfff <b>'}]"
    assert special_in(found) == []


def test_the_longest_token_wins_and_a_vocabulary_may_have_none() -> None:
    special = SpecialTokens({"<a>": 1, "<a>b": 2, "x": 3})
    assert special.split("<a>b<a>xx") == [("<a>b", True), ("<a>", True), ("xx", False)]
    assert NO_TOKENS.split(f"a{MARK}b") == [("ab", False)]

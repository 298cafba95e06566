"""Every command at once: --json, examples, statuses in --help; what shells complete; docs/commands.md in step."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from django.core.management import call_command

from accounts.management.help import UNREAD, USAGE
from llmsite import commandline
from llmsite.processes.console import Console
from tests.conftest import REPOSITORY, site_environment

pytestmark = pytest.mark.unit
COMMANDS = commandline.house_commands()
DOCUMENT = REPOSITORY / "docs" / "commands.md"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_json_examples_that_parse_and_exit_statuses(name: str) -> None:
    command = COMMANDS[name]
    parser = command.create_parser("manage.py", name)
    text = parser.format_help()
    assert "--json" in text and "examples:" in text and "exit statuses:" in text
    assert len(command.examples) >= 2, "one plain, one with options"
    for example in command.examples:
        words = shlex.split(example)
        assert words[0] == name
        parser.parse_args(words[1:])
        assert f"python manage.py {example}" in text
    assert commandline.facts_of(name, command).help.endswith(".")


def test_words_that_are_not_understood_have_a_status_of_their_own(tmp_path: Path) -> None:
    for words in (["models", "--no-such-option"], ["up", "--no-such-option"], ["doctor", "what"]):
        done = subprocess.run(
            [sys.executable, "manage.py", *words],
            cwd=REPOSITORY,
            env=site_environment(tmp_path / "state", 1),
            capture_output=True,
            check=False,
        )
        assert done.returncode == USAGE, done.stderr
        assert not done.stdout


@pytest.mark.parametrize(
    ("words", "unbuffered"),
    [
        ("shell_completion bash", ""),
        ("shell_completion bash", "1"),
        ("models --help", ""),
        ("cancel --json --no-such-option", ""),
        ("cancel --json --no-such-option", "1"),
    ],
)
def test_a_pipe_that_nobody_reads_any_more_is_no_traceback(tmp_path: Path, words: str, unbuffered: str) -> None:
    """As behind `| head`, which ends when it has seen enough."""
    unread, written = os.pipe()
    os.close(unread)
    try:
        done = subprocess.run(
            [sys.executable, "manage.py", *words.split()],
            cwd=REPOSITORY,
            env=site_environment(tmp_path / "state", 1, PYTHONUNBUFFERED=unbuffered),
            stdout=written,
            stderr=subprocess.PIPE,
            check=False,
        )
    finally:
        os.close(written)
    assert done.returncode == UNREAD and b"BrokenPipe" not in done.stderr


def test_words_that_are_not_understood_are_json_where_that_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        type(COMMANDS["models"])().run_from_argv(["manage.py", "models", "--json", "--no-such-option"])
    said = capsys.readouterr()
    assert end.value.code == USAGE and "--no-such-option" in said.err
    assert json.loads(said.out)["error"]["code"] == "usage"


def test_the_document_lists_every_command_as_it_is() -> None:
    text = DOCUMENT.read_text()
    found = re.search(r"<!-- commands -->\n(.*?)\n<!-- /commands -->", text, re.DOTALL)
    assert found is not None
    assert found[1] == commandline.table(), "python manage.py shell_completion --table"


def test_the_document_names_no_command_and_no_option_that_is_not_there() -> None:
    known = {*COMMANDS, *commandline.other_commands()}
    for line in re.findall(r"manage\.py ([a-z_]+[^\n`|>)]*)", DOCUMENT.read_text()):
        name, *words = shlex.split(line.split("#")[0])
        assert name in known, line
        if name in COMMANDS:
            COMMANDS[name].create_parser("manage.py", name).parse_args(words)


def completed(tmp_path: Path, *words: str) -> set[str]:
    """What bash offers for the last word."""
    script = tmp_path / "completion.bash"
    script.write_text(commandline.bash())
    listed = " ".join(shlex.quote(word) for word in words)
    ask = f'source {script}; COMP_WORDS=({listed}); COMP_CWORD={len(words) - 1}; _llmsite; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", ask], cwd=tmp_path, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_bash_completes_commands_options_values_and_files(tmp_path: Path) -> None:
    assert completed(tmp_path, "manage.py", "create_") == {"create_key", "create_tenant"}
    assert "migrate" in completed(tmp_path, "python", "manage.py", "mig")
    assert "--pool" in completed(tmp_path, "./manage.py", "worker", "--p")
    assert completed(tmp_path, "manage.py", "create_key", "--scope", "o") == {"operator"}
    (tmp_path / "site.yaml").touch()
    assert completed(tmp_path, "manage.py", "apply_config", "si") == {"site.yaml"}
    assert completed(tmp_path, "python", "si") == {"site.yaml"}


def test_the_other_shells_get_every_command_too() -> None:
    for shell in ("zsh", "fish"):
        out = StringIO()
        call_command("shell_completion", shell, stdout=out)
        assert all(name in out.getvalue() for name in COMMANDS)
    out = StringIO()
    call_command("shell_completion", "fish", "--json", stdout=out)
    assert "complete -c manage.py" in json.loads(out.getvalue())["text"]


def test_up_speaks_json_where_it_is_asked_to() -> None:
    out = StringIO()
    console = Console(out, as_json=True)
    console.say("Stopping.")
    console.relay("web", "plain words")
    console.relay("web", '{"event": "started"}')
    assert [json.loads(line) for line in out.getvalue().splitlines()] == [
        {"process": "up", "line": "Stopping."},
        {"process": "web", "line": "plain words"},
        {"process": "web", "line": {"event": "started"}},
    ]

"""The commands of llmsite as data: for shells that complete them, and for docs/commands.md.

Reads parsers and runs nothing. Called by the command shell_completion.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from typing import Any

from django.core.management import get_commands, load_command_class

from accounts.management.base import HouseCommand

APPLICATIONS = ("accounts", "inference", "llmsite")
NAME = re.compile(r"[a-z0-9_]+\Z")
QUIET = frozenset(
    {"--version", "--settings", "--pythonpath", "--traceback", "--no-color", "--force-color", "--skip-checks"}
)
"""Django's own options, which no shell needs to offer."""


@dataclass(frozen=True, slots=True)
class Option:
    """`words`: such as ("-v", "--verbosity"). `choices`: all values, where they can be listed."""

    words: tuple[str, ...]
    help: str
    choices: tuple[str, ...]
    takes_value: bool


@dataclass(frozen=True, slots=True)
class CommandFacts:
    """`statuses`: beyond the usual ones."""

    name: str
    help: str
    options: tuple[Option, ...]
    statuses: dict[int, str]
    examples: tuple[str, ...]


def house_commands() -> dict[str, HouseCommand]:
    """Every command of ours by name; all have one base. Raises TypeError for one that has not."""
    found = {}
    for name, application in sorted(get_commands().items()):
        if application in APPLICATIONS:
            command = load_command_class(str(application), name)
            if not isinstance(command, HouseCommand):
                raise TypeError(f"{name} is no HouseCommand")
            found[name] = command
    return found


def other_commands() -> list[str]:
    """Django's and its applications'."""
    return sorted(name for name, application in get_commands().items() if application not in APPLICATIONS)


def facts_of(name: str, command: HouseCommand) -> CommandFacts:
    parser = command.create_parser("manage.py", name)
    options = tuple(_option(action) for action in parser._actions if action.option_strings)
    shown = tuple(option for option in options if not QUIET.intersection(option.words))
    return CommandFacts(name, " ".join(str(command.help).split()), shown, dict(command.statuses), command.examples)


def _option(action: argparse.Action) -> Option:
    choices = tuple(str(choice) for choice in action.choices or ())
    help_text = "" if action.help in (None, argparse.SUPPRESS) else " ".join(str(action.help).split())
    return Option(tuple(action.option_strings), help_text, choices, action.nargs != 0)


def everything() -> list[CommandFacts]:
    return [facts_of(name, command) for name, command in house_commands().items()]


# docs/commands.md


def table() -> str:
    """A row for each command: what it does, and what its status says beyond the usual."""
    rows = ["| command | what it does | exit statuses of its own |", "|---|---|---|"]
    for facts in everything():
        statuses = "; ".join(f"{number}: {meaning}" for number, meaning in sorted(facts.statuses.items()))
        rows.append(f"| `{facts.name}` | {_cell(facts.help)} | {_cell(statuses)} |")
    return "\n".join(rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


# Completion


def bash() -> str:
    facts = everything()
    names = " ".join([*(each.name for each in facts), *other_commands()])
    cases = "\n".join(f"    {each.name}) words={_quoted(' '.join(_long_options(each)))} ;;" for each in facts)
    values = "\n".join(
        f"    {each.name}:{word}) words={_quoted(' '.join(option.choices))} ;;"
        for each in facts
        for option in each.options
        for word in option.words
        if option.choices
    )
    return BASH.format(names=names, cases=cases, values=values)


def zsh() -> str:
    """The same function, by zsh's own emulation of bash's completion."""
    return f"#compdef manage.py\nautoload -U +X compinit bashcompinit\nbashcompinit\n{bash()}"


def fish() -> str:
    lines = ["# llmsite's commands", "complete -c manage.py -f -n __fish_use_subcommand -a help"]
    for each in everything():
        lines.append(
            f"complete -c manage.py -f -n __fish_use_subcommand -a {each.name} -d {_quoted(_first(each.help))}"
        )
        for option in each.options:
            long = next((word[2:] for word in option.words if word.startswith("--")), None)
            if long is None:
                continue
            values = (
                f" -xa {_quoted(' '.join(option.choices))}" if option.choices else " -r" if option.takes_value else ""
            )
            seen = f"'__fish_seen_subcommand_from {each.name}'"
            lines.append(f"complete -c manage.py -n {seen} -l {long}{values} -d {_quoted(_first(option.help))}")
    lines += [f"complete -c manage.py -f -n __fish_use_subcommand -a {name}" for name in other_commands()]
    return "\n".join(lines) + "\n"


def _long_options(facts: CommandFacts) -> list[str]:
    return [word for option in facts.options for word in option.words if word.startswith("--")]


def _first(text: str) -> str:
    """The first sentence."""
    return re.split(r"(?<=[.:;])\s", text, maxsplit=1)[0][:100]


def _quoted(text: str) -> str:
    """For all three shells: within single quotes nothing means anything, and none is left inside."""
    return "'" + text.replace("\\", "").replace("'", "’") + "'"


SHELLS: dict[str, Any] = {"bash": bash, "zsh": zsh, "fish": fish}

BASH = """# Completes `manage.py`, `./manage.py` and `python manage.py`.
_llmsite() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" previous="" first=1 command words=""
  [ "$COMP_CWORD" -gt 0 ] && previous="${{COMP_WORDS[COMP_CWORD-1]}}"
  case "${{COMP_WORDS[0]##*/}}" in
    python*) first=2
      case "${{COMP_WORDS[1]}}" in
        *manage.py) ;;
        *) COMPREPLY=( $(compgen -f -- "$current") ); return ;;
      esac ;;
  esac
  if [ "$COMP_CWORD" -eq "$first" ]; then
    COMPREPLY=( $(compgen -W '{names}' -- "$current") ); return
  fi
  command="${{COMP_WORDS[first]}}"
  case "$command:$previous" in
{values}
  esac
  if [ -z "$words" ]; then
    case "$current" in
      -*) case "$command" in
{cases}
      esac ;;
    esac
  fi
  if [ -n "$words" ]; then
    COMPREPLY=( $(compgen -W "$words" -- "$current") )
  else
    COMPREPLY=( $(compgen -f -- "$current") )
  fi
}}
complete -o filenames -F _llmsite manage.py ./manage.py python python3
"""

"""Print a script that completes the commands."""

from __future__ import annotations

from typing import Any

from django.core.management.base import CommandParser

from accounts.management.base import HouseCommand
from llmsite import commandline


class Command(HouseCommand):
    help = "Print a script that completes commands, options and their values in bash, zsh or fish."
    examples = (
        "shell_completion bash",
        "shell_completion zsh",
        "shell_completion fish",
        "shell_completion --table",
    )
    more_help = (
        "to use it:\n"
        "  bash  source <(python manage.py shell_completion bash)\n"
        "  zsh   source <(python manage.py shell_completion zsh)\n"
        "  fish  python manage.py shell_completion fish | source"
    )
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("shell", nargs="?", choices=sorted(commandline.SHELLS), default="bash")
        parser.add_argument("--table", action="store_true", help="the table of docs/commands.md in place of a script")

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        text = commandline.table() if options["table"] else commandline.SHELLS[options["shell"]]()
        return {"shell": None if options["table"] else options["shell"], "text": text}

    def show(self, result: dict[str, Any]) -> None:
        self.stdout.write(result["text"])

"""Issue an API key."""

from __future__ import annotations

from typing import Any

from django.core.exceptions import ValidationError
from django.core.management.base import CommandParser

from accounts.identity import issuing
from accounts.management.arguments import add_limits, as_row, moment, overrides, sentence, tenant_named
from accounts.management.base import HouseCommand
from accounts.models import Scope


class Command(HouseCommand):
    help = "Issue an API key. Its text is printed once and kept nowhere."
    examples = (
        'create_key "Alice\'s" --name laptop',
        'create_key "Alice\'s" --name dashboards --scope usage --expires-at 2027-01-31T00:00:00Z --json',
        'create_key "Alice\'s" --name app --model small --adapter formal --adapter small:verse',
        "create_key Operations --name prometheus --scope operator",
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("tenant", help="the tenant's name")
        parser.add_argument("--name", default="main", help="what the key is for")
        parser.add_argument(
            "--scope",
            action="append",
            dest="scopes",
            choices=Scope.values,
            help="repeatable; generate and usage without",
        )
        for thing, example in (("model", "small"), ("adapter", "formal or small:verse")):
            parser.add_argument(
                f"--{thing}",
                action="append",
                dest=f"allowed_{thing}s",
                metavar="NAME",
                help=f"one that it may use, such as {example}; repeatable; all that its tenant may, without",
            )
        parser.add_argument("--expires-at", type=moment, metavar="TIME", help="end of its life, ISO 8601")
        add_limits(parser)

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        tenant = tenant_named(self, options["tenant"])
        try:
            key, text = issuing.issue(
                tenant,
                options["name"],
                options["scopes"],
                overrides(options, {}),
                options["expires_at"],
                allowed_models=options["allowed_models"],
                allowed_adapters=options["allowed_adapters"],
            )
        except issuing.IssuingError as error:
            self.fail("key_invalid", str(error))
        except ValidationError as error:
            self.fail("key_invalid", sentence(error))
        return {**as_row(key), "key": text}

    def show(self, result: dict[str, Any]) -> None:
        self.stdout.write(f"A key for {result['tenant']}. It is shown only now:\n\n  {result['key']}\n")

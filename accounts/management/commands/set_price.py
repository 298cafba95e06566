"""Say what tokens cost from a moment on."""

from __future__ import annotations

from argparse import ArgumentTypeError
from decimal import Decimal, InvalidOperation
from typing import Any

from django.conf import settings
from django.core.exceptions import ValidationError
from django.core.management.base import CommandParser
from django.utils import timezone

from accounts.ledger import prices
from accounts.management.arguments import moment, sentence
from accounts.management.base import HouseCommand
from accounts.models import Price


def amount(text: str) -> Decimal:
    try:
        found = Decimal(text)
    except InvalidOperation:
        raise ArgumentTypeError(f"{text!r} is not an amount such as 0.25") from None
    if not found.is_finite() or abs(found) > 10**9:
        raise ArgumentTypeError(f"{text!r} is not an amount such as 0.25")
    return found


class Command(HouseCommand):
    help = (
        "Set the price of a million tokens of a model from a moment on, or remove one that is not meant any more; "
        "without either it lists the prices. What is charged already stays charged."
    )
    examples = (
        "set_price --model small --input 0.10 --cached-input 0.05 --output 0.40",
        "set_price --every-model --input 0.20 --output 0.80 --from 2027-01-01",
        "set_price --remove 7",
        "set_price --json",
    )

    def add_arguments(self, parser: CommandParser) -> None:
        whose = parser.add_mutually_exclusive_group()
        whose.add_argument("--model", help="the model's name")
        whose.add_argument("--every-model", action="store_true", help="every model that has no price of its own")
        whose.add_argument("--remove", type=int, metavar="ID", help="delete a price, by its number in the list")
        parser.add_argument("--input", type=amount, help="a million prompt tokens")
        parser.add_argument("--cached-input", type=amount, help="a million that the prompt cache had; as --input")
        parser.add_argument("--output", type=amount, help="a million generated tokens")
        parser.add_argument("--from", dest="valid_from", type=moment, help="now, unless it says")

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        if options["remove"] is not None:
            return self._remove(options["remove"])
        if options["input"] is None and options["output"] is None:
            rows = list(Price.objects.order_by("model", "-valid_from")[:1000])
            return {"currency": settings.CONFIG.currency, "prices": [_as_json(row) for row in rows]}
        if not options["model"] and not options["every_model"]:
            self.fail("model_missing", "Say of which model: --model, or --every-model.")
        if options["input"] is None or options["output"] is None:
            self.fail("price_incomplete", "Give both --input and --output.")
        row = Price(
            model=options["model"] or prices.EVERY_MODEL,
            valid_from=options["valid_from"] or timezone.now(),
            input_per_million=options["input"],
            cached_input_per_million=options["cached_input"],
            output_per_million=options["output"],
        )
        try:
            row.full_clean()
            row.save()
        except ValidationError as error:
            self.fail("price_invalid", sentence(error))
        return {"currency": settings.CONFIG.currency, "prices": [_as_json(row)]}

    def _remove(self, pk: int) -> dict[str, Any]:
        row = Price.objects.filter(pk=pk).first()
        if row is None:
            self.fail("price_not_found", f"There is no price {pk}.")
        shown = _as_json(row)
        row.delete()
        return {"currency": settings.CONFIG.currency, "removed": shown, "prices": []}

    def show(self, result: dict[str, Any]) -> None:
        if "removed" in result:
            self.stdout.write(f"Removed price {result['removed']['id']}.")
        for row in result["prices"]:
            self.stdout.write(
                f"{row['id']}: {row['model'] or 'every other model'} from {row['valid_from']:%Y-%m-%d %H:%M}: "
                f"{row['input']} in, {row['cached_input']} cached, {row['output']} out, {result['currency']} a million"
            )


def _as_json(row: Price) -> dict[str, Any]:
    cached = row.input_per_million if row.cached_input_per_million is None else row.cached_input_per_million
    return {
        "id": row.pk,
        "model": row.model,
        "valid_from": row.valid_from,
        "input": str(row.input_per_million),
        "cached_input": str(cached),
        "output": str(row.output_per_million),
    }

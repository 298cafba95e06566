"""Measure file formats and settings of a model on this machine, and keep the best as a variant."""

from __future__ import annotations

import signal
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from django.conf import settings
from django.core.management.base import CommandError, CommandParser
from rich.table import Table

from accounts.management.base import HouseCommand
from inference import variants
from inference.bench import machine
from inference.gguf import Header
from inference.inspection import RegistrationError, check_header, is_unchanged
from inference.management.naming import model_named
from inference.management.steps import following
from inference.models import ModelVariant, ServedModel
from inference.registry import KV_BYTES
from inference.tuning import choice, formats
from inference.tuning.choice import Measured, Settings
from inference.tuning.native import NUM_SEQUENCES, SPEED_CONTEXT
from inference.tuning.search import Found, NotMeasured, Order, Search
from inference.tuning.steps import NativeSteps, Steps
from inference.tuning.workshop import WorkshopError, keep, workshop

INTERRUPTED = 130
"""Exit status, as shells have it for Ctrl-C."""
WIDE = 400
REQUANTIZED = (
    "The source is quantized already ({source}): every other format is made from its rounded weights and loses a "
    "little more. The perplexity says how much. Made from the original weights (F16 or F32), a file of the same format "
    "is better."
)


def bounded(low: float, high: float, kind: type[int] | type[float]) -> Callable[[str], float]:
    """An argparse type: a number within bounds."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise ArgumentTypeError(f"use a number from {low:g} to {high:g}")
        return value

    parse.__name__ = kind.__name__
    return parse


def some_formats(text: str) -> tuple[formats.Format, ...]:
    try:
        return formats.named(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error


class Command(HouseCommand):
    help = (
        "Write a model in other file formats, measure them and their settings on this machine, and keep the fastest "
        "whose perplexity rises little as a variant, which activate_variant serves. The model itself is not changed. "
        "Measure while the machine is idle. Exit status 0: it was measured, whether anything was better or not; 1: it "
        "could not be measured; 130: interrupted, and nothing is left behind."
    )
    examples = (
        "optimize_model smollm2",
        "optimize_model smollm2 --formats Q4_0,Q8_0,IQ4_NL --max-perplexity-increase 5",
        "optimize_model big --max-minutes 60 --out /models --json",
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("name", help="the served model")
        parser.add_argument(
            "--formats",
            type=some_formats,
            metavar="LIST",
            help=f"up to {formats.MAX_FORMATS} of {', '.join(formats.FORMATS)}; without it, what suits the model's own",
        )
        parser.add_argument(
            "--max-perplexity-increase",
            type=bounded(0, 1000, float),
            default=3.0,
            metavar="PERCENT",
            help="a format whose perplexity rises by more may not win (3)",
        )
        parser.add_argument(
            "--max-minutes",
            type=bounded(0.1, 600, float),
            default=20.0,
            metavar="N",
            help="then what is measured decides (20)",
        )
        parser.add_argument(
            "--rounds", type=bounded(1, 9, int), default=3, metavar="N", help="measurements of each (3)"
        )
        parser.add_argument(
            "--seconds", type=bounded(0.1, 30, float), default=1.0, metavar="N", help="of each speed, at least (1)"
        )
        parser.add_argument(
            "--out", type=Path, metavar="FOLDER", help="for the file; STATE_DIR/models/variants without it"
        )

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        row = model_named(self, options["name"])
        with interruptible():
            try:
                return self._optimize(row, options)
            except KeyboardInterrupt as error:
                raise CommandError("Stopped; nothing was changed or left behind.", returncode=INTERRUPTED) from error
            except (WorkshopError, RegistrationError) as error:
                self.fail(error.code, error.message)
            except NotMeasured as error:
                self.fail("not_measured", str(error))

    def _optimize(self, row: ServedModel, options: dict[str, Any]) -> dict[str, Any]:
        header = check_header(Path(row.path))
        if not is_unchanged(Path(row.path), row.digest, row.metadata):
            self.fail("file_changed", f"{row.path} is not the file that was registered: register_model reads it again.")
        notes = machine.busyness(machine.describe())
        chosen = options["formats"] or formats.defaults(header)
        folder: Path = (options["out"] or settings.CONFIG.state / "models" / "variants").absolute()
        with workshop(folder, formats.total_bytes(chosen, header)) as own:
            order = self._order(row, header, chosen, own, options)
            with following(self._wide_console(), hidden=self.as_json) as watch:
                found = Search(order, self._steps(row, header, options), watch).run()
            variant = _keep(row, found, folder)
        return as_json(row, order, found, variant, notes + found.notes)

    def _order(
        self, row: ServedModel, header: Header, chosen: tuple[formats.Format, ...], own: Path, options: dict[str, Any]
    ) -> Order:
        cpus = choice.usable_cpus()
        return Order(
            source=Path(row.path),
            header=header,
            formats=chosen,
            settings=Settings(row.n_threads or cpus),
            usable_cpus=cpus,
            kv_type=row.kv_type,
            folder=own,
            most_increase=options["max_perplexity_increase"],
            rounds=options["rounds"],
            seconds=60 * options["max_minutes"],
        )

    def _steps(self, row: ServedModel, header: Header, options: dict[str, Any]) -> Steps:
        elements = header.kv_elements_per_token() or 0
        return NativeSteps(
            n_threads=choice.usable_cpus(),
            n_gpu_layers=row.n_gpu_layers,
            kv_type=row.kv_type,
            kv_bytes=int(elements * SPEED_CONTEXT * NUM_SEQUENCES * KV_BYTES[row.kv_type]),
            measured_seconds=options["seconds"],
        )

    def _wide_console(self) -> Any:
        console = self.console
        if not console.is_terminal:  # a pipe or a file has no width to keep to
            console.width = WIDE
        return console

    def show(self, result: dict[str, Any]) -> None:
        console = self._wide_console()
        if result["requantized"]:
            console.print(REQUANTIZED.format(source=result["source"]["format"]), markup=False)
        console.print(_table(result))
        if result["settings_tried"]:
            tried = ", ".join(f"{each['settings']} {_times(each['gain'])}" for each in result["settings_tried"])
            console.print(f"Settings for {result['chosen_format'] or 'the source'}: {tried}.", markup=False)
        for note in result["notes"]:
            console.print(note, markup=False)
        variant = result["variant"]
        if variant is None:
            console.print("Nothing better was found: the model stays as it is.")
            return
        console.print(
            f"Kept as the variant {variant['name']}: {variant['path']}, {result['chosen_settings']}, "
            f"{_times(result['gain'])} the speed of now.\n"
            f"Serve it: python manage.py activate_variant {result['model']} {variant['name']}",
            markup=False,
        )


@contextmanager
def interruptible() -> Iterator[None]:
    """A request to end is Ctrl-C: the file that is being written goes away too."""

    def stop(_signal: int, _frame: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _keep(row: ServedModel, found: Found, folder: Path) -> ModelVariant | None:
    """The best as a file in its place and a row; None where there is none. What cannot be registered is not left."""
    if found.gain is None or found.notes:
        return None
    path, is_new = Path(row.path), False
    try:
        if found.path is not None:
            path, is_new = keep(found.path, folder, row.name)
        return variants.register(
            row,
            found.format.name.lower() if found.format else "tuned",
            path,
            n_threads=found.settings.n_threads if found.settings.n_threads != row.n_threads else None,
            flash_attention=found.settings.flash_attention,
            measured=measured_json(found),
        )
    except BaseException:
        if is_new:
            path.unlink(missing_ok=True)
        raise


def measured_json(found: Found) -> dict[str, Any]:
    best = next((each for each in found.candidates if found.format and each.name == found.format.name), None)
    cost = choice.increase(best, found.source) if best else None
    return {
        "gain": _rounded(found.gain),
        "perplexity_increase_percent": _rounded(cost.percent) if cost else 0.0,
        "source": file_json(found.source, found.source),
        "file": file_json(best or found.source, found.source),
        "machine": machine.describe(),
    }


def file_json(each: Measured, source: Measured) -> dict[str, Any]:
    """One line of the table. Speeds in tokens per second, ratios to the source."""
    speed, cost = each.typical(), choice.increase(each, source)
    return {
        "format": each.name,
        "size_bytes": each.size_bytes or None,
        "prompt": _rounded(speed.prompt) if speed else None,
        "decode_1": _rounded(speed.decode_1) if speed else None,
        "decode_8": _rounded(speed.decode_8) if speed else None,
        "gain": _rounded(choice.gain(each, source)),
        "perplexity": _rounded(each.perplexity),
        "perplexity_increase_percent": _rounded(cost.percent) if cost else None,
        "perplexity_increase_error": _rounded(cost.error) if cost else None,
        "objection": each.problem,
    }


def as_json(
    row: ServedModel, order: Order, found: Found, variant: ModelVariant | None, notes: list[str]
) -> dict[str, Any]:
    now = found.tried.get(order.settings)
    return {
        "model": row.name,
        "requantized": order.header.quantization not in ("F32", "F16", "BF16"),
        "scored_tokens": len(found.source.losses),
        "source": {**file_json(found.source, found.source), "format": order.header.quantization},
        "formats": [file_json(each, found.source) for each in found.candidates],
        "chosen_format": found.format.name if found.format else None,
        "settings_of_now": str(order.settings),
        "settings_tried": [
            {"settings": str(each), "gain": _rounded(choice.gain(arm, now)), "objection": arm.problem}
            for each, arm in found.tried.items()
            if now is not None
        ],
        "chosen_settings": str(found.settings),
        "gain": _rounded(found.gain),
        "variant": variants.as_variant_row(variant) if variant else None,
        "notes": notes,
    }


def _table(result: dict[str, Any]) -> Table:
    table = Table("file", "MB", "decode 1", "decode 8", "prompt", "gain", "perplexity", "change", "", box=None)
    source = result["source"]
    for each in (source, *result["formats"]):
        is_source = each is source
        table.add_row(
            each["format"] + (" (source)" if is_source else ""),
            f"{each['size_bytes'] / 1e6:,.0f}" if each["size_bytes"] else "-",
            *(_speed(each[name], source[name]) for name in ("decode_1", "decode_8", "prompt")),
            _times(each["gain"]),
            "-" if each["perplexity"] is None else f"{each['perplexity']:.2f}",
            "" if is_source else _change(each),
            _verdict(each, result["chosen_format"], is_source),
        )
    return table


def _verdict(each: dict[str, Any], chosen: str | None, is_source: bool) -> str:
    if is_source:
        return ""
    return "chosen" if each["format"] == chosen else each["objection"] or "may win"


def _change(each: dict[str, Any]) -> str:
    if each["perplexity_increase_percent"] is None:
        return "-"
    return f"{each['perplexity_increase_percent']:+.2f} % ± {each['perplexity_increase_error']:.2f}"


def _speed(value: float | None, reference: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f} tok/s" + (f" ({value / reference:.2f})" if reference else "")


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)

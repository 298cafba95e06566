"""What a search found, as JSON for commands and rows, and as the table that the command and the console show."""

from __future__ import annotations

from typing import Any

from inference.catalog import variants
from inference.models import ModelVariant
from inference.tuning import choice, machine
from inference.tuning.choice import Measured
from inference.tuning.search import Found, Order

HEADINGS = ("file", "MB", "decode 1", "decode 8", "prompt", "gain", "perplexity", "change", "verdict")
REQUANTIZED = (
    "The source is quantized already ({source}): every other format is made from its rounded weights and loses a "
    "little more. The perplexity says how much. Made from the original weights (F16 or F32), a file of the same format "
    "is better."
)
NOTHING_BETTER = "Nothing better was found: the model stays as it is."


def as_json(name: str, order: Order, found: Found, variant: ModelVariant | None, notes: list[str]) -> dict[str, Any]:
    """name: the model's."""
    now = found.tried.get(order.settings)
    return {
        "model": name,
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


def measured_json(found: Found) -> dict[str, Any]:
    """What a variant keeps of it."""
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


# In words


def cells(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """A line for each file, the source first, under HEADINGS."""
    return [_line(each, result) for each in (result["source"], *result["formats"])]


def _line(each: dict[str, Any], result: dict[str, Any]) -> tuple[str, ...]:
    source = result["source"]
    is_source = each is source
    return (
        each["format"] + (" (source)" if is_source else ""),
        f"{each['size_bytes'] / 1e6:,.0f}" if each["size_bytes"] else "-",
        *(_speed(each[name], source[name]) for name in ("decode_1", "decode_8", "prompt")),
        _times(each["gain"]),
        "-" if each["perplexity"] is None else f"{each['perplexity']:.2f}",
        "" if is_source else _change(each),
        "" if is_source else _verdict(each, result["chosen_format"]),
    )


def settings_tried(result: dict[str, Any]) -> str:
    """Empty where none were."""
    if not result["settings_tried"]:
        return ""
    tried = ", ".join(f"{each['settings']} {_times(each['gain'])}" for each in result["settings_tried"])
    return f"Settings for {result['chosen_format'] or 'the source'}: {tried}."


def kept(result: dict[str, Any]) -> str:
    """What was kept, and where."""
    variant = result["variant"]
    if variant is None:
        return NOTHING_BETTER
    return (
        f"Kept as the variant {variant['name']}: {variant['path']}, {result['chosen_settings']}, "
        f"{_times(result['gain'])} the speed of now."
    )


def _verdict(each: dict[str, Any], chosen: str | None) -> str:
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

"""Watch the site at work."""

from __future__ import annotations

import time
from typing import Any

from django.core.management.base import CommandParser
from django.utils import timezone
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from accounts.management.base import HouseCommand
from accounts.management.plain import plain
from inference.inquiry import top

WIDE = 400
TONES = {"ready": "green", "loading": "yellow", "retiring": "yellow", "failed": "red"}


class Command(HouseCommand):
    help = "Show workers, slots, queues and tenants as they are now, again and again until Ctrl-C."
    examples = ("top", "top --seconds 5", "top --once", "top --json")

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--once", action="store_true", help="look once; --json does, too")
        parser.add_argument("--seconds", type=float, default=1.0, help="between two looks, 0.2 to 60 (1)")

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        if not 0.2 <= options["seconds"] <= 60:
            self.fail("seconds_invalid", "--seconds is a number from 0.2 to 60.")
        self._is_live = self.console.is_terminal and not (options["once"] or self.as_json)
        return self._watch(options["seconds"]) if self._is_live else top.look(timezone.now())

    def _watch(self, seconds: float) -> dict[str, Any]:
        found = plain(top.look(timezone.now()))
        with Live(screen_of(found, None, seconds), console=self.console, screen=True, auto_refresh=False) as live:
            try:
                while True:
                    time.sleep(seconds)
                    before, found = found, plain(top.look(timezone.now()))
                    live.update(screen_of(found, before, seconds), refresh=True)
            except KeyboardInterrupt:
                return found

    def show(self, result: dict[str, Any]) -> None:
        console = self.console
        if not console.is_terminal:  # a pipe or a file has no width to keep to
            console.width = WIDE
        if not self._is_live:
            console.print(screen_of(result, None, 1.0))


def screen_of(found: dict[str, Any], before: dict[str, Any] | None, seconds: float) -> RenderableType:
    """before: an earlier look, for steps a second."""
    waiting = ", ".join(f"{pool['pool']} {pool['waiting']:,}" for pool in found["pools"]) or "no pool"
    head = Text(f"{found['at']}  {len(found['workers'])} workers  waiting: {waiting}")
    if not found["redis"]:
        head = Text(f"{found['at']}  Redis does not answer: what the workers do is unknown", style="red")
    return Group(head, Text(), _workers(found, before, seconds), Text(), _tenants(found))


def _workers(found: dict[str, Any], before: dict[str, Any] | None, seconds: float) -> Table:
    table = Table(
        "worker", "pool", "up", "model", "state", "slots", "", "steps/s", "adapters", box=None, pad_edge=False
    )
    earlier = dict(_steps(before)) if before else {}
    for worker in found["workers"]:
        name = Text(worker["worker"], style="yellow" if worker["stopping"] else "")
        for model in worker["models"] or [{}]:
            key = (worker["worker"], model.get("name"))
            rate = f"{(model['steps'] - earlier[key]) / seconds:,.0f}" if key in earlier else "-"
            table.add_row(
                name,
                worker["pool"],
                _age(worker["seconds"]),
                *_model_cells(model),
                rate,
                str(model.get("adapters", "-")),
            )
            name = Text()
    return table


def _steps(found: dict[str, Any]) -> list[tuple[tuple[str, str], int]]:
    return [
        ((worker["worker"], model["name"]), model["steps"]) for worker in found["workers"] for model in worker["models"]
    ]


def _model_cells(model: dict[str, Any]) -> tuple[Text, Text, str, Text]:
    if not model:
        return Text("-"), Text("holds nothing"), "-", Text()
    state = Text(model["error"] or model["state"], style=TONES.get(model["state"], ""))
    return Text(model["name"]), state, f"{model['busy']} of {model['slots']}", bar(model["busy"], model["slots"])


def bar(part: int, whole: int, width: int = 16) -> Text:
    filled = min(width, round(width * part / whole)) if whole else 0
    return Text("█" * filled + "░" * (width - filled), style="green" if part < whole else "yellow")


def _age(seconds: int | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds // 3600}h{seconds // 60 % 60:02d}" if seconds >= 3600 else f"{seconds // 60}m{seconds % 60:02d}"


def _tenants(found: dict[str, Any]) -> Table:
    table = Table(
        "tenant",
        "plan",
        "running",
        "requests/min",
        "failed/min",
        "tokens/min",
        "period",
        "of",
        box=None,
        pad_edge=False,
    )
    for row in found["tenants"]:
        limit = row["monthly_tokens"]
        table.add_row(
            Text(row["tenant"]),
            Text(row["plan"]),
            "?" if row["running"] is None else f"{row['running']:,}",
            f"{row['requests_per_minute']:,}",
            Text(f"{row['failed_per_minute']:,}", style="red" if row["failed_per_minute"] else ""),
            f"{row['tokens_per_minute']:,}",
            f"{row['used_tokens'] + row['reserved_tokens']:,}",
            "unlimited" if limit is None else f"{limit:,}",
        )
    return table

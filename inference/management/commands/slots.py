"""Slots and saved states that workers hold: look, erase, forget."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any

import redis
from django.core.management.base import CommandParser
from rich.table import Table

from accounts.management.arguments import tenant_named
from accounts.management.base import HouseCommand
from accounts.models import Tenant
from accounts.trail.refusals import Refusal
from inference.management.naming import model_named
from inference.models import ServedModel
from inference.slots import holdings
from inference.slots.holdings import Answer, Disk, Holdings, Loaded

ACTIONS = ("list", "erase", "forget")


class Command(HouseCommand):
    help = (
        "List what workers hold for tenants, in slots and as saved states on their disks; erase slots, or forget saved "
        "states, of one tenant: all of them, or those that the options name. No token is shown."
    )
    examples = (
        "slots",
        'slots list --tenant "Alice\'s" --json',
        'slots erase --tenant "Alice\'s" --model smollm2 --number 1',
        'slots forget --tenant "Alice\'s"',
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("action", nargs="?", choices=ACTIONS, default="list")
        parser.add_argument("--tenant", help="whose; erase and forget need it")
        parser.add_argument("--worker", help="of this worker alone")
        parser.add_argument("--model", help="of this model alone")
        parser.add_argument("--number", type=int, metavar="N", help="the slot of this number alone")
        parser.add_argument("--state", metavar="NAME", help="the saved state of this name alone, as the list has it")

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        tenant = tenant_named(self, options["tenant"]) if options["tenant"] else None
        model = model_named(self, options["model"]) if options["model"] else None
        if options["action"] != "list" and tenant is None:
            self.fail("tenant_missing", f"Say whose: slots {options['action']} --tenant NAME.")
        try:
            found = _told(holdings.look(), tenant, model, options)
            if options["action"] == "erase" and tenant is not None:
                return self._dropped("erased", "slots", found, partial(_erase, tenant))
            if options["action"] == "forget" and tenant is not None:
                return self._dropped("forgotten", "states", found, partial(_forget, tenant))
        except redis.RedisError:
            self.fail("redis_unreachable", "Redis does not answer: what workers hold is unknown.")
        return found

    def _dropped(
        self, word: str, kind: str, found: dict[str, list[dict[str, Any]]], drop: Callable[[dict[str, Any]], Any]
    ) -> dict[str, Any]:
        """Each row for itself. A worker that did not answer, or refused, may hold something yet: then the command has
        failed, and says what is done. Raises redis.RedisError."""
        done = []
        problems = [each for each in found["problems"] if each["of"] == kind]
        for row in found[kind]:
            try:
                told = drop(row)
            except Refusal as refusal:
                problems.append(_problem(kind, row["worker"], row["model"], refusal))
            else:
                done += [told] if told else []
        if problems:
            first = problems[0]
            text = f"{len(done)} {word}, and perhaps not all: {first['worker']}: {first['message']}"
            self.fail(first["code"], text, problems=problems, done=done)
        return {word: done}

    def show(self, result: dict[str, Any]) -> None:
        if "erased" in result:
            tokens = sum(row["tokens"] for row in result["erased"])
            self.stdout.write(f"{len(result['erased'])} slots erased; they held {tokens:,} tokens.")
        elif "forgotten" in result:
            self.stdout.write(f"{len(result['forgotten'])} saved states removed.")
        else:
            self._list(result)

    def _list(self, result: dict[str, Any]) -> None:
        for problem in result["problems"]:
            self.stdout.write(f"{problem['worker']}: {problem['message']}")
        if not result["slots"] and not result["states"]:
            self.stdout.write("No worker holds anything of it.")
        if result["slots"]:
            table = Table("tenant", "number", "model", "worker", "tokens held", "request", box=None)
            for row in result["slots"]:
                table.add_row(
                    row["tenant"] or "-",
                    str(row["number"]),
                    row["model"],
                    row["worker"],
                    f"{row['tokens']:,}",
                    row["request_id"] or "-",
                )
            self.print_table(table)
        if result["states"]:
            table = Table("tenant", "saved state", "model", "host", "kind", "bytes", "written (UTC)", box=None)
            for row in result["states"]:
                table.add_row(
                    row["tenant"] or f"{row['tenant_id']}, gone",
                    row["name"],
                    row["model"] or "-",
                    row["host"],
                    row["kind"],
                    f"{row['bytes']:,}",
                    f"{row['written_at']:%Y-%m-%d %H:%M}",
                )
            self.print_table(table)


def _erase(tenant: Tenant, row: dict[str, Any]) -> dict[str, Any] | None:
    """The row, with the tokens that it held; None for a model that is served no more. Raises Refusal."""
    model = ServedModel.objects.filter(pk=row["model_id"]).first()
    if model is None:
        return None
    return {**row, "tokens": holdings.erase(tenant, row["worker"], model, row["number"])}


def _forget(tenant: Tenant, row: dict[str, Any]) -> dict[str, Any] | None:
    """The row; None where it was gone. Raises Refusal."""
    return row if holdings.forget(tenant, row["worker"], row["name"]) else None


def _problem(kind: str, worker: str, model: str | None, refusal: Refusal) -> dict[str, Any]:
    return {"of": kind, "worker": worker, "model": model, "code": refusal.code, "message": refusal.message}


def _told(
    found: Holdings, tenant: Tenant | None, model: ServedModel | None, options: dict[str, Any]
) -> dict[str, list[dict[str, Any]]]:
    """As JSON, what the options leave of it."""
    slots = [row for each in found.loaded for row in _slots(each, found)]
    states = [row for each in found.disks for row in _states(each, found)]
    wanted = {
        "tenant_id": tenant.pk if tenant else None,
        "worker": options["worker"],
        "model": model.name if model else None,
        "number": options["number"],
        "name": options["state"],
    }
    wanted = {name: value for name, value in wanted.items() if value is not None}
    told: list[tuple[str, str, str | None, Answer]]
    told = [("slots", each.worker, each.report["name"], each.answer) for each in found.loaded]
    told += [("states", each.worker, None, each.answer) for each in found.disks]
    problems = [
        _problem(kind, worker, name, answer) for kind, worker, name, answer in told if isinstance(answer, Refusal)
    ]
    return {
        "slots": [row for row in slots if _fits(row, wanted)],
        "states": [row for row in states if _fits(row, wanted)],
        "problems": [each for each in problems if _may_fit(each, wanted)],
    }


def _fits(row: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """A row that has nothing of that name is not meant."""
    return all(name in row and row[name] == value for name, value in wanted.items())


def _may_fit(problem: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether something that is meant may be where nobody answered."""
    return all(problem[name] in (None, wanted[name]) for name in ("worker", "model") if name in wanted)


def _slots(loaded: Loaded, found: Holdings) -> list[dict[str, Any]]:
    if isinstance(loaded.answer, Refusal):
        return []
    return [
        {
            "worker": loaded.worker,
            "model": loaded.report["name"],
            "model_id": loaded.report["id"],
            "number": slot["number"],
            "slot_id": slot["slot_id"],
            "tenant_id": slot["tenant"],
            "tenant": found.names.tenants.get(slot["tenant"]),
            "request_id": slot["request_id"],
            "tokens": slot["num_held"],
        }
        for slot in loaded.answer["slots"]
    ]


def _states(disk: Disk, found: Holdings) -> list[dict[str, Any]]:
    return [
        {
            "worker": disk.worker,
            "host": disk.host,
            "tenant_id": file["tenant_id"],
            "tenant": found.names.tenants.get(file["tenant_id"]),
            "name": file["name"],
            "kind": "kept while unloaded" if file["is_kept"] else "saved",
            "model": found.names.models.get(file["model_digest"]),
            "tokens": file["num_tokens"],
            "bytes": file["num_bytes"],
            "written_at": datetime.fromtimestamp(file["written_at"], UTC),
        }
        for file in disk.files()
    ]

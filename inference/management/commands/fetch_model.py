"""Get a model or an adapter from an address, check it, and register it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any

from django.core.management.base import CommandParser
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from accounts.management.base import HouseCommand
from accounts.management.help import INTERRUPTED
from inference.gguf.parts import place_among
from inference.imports import desk, importer, quarantine
from inference.imports.addresses import file_name
from inference.imports.importer import Watch
from inference.imports.models import ModelImport
from inference.management.naming import model_named
from inference.management.steps import interruptible
from inference.models import ServedModel
from inference.vetting.inspection import RegistrationError

State = ModelImport.State


class Command(HouseCommand):
    help = (
        "Get a GGUF model, all of its parts, or an adapter from an allowed address (FETCH_HOSTS), check it in "
        "quarantine as register_model does, and serve it under a name. Interrupted, the same command goes on."
    )
    statuses = {
        0: "it is registered, or with --background written down",
        1: "refused; nothing of it is kept",
        INTERRUPTED: "interrupted; what has come is kept for IMPORT_HOURS",
    }
    examples = (
        "fetch_model https://models.example.org/tiny-Q4_0.gguf --name tiny --sha256 9f86d081884c7d659a2feaa0c55ad015"
        "a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "fetch_model owner/repository:big-Q8_0-00001-of-00003.gguf --name big --visibility granted",
        "fetch_model owner/repository@v1.1:style-lora.gguf --adapter-of tiny --background",
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("address", help="http(s)://..., or owner/repository[@revision]:file.gguf of MODEL_HUB_URL")
        parser.add_argument("--name", help="what tenants write; the file's name without it")
        parser.add_argument("--adapter-of", metavar="MODEL", help="it is an adapter of this served model")
        parser.add_argument(
            "--sha256", default="", help="what its SHA-256 must be; of several parts that of all together"
        )
        parser.add_argument("--visibility", default="", choices=ServedModel.Visibility.values, help="who may use it")
        parser.add_argument("--default", action="store_true", help="serve requests that name no model with this one")
        parser.add_argument("--replace", action="store_true", help="take the place of the one that has this name")
        parser.add_argument("--background", action="store_true", help="leave the work to the web, and do not wait")

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        with interruptible():
            try:
                row = self._row(options)
                if not options["background"]:
                    self._bring(row)
            except RegistrationError as error:
                self.fail(error.code, error.message, fields=dict(error.fields))
            except KeyboardInterrupt:
                text = "Stopped; what has come is kept. The same command goes on with it."
                self.fail("interrupted", text, status=INTERRUPTED)
        if row.state == State.REFUSED:
            self.fail(row.problem_code, row.problem)
        if row.state == State.CANCELLED:
            self.fail("import_cancelled", "It was cancelled in the console.")
        return as_json(row)

    def _row(self, options: dict[str, Any]) -> ModelImport:
        """The one that was interrupted, else a new one. Raises RegistrationError."""
        url = desk.url_of(options["address"])
        base = model_named(self, options["adapter_of"]) if options["adapter_of"] else None
        name = options["name"] or name_at(url)
        begun = ModelImport.objects.filter(url=url, name=name, base_model=base, is_attended=True)
        found = begun.filter(state__in=ModelImport.OPEN).first()
        wanted = {
            "sha256": options["sha256"].lower(),
            "visibility": options["visibility"],
            "replaces": options["replace"],
            "is_default": options["default"],
        }
        if found is not None and not options["background"]:
            if any(getattr(found, name) != value for name, value in wanted.items()):
                text = f"It was begun with other options, as import {found.pk}: give the same, or end that one first"
                self.fail("conflict", f"{text} (`manage.py imports cancel {found.pk}`).")
            return found
        return desk.ask(
            desk.Asked(
                kind=ModelImport.Kind.ADAPTER if base else ModelImport.Kind.MODEL,
                name=name,
                url=url,
                base_model=base,
                is_attended=not options["background"],
                **wanted,
            )
        )

    def _bring(self, row: ModelImport) -> None:
        with quarantine.held(row.pk) as is_ours:
            if not is_ours:
                self.fail("conflict", "Another process fetches it already.")
            with following(self.console, hidden=self.as_json) as watch:
                importer.work(row, threading.Event(), watch=watch)
        row.refresh_from_db()

    def show(self, result: dict[str, Any]) -> None:
        if result["state"] == State.READY:
            self.stdout.write(
                f"{result['name']} is served: {result['received_bytes']:,} bytes, SHA-256 {result['digest']}."
            )
        else:
            self.stdout.write(
                f"{result['name']} is import {result['id']}: the web fetches it, the console shows how far."
            )


def name_at(url: str) -> str:
    """A name for what is there: the file's, without what says which part it is."""
    name = file_name(url)
    place = place_among(name)
    return place[0] if place else PurePosixPath(name).stem


def as_json(row: ModelImport) -> dict[str, Any]:
    shown = ("id", "kind", "name", "url", "state", "received_bytes", "digest")
    return {name: getattr(row, name) for name in shown}


@contextmanager
def following(console: Console, *, hidden: bool) -> Iterator[Watch]:
    """A bar with bytes, rate and the time that is left; silent where only a result is wanted."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=hidden or not console.is_terminal) as bar:
        task = bar.add_task("asking", total=None)

        def watch(row: ModelImport) -> None:
            done = row.received_bytes if row.state == State.RECEIVING else row.checked_bytes
            bar.update(task, completed=done, total=row.total_bytes, description=row.get_state_display().lower())

        yield watch

"""Register a GGUF file as a served model, or change one that is registered."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from django.core.management.base import CommandParser

from accounts.management.base import HouseCommand
from accounts.models import Tenant
from inference.catalog import model_rows
from inference.chat.prompt import MAX_TEMPLATE_BYTES
from inference.management.listing import as_row, hashing
from inference.models import ServedModel
from inference.vetting.inspection import RegistrationError


class Command(HouseCommand):
    help = "Register a GGUF file: read its header, hash it, load it once on trial, and serve it under a name."
    examples = (
        "register_model /models/SmolLM2-135M-Instruct-Q4_K_M.gguf --name smollm2 --default",
        "register_model /models/big.gguf --name big --n-ctx 8192 --n-slots 4 --n-gpu-layers -1 --kv-type q8_0",
        'register_model /models/private.gguf --name private --grant "Alice\'s" --json',
    )

    def add_arguments(self, parser: CommandParser) -> None:
        number = partial(parser.add_argument, type=int, metavar="N")
        parser.add_argument("path", help="the .gguf file, on the worker's disk")
        parser.add_argument("--name", help="what tenants write into `model`; the file's name without it")
        parser.add_argument("--alias", action="append", dest="aliases", metavar="NAME", help="another name; repeatable")
        parser.add_argument("--default", action="store_true", help="serve requests that name no model with this one")
        parser.add_argument("--visibility", choices=ServedModel.Visibility.values, help="every tenant, or granted ones")
        parser.add_argument(
            "--grant", action="append", metavar="TENANT", help="a tenant that may use it, and no other; repeatable"
        )
        parser.add_argument("--pool", help="the group of workers that holds it")
        number("--n-ctx", help="context of one slot, in tokens")
        number("--n-slots", help="sequences decoded at once")
        number("--n-threads", help="threads; one per core without it")
        number("--n-gpu-layers", help="layers on the GPU; -1: all")
        parser.add_argument("--kv-type", choices=ServedModel.KVType.values, help="type of the key-value cache")
        parser.add_argument("--draft-kind", choices=ServedModel.DraftKind.values, help="who guesses tokens, if anybody")
        parser.add_argument("--draft-model", metavar="NAME", help="the served model that guesses")
        number("--draft-n-min", help="shorter drafts are thrown away")
        number("--draft-n-max", help="guesses of a step at most")
        parser.add_argument("--draft-p-min", type=float, metavar="P", help="a draft model stops guessing below this")
        parser.add_argument(
            "--draft-policy", choices=ServedModel.DraftPolicy.values, help="draft as it pays, or always"
        )
        parser.add_argument("--load-mode", choices=ServedModel.LoadMode.values, help="when it is loaded, or not at all")
        number("--keep-alive-seconds", help="idle time after which it is unloaded")
        parser.add_argument(
            "--chat-template",
            metavar="FILE",
            help="Jinja to use in place of the file's own template; '' for the file's",
        )
        parser.add_argument("--notes", help="for operators")
        parser.add_argument("--force", action="store_true", help="inspect the file again although it looks unchanged")

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        given = {name: options[name] for name in model_rows.OPTIONS if options.get(name) is not None}
        if given.get("chat_template"):
            given["chat_template"] = self._read_template(Path(given["chat_template"]))
        tenants = self._tenants(options["grant"]) if options["grant"] else None
        if tenants:
            given.setdefault("visibility", ServedModel.Visibility.GRANTED)
        try:
            with hashing(self.console, hidden=self.as_json) as progress:
                row = model_rows.register(
                    options["path"],
                    options["name"] or Path(options["path"]).stem,
                    default=options["default"] or None,
                    granted_tenants=tenants,
                    progress=progress,
                    force=options["force"],
                    **given,
                )
        except RegistrationError as error:
            self.fail(error.code, error.message, fields=dict(error.fields))
        return as_row(row)

    def _read_template(self, path: Path) -> str:
        try:
            with path.open("rb") as file:
                return file.read(MAX_TEMPLATE_BYTES + 1).decode()
        except (OSError, UnicodeDecodeError) as error:
            self.fail("chat_template_unreadable", f"{path} cannot be read: {error}")

    def _tenants(self, names: list[str]) -> list[Tenant]:
        found = {tenant.name: tenant for tenant in Tenant.objects.filter(name__in=names)}
        for name in names:
            if name not in found:
                self.fail("tenant_not_found", f"There is no tenant {name!r}.")
        return list(found.values())

    def show(self, result: dict[str, Any]) -> None:
        self.stdout.write(
            f"{result['name']}: {result['quantization']}, {result['num_parameters']:,} parameters, "
            f"{result['n_slots']} slots of {result['n_ctx']} tokens, "
            f"about {result['memory_bytes'] / 1e6:,.0f} MB in the worker"
            f"{', the default' if result['default'] else ''}."
        )

"""Register a LoRA adapter for a served model, or change one that is registered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from django.core.management.base import CommandParser

from accounts.management.arguments import tenant_named
from accounts.management.base import HouseCommand
from inference.catalog import adapter_rows
from inference.management.listing import hashing
from inference.management.naming import as_adapter_row, model_named
from inference.models import Adapter
from inference.vetting.inspection import RegistrationError


class Command(HouseCommand):
    help = (
        "Register a LoRA adapter (GGUF) for a served model: compare both headers, hash the file, and prove in a child "
        "process that it changes what the model answers. Workers load it without a restart."
    )
    examples = (
        "register_adapter /models/shakespeare.gguf --model smollm2 --name shakespeare --shared",
        'register_adapter /models/support.gguf --model smollm2 --owner "Alice\'s" --default-scale 0.8',
        'register_adapter /models/json.gguf --model smollm2 --grant "Alice\'s" --json',
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("path", help="the .gguf file, on the worker's disk")
        parser.add_argument("--model", required=True, help="the name of the model that it was trained for")
        parser.add_argument("--name", help="what tenants write; the file's name without it")
        parser.add_argument("--default-scale", type=float, metavar="X", help="where a request names no scale")
        parser.add_argument("--owner", metavar="TENANT", help="the tenant that it was made for, which is granted it")
        parser.add_argument("--grant", action="append", metavar="TENANT", help="a tenant that may use it; repeatable")
        parser.add_argument("--shared", action="store_true", help="every tenant may use it")
        parser.add_argument("--force", action="store_true", help="check the file again although it looks unchanged")

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        base = model_named(self, options["model"])
        tenants = [tenant_named(self, name) for name in options["grant"] or ()]
        try:
            with hashing(self.console, hidden=self.as_json) as progress:
                row = adapter_rows.register(
                    options["path"],
                    base,
                    options["name"] or Path(options["path"]).stem,
                    granted_tenants=tenants,
                    progress=progress,
                    force=options["force"],
                    **self._given(options),
                )
        except RegistrationError as error:
            self.fail(error.code, error.message, fields=dict(error.fields))
        return as_adapter_row(row)

    def _given(self, options: dict[str, Any]) -> dict[str, Any]:
        given: dict[str, Any] = {}
        if options["default_scale"] is not None:
            given["default_scale"] = options["default_scale"]
        if options["owner"]:
            given["owner"] = tenant_named(self, options["owner"])
        if options["shared"]:
            given["visibility"] = Adapter.Visibility.SHARED
        return given

    def show(self, result: dict[str, Any]) -> None:
        users = "every tenant" if result["visibility"] == "shared" else ", ".join(result["granted"]) or "no tenant yet"
        self.stdout.write(
            f"{result['model']}:{result['name']}: rank {result['rank']} on {', '.join(result['targets'])}, "
            f"{result['size_bytes'] / 1e6:,.1f} MB, for {users}."
        )

"""Compute a request once more."""

from __future__ import annotations

import sys
from argparse import ArgumentTypeError
from dataclasses import asdict
from pathlib import Path
from typing import Any

from django.core.management.base import CommandParser

from accounts.management.base import HouseCommand
from accounts.management.help import DIFFERS
from inference.inquiry import replay
from inference.models import Receipt


def seconds(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found <= replay.TIMEOUT_SECONDS:
        raise ArgumentTypeError(f"{text!r} is no number of seconds up to {replay.TIMEOUT_SECONDS:.0f}")
    return found


class Command(HouseCommand):
    help = (
        "Compute a finished request once more, in this process, with the seed and the files of its receipt: the same "
        "tokens, or the reason why not. Prompts are not stored, so the body comes from you. Nothing is charged. The "
        "model is loaded here: it needs as much memory as in a worker."
    )
    examples = (
        "replay 0b6f3c9e-7f0e-4a44-8f1c-3f3b5f0f9d11 --body request.json",
        "replay 0b6f3c9e-7f0e-4a44-8f1c-3f3b5f0f9d11 --body request.json --text",
        "replay 0b6f3c9e-7f0e-4a44-8f1c-3f3b5f0f9d11 --json",
    )
    statuses = {
        0: "the same tokens",
        1: "it cannot be replayed; standard error says why",
        2: "other tokens, or unknown",
    }

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("request_id", help="the X-Request-ID of its answer")
        parser.add_argument("--body", default="-", metavar="FILE", help="the body as it was sent; - is standard input")
        parser.add_argument(
            "--timeout", type=seconds, default=replay.TIMEOUT_SECONDS, metavar="SECONDS", help="at most an hour"
        )
        parser.add_argument("--text", action="store_true", help="show the answer, too")

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        rows = Receipt.objects.select_related("key__tenant__plan")
        receipt = rows.filter(request_id=options["request_id"]).first()
        if receipt is None:
            self.fail("receipt_not_found", "There is no receipt of this request: it runs still, or never was.")
        try:
            done = replay.replay(receipt, self._body(options["body"]), timeout_seconds=options["timeout"])
        except replay.ReplayError as error:
            self.fail(error.code, str(error))
        self.exit_status = 0 if done.verdict == "same" else DIFFERS
        found = asdict(done)
        if not options["text"]:
            del found["text"]
        return found

    def _body(self, name: str) -> bytes:
        try:
            if name == "-":
                data = sys.stdin.buffer.read(replay.MAX_BODY_BYTES + 1)
            else:
                with Path(name).open("rb") as file:
                    data = file.read(replay.MAX_BODY_BYTES + 1)
        except OSError as error:
            self.fail("body_unreadable", f"{name} cannot be read: {error.strerror}")
        if len(data) > replay.MAX_BODY_BYTES:
            self.fail("body_too_large", f"The body is larger than {replay.MAX_BODY_BYTES >> 20} MiB.")
        return data

    def show(self, result: dict[str, Any]) -> None:
        words = {"same": "The same", "differs": "Not the same", "unknown": "Not known whether the same"}
        self.stdout.write(
            f"{words[result['verdict']]}: {result['completion_tokens']:,} tokens of {result['model']}, "
            f"seed {result['seed']}, {result['finish_reason']}."
        )
        if result["reason"]:
            self.stdout.write(result["reason"])
        if "text" in result:
            self.stdout.write(f"\n{result['text']}")

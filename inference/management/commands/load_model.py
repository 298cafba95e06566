"""Load a model before somebody asks for it."""

from __future__ import annotations

import time
from typing import Any

from django.core.management.base import CommandParser

from accounts.management.base import HouseCommand
from accounts.trail.refusals import Refusal
from inference.catalog.served import Served
from inference.management.naming import served_named
from inference.management.steps import following
from inference.transport import model_orders
from inference.transport.model_orders import ModelState
from inference.transport.queue import ticket_queue

LOOK_SECONDS = 0.2
DONE = ("ready", "failed", "off", "missing")


class Command(HouseCommand):
    help = "Have a worker load a model now, and wait until it has. A model that failed is tried again."
    examples = ("load_model smollm2", "load_model smollm2 --no-wait", "load_model smollm2 --seconds 600 --json")

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("name", help="the model's name or alias")
        parser.add_argument("--no-wait", action="store_true", help="end as soon as a worker has the order")
        parser.add_argument("--seconds", type=float, default=300.0, help="wait at most so long (default: 300)")

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        served = served_named(self, options["name"])
        try:
            was_loaded = not model_orders.load(served)
        except Refusal as refusal:
            self.fail(refusal.code, refusal.message)
        state = _state(served)
        if not options["no_wait"]:
            state = self._wait(served, options["seconds"])
            if state.state == "failed":
                self.fail("llm_unavailable", state.error)
            if not state.is_loaded:
                self.fail("service_unavailable", f"{served.name} is {state.state}, and not loaded in time.")
        return {"model": served.name, "already_loaded": was_loaded, "state": state.state}

    def _wait(self, served: Served, seconds: float) -> ModelState:
        """Until it is loaded, or has failed. What it was before the order came is still told for a heartbeat."""
        started = time.monotonic()
        with following(self.console, hidden=self.as_json) as watch:
            while True:
                state, waited = _state(served), time.monotonic() - started
                if state.is_loaded or waited > seconds or (state.state in DONE and waited > 2.0):
                    return state
                watch(f"{served.name} is {state.state}", state.progress or 0.0, 0, 1)
                time.sleep(LOOK_SECONDS)

    def show(self, result: dict[str, Any]) -> None:
        self.stdout.write(f"{result['model']} is {result['state']}.")


def _state(served: Served) -> ModelState:
    return model_orders.state_of(served, ticket_queue().workers())

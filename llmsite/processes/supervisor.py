"""`manage.py up`: the whole site on one machine, in one terminal, from one process that starts and watches the others.

One thread, one loop: it reads the children's output, sees them die, starts them again. It never imports Django, Redis
or a model; what needs those runs as a child. Order of start: Valkey, set-up, then web, worker and beat at once.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO

from accounts.management.help import epilog, parsed
from llmsite.config import BASE_DIR, Config, ConfigError, load
from llmsite.processes import probe, valkey
from llmsite.processes.child import Child, ChildPlan
from llmsite.processes.console import Console
from llmsite.processes.curl import demo_curl_line

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STOP_MARGIN_SECONDS = 3.0
READY_LOOK_SECONDS = 0.25
WORD_SECONDS = 5.0
FORGET_WORKER = """
for _, id in ipairs(redis.call('SMEMBERS', 'workers')) do
  if string.sub(id, 1, #ARGV[1]) == ARGV[1] then redis.call('DEL', 'worker:' .. id) end
end
return 1
"""
"""Ends the heartbeat of a dead worker (its worker.py names itself host-pid-...): its clients hear at once."""
EXIT_CONFIG = 78  # EX_CONFIG of <sysexits.h>


class StartError(Exception):
    """The site cannot be started; the message says what to do."""


class StopRequested(Exception):
    """Ctrl-C, TERM or the end of the terminal, while something was being waited for."""


EXAMPLES = ("up", "up --demo", "up --json")
STATUSES = {0: "told to stop, and stopped", 1: "the start failed; the last lines say why", 78: "the settings are wrong"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--demo", action="store_true", help="make demo tenants, keys and a small model, once")


def main(arguments: list[str]) -> int:
    """Run until told to stop; the exit status is 0 then, 1 if the start failed, 78 if the settings are wrong."""
    parser = argparse.ArgumentParser(
        prog="manage.py up",
        description="Start the web, a worker, beat and an embedded Valkey, and keep them running.",
        epilog=epilog(EXAMPLES, STATUSES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object a line in the place of lines for people")
    options = parsed(parser, arguments)
    console = Console.of_this_process(as_json=options.json)
    try:
        config = load()
    except ConfigError as error:
        console.say("The environment does not describe a server that can start:")
        for problem in error.problems:
            console.say(f"  - {problem}")
        return EXIT_CONFIG
    try:
        os.umask(0o077)  # everything in the state folder is this user's business alone
        with held_alone(config.state):
            return Supervisor(config, console, is_demo=options.demo).run()
    except (StartError, valkey.ValkeyError) as error:
        console.say(str(error))
        return 1


@contextlib.contextmanager
def held_alone(state: Path) -> Iterator[IO[str]]:
    """Hold STATE_DIR/lock for as long as this process lives. Raises StartError if another one has it."""
    try:
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = (state / "lock").open("a+")
    except OSError as error:
        raise StartError(f"STATE_DIR={state} cannot be written ({error.strerror}): choose another folder.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise StartError(
                f"A site already runs on {state} (process {owner}). Stop it, or choose another STATE_DIR and PORT."
            ) from None
        file.seek(0)
        file.truncate()
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield file


def refuse_taken_port(host: str, port: int) -> None:
    """Raises StartError where the web process could not listen."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe_socket:
        probe_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe_socket.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise StartError(f"Port {port} is taken: choose another one, such as PORT={port + 1}.") from error
            raise StartError(f"Cannot listen on HOST={host}, PORT={port}: {error.strerror}.") from error


class Supervisor:
    """The loop and the children. `run` is all there is to call."""

    def __init__(self, config: Config, console: Console, *, is_demo: bool) -> None:
        self.config = config
        self.console = console
        self.is_demo = is_demo
        self.metrics = config.state / "metrics"
        self.selector = selectors.DefaultSelector()
        self.wake_read, self.wake_write = socket.socketpair()
        self.children: list[Child] = []
        self.stop_signals = 0
        self.is_stopping = False

    def run(self) -> int:
        self._catch_signals()
        refuse_taken_port(self.config.host, self.config.port)
        self._clean_metrics()
        try:
            self._start()
            self._announce()
            self._wait(lambda: False)
        except StopRequested:
            self.console.say("Stopping.")
            return 0
        finally:
            self._stop()
        return 0

    # Start

    def _start(self) -> None:
        if not self.config.redis_url:
            self._start_valkey()
        self._set_up()
        for plan in (self._web(), self._worker(), self._beat()):
            self._launch(plan)

    def _start_valkey(self) -> None:
        plan = self._valkey_plan()
        valkey.prepare(plan)
        child = self._launch(
            ChildPlan(
                "valkey",
                plan.command(valkey.find_server()),
                self._env(),
                plan.folder,
                stop_seconds=10.0,
                signal_on_death=signal.SIGTERM,  # it writes its file to the disk and leaves at once
                is_noise=valkey.is_noise,
            )
        )
        deadline = time.monotonic() + 60.0
        while not valkey.answers(plan.socket):
            if child.failures > 2 or time.monotonic() > deadline:
                raise StartError(f"The embedded Valkey does not start; its data is in {plan.folder}.")
            if self.stop_signals:
                raise StopRequested
            self._turn(0.02)

    def _valkey_plan(self) -> valkey.ValkeyPlan:
        return valkey.ValkeyPlan(
            self.config.state / "valkey", self.config.embedded_valkey_socket, self.config.valkey_max_memory_mb
        )

    def _set_up(self) -> None:
        """Database, demo data, models.yaml: in a child, because it needs Django."""
        arguments = ["--demo"] if self.is_demo else []
        setup = Child(self._python("setup", "-m", "llmsite.processes.setup", *arguments, stop_seconds=5.0))
        self.children.append(setup)
        self._begin(setup)
        status: list[int] = []

        def has_ended() -> bool:
            found = self._ended(setup)
            status.extend([] if found is None else [found])
            return found is not None

        self._wait(has_ended)
        self.children.remove(setup)
        if status[0] != 0:
            raise StartError("Set-up failed (above): nothing was started. `manage.py doctor` looks for the cause.")

    def _announce(self) -> None:
        """Say when the site answers, and what to type."""
        started = time.monotonic()
        next_word = started + WORD_SECONDS
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.config.host, self.config.host)
        while not (found := probe.readiness(host, self.config.port)).is_ready:
            if time.monotonic() > next_word:
                seconds = time.monotonic() - started
                self.console.say(f"Not ready after {seconds:.0f} s: {found.reason or f'/readyz says {found.status}'}")
                next_word += WORD_SECONDS
            until = time.monotonic() + READY_LOOK_SECONDS
            self._wait(lambda until=until: time.monotonic() > until)  # type: ignore[misc]
        self.console.say(f"Ready: {self.config.base_url}  (admin: {self.config.base_url}/admin/). Ctrl-C stops it.")
        if self.is_demo and (line := demo_curl_line(self.config)):
            self.console.say(f"Try it:\n\n{line}\n")
            self.console.say(f"Keys and the admin's password: {self.config.state / 'demo.json'}")

    # The children

    def _web(self) -> ChildPlan:
        stop_seconds = self.config.drain_seconds + STOP_MARGIN_SECONDS
        return self._python("web", "-m", "llmsite.processes.web", stop_seconds=stop_seconds)

    def _worker(self) -> ChildPlan:
        stop_seconds = self.config.drain_seconds + STOP_MARGIN_SECONDS  # it ends itself a second earlier
        plan = self._python("worker", str(BASE_DIR / "manage.py"), "worker", stop_seconds=stop_seconds)
        return replace(plan, on_end=self._forget_worker)

    def _beat(self) -> ChildPlan:
        return self._python("beat", "-m", "llmsite.processes.beat", stop_seconds=5.0)

    def _python(self, name: str, *arguments: str, stop_seconds: float) -> ChildPlan:
        command = [sys.executable, *arguments]
        return ChildPlan(name, command, self._env(), BASE_DIR, stop_seconds, on_end=self._forget_metrics)

    def _env(self) -> dict[str, str]:
        env = {**os.environ, "PYTHONUNBUFFERED": "1", "PROMETHEUS_MULTIPROC_DIR": str(self.metrics)}
        env.setdefault("PYTHONWARNINGS", "ignore:You're running the worker with superuser privileges")
        if self.console.is_coloured:
            env.setdefault("LOG_FORMAT", "console")
        return env

    def _launch(self, plan: ChildPlan) -> Child:
        child = Child(plan)
        self.children.append(child)
        self._begin(child)
        return child

    def _begin(self, child: Child) -> None:
        child.start(time.monotonic())
        assert child.descriptor is not None
        self.selector.register(child.descriptor, selectors.EVENT_READ, child)

    def _begin_again(self, child: Child) -> None:
        """A machine that has no memory or no process numbers for a moment must not cost the other children."""
        try:
            self._begin(child)
        except (OSError, subprocess.SubprocessError) as error:
            now = time.monotonic()
            child.put_off(now)
            words = getattr(error, "strerror", None) or error
            pause = child.next_start_at - now
            self.console.say(f"{child.name} cannot be started ({words}); trying again in {pause:.1f} s.")

    # The loop

    def _wait(self, is_over: Callable[[], bool]) -> None:
        """Serve the children until `is_over`. Raises StopRequested at a signal."""
        while not is_over():
            if self.stop_signals:
                raise StopRequested
            self._turn(0.2)

    def _turn(self, timeout: float) -> None:
        """Relay what was written, see who died, start who is due."""
        now = time.monotonic()
        # Who stops starts nobody: those that have ended are not waited for.
        due = [child.next_start_at - now for child in self.children if not (child.is_running or self.is_stopping)]
        for key, _ in self.selector.select(max(0.0, min([timeout, *due]))):
            if key.data is None:
                with contextlib.suppress(BlockingIOError):
                    self.wake_read.recv(4096)
            else:
                self._relay(key.data)
        for child in self.children:
            if child.name != "setup":
                self._look_after(child)

    def _look_after(self, child: Child) -> None:
        status = self._ended(child)
        if self.is_stopping:
            return
        now = time.monotonic()
        if status is not None:
            pause = child.next_start_at - now
            self.console.say(f"{child.name} ended ({describe(status)}); starting it again in {pause:.1f} s.")
        elif not child.is_running and now >= child.next_start_at:
            self._begin_again(child)

    def _ended(self, child: Child) -> int | None:
        descriptor = child.descriptor
        if descriptor is None or child.process is None or child.process.poll() is None:
            return None
        self._relay(child)
        self.selector.unregister(descriptor)
        for line in child.lines.end():
            self.console.relay(child.name, line)
        return child.reap(time.monotonic())

    def _relay(self, child: Child) -> None:
        lines = child.read()
        for line in lines:
            self.console.relay(child.name, line)

    # Signals, stop, traces

    def _catch_signals(self) -> None:
        self.wake_read.setblocking(False)
        self.wake_write.setblocking(False)
        self.selector.register(self.wake_read, selectors.EVENT_READ, None)
        signal.set_wakeup_fd(self.wake_write.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)  # wakes the loop
        for number in STOP_SIGNALS:
            signal.signal(number, self._note_stop)

    def _note_stop(self, number: int, frame: object) -> None:
        self.stop_signals += 1

    def _stop(self) -> None:
        """Reversed order of start, but web before worker: no new work comes in while the worker ends the old."""
        self.is_stopping = True
        rank = {"setup": 0, "web": 1, "worker": 2, "beat": 3, "valkey": 4}
        for child in sorted(self.children, key=lambda one: rank[one.name]):
            self._stop_one(child)

    def _stop_one(self, child: Child) -> None:
        """TERM, then a bounded wait; a second Ctrl-C, or the end of the wait, kills."""
        child.terminate()
        deadline = time.monotonic() + child.plan.stop_seconds
        patience = self.stop_signals + 1
        while child.is_running:
            if time.monotonic() > deadline or (self.stop_signals >= patience and child.name != "valkey"):
                child.kill()
                deadline = float("inf")
                patience = sys.maxsize
            self._turn(0.1)
            if child.name == "setup":
                self._ended(child)

    def _clean_metrics(self) -> None:
        self.metrics.mkdir(parents=True, exist_ok=True, mode=0o700)
        for path in self.metrics.glob("*.db"):
            path.unlink()

    def _forget_worker(self, pid: int) -> None:
        """Do not wait for the heartbeat to run out: whoever reads a stream of it hears now."""
        self._forget_metrics(pid)
        if not self.is_stopping:
            name = f"{socket.gethostname()}-{pid}-"
            probe.redis_commands(self.config.redis(0), ("EVAL", FORGET_WORKER, "0", name), timeout_seconds=0.5)

    def _forget_metrics(self, pid: int) -> None:
        """Gauges of living processes alone are shown (prometheus_client.multiprocess.mark_process_dead)."""
        for path in self.metrics.glob(f"gauge_live*_{pid}.db"):
            path.unlink(missing_ok=True)


def describe(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"status {status}"
    try:
        return f"signal {signal.Signals(-status).name}"
    except ValueError:
        return f"signal {-status}"

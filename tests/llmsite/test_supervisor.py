"""The supervisor with real processes: who is started, restarted, stopped, and that nobody is left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmsite.config import Config
from llmsite.processes import supervisor
from tests.conftest import REPOSITORY, free_port
from tests.timing import PATIENCE_SECONDS

pytestmark = pytest.mark.integration


class Site:
    """A supervisor under test with its state folder and what it printed."""

    def __init__(self, state: Path, module: str = "tests.llmsite.stub_site", **environment: str) -> None:
        self.state = state
        self.port = free_port()
        self.log = state.with_suffix(".log")
        env = {name: value for name, value in os.environ.items() if name.lower() not in Config.model_fields}
        env |= {"STATE_DIR": str(state), "PORT": str(self.port), "HOST": "127.0.0.1", **environment}
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module],
                env=env,
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        return self.log.read_text()

    def pid(self, name: str) -> int:
        return int((self.state / f"{name}.pid").read_text())

    def pids(self) -> dict[str, int]:
        return {name: self.pid(name) for name in ("web", "worker", "beat", "grandchild")} | {"valkey": self.valkey()}

    def valkey(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        (found,) = [pid for pid in map(int, children) if Path(f"/proc/{pid}/comm").read_text().startswith("valkey")]
        return found

    def wait_until_ready(self) -> None:
        wait_until(lambda: "Ready: " in self.said, lambda: self.said)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(timeout=PATIENCE_SECONDS)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(
    is_true: Callable[[], bool], explain: Callable[[], str] = str, seconds: float = PATIENCE_SECONDS
) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.02)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    (tmp_path / "state").mkdir()
    site = Site(tmp_path / "state")
    try:
        site.wait_until_ready()
        yield site
    finally:
        site.stop()


def test_a_start_ends_with_a_word_and_lines_carry_the_name_of_the_child(site: Site) -> None:
    assert f"Ready: http://127.0.0.1:{site.port}" in site.said
    assert "web    | web is here" in site.said
    assert "worker | worker is here" in site.said


def test_the_embedded_valkey_is_private_and_durable(site: Site) -> None:
    path = site.state / "valkey" / "valkey.sock"
    assert path.stat().st_mode & 0o777 == 0o700
    assert path.parent.stat().st_mode & 0o777 == 0o700
    import redis

    with redis.Redis(unix_socket_path=str(path)) as connection:
        assert connection.config_get("appendonly") == {"appendonly": "yes"}
        assert connection.config_get("maxmemory") == {"maxmemory": str(256 * 1024**2)}
        connection.set("kept", "yes")
    site.stop()
    again = Site(site.state)
    try:
        again.wait_until_ready()
        with redis.Redis(unix_socket_path=str(path)) as connection:
            assert connection.get("kept") == b"yes"
    finally:
        again.stop()


def test_a_second_start_on_the_same_state_folder_is_refused(site: Site) -> None:
    second = Site(site.state)
    assert second.process.wait(timeout=PATIENCE_SECONDS) == 1
    assert f"already runs on {site.state} (process {site.process.pid})" in site.said
    assert is_alive(site.pid("web"))


def test_a_start_on_a_taken_port_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = Site(tmp_path / "state", PORT=str(port))
        assert refused.process.wait(timeout=PATIENCE_SECONDS) == 1
    assert f"Port {port} is taken" in refused.said
    assert not (tmp_path / "state" / "valkey").exists()


def test_wrong_settings_are_listed_and_nothing_is_started(tmp_path: Path) -> None:
    refused = Site(tmp_path / "state", PORT="70000", DRAIN_SECONDS="soon")
    assert refused.process.wait(timeout=PATIENCE_SECONDS) == supervisor.EXIT_CONFIG
    assert "- PORT: " in refused.said
    assert "- DRAIN_SECONDS: " in refused.said


def test_a_child_that_dies_is_started_again(site: Site) -> None:
    first, grandchild = site.pid("worker"), site.pid("grandchild")
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: site.pid("worker") != first and is_alive(site.pid("worker")), lambda: site.said)
    assert "worker ended (signal SIGKILL); starting it again in 0.2 s." in site.said
    assert not is_alive(grandchild)


def test_a_worker_that_ends_itself_because_it_is_stuck_is_started_again(site: Site) -> None:
    first = site.pid("worker")
    (site.state / "stuck").touch()
    wait_until(lambda: site.pid("worker") != first and is_alive(site.pid("worker")), lambda: site.said)
    assert "worker ended (status 75); starting it again in 0.2 s." in site.said


def test_valkey_is_started_again_too(site: Site) -> None:
    first = site.valkey()
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: "valkey ended" in site.said, lambda: site.said)
    from llmsite.processes import valkey

    wait_until(lambda: valkey.answers(site.state / "valkey" / "valkey.sock"), lambda: site.said)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stop_goes_from_the_web_to_valkey_and_leaves_nobody(site: Site, number: signal.Signals) -> None:
    pids = site.pids()
    site.process.send_signal(number)
    assert site.process.wait(timeout=PATIENCE_SECONDS) == 0
    assert (site.state / "order").read_text().split() == ["web", "worker", "beat"]
    assert not [name for name, pid in pids.items() if is_alive(pid)]


def test_a_child_that_does_not_leave_is_killed_in_bounded_time(site: Site) -> None:
    pids = site.pids()
    (site.state / "stubborn").touch()
    started = time.monotonic()
    assert site.stop() == 0
    assert time.monotonic() - started < 15, "each has a second"
    assert not [name for name, pid in pids.items() if is_alive(pid)]


def test_kill_9_of_the_supervisor_leaves_no_orphan(site: Site) -> None:
    pids = site.pids()
    site.process.kill()
    site.process.wait(timeout=PATIENCE_SECONDS)
    wait_until(
        lambda: not any(map(is_alive, pids.values())), lambda: str({n: p for n, p in pids.items() if is_alive(p)})
    )
    again = Site(site.state)  # the lock died with its holder
    try:
        wait_until(lambda: again.said.count("Ready: ") == 2, lambda: again.said)
    finally:
        again.stop()


def test_the_supervisor_is_small(site: Site) -> None:
    status = Path(f"/proc/{site.process.pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmRSS")]
    measured_too = 25 if "COVERAGE_PROCESS_CONFIG" in os.environ else 0  # coverage.py inside it
    assert int(line.split()[1]) < (40 + measured_too) * 1024


def test_gauges_of_the_dead_are_removed(site: Site) -> None:
    worker = site.pid("worker")
    (site.state / "metrics" / "old.db").touch()
    site.stop()
    again = Site(site.state)
    try:
        wait_until(lambda: again.said.count("Ready: ") == 2, lambda: again.said)
        assert not list((site.state / "metrics").iterdir()), worker
    finally:
        again.stop()

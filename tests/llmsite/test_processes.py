"""The parts of the supervisor one by one: lines, children, probes, lifelines, the embedded Valkey."""

from __future__ import annotations

import errno
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmsite.config import Config
from llmsite.processes import lifeline, probe, valkey
from llmsite.processes.child import FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, Child, ChildPlan, pause_before
from llmsite.processes.console import LONGEST_LINE_BYTES, Console, Lines
from llmsite.processes.curl import demo_curl_line
from llmsite.processes.supervisor import Supervisor, describe
from tests.conftest import REPOSITORY, VALKEY, free_port
from tests.llmsite.test_supervisor import is_alive, wait_until

pytestmark = pytest.mark.integration


# Console


def test_lines_are_cut_where_they_end_and_never_grow_without_bound() -> None:
    lines = Lines()
    assert lines.feed(b"one\ntw") == ["one"]
    assert lines.feed(b"o\r\n\xff\n") == ["two", "\ufffd"]
    assert lines.feed(b"x" * (LONGEST_LINE_BYTES + 1)) == ["x" * (LONGEST_LINE_BYTES + 1)]
    assert lines.feed(b"rest") == []
    assert lines.end() == ["rest"]
    assert lines.end() == []


def test_names_stand_in_a_column_and_are_coloured_on_terminals_alone() -> None:
    plain, coloured = io.StringIO(), io.StringIO()
    Console(plain).relay("web", "hello")
    assert plain.getvalue() == "web    | hello\n"
    Console(coloured, is_coloured=True).relay("web", "hello")
    assert coloured.getvalue() == "\x1b[36mweb    |\x1b[0m hello\n"


def test_output_that_nobody_reads_is_dropped() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    out = os.fdopen(write_end, "w")
    console = Console(out)
    console.say("lost")
    console.say("lost, too")
    assert console.is_gone
    with pytest.raises(BrokenPipeError):
        out.close()


def test_a_terminal_that_is_not_utf_8_ends_nothing() -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console = Console(out)
    console.relay("worker", "caf\u00e9 \ufffd")
    console.say("\u2192")
    assert out.buffer.getvalue() == b"worker | caf\\xe9 \\ufffd\n\\u2192\n"  # type: ignore[attr-defined]
    assert not console.is_gone


# Children


def supervisor_of(tmp_path: Path) -> tuple[Supervisor, io.StringIO]:
    out = io.StringIO()
    return Supervisor(Config(state_dir=tmp_path), Console(out), is_demo=False), out


def test_a_child_that_cannot_be_started_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without memory or process numbers for a moment: the others go on."""
    supervisor, out = supervisor_of(tmp_path)
    child = Child(plan_for("import time; time.sleep(60)", tmp_path))
    supervisor.children.append(child)

    def no_memory(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    with monkeypatch.context() as patched:
        patched.setattr(lifeline, "spawn", no_memory)
        supervisor._turn(0.0)
    assert "web cannot be started (Cannot allocate memory); trying again in 0.2 s." in out.getvalue()
    assert child.next_start_at > time.monotonic()
    assert child.failures == 1
    wait_until(lambda: supervisor._turn(0.01) or child.is_running)
    child.kill()
    wait_until(lambda: child.reap(time.monotonic()) is not None)


def test_a_supervisor_that_stops_waits_for_the_rest_without_haste(tmp_path: Path) -> None:
    """The processor is for the worker, which has answers to finish."""
    supervisor, _ = supervisor_of(tmp_path)
    supervisor.children.append(Child(plan_for("", tmp_path)))  # it has ended, and would be due if this were no stop
    supervisor.is_stopping = True
    started = time.monotonic()
    supervisor._turn(0.1)
    assert time.monotonic() - started > 0.09


def plan_for(script: str, tmp_path: Path, **more: Any) -> ChildPlan:
    return ChildPlan("web", [sys.executable, "-c", script], dict(os.environ), tmp_path, 1.0, **more)


def reaped(child: Child, now: float) -> int:
    wait_until(lambda: child.process is not None and child.process.poll() is not None)
    status = child.reap(now)
    assert status is not None
    return status


def test_pauses_double_and_are_bounded() -> None:
    assert [pause_before(failures) for failures in range(3)] == [
        FIRST_PAUSE_SECONDS,
        2 * FIRST_PAUSE_SECONDS,
        4 * FIRST_PAUSE_SECONDS,
    ]
    assert pause_before(1000) == LONGEST_PAUSE_SECONDS


def test_half_a_minute_of_health_forgives_earlier_deaths(tmp_path: Path) -> None:
    ended: list[int] = []
    child = Child(plan_for("raise SystemExit(3)", tmp_path, on_end=ended.append))
    for count in (1, 2, 3):
        child.start(now=100.0)
        assert reaped(child, now=101.0) == 3
        assert child.failures == count
    assert child.next_start_at == pytest.approx(101.0 + 4 * FIRST_PAUSE_SECONDS)
    child.start(now=200.0)
    reaped(child, now=231.0)
    assert child.next_start_at == pytest.approx(231.0 + FIRST_PAUSE_SECONDS)
    assert len(ended) == 4


def test_what_a_child_says_is_read_without_waiting_and_noise_is_left_out(tmp_path: Path) -> None:
    script = (
        "print('news'); print('noise'); import sys; sys.stdout.flush(); sys.stdin.read(); import time; time.sleep(60)"
    )
    child = Child(plan_for(script, tmp_path, is_noise=lambda line: line == "noise"))
    assert child.read() == []
    child.start(time.monotonic())
    lines: list[str] = []
    wait_until(lambda: lines.extend(child.read()) is None and bool(lines))
    assert lines == ["news"]
    assert child.reap(time.monotonic()) is None
    child.kill()
    assert reaped(child, time.monotonic()) == -signal.SIGKILL
    child.terminate()
    child.kill()  # of one that has ended: nothing happens


def test_an_exit_status_is_told_in_words() -> None:
    assert describe(3) == "status 3"
    assert describe(-9) == "signal SIGKILL"
    assert describe(-200) == "signal 200"


# Lifelines

PARENT = """
import signal, sys, time
sys.path.insert(0, {repository!r})
from llmsite.processes import lifeline
lifeline.TIED_BY_KERNEL = {by_kernel}
child = lifeline.spawn([sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


def descendants(pid: int) -> list[int]:
    """Children of any thread, and theirs."""
    children = [
        int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()
    ]
    return children + [each for child in children for each in descendants(child)]


@pytest.mark.parametrize("by_kernel", [True, False])
def test_a_child_does_not_outlive_its_parent(by_kernel: bool) -> None:
    script = PARENT.format(repository=str(REPOSITORY), by_kernel=by_kernel)
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    said = {parent.stdout.readline().strip(), parent.stdout.readline().strip()}
    assert "up" in said
    pids = descendants(parent.pid)
    assert len(pids) == (1 if by_kernel else 2)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not any(map(is_alive, pids)))


def test_a_child_whose_parent_is_gone_already_does_not_start() -> None:
    script = f"""
import os, sys
sys.path.insert(0, {str(REPOSITORY)!r})
from llmsite.processes import lifeline
os.getpid = lambda: 1  # as if the parent had died between fork and prctl
print(lifeline.spawn([sys.executable, "-c", "print('never')"]).wait())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(lifeline.ORPHANED)]


def test_the_watcher_passes_signals_on_and_the_exit_status_back() -> None:
    script = (
        "import signal, sys, time; signal.signal(15, lambda n, f: sys.exit(7)); print('up', flush=True); time.sleep(60)"
    )
    read_end, write_end = os.pipe()
    watcher = subprocess.Popen(
        [sys.executable, lifeline.__file__, str(read_end), "--", sys.executable, "-c", script],
        pass_fds=(read_end,),
        stdout=subprocess.PIPE,
    )
    os.close(read_end)
    assert watcher.stdout is not None
    assert watcher.stdout.readline() == b"up\n"
    watcher.terminate()
    assert watcher.wait(timeout=10) == 7
    watcher.stdout.close()
    os.close(write_end)


# Probes


@pytest.fixture
def answer() -> Iterator[Any]:
    """`answer(data)` gives the port of a server that answers one connection with those bytes."""
    listeners: list[socket.socket] = []

    def serve(data: bytes) -> int:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def once() -> None:
            link, _ = listener.accept()
            with link:
                link.recv(4096)
                link.sendall(data)

        threading.Thread(target=once, daemon=True).start()
        return int(listener.getsockname()[1])

    yield serve
    for listener in listeners:
        listener.close()


@pytest.mark.parametrize(
    ("data", "status", "reason"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n{}", 200, ""),
        (b'HTTP/1.1 503 x\r\n\r\n{"db": "ok", "redis": "ok", "llm": "loading"}', 503, "llm: loading"),
        (b'HTTP/1.1 503 x\r\n\r\n{"message": "soon"}', 503, "soon"),
        (b"HTTP/1.1 502 x\r\n\r\n<html>", 502, ""),
        (b"HTTP/1.1 503 x\r\n\r\n[]", 503, ""),
        (b"SSH-2.0", 0, "the web process does not speak HTTP"),
    ],
)
def test_readiness_is_read_from_whatever_answers(answer: Any, data: bytes, status: int, reason: str) -> None:
    found = probe.readiness("127.0.0.1", answer(data))
    assert (found.status, found.reason, found.is_ready) == (status, reason, status == 200)


def test_nobody_answering_is_not_ready() -> None:
    assert probe.readiness("127.0.0.1", free_port()).status == 0
    assert probe.readiness("::1", free_port()).status == 0


def test_redis_commands_go_over_a_plain_socket(valkey_connection: Any) -> None:
    valkey_connection.set("worker:one", "x")
    assert probe.redis_commands(f"unix://{VALKEY.socket}?db=0", ("DEL", "worker:one"), ("PING",))
    assert not valkey_connection.exists("worker:one")
    assert not probe.redis_commands(f"unix://{VALKEY.socket}", ("NO-SUCH-COMMAND",))
    assert not probe.redis_commands("unix:///nowhere.sock", ("PING",))
    assert not probe.redis_commands("rediss://localhost", ("PING",))


def test_redis_commands_log_in_and_choose_the_database(answer: Any) -> None:
    assert probe.redis_commands(f"redis://user:pass%21@127.0.0.1:{answer(b'+OK' + bytes([13, 10]))}/0") is False
    port = answer(b"+OK\r\n+OK\r\n:1\r\n")
    assert probe.redis_commands(f"redis://user:pass@127.0.0.1:{port}/3", ("DEL", "a"))


# Valkey


def test_a_server_on_the_path_is_taken_where_the_package_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert valkey.find_server().name.startswith("valkey")
    monkeypatch.setattr(valkey, "CARRIER", "no_such_package")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(valkey.ValkeyError, match="REDIS_URL"):
        valkey.find_server()
    server = tmp_path / "redis-server"
    server.touch(mode=0o755)
    assert valkey.find_server() == server


def test_finding_the_server_does_not_load_the_packages_client() -> None:
    script = (
        "import sys; from llmsite.processes import valkey; print(valkey.find_server()); print('valkey' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    path, is_loaded = done.stdout.split()
    assert Path(path).exists()
    assert is_loaded == "False"


def test_a_socket_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    plan = valkey.ValkeyPlan(tmp_path / "data", tmp_path / "link" / "valkey.sock")
    with pytest.raises(valkey.ValkeyError, match="belongs to somebody else"):
        valkey.prepare(plan)


def test_a_server_that_ends_at_once_is_told(tmp_path: Path) -> None:
    plan = valkey.ValkeyPlan(tmp_path, tmp_path / "valkey.sock")
    with pytest.raises(valkey.ValkeyError, match="ended at once"):
        valkey.wait_until_it_answers(plan, lambda: False)
    with pytest.raises(valkey.ValkeyError, match="did not answer"):
        valkey.wait_until_it_answers(plan, lambda: True, timeout_seconds=0.05)


def test_a_data_folder_too_deep_for_a_socket_still_serves(tmp_path: Path) -> None:
    config = Config(state_dir=tmp_path / ("deep" * 30))
    plan = valkey.ValkeyPlan(config.state / "valkey", config.embedded_valkey_socket)
    server = valkey.start(plan, output=subprocess.DEVNULL)
    try:
        valkey.wait_until_it_answers(plan, lambda: server.poll() is None)
        assert plan.socket.parent.stat().st_mode & 0o777 == 0o700
    finally:
        server.terminate()
        server.wait(timeout=5)
        plan.socket.parent.rmdir()


# What is printed, what is served


def test_the_line_to_paste_holds_the_first_tenants_key(tmp_path: Path) -> None:
    config = Config(state_dir=tmp_path, port=8123)
    assert demo_curl_line(config) == ""
    (tmp_path / "demo.json").write_text('{"tenants": [{"api_key": "llms_a"}]}')
    line = demo_curl_line(config)
    assert line.startswith("curl -s http://127.0.0.1:8123/v1/generate -H 'Authorization: Bearer llms_a'")


def test_uvicorn_is_bounded() -> None:
    from llmsite.guard import HeaderDeadlineProtocol
    from llmsite.processes.web import server_config

    options = server_config(Config(drain_seconds=7, trusted_proxies=["10.0.0.0/8"]))
    assert options.timeout_graceful_shutdown == 7
    assert options.limit_concurrency == 2048
    assert options.http is HeaderDeadlineProtocol
    assert options.proxy_headers is True
    assert options.forwarded_allow_ips == ["10.0.0.0/8"]
    assert server_config(Config()).proxy_headers is False


@pytest.mark.parametrize("module", ["llmsite.processes.web", "llmsite.processes.beat"])
def test_every_process_refuses_wrong_settings(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module], env={**os.environ, "PORT": "x"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 78
    assert "PORT: " in done.stderr
    assert "Traceback" not in done.stderr


def test_beat_rings_for_the_sweep_and_is_patient_and_small(valkey_connection: Any, tmp_path: Path) -> None:
    env = {**os.environ, "STATE_DIR": str(tmp_path)}
    script = (
        "from llmsite.processes import beat; beat.SWEEP_SECONDS = beat.SCHEDULE['sweep']['schedule'] = 1; beat.main()"
    )
    started = subprocess.Popen([sys.executable, "-c", script], env=env, cwd=REPOSITORY)
    try:
        queue = "llmsite:housekeeping"
        wait_until(lambda: valkey_connection.llen(queue) >= 3, lambda: str(valkey_connection.keys()))
        assert b"inference.sweep" in valkey_connection.lindex(queue, 0)
        time.sleep(2.5)
        assert valkey_connection.llen(queue) == 3  # nobody takes them
        modules = Path(f"/proc/{started.pid}/status").read_text()
        (line,) = [line for line in modules.splitlines() if line.startswith("VmRSS")]
        assert int(line.split()[1]) < 70 * 1024
    finally:
        started.terminate()
        assert started.wait(timeout=10) == 0

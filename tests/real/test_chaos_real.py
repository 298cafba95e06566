"""Kills of everything under load: nothing is lost, nothing is charged twice, no word is told to another.

CHAOS_SECONDS and CHAOS_CLIENTS set how long and how many (12 s, 8 clients); SOAK_SECONDS how long memory is watched
(6 s).
"""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import statistics
import time
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from tests.conftest import Site, manage, running_site
from tests.llmsite.test_processes import descendants
from tests.llmsite.test_supervisor import wait_until
from tests.mixed_load import MixedLoad
from tests.real.test_resume_real import command
from tests.timing import Stopwatch

pytestmark = [pytest.mark.integration, pytest.mark.model, pytest.mark.slow]

SECONDS = int(os.environ.get("CHAOS_SECONDS", "12"))
CLIENTS = int(os.environ.get("CHAOS_CLIENTS", "8"))
SOAK_SECONDS = int(os.environ.get("SOAK_SECONDS", "6"))
EVERY_SECONDS = max(4.0, min(20.0, SECONDS / 15))
QUIET_SECONDS = 30.0
PROCESSES = {"worker": b"manage.py\0worker", "web": b"llmsite.processes.web", "valkey": b"valkey-server"}
MORE_FILES = CLIENTS if SOAK_SECONDS >= 1800 else 4 * CLIENTS
"""Connections of threads that have something to do for the first time; in the short form they all are."""
SLOPE_MIB = 1.0
"""In ten minutes, of each process, once it is warm."""


def process(site: Site, name: str) -> int:
    """Its id, once the supervisor has it again."""
    found: list[int] = []

    def is_there() -> bool:
        found[:] = [pid for pid in descendants(site.process.pid) if PROCESSES[name] in command(pid)]
        return bool(found)

    wait_until(is_there, seconds=60)
    return found[0]


def disaster(site: Site, kind: str) -> None:
    name, _, how = kind.partition(" ")
    pid = process(site, name)
    if how == "stop":
        os.kill(pid, signal.SIGSTOP)
        time.sleep(min(10.0, EVERY_SECONDS))
        os.kill(pid, signal.SIGCONT)
    else:
        os.kill(pid, {"kill": signal.SIGKILL, "term": signal.SIGTERM}[how])


BACK_SECONDS = 10.0
"""After a kill of the worker a request is answered again."""


def seconds_until_answered(site: Site) -> float:
    began, watch = time.monotonic(), Stopwatch()
    body = {"prompt": "still there?", "max_new_tokens": 1, "cache": False}
    with httpx.Client(base_url=site.base_url, headers=site.headers(site.key), timeout=60) as client:
        while client.post("/v1/generate", json=body).status_code != 200:
            assert time.monotonic() - began < 60
            time.sleep(0.05)
    return watch.seconds()


DISASTERS = ("worker kill", "web kill", "valkey term", "worker term", "worker stop", "valkey kill")


@pytest.mark.timeout(SECONDS * 2 + 300)
def test_kills_of_everything_lose_nothing_and_charge_nothing_twice(tmp_path: Path) -> None:
    with running_site(tmp_path / "state", DRAIN_SECONDS="5") as site:
        disaster(site, "worker kill")
        back_after = seconds_until_answered(site)
        load = MixedLoad(site.base_url, [site.key, site.other_key], CLIENTS)
        draw = random.Random(6)
        began, number, done = time.monotonic(), 0, []
        load.start()
        try:
            while time.monotonic() - began < SECONDS:
                time.sleep(EVERY_SECONDS)
                done.append(DISASTERS[number] if number < len(DISASTERS) else draw.choice(DISASTERS))
                disaster(site, done[-1])
                number += 1
        finally:
            load.stop(150.0)
        wait_until(lambda: is_ready(site), seconds=60)
        ready_at = time.monotonic()
        print(f"{done}; {len(load.accepted)} requests; {dict(load.outcomes)}; answered again after {back_after:.1f} s")
        assert back_after < BACK_SECONDS
        assert not load.wrong, "\n".join(load.wrong)
        assert any(outcome.endswith((" 200", " whole")) for outcome in load.outcomes), load.outcomes
        states = wait_for_ends(site, load.accepted)
        assert time.monotonic() - ready_at < QUIET_SECONDS
        lost = {request_id for request_id, state in states.items() if state in ("waiting", "running", "404")}
        assert not lost, f"{len(lost)} of {len(states)} requests have no end: {sorted(lost)[:5]}"
        proof = manage(site, "audit_ledger")
        assert proof["clean"], proof
        assert num_open(site) == 0


def is_ready(site: Site) -> bool:
    try:
        return httpx.get(f"{site.base_url}/readyz", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def state_of(client: httpx.Client, request_id: str) -> str:
    answer = client.get(f"/v1/requests/{request_id}")
    if answer.status_code != 200:
        return str(answer.status_code)
    return str(answer.json()["status"]) if "receipt" in answer.json() else "running"


def wait_for_ends(site: Site, accepted: set[str]) -> dict[str, str]:
    """Of each its last state; those that have none after QUIET_SECONDS as they are."""
    states: dict[str, str] = dict.fromkeys(accepted, "waiting")
    deadline = time.monotonic() + QUIET_SECONDS
    clients = [
        httpx.Client(base_url=site.base_url, headers=site.headers(key), timeout=20)
        for key in (site.key, site.other_key)
    ]
    while time.monotonic() < deadline:
        waiting = [each for each, state in states.items() if state in ("waiting", "running", "404")]
        if not waiting:
            break
        for request_id in waiting:
            found = {state_of(client, request_id) for client in clients} - {"404"}
            states[request_id] = found.pop() if found else "404"
        time.sleep(0.2)
    for client in clients:
        client.close()
    return states


def num_open(site: Site) -> int:
    """Tokens that are still reserved, of everybody."""
    with closing(sqlite3.connect(site.state / "db.sqlite3", timeout=10)) as database:
        return int(database.execute("select sum(reserved_tokens) from accounts_quotaperiod").fetchone()[0])


# Soak


@pytest.mark.memory
@pytest.mark.timeout(SOAK_SECONDS + 300)
def test_memory_descriptors_and_connections_stay_flat_under_mixed_load(tmp_path: Path) -> None:
    with running_site(tmp_path / "state") as site:
        load = MixedLoad(site.base_url, [site.key, site.other_key], CLIENTS)
        load.start()
        samples: list[dict[str, tuple[float, int]]] = []
        try:
            time.sleep(SOAK_SECONDS / 4)  # pools and caches fill up
            wait_until(lambda: load.outcomes.total() >= 4 * CLIENTS, seconds=90)
            began = time.monotonic()
            while time.monotonic() - began < SOAK_SECONDS * 3 / 4:
                samples.append({name: size_of(process(site, name)) for name in PROCESSES})
                time.sleep(max(0.5, SOAK_SECONDS / 200))
            seconds = time.monotonic() - began
        finally:
            load.stop()
    assert not load.wrong, "\n".join(load.wrong)
    for name in PROCESSES:
        memory = [sample[name][0] for sample in samples]
        files = [sample[name][1] for sample in samples]
        fifth = max(1, len(samples) // 5)
        grown = statistics.median(memory[-fifth:]) - statistics.median(memory[:fifth])
        slope = grown / (seconds * 0.8) * 600
        sizes = f"{memory[0]:.0f} to {memory[-1]:.0f} MiB ({slope:+.2f} in 10 min)"
        print(f"{name}: {sizes}, {files[0]} to {files[-1]} descriptors")
        assert statistics.median(files[-fifth:]) <= statistics.median(files[:fifth]) + MORE_FILES, f"{name}: {files}"
        assert slope < SLOPE_MIB or SOAK_SECONDS < 1800, f"{name}: {[round(each, 1) for each in memory]}"
    print(dict(load.outcomes))


def size_of(pid: int) -> tuple[float, int]:
    """Resident MiB, and open descriptors, connections among them."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20), len(list(Path(f"/proc/{pid}/fd").iterdir()))

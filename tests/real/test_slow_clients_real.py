"""Many clients at once that send slowly, or do not read: what the others notice, and what is left afterwards (R24).

SLOW_CLIENTS sets how many begin headers that do not end (30); a sixth of that send a body a byte a second, as many
read nothing of a stream.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from llmsite.demo import MODEL_SLOTS
from tests.conftest import Site, running_site
from tests.in_process import wait_until
from tests.real.test_chaos_real import process, size_of
from tests.timing import Stopwatch

pytestmark = [pytest.mark.integration, pytest.mark.model, pytest.mark.slow, pytest.mark.memory]

SLOW_CLIENTS = int(os.environ.get("SLOW_CLIENTS", "30"))
FEW = max(2, SLOW_CLIENTS // 6)
BODY_SECONDS = 4.0
"""BODY_TIMEOUT_SECONDS of the site."""
NETWORK_BYTES = 536
"""Of a segment, the least that every network carries. On loopback they are so large that the kernel takes
megabytes for who does not read."""
CLOSED_SECONDS = 1.0
"""After BODY_TIMEOUT_SECONDS a slow sender is closed by then."""
FREE_SECONDS = 30.0
"""A slot whose reader does not read is free again by then; most of it goes by until the buffers are full."""
MORE_MIB, MORE_SOCKETS = 30.0, 16
"""Memory while they are there, and sockets afterwards: two to Valkey of each of the web's threads, which stay."""
NUM_OTHERS = 2
"""Connections of those who are not slow."""
SLOWER, SECONDS_BESIDE_SENDERS = 1.5, 0.25
"""Others wait so many times as long as alone (p95), or so many seconds."""
SLOWER_FOR_READERS, SECONDS_BESIDE_READERS = 3.0, 1.5
"""The same beside streams that fill every slot."""
STREAM: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Count."}],
    "max_tokens": 2000,
    "temperature": 0,
    "ignore_eos": True,
    "context_shift": True,
    "stream": True,
    "logprobs": True,
    "top_logprobs": 20,
}
"""Some two kilobytes a token."""


@dataclass
class Slow:
    """A client. later: what it sends, a byte a second; seconds: after so many it was closed."""

    connection: socket.socket
    later: bytes = b""
    reads: bool = True
    began: float = field(default_factory=time.monotonic)
    seconds: float = math.inf
    answer: bytes = b""

    def look(self) -> None:
        """Whether the other side has closed. One that does not read is looked at only then."""
        try:
            if self.reads:
                while part := self.connection.recv(4096):
                    self.answer += part
        except BlockingIOError:
            return
        except OSError as error:
            self.answer += repr(error).encode()
        self.seconds = time.monotonic() - self.began


class Crowd(threading.Thread):
    """All of them, in one thread, until the last is closed."""

    def __init__(self, site: Site) -> None:
        super().__init__(daemon=True)
        self._address = ("127.0.0.1", int(site.base_url.rsplit(":", 1)[1]))
        self._head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        self._head += f"Authorization: Bearer {site.key}\r\n".encode()
        self.all: list[Slow] = []

    def send_headers(self, number: int) -> None:
        self._begin(number, self._head + b"X-Slow: ", later=b"x" * 600)

    def send_bodies(self, number: int) -> None:
        self._begin(number, self._head + b"Content-Length: 600\r\n\r\n", later=b" " * 600)

    def read_nothing(self, number: int) -> None:
        body = orjson.dumps(STREAM)
        self._begin(number, self._head + b"Content-Length: %d\r\n\r\n" % len(body) + body, reads=False)

    def _begin(self, number: int, text: bytes, **how: Any) -> None:
        for _ in range(number):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, NETWORK_BYTES)
            connection.connect(self._address)
            connection.sendall(text)
            connection.setblocking(False)
            self.all.append(Slow(connection, **how))

    def run(self) -> None:
        poll, by_number = select.poll(), {}
        for each in self.all:
            by_number[each.connection.fileno()] = each
            poll.register(each.connection, select.POLLIN if each.reads else select.POLLRDHUP)
        next_byte = time.monotonic() + 1.0
        while by_number:
            for number, _ in poll.poll(50):
                each = by_number[number]
                each.look()
                if each.seconds < math.inf:
                    poll.unregister(number)
                    del by_number[number]
            if time.monotonic() >= next_byte:
                next_byte += 1.0
                for each in by_number.values():
                    send_a_byte(each)

    def close(self) -> None:
        for each in self.all:
            each.connection.close()


def send_a_byte(slow: Slow) -> None:
    if slow.later:
        try:
            slow.connection.send(slow.later[:1])
        except OSError:
            return  # closed meanwhile: the next look sees it
        slow.later = slow.later[1:]


def short(client: httpx.Client, every_seconds: float) -> float:
    """Seconds of a request as others send them; not those that the machine was busy with other tests."""
    body = {"prompt": "One plus", "max_new_tokens": 1, "temperature": 0, "cache": False}
    started, watch = time.monotonic(), Stopwatch()
    answer = client.post("/v1/generate", json=body)
    seconds = watch.seconds()
    assert answer.status_code == 200, answer.text
    time.sleep(max(0.0, every_seconds - (time.monotonic() - started)))
    return seconds


def p95(values: list[float]) -> float:
    return sorted(values)[max(0, math.ceil(0.95 * len(values)) - 1)]


def num_connections(site: Site) -> int:
    """That the web has on its port."""
    port = int(site.base_url.rsplit(":", 1)[1])
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[1].endswith(f":{port:04X}") and row[3] == "01" for row in rows)


def num_sockets(pid: int) -> int:
    """That a process has open; a thread that meets SQLite for the first time opens files beside."""
    links = []
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            links.append(str(each.readlink()))
    return sum(link.startswith("socket:") for link in links)


def slots_in_use(client: httpx.Client) -> int:
    return sum(slot["is_processing"] for slot in client.get("/slots").json())


@dataclass
class Seen:
    """What others saw beside a crowd, and what it took (MiB at most) and left."""

    waits: list[float]
    memory: float
    more_sockets: int


def beside(site: Site, client: httpx.Client, every_seconds: float, crowd: Crowd, **numbers: int) -> Seen:
    """numbers: how many do what, by the method of the crowd."""
    web, waits = process(site, "web"), []
    before, sockets = size_of(web)[0], num_sockets(web)
    most = before
    for name, number in numbers.items():
        getattr(crowd, name)(number)
    crowd.start()
    while crowd.is_alive():
        waits.append(short(client, every_seconds))
        most = max(most, size_of(web)[0])
    wait_until(lambda: num_connections(site) <= NUM_OTHERS)
    crowd.close()
    return Seen(waits, most - before, num_sockets(web) - sockets)


@pytest.mark.timeout(240 + 2 * SLOW_CLIENTS)
def test_many_slow_clients_at_once_are_closed_and_the_others_hardly_notice(tmp_path: Path) -> None:
    with (
        running_site(tmp_path / "state", BODY_TIMEOUT_SECONDS=f"{BODY_SECONDS:g}") as site,
        httpx.Client(base_url=site.base_url, headers=site.headers(), timeout=60) as same,
        httpx.Client(base_url=site.base_url, headers=site.headers(site.other_key), timeout=60) as other,
    ):
        with ThreadPoolExecutor(32) as pool:  # threads and their connections are there from now on
            list(pool.map(lambda _: httpx.get(f"{site.base_url}/v1/me", headers=site.headers()), range(64)))
        idle = [short(same, 0.1) for _ in range(40)]
        slow_senders, no_readers = Crowd(site), Crowd(site)
        senders = beside(site, same, 0.1, slow_senders, send_headers=SLOW_CLIENTS, send_bodies=FEW)
        short(other, 0.1)
        readers = beside(site, other, 0.6, no_readers, read_nothing=FEW)  # its plan lets it ask 120 times a minute
        wait_until(lambda: not any(slot["is_processing"] for slot in same.get("/slots").json()))
    for name, seen, crowd in (("senders", senders, slow_senders), ("readers", readers, no_readers)):
        print(
            f"{len(crowd.all)} slow {name}: closed after {max(each.seconds for each in crowd.all):.1f} s at most; "
            f"others p95 {p95(seen.waits):.3f} s, median {statistics.median(seen.waits):.3f} s of {len(seen.waits)}; "
            f"alone {p95(idle):.3f}, {statistics.median(idle):.3f} s; "
            f"{seen.memory:+.1f} MiB, {seen.more_sockets:+d} sockets"
        )
    assert all(each.answer.startswith(b"HTTP/1.1 408 ") for each in slow_senders.all)
    assert max(each.seconds for each in slow_senders.all) < BODY_SECONDS + CLOSED_SECONDS
    assert p95(senders.waits) < max(SLOWER * p95(idle), SECONDS_BESIDE_SENDERS)
    turns = math.ceil(FEW / MODEL_SLOTS)
    assert max(each.seconds for each in no_readers.all) < turns * FREE_SECONDS
    assert p95(readers.waits) < max(SLOWER_FOR_READERS * p95(idle), SECONDS_BESIDE_READERS)
    assert max(senders.memory, readers.memory) < MORE_MIB
    assert max(senders.more_sockets, readers.more_sockets) <= MORE_SOCKETS

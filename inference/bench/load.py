"""The load generator: closed-loop clients on kept-alive connections, in a process of its own.

`run_load` (called by the benchmark) starts `python -m inference.bench.load`, which reads one LoadJob from standard
input and writes one LoadResult to standard output, both JSON. Django is never imported here.
"""

from __future__ import annotations

import asyncio
import gc
import json
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from itertools import count

import uvloop

from inference.bench.wire import Answer, Connection, render_request

NUMBER = "@N@"
"""Where this stands in a body, each request gets a number of its own."""
MAX_ERRORS = 50
MAX_ERROR_SAMPLES = 5
GRACE_SECONDS = 90.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadJob:
    """What to send, by how many clients, for how long.

    bodies: JSON texts, taken in turn. marker: what the first token looks like in a stream. expect: what each answer
    must contain. Answers that arrive in the first warmup_seconds are checked and not counted. max_requests bounds the
    job by number as well (0: no bound).
    """

    port: int
    path: str
    bodies: list[str]
    clients: int
    seconds: float
    host: str = "127.0.0.1"
    headers: dict[str, str] = field(default_factory=dict)
    warmup_seconds: float = 0.0
    marker: str = ""
    expect: str = ""
    max_requests: int = 0
    first_number: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadResult:
    """latencies and firsts in seconds, in order of arrival; window_seconds is the time in which they arrived.

    num_sent counts all answers, those of the warm-up too; cpu_seconds is the load generator's own.
    """

    latencies: list[float]
    firsts: list[float]
    num_sent: int
    num_errors: int
    errors: list[str]
    window_seconds: float
    cpu_seconds: float

    @property
    def rate(self) -> float:
        """Answers a second."""
        return len(self.latencies) / self.window_seconds if self.window_seconds > 0 else 0.0


class LoadFailed(Exception):
    """The load generator itself did not work."""


def run_load(job: LoadJob) -> LoadResult:
    """Run a job in a fresh process. Raises LoadFailed."""
    limit_seconds = job.warmup_seconds + job.seconds + GRACE_SECONDS
    try:
        done = subprocess.run(
            [sys.executable, "-m", "inference.bench.load"],
            input=json.dumps(asdict(job)),
            capture_output=True,
            text=True,
            timeout=limit_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise LoadFailed(f"the load generator did not end within {limit_seconds:.0f} s") from error
    if done.returncode != 0:
        raise LoadFailed(f"the load generator ended with {done.returncode}: {done.stderr[-500:]}")
    return LoadResult(**json.loads(done.stdout))


class _Load:
    """One running job."""

    def __init__(self, job: LoadJob) -> None:
        self.job = job
        self.numbers = count(job.first_number)
        self.latencies: list[float] = []
        self.firsts: list[float] = []
        self.errors: list[str] = []
        self.num_sent = 0
        self.num_errors = 0

    async def run(self) -> LoadResult:
        self.counted_from = time.perf_counter() + self.job.warmup_seconds
        self.until = self.counted_from + self.job.seconds
        await asyncio.gather(*(self._client() for _ in range(self.job.clients)))
        ended = min(time.perf_counter(), self.until) if not self.job.max_requests else time.perf_counter()
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return LoadResult(
            latencies=self.latencies,
            firsts=self.firsts,
            num_sent=self.num_sent,
            num_errors=self.num_errors,
            errors=self.errors,
            window_seconds=ended - self.counted_from,
            cpu_seconds=usage.ru_utime + usage.ru_stime,
        )

    async def _client(self) -> None:
        connection: Connection | None = None
        while (number := self._next_number()) is not None:
            try:
                if connection is None or not connection.usable:
                    connection = await Connection.open(self.job.host, self.job.port)
                answer = await connection.send(self._request(number), self.job.marker.encode())
            except (OSError, TimeoutError, ValueError) as error:
                self._blame(f"{type(error).__name__}: {error}")
                connection = None
                await asyncio.sleep(0.01)
                continue
            self._note(answer)
        if connection is not None:
            connection.close()

    def _next_number(self) -> int | None:
        if time.perf_counter() >= self.until or self.num_errors >= MAX_ERRORS:
            return None
        number = next(self.numbers)
        if self.job.max_requests and number >= self.job.first_number + self.job.max_requests:
            return None
        return number

    def _request(self, number: int) -> bytes:
        job = self.job
        body = job.bodies[number % len(job.bodies)].replace(NUMBER, str(number)).encode()
        return render_request("POST", job.path, f"{job.host}:{job.port}", job.headers, body)

    def _note(self, answer: Answer) -> None:
        self.num_sent += 1
        problem = self._problem(answer)
        if problem:
            self._blame(problem)
            return
        if self.counted_from <= time.perf_counter() <= self.until:
            self.latencies.append(answer.seconds)
            if answer.first_seconds is not None:
                self.firsts.append(answer.first_seconds)

    def _problem(self, answer: Answer) -> str | None:
        start = answer.body[:200].decode(errors="replace")
        if answer.status != 200:
            return f"status {answer.status}: {start}"
        if self.job.expect and self.job.expect.encode() not in answer.body:
            return f"the answer lacks {self.job.expect!r}: {start}"
        if self.job.marker and answer.first_seconds is None:
            return f"no first token ({self.job.marker!r}): {start}"
        return None

    def _blame(self, problem: str) -> None:
        self.num_errors += 1
        if len(self.errors) < MAX_ERROR_SAMPLES:
            self.errors.append(problem)


def main() -> None:
    job = LoadJob(**json.load(sys.stdin))
    gc.freeze()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        result = runner.run(_Load(job).run())
    json.dump(asdict(result), sys.stdout)


if __name__ == "__main__":
    main()

"""Clients that read streams of tokens, in a process of their own: the same code for every server.

`run_streams` starts `python -m inference.bench.servers.streams`, which reads one StreamJob from standard input and
writes one StreamResult to standard output, both JSON. While tokens arrive their bytes are only stamped; they are parsed
when the request has ended. Django is never imported here.
"""

from __future__ import annotations

import asyncio
import gc
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import uvloop

from inference.bench.load import LoadFailed
from inference.bench.wire import Connection, render_request

HOST = "127.0.0.1"
EVENT = b"data:"
MAX_ERROR_CHARACTERS = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One request. num_tokens: how many must come. fields: the rest of its body."""

    prompt: str
    num_tokens: int
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """Requests one after another. keeps_history: each prompt goes on after the last prompt and its answer.

    waits_for: it begins when every client that waits for nothing has had so many events.
    """

    role: str
    turns: list[Turn]
    keeps_history: bool = False
    waits_for: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamJob:
    """What to send where. dialect: `llama.cpp` (/completion) or `openai` (/v1/completions)."""

    port: int
    dialect: str
    clients: list[Client]
    headers: dict[str, str] = field(default_factory=dict)
    limit_seconds: float = 180.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One request's stream. events: when each event with text or tokens came, in seconds after started.

    started: seconds after the job's start. prompt_tokens and cached_tokens are None where the server does not say.
    """

    client: int
    role: str
    turn: int
    started: float
    seconds: float
    events: list[float]
    num_tokens: int
    text: str
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    timings: dict[str, float] = field(default_factory=dict)
    error: str | None = None

    @property
    def first_seconds(self) -> float:
        return self.events[0]

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in zip(self.events, self.events[1:], strict=False)]


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamResult:
    """seconds: from the first request to the end of the last. cpu_seconds: the clients' own."""

    answers: list[Answer]
    seconds: float
    cpu_seconds: float

    @property
    def num_tokens(self) -> int:
        return sum(answer.num_tokens for answer in self.answers)


def run_streams(job: StreamJob) -> StreamResult:
    """Run a job in a fresh process. Raises LoadFailed when it breaks, and when any answer is not what was asked for."""
    num_turns = max(len(client.turns) for client in job.clients)
    limit_seconds = job.limit_seconds * num_turns + 30
    try:
        done = subprocess.run(
            [sys.executable, "-m", "inference.bench.servers.streams"],
            input=json.dumps(asdict(job)),
            capture_output=True,
            text=True,
            timeout=limit_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise LoadFailed(f"the clients did not end within {limit_seconds:.0f} s") from error
    if done.returncode != 0:
        raise LoadFailed(f"the clients ended with {done.returncode}: {done.stderr[-500:]}")
    found = json.loads(done.stdout)
    result = StreamResult(
        answers=[Answer(**each) for each in found["answers"]],
        seconds=found["seconds"],
        cpu_seconds=found["cpu_seconds"],
    )
    if problems := [answer.error for answer in result.answers if answer.error]:
        raise LoadFailed(f"{len(problems)} of {len(result.answers)} answers are wrong: {problems[0]}")
    return result


# In the child


def _nobody() -> None:
    """Nobody waits for events."""


class StampedConnection(Connection):
    """Notes when how many bytes of the body had arrived, and counts events as they come."""

    def __init__(self) -> None:
        super().__init__()
        self.stamps: list[tuple[int, float]] = []
        self.num_bytes = 0
        self.num_events = 0
        self.on_events: Callable[[], None] = _nobody

    def on_body(self, body: bytes) -> None:
        self.num_bytes += len(body)
        self.stamps.append((self.num_bytes, time.perf_counter()))
        self.num_events += body.count(EVENT)
        super().on_body(body)
        self.on_events()


class _Job:
    """One running job: its clients are coroutines on one loop."""

    def __init__(self, job: StreamJob) -> None:
        self.job = job
        self.answers: list[Answer] = []
        self.connections: dict[int, StampedConnection] = {}
        self.changed = asyncio.Event()

    async def run(self) -> StreamResult:
        self.started = time.perf_counter()
        await asyncio.gather(*(self._client(number, client) for number, client in enumerate(self.job.clients)))
        ended = max((answer.started + answer.seconds for answer in self.answers), default=0.0)
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return StreamResult(answers=self.answers, seconds=ended, cpu_seconds=usage.ru_utime + usage.ru_stime)

    async def _client(self, number: int, client: Client) -> None:
        if client.waits_for:
            await self._others_have(client.waits_for)
        history = ""
        for index, turn in enumerate(client.turns):
            prompt = history + turn.prompt
            answer = await self._ask(number, client, index, prompt)
            self.answers.append(answer)
            if answer.error:
                self.changed.set()
                return
            history = prompt + answer.text if client.keeps_history else ""

    async def _others_have(self, num_events: int) -> None:
        """Returns early where one of them has failed: nothing is worth waiting for then."""
        others = [number for number, client in enumerate(self.job.clients) if not client.waits_for]
        while not any(answer.error for answer in self.answers):
            counts = [self.connections[number].num_events for number in others if number in self.connections]
            if len(counts) == len(others) and min(counts) >= num_events:
                return
            self.changed.clear()
            await self.changed.wait()

    async def _ask(self, number: int, client: Client, index: int, prompt: str) -> Answer:
        turn = client.turns[index]
        started = time.perf_counter()
        events: list[float] = []
        said = _Said()
        error: str | None = None
        ended = started
        try:
            _, connection = await asyncio.get_running_loop().create_connection(StampedConnection, HOST, self.job.port)
            self.connections[number] = connection
            connection.on_events = self.changed.set
            reply = await connection.send(self._request(prompt, turn), limit_seconds=self.job.limit_seconds)
            ended = time.perf_counter()
            connection.close()
            if reply.status != 200:
                raise ValueError(f"status {reply.status}: {reply.body[:MAX_ERROR_CHARACTERS].decode(errors='replace')}")
            for content, moment in _events(bytes(reply.body), connection.stamps):
                if said.hear(content):
                    events.append(moment - started)
            error = said.problem(turn.num_tokens, self.job.dialect)
        except (OSError, TimeoutError, ValueError, KeyError, TypeError) as problem:
            error = f"{type(problem).__name__}: {problem}"
        return Answer(
            client=number,
            role=client.role,
            turn=index,
            started=started - self.started,
            seconds=ended - started,
            events=events,
            num_tokens=turn.num_tokens,
            text=said.text,
            prompt_tokens=said.prompt_tokens,
            cached_tokens=said.cached_tokens,
            timings=said.timings,
            error=error,
        )

    def _request(self, prompt: str, turn: Turn) -> bytes:
        if self.job.dialect == "openai":
            path, asked = "/v1/completions", {"max_tokens": turn.num_tokens}
        else:
            path, asked = "/completion", {"n_predict": turn.num_tokens, "ignore_eos": True, "return_tokens": True}
        body = {"prompt": prompt, "temperature": 0, "stream": True, **asked, **turn.fields}
        return render_request("POST", path, f"{HOST}:{self.job.port}", self.job.headers, json.dumps(body).encode())


class _Said:
    """What a stream has said so far, in either dialect."""

    def __init__(self) -> None:
        self.text = ""
        self.num_tokens = 0
        self.prompt_tokens: int | None = None
        self.cached_tokens: int | None = None
        self.timings: dict[str, float] = {}
        self.finish: str | None = None
        self.counted: int | None = None

    def hear(self, content: dict[str, Any]) -> bool:
        """Whether the event brought text or tokens. Raises ValueError for an event that tells of an error."""
        if "error" in content:
            raise ValueError(f"an error in the stream: {json.dumps(content['error'])[:MAX_ERROR_CHARACTERS]}")
        return self._hear_openai(content) if "choices" in content else self._hear_llama(content)

    def _hear_llama(self, content: dict[str, Any]) -> bool:
        self.text += content["content"]
        num_tokens = len(content.get("tokens", ()))
        self.num_tokens += num_tokens
        if content["stop"]:
            self.finish = content["stop_type"]
            self.counted = content["tokens_predicted"]
            self.prompt_tokens = content["tokens_evaluated"]
            self.timings = {name: value for name, value in content["timings"].items() if isinstance(value, int | float)}
            self.cached_tokens = int(self.timings.get("cache_n", 0))
        return num_tokens > 0 or bool(content["content"])

    def _hear_openai(self, content: dict[str, Any]) -> bool:
        (choice,) = content["choices"]
        self.text += choice["text"]
        self.finish = choice["finish_reason"] or self.finish
        self.num_tokens += bool(choice["text"])
        return bool(choice["text"])

    def problem(self, num_tokens: int, dialect: str) -> str | None:
        """Why this is not what was asked for. The openai dialect does not count tokens: it says why it ended."""
        if dialect == "openai":
            return (
                None if self.finish == "length" and self.num_tokens else f"it ended by {self.finish!r}, not by length"
            )
        if self.finish != "limit":
            return f"it ended by {self.finish!r}, not by its limit"
        if self.counted != num_tokens or self.num_tokens != num_tokens:
            return f"{num_tokens} tokens were asked for, {self.counted} counted and {self.num_tokens} sent"
        return None


def _events(body: bytes, stamps: list[tuple[int, float]]) -> Iterator[tuple[dict[str, Any], float]]:
    """The JSON events of a stream, each with the moment when the end of its line had come."""
    position = 0
    arrivals = iter(stamps)
    num_bytes, moment = next(arrivals, (0, 0.0))
    for line in body.splitlines(keepends=True):
        position += len(line)
        while num_bytes < position:
            num_bytes, moment = next(arrivals)
        if line.startswith(EVENT) and (data := line.removeprefix(EVENT).strip()) != b"[DONE]":
            yield json.loads(data), moment


def main() -> None:
    given = json.load(sys.stdin)
    clients = [Client(**{**client, "turns": [Turn(**turn) for turn in client["turns"]]}) for client in given["clients"]]
    gc.freeze()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        result = runner.run(_Job(StreamJob(**{**given, "clients": clients})).run())
    json.dump(asdict(result), sys.stdout)


if __name__ == "__main__":
    main()

"""Clients that ask for words that nobody else is told, in several ways, for as long as they are let."""

from __future__ import annotations

import random
import string
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import orjson

from tests.canary_calls import forced

KINDS = ("whole", "stream", "chat", "keyed", "background")
REFUSALS = (429, 502, 503, 504)
"""What a client that asks rightly may be told where there is too much to do, or something died."""
PAUSE_SECONDS = 0.1
"""Before the same client asks again where the server did not answer."""


@dataclass
class MixedLoad:
    """wrong: what must not be; accepted: ids of requests that were admitted; outcomes: how often what happened."""

    base_url: str
    keys: list[str]
    num_clients: int
    wrong: list[str] = field(default_factory=list)
    accepted: set[str] = field(default_factory=set)
    outcomes: Counter[str] = field(default_factory=Counter)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> None:
        self._threads = [threading.Thread(target=self._run, args=(each,)) for each in range(self.num_clients)]
        for thread in self._threads:
            thread.start()

    def stop(self, seconds: float = 90.0) -> None:
        """Each client ends what it has begun."""
        self._stop.set()
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        assert not any(thread.is_alive() for thread in self._threads), "a client still waits for an answer"

    def _run(self, number: int) -> None:
        draw = random.Random(number)
        headers = {"Authorization": f"Bearer {self.keys[number % len(self.keys)]}"}
        with httpx.Client(base_url=self.base_url, headers=headers, timeout=80) as client:
            while not self._stop.is_set():
                kind = draw.choice(KINDS)
                word = "".join(draw.choices(string.ascii_lowercase, k=draw.randint(4, 24)))
                try:
                    self.outcomes[f"{kind} {self._ask(client, kind, word)}"] += 1
                except httpx.HTTPError as error:
                    self.outcomes[f"{kind} {type(error).__name__}"] += 1
                    self._stop.wait(PAUSE_SECONDS)

    def _ask(self, client: httpx.Client, kind: str, word: str) -> str:
        body: dict[str, Any] = {"grammar": forced(word), "temperature": 0, "cache": False}
        say = {"prompt": f"Say {word[:3]}", "max_new_tokens": 40}
        if kind == "whole":
            answer = client.post("/v1/generate", json={**body, **say})
            return self._judge(answer, word, lambda whole: whole.json()["output"])
        if kind == "stream":
            return self._stream(client, "/v1/generate", {**body, **say, "stream": True}, word)
        if kind == "background":
            return self._background(client, {**body, **say, "background": True}, word)
        messages = [{"role": "user", "content": f"Say {word[:3]}"}]
        body = {"grammar": body["grammar"], "temperature": 0, "messages": messages, "max_tokens": 40}
        if kind == "chat":
            return self._stream(client, "/v1/chat/completions", {**body, "stream": True}, word)
        return self._keyed(client, body, word)

    def _judge(self, answer: httpx.Response, word: str, text: Callable[[httpx.Response], str]) -> str:
        """The status; an answer that is 200 must say the word, and no refusal may blame the client or be a defect."""
        if answer.status_code == 200:
            self.accepted.add(answer.headers["x-request-id"])
            if text(answer) != word:
                self.wrong.append(f"{answer.headers['x-request-id']} said {text(answer)!r}, not {word!r}")
        elif answer.status_code not in REFUSALS:
            self.wrong.append(f"{answer.headers.get('x-request-id')}: {answer.text[:300]}")
        if answer.status_code in (429, 503):
            self._stop.wait(PAUSE_SECONDS)
        return str(answer.status_code)

    def _stream(self, client: httpx.Client, path: str, body: dict[str, Any], word: str) -> str:
        text, end = "", ""
        with client.stream("POST", path, json=body) as answer:
            if answer.status_code != 200:
                answer.read()
                return self._judge(answer, word, chat_text)
            self.accepted.add(answer.headers["x-request-id"])
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    data = orjson.loads(line.removeprefix("data: "))
                    text += text_of(data)
                    end = "error" if "error" in data or "code" in data else end
                    if not word.startswith(text):
                        self.wrong.append(f"{answer.headers['x-request-id']} said {text!r} of {word!r}")
                        return "wrong"
        return end or ("whole" if text == word else "cut")

    def _keyed(self, client: httpx.Client, body: dict[str, Any], word: str) -> str:
        """Asked again until there is an answer."""
        key = {"Idempotency-Key": uuid.uuid4().hex}
        for _ in range(100):
            try:
                answer = client.post("/v1/chat/completions", json=body, headers=key)
            except httpx.HTTPError:
                time.sleep(PAUSE_SECONDS)
                continue
            status = self._judge(answer, word, chat_text)
            if answer.status_code not in (429, 503) and answer.json().get("error", {}).get("code") != "worker_lost":
                return status
        return "without an answer"

    def _background(self, client: httpx.Client, body: dict[str, Any], word: str) -> str:
        answer = client.post("/v1/generate", json=body)
        if answer.status_code != 202:
            return self._judge(answer, word, chat_text)
        request_id = answer.json()["id"]
        self.accepted.add(request_id)
        return "202"


def text_of(data: dict[str, Any]) -> str:
    """Of an event of /v1/generate, or a chunk of OpenAI's."""
    if "choices" in data:
        return "".join(choice["delta"].get("content") or "" for choice in data["choices"])
    return str(data.get("text") or "") if "code" not in data else ""


def chat_text(answer: httpx.Response) -> str:
    return str(answer.json()["choices"][0]["message"]["content"])

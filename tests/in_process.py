"""A whole site inside the test process: uvicorn on a thread, a worker with a fake model, the cast; Celery left out.

Deterministic and quick: text is cut at blanks into tokens, answers are invented at the speed that a test sets. With
API_BASE and API_KEY in the environment, `api` talks to that deployment instead, and only tests that can are run.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import socket
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import httpx
import orjson
import pytest

from accounts.trail.refusals import Refusal
from tests.timing import PATIENCE_SECONDS
from tests.timing import wait_for as wait_until

API_BASE = os.environ.get("API_BASE", "").rstrip("/")
API_KEY = os.environ.get("API_KEY", "")
MODEL = "fake-model"
OTHER_MODEL = "granted-model"
N_CTX = 256
N_SLOTS = 4
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }}\n{% endfor %}"
    "{% if enable_thinking %}<think>\n{% endif %}{% if add_generation_prompt %}assistant :{% endif %}"
)
"""Of the fake models: words that stand alone. It shows no tools."""


class Client(httpx.Client):
    """httpx with a key, and the few calls that every test makes."""

    def __init__(self, base_url: str, key: str | None) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        super().__init__(base_url=base_url, headers=headers, timeout=30.0)
        self.key = key or ""

    def generate(self, prompt: str = "Once upon a time", **fields: Any) -> httpx.Response:
        return self.post("/v1/generate", json={"prompt": prompt, "max_new_tokens": 8, **fields})

    def events(self, prompt: str = "Once upon a time", **fields: Any) -> list[tuple[str, dict[str, Any]]]:
        """The whole stream of a request, as (event, data) pairs."""
        body = {"prompt": prompt, "max_new_tokens": 8, "stream": True, **fields}
        with self.stream("POST", "/v1/generate", json=body) as response:
            assert response.status_code == 200, response.read()
            return list(read_events(response))


def read_events(response: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    """Server-sent events as (event, data); comments are dropped."""
    event = ""
    for line in response.iter_lines():
        if line.startswith("event: "):
            event = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield event, orjson.loads(line.removeprefix("data: "))


class BlankTokenizers:
    """In the place of TokenizerPool: one token per word."""

    def __init__(self) -> None:
        self.num_encoded = 0
        self.tried: list[str] = []
        self.words: dict[int, str] = {}
        self.fill: dict[str, int | None] = dict.fromkeys(("pre", "suf", "mid", "rep", "sep", "bos"))

    def encode(self, model: Any, text: str, *, add_special: bool = True) -> tuple[int, ...]:
        self.num_encoded += 1
        found = {zlib.crc32(word.encode()) & 0x7FFFFFF: word for word in text.split()}
        self.words.update(found)
        return tuple(zlib.crc32(word.encode()) & 0x7FFFFFF for word in text.split())

    def encode_each(self, model: Any, texts: Any, *, add_special: bool = False) -> list[tuple[int, ...]]:
        return [self.encode(model, text) for text in texts]

    def pieces(self, model: Any, tokens: Any) -> list[str | list[int]]:
        return [self.words.get(token, [255]) for token in tokens]

    def chat(self, model: Any, template: Any, prompt: Any) -> tuple[int, ...]:
        return self.encode(model, self.render(model, template, prompt))

    def render(self, model: Any, template: Any, prompt: Any) -> str:
        """As the real child does it, but here and with a vocabulary without special tokens."""
        from inference.chat.probing import NO_TOKENS
        from inference.chat.rendering import rendered, text_of

        found = orjson.loads(orjson.dumps(prompt))
        return text_of(rendered(template.source, found, template.facts(), NO_TOKENS, now=datetime.now(UTC)))

    def decode(self, model: Any, tokens: Any, *, special: bool = False) -> str:
        return " ".join(self.words.get(token, f"<{token}>") for token in tokens)

    def control_tokens(self, model: Any, texts: Any) -> tuple[int, ...]:
        return ()

    def fill_tokens(self, model: Any) -> dict[str, int | None]:
        return dict(self.fill)

    def ask(self, model: Any, message: dict[str, Any]) -> dict[str, Any]:
        """A dry run of a grammar: one with a rule named `bomb` ends the child that tries it."""
        self.tried.append(message["grammar"])
        if "bomb" in message["grammar"]:
            raise Refusal("tokenizer_failed", "This text cannot be tokenized.")
        return {"ok": True}

    def close(self) -> None:
        return


@dataclass
class FakeSpeed:
    """What the fake model does; change it before the worker starts, or restart the worker."""

    seconds_per_step: float = 0.0
    answer_tokens: int | None = None


@dataclass
class InProcessSite:
    """A running site; `host` is its worker."""

    base_url: str
    cast: Any
    speed: FakeSpeed
    tokenizers: BlankTokenizers
    models: dict[str, Any]
    host: Any = None
    clients: list[Client] = field(default_factory=list)
    pump: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(32, thread_name_prefix="task"))

    def client(self, customer: Any = None) -> Client:
        client = Client(self.base_url, customer.text if customer else None)
        self.clients.append(client)
        return client

    def start_worker(self) -> None:
        from accounts import redis_client
        from inference.engine.fake_backend import FakeBackend
        from inference.worker.worker import WorkerHost

        def load(served: Any) -> FakeBackend:
            return FakeBackend(
                served.n_slots,
                served.n_ctx,
                self.speed.seconds_per_step,
                answer_tokens=self.speed.answer_tokens,
                supports_adapters=True,
            )

        self.host = WorkerHost("default", client=redis_client.client(), load=load)
        self.host.start()
        self.host.beat()

    def stop_worker(self, drain_seconds: float = 0.0) -> None:
        host, self.host = self.host, None
        if host is not None:
            host.stop(drain_seconds, 5.0)  # what it leaves would go on in the next test

    def serve_thinker(self) -> str:
        """A model whose template opens its thoughts, so that answers of the fake model are nothing else; its name."""
        from inference.catalog import registry
        from inference.chat.probing import examine
        from inference.models import ServedModel

        source = (
            "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %} <think>\n{% endif %}"
        )
        metadata = {"chat_templates": {"default": source}, "chat": {"default": examine(source)}}
        ServedModel.objects.create(
            name="thinker", path="/models/t.gguf", digest="e" * 64, n_ctx=N_CTX, n_slots=2, metadata=metadata
        )
        registry.forget()
        self.stop_worker()
        self.start_worker()
        return "thinker"

    def ring(self, pool: str) -> bool:
        """In the place of the Celery message."""
        host = self.host
        if host is not None and pool == host.pool:
            self.pump.submit(host.serve)
        return True

    def ask(
        self, customer: Any, prompt: tuple[int, ...], slot_id: int | None = None, *, wait: bool = True, **order: Any
    ) -> dict[str, Any]:
        """A request for one slot, past HTTP; its last event. Without waiting: its id alone."""
        from accounts import redis_client
        from inference.engine.types import Decoding, SamplingParams
        from tests.inference import flow

        order.setdefault("sampling", SamplingParams(temperature=0.0))
        answer = flow.admitted(
            flow.principal_of(customer, tokens_per_minute=None, concurrent_requests=None),
            prompt=prompt,
            decoding=Decoding(slot_id=slot_id),
            **order,
        )
        request_id = answer.ticket.request_id
        return flow.finish(redis_client.client(), request_id, 60.0) if wait else {"request_id": request_id}

    def num_running(self) -> int:
        return len(self.host._live) if self.host else 0

    def charged(self, customer: Any) -> tuple[int, int]:
        """(tokens used, tokens reserved) of the tenant, once everything that ended is settled."""
        from django.db.models import Sum

        from accounts.models import QuotaPeriod

        self.settle()
        sums = QuotaPeriod.objects.filter(tenant=customer.tenant, key=None).aggregate(
            used=Sum("used_tokens", default=0), reserved=Sum("reserved_tokens", default=0)
        )
        return sums["used"], sums["reserved"]

    def settle(self) -> None:
        """What has ended is in the database after this."""
        from accounts import redis_client
        from inference import settlement

        wait_until(lambda: self.num_running() == 0)
        if self.host is not None:
            assert self.host._settler.flush(PATIENCE_SECONDS)
        settlement.settle_pending(redis_client.client())


def post_bytes(key: str, content: bytes, path: str = "/v1/generate", **headers: str) -> bytes:
    """The bytes of a request."""
    lines = {"Host": "x", "X-API-Key": key, "Content-Length": str(len(content)), **headers}
    head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in lines.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + content


def leave_after(
    site: InProcessSite,
    key: str,
    body: dict[str, Any],
    wait: Callable[[], object],
    path: str = "/v1/generate",
    **headers: str,
) -> None:
    """Sends a request on a socket and closes it when `wait` returns."""
    host, port = site.base_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(post_bytes(key, orjson.dumps(body), path, **headers))
        wait()


def _serve_models(cast: Any) -> dict[str, Any]:
    from inference.chat.probing import examine
    from inference.models import ServedModel

    metadata = {
        "context_length": 4096,
        "chat_templates": {"default": CHAT_TEMPLATE},
        "chat": {"default": examine(CHAT_TEMPLATE)},
    }
    common = {"path": "/models/fake.gguf", "n_ctx": N_CTX, "n_slots": N_SLOTS, "metadata": metadata}
    shared = ServedModel.objects.create(
        name=MODEL, is_default=True, digest="a" * 64, aliases=["default-chat"], **common
    )
    granted = ServedModel.objects.create(name=OTHER_MODEL, visibility="granted", digest="b" * 64, **common)
    granted.granted_tenants.add(cast.alice.tenant)
    return {MODEL: shared, OTHER_MODEL: granted}


@contextlib.contextmanager
def _uvicorn() -> Iterator[str]:
    """The real application on a real socket; yields its base URL."""
    import uvicorn

    from llmsite.asgi import application
    from llmsite.guard import HeaderDeadlineProtocol

    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    config = uvicorn.Config(
        application, http=HeaderDeadlineProtocol, ws="none", lifespan="on", log_config=None, timeout_keep_alive=30
    )

    class Server(uvicorn.Server):
        """Ends as soon as it is told to; uvicorn's own looks ten times a second, and gives its clients a tenth more."""

        async def main_loop(self) -> None:
            while not await self.on_tick(0):  # noqa: ASYNC110
                await asyncio.sleep(0.01)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            for one in self.servers:
                one.close()
            for connection in list(self.server_state.connections):
                connection.shutdown()
            for _ in range(200):
                if not self.server_state.connections and not self.server_state.tasks:
                    break
                await asyncio.sleep(0.005)
            for task in self.server_state.tasks:
                task.cancel()
            await self.lifespan.shutdown()

    server = Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="uvicorn", daemon=True)
    thread.start()
    wait_until(lambda: server.started or not thread.is_alive())
    assert thread.is_alive(), "the server did not start"
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(PATIENCE_SECONDS)
        listener.close()


@pytest.fixture
def fake_speed() -> FakeSpeed:
    """Instant, and as long as the request allows. Override it in a module or change it before asking for `site`."""
    return FakeSpeed()


@pytest.fixture
def site(
    transactional_db: None, monkeypatch: pytest.MonkeyPatch, cast: Any, fake_speed: FakeSpeed
) -> Iterator[InProcessSite]:
    from accounts.identity import known_keys
    from inference.catalog import registry
    from inference.intake import admission, grammars
    from inference.tokenizers import pool
    from inference.transport import doorbell

    tokenizers = BlankTokenizers()
    monkeypatch.setattr(admission, "tokenizer_pool", lambda: tokenizers)
    monkeypatch.setattr(pool, "tokenizer_pool", lambda: tokenizers)
    tried = grammars.Verdicts(lambda: tokenizers)  # type: ignore[arg-type, return-value]
    monkeypatch.setattr(admission, "verdicts", lambda: tried)
    known_keys.CACHE.forget()
    models = _serve_models(cast)
    registry.forget()
    with _uvicorn() as base_url:
        site = InProcessSite(base_url, cast, fake_speed, tokenizers, models)
        monkeypatch.setattr(doorbell, "ring", site.ring)
        site.start_worker()
        try:
            yield site
        finally:
            for client in site.clients:
                client.close()
            site.stop_worker()
            site.pump.shutdown(wait=True)
    registry.forget()
    known_keys.CACHE.forget()


if API_BASE:

    @pytest.fixture
    def api() -> Iterator[Client]:
        """A client of the deployment at API_BASE."""
        with Client(API_BASE, API_KEY) as client:
            yield client

else:

    @pytest.fixture
    def api(site: InProcessSite) -> Client:  # type: ignore[misc]
        """A client whose key may generate: Alice's, on a site in this process."""
        return site.client(site.cast.alice)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Against a deployment: the tests that ask for `api` and reach into nothing else."""
    if not API_BASE:
        return
    inside = {"site", "db", "transactional_db", "cast", "valkey", "monkeypatch"}
    asked = {item: set(inspect.signature(item.function).parameters) for item in items if hasattr(item, "function")}
    keep = [item for item in items if "api" in asked.get(item, ()) and inside.isdisjoint(asked[item])]
    config.hook.pytest_deselected(items=[item for item in items if item not in keep])
    items[:] = keep

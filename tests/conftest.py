"""What every test stands on: a state folder and an embedded Valkey of its own per process, a cast, the real model.

The environment is set here, before Django reads it; nothing of the caller's environment leaks in. Without a Redis or
PostgreSQL beside it the whole suite runs; tests/services runs parts of it again on those, where they answer.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import pytest

from llmsite.config import Config
from llmsite.processes import probe
from llmsite.processes import valkey as embedded_valkey

pytest_plugins = ["tests.in_process"]
# Clients of loopback servers need no certificates, and reading the world's takes each of them 20 ms of a core.
ssl.create_default_context = functools.cache(ssl.create_default_context)
# A machine that is busy is no defect.
hypothesis.settings.register_profile("llmsite", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("llmsite")

REPOSITORY = Path(__file__).parent.parent
STATE_DIR = Path(tempfile.mkdtemp(prefix="llmsite-test-"))
RUN_DIR = Path(os.environ.setdefault("LLMSITE_TEST_RUN_DIR", str(STATE_DIR)))
"""Of the process that began; what its workers make once for all of them is there."""
VALKEY = embedded_valkey.ValkeyPlan(STATE_DIR / "valkey", STATE_DIR / "valkey" / "valkey.sock", max_memory_mb=128)
OUTER_REDIS_URL = os.environ.get("LLMSITE_TEST_REDIS_URL", "")
OUTER_DATABASE_URL = os.environ.get("LLMSITE_TEST_DATABASE_URL", "")
REQUIRE_SERVICES = os.environ.get("REQUIRE_SERVICES", "") not in {"", "0", "false"}

if "llmsite.settings" in sys.modules:  # pytest-django was quicker, and with somebody else's environment
    raise pytest.UsageError("DJANGO_SETTINGS_MODULE is set: unset it, the tests choose their settings themselves.")
for name in Config.model_fields:
    os.environ.pop(name.upper(), None)
# Hundreds of processes are started; each would compile the modules anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ.update(
    DJANGO_SETTINGS_MODULE="llmsite.settings",
    STATE_DIR=str(STATE_DIR),
    REDIS_URL=OUTER_REDIS_URL or f"unix://{VALKEY.socket}",
    DATABASE_URL=OUTER_DATABASE_URL,
    SECRET_KEY="a secret key for tests alone, of more than fifty characters",
    KEY_PEPPER="t:a pepper for tests alone of more than thirty-two characters",
    LOG_LEVEL="WARNING",
    LOG_FORMAT="console",
)


def pytest_configure(config: pytest.Config) -> None:
    """Set Django up where tests run. Whoever only hands them out must not pass its own settings on to those who do."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        del os.environ["DJANGO_SETTINGS_MODULE"]
        return
    import django

    django.setup()
    import django_ratelimit.core

    from accounts.trail import refusal_log
    from tests import emptying

    emptying.install()
    # A minute would end in the middle of one test in a few thousand; a test in which it ends says so itself.
    django_ratelimit.core.time = SimpleNamespace(time=lambda: 1_800_000_000.0)  # type: ignore[attr-defined]
    # Its thread would write rows of one test into the tables of the next: whoever wants them calls LOG.write().
    refusal_log.LOG._ensure_started = lambda: None  # type: ignore[method-assign]


# Services


@pytest.fixture(scope="session", autouse=True)
def valkey_server() -> Iterator[None]:
    """The embedded Valkey of this test process; with LLMSITE_TEST_REDIS_URL a server that runs already."""
    if OUTER_REDIS_URL:
        yield
        return
    with (STATE_DIR / "valkey.log").open("wb") as log:
        server = embedded_valkey.start(VALKEY, output=log)
    try:
        embedded_valkey.wait_until_it_answers(VALKEY, lambda: server.poll() is None)
        yield
    finally:
        if known_keys := sys.modules.get("accounts.identity.known_keys"):
            known_keys.WATCHER.stop()
        server.terminate()
        try:
            server.wait(timeout=5)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


@pytest.fixture(scope="session")
def valkey_connection(valkey_server: None) -> Iterator[Any]:
    import redis

    connection = redis.Redis.from_url(os.environ["REDIS_URL"])
    yield connection
    connection.close()


@pytest.fixture(autouse=True)
def _clean_slate(request: pytest.FixtureRequest) -> None:
    """No key in Valkey, no cached row and no note of a refusal is left from the test before."""
    if request.node.get_closest_marker("unit") and "valkey" not in request.fixturenames:
        return
    request.getfixturevalue("valkey_connection").flushdb()
    if registry := sys.modules.get("inference.catalog.registry"):
        registry.forget()
    if known_keys := sys.modules.get("accounts.identity.known_keys"):
        known_keys.CACHE.forget()
    if refusal_log := sys.modules.get("accounts.trail.refusal_log"):
        refusal_log.LOG.forget()


@pytest.fixture
def valkey(valkey_connection: Any) -> Any:
    """A redis.Redis on an empty database; for tests that stop the server themselves, start one of your own."""
    valkey_connection.flushdb()
    return valkey_connection


# A site of its own


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@dataclass(frozen=True)
class Site:
    """A running `manage.py up --demo`: web, worker with the real model, beat, Valkey."""

    base_url: str
    state: Path
    demo: dict[str, Any]
    process: subprocess.Popen[bytes]
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    """The settings that it was given."""

    @property
    def key(self) -> str:
        return str(self.demo["tenants"][0]["api_key"])

    @property
    def other_key(self) -> str:
        return str(self.demo["tenants"][1]["api_key"])

    def headers(self, key: str | None = None) -> dict[str, str]:
        return {"Authorization": f"Bearer {key or self.key}"}


def site_environment(state: Path, port: int, **more: str) -> dict[str, str]:
    """The caller's environment without any setting of llmsite but these."""
    clean = {name: value for name, value in os.environ.items() if name.lower() not in Config.model_fields}
    clean.pop("PROMETHEUS_MULTIPROC_DIR", None)
    return {**clean, "STATE_DIR": str(state), "PORT": str(port), "LOG_FORMAT": "console", **more}


def prepared_state() -> Path:
    """The state folder of a demo that was set up and never started, made once: a start on a copy of it is a second one.

    It saves each site the migrations and the proof that the adapters have an effect, fifteen seconds of a core.
    """
    state = RUN_DIR / "prepared"
    with (RUN_DIR / "prepared.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not state.exists():
            scratch = RUN_DIR / "being-prepared"
            done = subprocess.run(
                [sys.executable, "-m", "llmsite.processes.setup", "--demo"],
                env=site_environment(scratch, 8000, REDIS_URL="", DATABASE_URL=""),
                cwd=REPOSITORY,
                umask=0o077,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            assert done.returncode == 0, done.stdout + done.stderr
            scratch.rename(state)
    return state


@contextlib.contextmanager
def running_site(
    state: Path, *, timeout_seconds: float = 120.0, prepared: bool = True, **environment: str
) -> Iterator[Site]:
    """Start a site, wait until /readyz is 200, stop it at the end; a start that fails shows its log.

    prepared: where there is no state yet and the site has SQLite, it begins with a copy of the prepared one.
    """
    if prepared and not state.exists() and not environment.get("DATABASE_URL"):
        shutil.copytree(prepared_state(), state)
    port = free_port()
    log = state.with_name(f"{state.name}.log")
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, str(REPOSITORY / "manage.py"), "up", "--demo"],
            env=site_environment(state, port, **environment),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + timeout_seconds
        while not probe.readiness("127.0.0.1", port).is_ready:
            assert process.poll() is None, f"the site ended:\n{log.read_text()}"
            assert time.monotonic() < deadline, f"the site is not ready:\n{log.read_text()}"
            time.sleep(0.1)
        demo = json.loads((state / "demo.json").read_text())
        yield Site(f"http://127.0.0.1:{port}", state, demo, process, log, environment)
    finally:
        process.terminate()
        try:
            process.wait(timeout=40)
        except subprocess.TimeoutExpired:
            process.kill()  # the kernel takes its children with it
            process.wait()


def manage(site: Site, *words: str, **environment: str) -> Any:
    """What a command says of a running site, in a process of its own, with the settings that the site was given."""
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "manage.py"), *words, "--json"],
        env=site_environment(site.state, int(site.base_url.rsplit(":", 1)[1]), **{**site.environment, **environment}),
        capture_output=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="session")
def live_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One running site for all tests that ask for it; do not break it: for that, start one with `running_site`."""
    with running_site(tmp_path_factory.mktemp("site") / "state") as site:
        yield site


# The cast


@dataclass(frozen=True)
class Customer:
    """A tenant with one key. `text` is the key as the client sends it."""

    tenant: Any
    key: Any
    text: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.text}"}


@dataclass(frozen=True)
class Cast:
    """Alice and Bob are customers; Charlie is one too and must see nothing of theirs. The operator runs the house."""

    alice: Customer
    bob: Customer
    charlie: Customer
    operator: Customer


def make_customer(name: str, plan: Any, *, scopes: list[str] | None = None, **limits: int | None) -> Customer:
    """A tenant on `plan` with one key; `limits` override the plan's for the tenant."""
    from accounts.identity import issuing
    from accounts.limits.precedence import Limits
    from accounts.models import DEFAULT_SCOPES, Tenant

    Limits().overridden(limits)
    tenant = Tenant.objects.create(name=name, plan=plan, limit_overrides=limits)
    key, text = issuing.issue(tenant, "main", scopes or DEFAULT_SCOPES, {}, None)
    return Customer(tenant, key, text)


@pytest.fixture
def plan(db: None) -> Any:
    """Unlimited but for ten million tokens a month; tests narrow it where they need to."""
    from accounts.models import Plan

    return Plan.objects.create(name="cast", monthly_tokens=10_000_000)


@pytest.fixture
def cast(plan: Any) -> Cast:
    return Cast(
        alice=make_customer("Alice's", plan),
        bob=make_customer("Bob's", plan),
        charlie=make_customer("Charlie's", plan),
        operator=make_customer("Operator", plan, scopes=["operator"]),
    )


# The real model


@pytest.fixture(scope="session")
def model_path() -> Path:
    """SmolLM2-135M-Instruct, the package that `make install` brings. Its absence is a failure, not a skip."""
    from llmsite.demo import demo_model_path

    return demo_model_path()


# Collection and report


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Who runs where: tests that share one running site, or in tests/real one loaded model, share one process.

    Long ones come first, so that no process is left with one at the end while the others have nothing to do.
    """
    for item in items:
        if "live_site" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("live_site"))
        elif item.path.parent.name == "real" and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Where the services are said to answer, a test that skips for want of one fails. A browser is another matter."""
    report: pytest.TestReport = yield  # type: ignore[misc, assignment]
    wants_services = REQUIRE_SERVICES and item.path.parent.name == "services"
    if wants_services and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"REQUIRE_SERVICES=1, yet this test was skipped: {reason}"
    return report  # type: ignore[return-value]


def pytest_unconfigure() -> None:
    shutil.rmtree(STATE_DIR, ignore_errors=True)

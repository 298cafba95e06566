"""docker/Caddyfile: in step with the settings; and where caddy is installed, run in front of a site."""

from __future__ import annotations

import ipaddress
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from llmsite.config import Config
from llmsite.guard import MAX_HEADER_BYTES, UPLOADS
from llmsite.processes.web import server_config
from tests.conftest import REPOSITORY, free_port
from tests.in_process import FakeSpeed, InProcessSite, read_events, wait_until
from tests.llmsite.echo import echo

DOCKER = REPOSITORY / "docker"
CADDYFILE = DOCKER / "Caddyfile"
TEXT = CADDYFILE.read_text()
CODE = re.sub(r"(?m)^\s*#.*$", "", TEXT)
CADDY = shutil.which("caddy")
SIZES = {"KiB": 1 << 10, "MiB": 1 << 20}
NUM_TOKENS, SECONDS_A_TOKEN = 20, 0.05
APP = "https://app.example.org"


def number(name: str) -> int:
    """The one number behind a word, in bytes or seconds."""
    (found,) = re.findall(rf"^\s*{name} (\d+)(KiB|MiB|s)$", CODE, flags=re.MULTILINE)
    return int(found[0]) * SIZES.get(found[1], 1)


def block(opening: str) -> str:
    (found,) = re.findall(rf"^\t{opening} \{{\n(.*?)^\t\}}", CODE, flags=re.MULTILINE | re.DOTALL)
    return str(found)


@pytest.mark.unit
def test_its_numbers_are_those_of_the_settings() -> None:
    defaults = Config()
    sizes = {
        name: int(mib) << 20
        for name, mib in re.findall(r"request_body (@\w+) \{\s*max_size (\d+)MiB", CODE, flags=re.MULTILINE)
    }
    assert sizes["@bodies"] == defaults.max_body_bytes
    assert sizes["@imports"] == defaults.import_mb << 20
    assert defaults.batch_file_mb << 20 < sizes["@uploads"] <= (defaults.batch_file_mb + 1) << 20
    assert number("max_header_size") == MAX_HEADER_BYTES
    assert number("read_header") == defaults.body_timeout_seconds
    assert defaults.generation_timeout_seconds < number("response_header_timeout") <= 700
    assert number("keepalive") < server_config(defaults).timeout_keep_alive


@pytest.mark.unit
def test_its_paths_are_those_of_the_site() -> None:
    uploads = ["method", "POST", "path", "/v1/files"]
    imports = ["method", "PUT", "path", "/v1/admin/imports/*/content"]
    assert block("@uploads").split() == uploads and block("@imports").split() == imports
    assert block("@bodies").split() == ["not", "{", *uploads, "}", "not", "{", *imports, "}"]
    for _, method, _, path in (uploads, imports):
        assert UPLOADS.fullmatch(f"{method} {path.replace('*', '7')}")
    assert UPLOADS.pattern.count("|") == 1
    assert "@inside path /metrics\n" in CODE


@pytest.mark.unit
def test_nothing_in_it_holds_events_back_writes_keys_or_believes_clients() -> None:
    for word in ("encode", "flush_interval", "log", "trusted_proxies", "header_up", "request_buffers", "buffer_"):
        assert not re.search(rf"^\s*{word}", CODE, flags=re.MULTILINE), word
    assert re.search(r"^\tadmin off$", CODE, flags=re.MULTILINE)


@pytest.mark.unit
def test_the_compose_file_trusts_the_proxy_and_nothing_else() -> None:
    plan: dict[str, Any] = yaml.safe_load((DOCKER / "compose.proxy.yaml").read_text())
    base: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    proxy, web = plan["services"]["proxy"], plan["services"]["web"]["environment"]
    address = proxy["networks"]["default"]["ipv4_address"]
    assert web["TRUSTED_PROXIES"] == address
    (network,) = base["networks"]["default"]["ipam"]["config"]
    assert ipaddress.ip_address(address) in ipaddress.ip_network(network["subnet"])
    assert ipaddress.ip_address(address) not in ipaddress.ip_network(network["ip_range"])
    assert set(web) <= {name.upper() for name in Config.model_fields}
    assert set(proxy["environment"]) == set(re.findall(r"\{\$(\w+)\}", TEXT))
    assert proxy["environment"]["SITE_UPSTREAM"] == "web:8000"
    assert proxy["read_only"] is True and proxy["cap_drop"] == ["ALL"]
    for mount in proxy["volumes"]:
        source = mount.split(":")[0]
        assert source in plan["volumes"] or (DOCKER / source).exists()
    assert "SITE_NAME=" in (DOCKER / ".env.example").read_text()


# Run


class Caddy:
    """caddy with the file as it is, on a free port of loopback."""

    def __init__(self, upstream: str, folder: Path) -> None:
        assert CADDY is not None
        self.base_url = f"http://127.0.0.1:{free_port()}"
        places = {"HOME": str(folder), "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
        environment = {**os.environ, **places, "SITE_ADDRESS": self.base_url, "SITE_UPSTREAM": upstream}
        with (folder / "caddy.log").open("wb") as log:
            self.process = subprocess.Popen(
                [CADDY, "run", "--config", str(CADDYFILE), "--adapter", "caddyfile"],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait(self) -> None:
        def answers() -> bool:
            assert self.process.poll() is None, "caddy ended"
            try:
                return bool(httpx.get(f"{self.base_url}/metrics").status_code)
            except httpx.TransportError:
                return False

        wait_until(answers)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


needs_caddy = pytest.mark.skipif(CADDY is None, reason="caddy is not installed")


@pytest.fixture
def fake_speed() -> FakeSpeed:
    return FakeSpeed(seconds_per_step=SECONDS_A_TOKEN)


@pytest.fixture
def proxied(site: InProcessSite, tmp_path: Path) -> Iterator[InProcessSite]:
    """The site, with the proxy's address in the place of its own."""
    caddy = Caddy(site.base_url.removeprefix("http://"), tmp_path)
    try:
        caddy.wait()
        site.base_url = caddy.base_url
        yield site
    finally:
        caddy.stop()


@needs_caddy
@pytest.mark.integration
def test_a_stream_comes_through_event_by_event_and_ends_when_its_client_goes(proxied: InProcessSite) -> None:
    alice = proxied.client(proxied.cast.alice)
    body = {"prompt": "Once upon a time", "max_new_tokens": NUM_TOKENS, "stream": True, "cache": False}
    with alice.stream("POST", "/v1/generate", json=body, headers={"Origin": APP}) as answer:
        assert answer.status_code == 200, answer.read()
        moments = [time.monotonic() for _ in read_events(answer)]
    assert len(moments) >= NUM_TOKENS
    gaps = [after - before for before, after in pairwise(moments)]
    assert sum(gap > SECONDS_A_TOKEN / 5 for gap in gaps) > NUM_TOKENS / 2, "events came in heaps"
    with alice.stream("POST", "/v1/generate", json={**body, "max_new_tokens": 200}) as answer:
        next(read_events(answer))
        assert proxied.num_running() == 1
    wait_until(lambda: proxied.num_running() == 0)


@needs_caddy
@pytest.mark.integration
def test_bounds_and_headers_are_the_sites(proxied: InProcessSite) -> None:
    alice = proxied.client(proxied.cast.alice)
    too_long = alice.post("/v1/generate", content=b" " * ((2 << 20) + 1))
    assert too_long.status_code in (413, 502), "Caddy before 2.7 says 502"
    assert alice.get("/metrics").status_code == 404
    page = httpx.get(f"{proxied.base_url}/admin/login/")
    assert page.status_code == 200 and page.headers.get_list("strict-transport-security") == ["max-age=31536000"]
    tenant = proxied.cast.alice.tenant
    tenant.allowed_origins = [APP]
    tenant.save(update_fields=["allowed_origins"])
    asked = {"Origin": APP, "Access-Control-Request-Method": "POST"}
    answer = httpx.options(f"{proxied.base_url}/v1/generate", headers=asked)
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == APP
    assert alice.post("/v1/files", files={"file": b"{}\n"}, data={"purpose": "batch"}).status_code in (200, 400)


@needs_caddy
@pytest.mark.integration
def test_what_a_client_says_of_itself_is_dropped(tmp_path: Path) -> None:
    lies = {"X-Forwarded-For": "6.6.6.6", "X-Forwarded-Proto": "https", "X-Forwarded-Host": "evil.example"}
    with echo(Config(trusted_proxies=["127.0.0.1"])) as upstream:
        caddy = Caddy(upstream.removeprefix("http://"), tmp_path)
        try:
            caddy.wait()
            found = httpx.get(f"{caddy.base_url}/", headers=lies).json()
        finally:
            caddy.stop()
    assert found["forwarded_for"] == "127.0.0.1" and found["secure"] is False
    assert found["host"] == caddy.base_url.removeprefix("http://")

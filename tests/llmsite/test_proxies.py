"""Whom the web process believes about where a request comes from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from django.test import RequestFactory

from inference.api import metrics_view
from llmsite.config import Config, ConfigError, load
from tests.llmsite.echo import echo

pytestmark = pytest.mark.integration

PROXIES = ["127.0.0.1", "10.0.0.0/8", "fd00::/8"]
LOOPBACK, CLIENT, CLIENT6 = "127.0.0.1", "203.0.113.7", "2001:db8::7"


@pytest.fixture(scope="module")
def behind_a_proxy() -> Iterator[str]:
    with echo(Config(trusted_proxies=PROXIES)) as base_url:
        yield base_url


@pytest.fixture(scope="module")
def in_the_open() -> Iterator[str]:
    """The peer is none of the proxies that are named."""
    with echo(Config(trusted_proxies=["10.0.0.0/8"])) as base_url:
        yield base_url


@pytest.fixture(scope="module")
def without_proxies() -> Iterator[str]:
    with echo(Config()) as base_url:
        yield base_url


def ask(base_url: str, *headers: tuple[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{base_url}/", headers=list(headers)).json()
    return found


@pytest.mark.parametrize(
    ("forwarded", "address"),
    [
        ((), LOOPBACK),
        ((CLIENT,), CLIENT),
        ((f"6.6.6.6, {CLIENT}",), CLIENT),  # what a client wrote itself stands on the left
        ((f"127.0.0.1, {CLIENT}",), CLIENT),
        ((f"6.6.6.6,{CLIENT} , 10.1.2.3, 10.3.2.1",), CLIENT),  # proxies of ours stand on the right
        (("6.6.6.6", CLIENT), CLIENT),  # two lines are one list
        ((f"{CLIENT}:51234",), CLIENT),
        ((CLIENT6,), CLIENT6),
        ((f"[{CLIENT6}]:51234",), CLIENT6),
        ((f"6.6.6.6, [{CLIENT6}], fd00::1",), CLIENT6),
        (("10.1.1.1",), "10.1.1.1"),
        (("",), LOOPBACK),
    ],
)
def test_the_last_address_that_is_no_proxy_of_ours_is_the_clients(
    behind_a_proxy: str, forwarded: tuple[str, ...], address: str
) -> None:
    assert ask(behind_a_proxy, *(("X-Forwarded-For", value) for value in forwarded))["address"] == address


@pytest.mark.parametrize(
    ("said", "secure"), [("https", True), ("http", False), ("gopher", False), ("https, http", False), ("", False)]
)
def test_a_proxy_of_ours_says_whether_the_browser_came_by_tls(behind_a_proxy: str, said: str, secure: bool) -> None:
    assert ask(behind_a_proxy, ("X-Forwarded-Proto", said))["secure"] is secure


@pytest.mark.parametrize("site", ["in_the_open", "without_proxies"])
def test_nobody_else_is_believed(site: str, request: pytest.FixtureRequest) -> None:
    found = ask(
        request.getfixturevalue(site),
        ("X-Forwarded-For", CLIENT),
        ("X-Forwarded-Proto", "https"),
        ("X-Forwarded-Host", "evil.example"),
        ("Forwarded", f"for={CLIENT};proto=https"),
        ("X-Real-IP", CLIENT),
    )
    assert found["address"] == LOOPBACK and found["secure"] is False


def test_the_host_is_the_one_that_was_asked_for_whatever_else_is_said(behind_a_proxy: str) -> None:
    said = (("X-Forwarded-Host", "evil.example"), ("Forwarded", "host=evil.example"), ("X-Real-IP", "6.6.6.6"))
    found = ask(behind_a_proxy, *said, ("Host", "llm.example.org"))
    assert found["host"] == "llm.example.org" and found["address"] == LOOPBACK


@pytest.mark.parametrize("everybody", ["0.0.0.0/0", "10.0.0.0/8,::/0"])
def test_all_the_world_is_no_proxy(everybody: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUSTED_PROXIES", everybody)
    with pytest.raises(ConfigError, match="name the proxies"):
        load()


@pytest.mark.parametrize("wrong", ["proxy.example.org", "10.0.0.1/8", "*"])
def test_proxies_are_addresses_and_networks(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUSTED_PROXIES", wrong)
    with pytest.raises(ConfigError, match="TRUSTED_PROXIES"):
        load()


@pytest.mark.parametrize("said", ["X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host", "Forwarded", "Via"])
def test_whatever_a_proxy_on_this_machine_passes_on_is_no_member_of_its_network(said: str) -> None:
    """Else the metrics, which are open to 127.0.0.0/8, were open to everybody behind it."""
    asked = RequestFactory().get("/metrics", REMOTE_ADDR="127.0.0.1")
    assert metrics_view._comes_from_allowed_network(asked)
    asked.META[f"HTTP_{said.upper().replace('-', '_')}"] = "anything"
    assert not metrics_view._comes_from_allowed_network(asked)

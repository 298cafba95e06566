"""The environment as one object: defaults, bounds, and sentences that say how to mend it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmsite.config import Config, ConfigError, load

pytestmark = pytest.mark.unit

LONG = "x" * 50


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Config.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)


def problems_with(monkeypatch: pytest.MonkeyPatch, **environment: str) -> list[str]:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as raised:
        load()
    return raised.value.problems


def test_an_empty_environment_is_a_laptop() -> None:
    config = load()
    assert (config.host, config.port, config.is_loopback) == ("127.0.0.1", 8000, True)
    assert config.base_url == "http://127.0.0.1:8000"
    assert config.state.is_absolute()
    assert config.redis(0).startswith("unix://")
    assert config.broker_url.startswith("redis+socket://")
    assert "socket_keepalive" not in config.broker_options


def test_lists_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLOWED_HOSTS", "a.example.org, b.example.org,")
    assert load().allowed_hosts == ["a.example.org", "b.example.org"]


def test_an_ipv6_host_is_bracketed_in_the_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOST", "::1")
    assert load().base_url == "http://[::1]:8000"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "99999"),
        ("PORT", "web"),
        ("DATABASE_URL", "mysql://localhost/x"),
        ("REDIS_URL", "http://localhost"),
        ("KEY_PEPPER", "1:short"),
        ("METRICS_ALLOWED_NETWORKS", "everyone"),
        ("TRUSTED_PROXIES", "proxy"),
        ("LOG_FORMAT", "xml"),
        ("DRAIN_SECONDS", "-1"),
    ],
)
def test_a_wrong_value_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    (problem,) = problems_with(monkeypatch, **{name: value})
    assert problem.startswith(f"{name}: ")


def test_a_wrong_secret_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("KEY_PEPPER", "1:hush-hush"), ("DATABASE_URL", "mysql://user:hush-hush@db/x")):
        assert "hush-hush" not in problems_with(monkeypatch, **{name: value})[0]
        monkeypatch.delenv(name)


def test_all_problems_come_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = problems_with(monkeypatch, PORT="0", DRAIN_SECONDS="x", HOST="0.0.0.0", DEBUG="true", ALLOWED_HOSTS="*")
    starts = [problem.split(":")[0].split(" ")[0] for problem in problems]
    assert sorted(starts) == ["ALLOWED_HOSTS", "DEBUG", "DRAIN_SECONDS", "KEY_PEPPER", "PORT", "SECRET_KEY"]


def test_beyond_loopback_secrets_must_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = problems_with(monkeypatch, HOST="0.0.0.0")
    assert [problem.split(" ")[0] for problem in problems] == ["SECRET_KEY", "KEY_PEPPER"]
    monkeypatch.setenv("SECRET_KEY", LONG)
    monkeypatch.setenv("KEY_PEPPER", f"1:{LONG}")
    assert not load().is_loopback


@pytest.mark.parametrize(
    "environment", [{"DATABASE_URL": "postgres://u:p@db.example.org/x"}, {"REDIS_URL": "redis://cache.example.org/0"}]
)
def test_secrets_of_one_machine_are_refused_with_shared_services(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    problems = problems_with(monkeypatch, **environment)
    assert len(problems) == 2
    assert all("names another machine" in problem for problem in problems)


def test_services_on_loopback_may_use_secrets_of_the_state_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgres://u@127.0.0.1:5432/x")
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:6379/3")
    config = load()
    assert config.redis(1) == config.broker_url == "redis://127.0.0.1:6379/3"
    assert config.broker_options["socket_keepalive"] is True


def test_a_deep_state_folder_gets_a_short_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE_DIR", str(tmp_path / ("deep" * 30)))
    first, second = load(), load()
    assert len(os.fsencode(first.embedded_valkey_socket)) <= 107
    assert first.embedded_valkey_socket == second.embedded_valkey_socket
    assert not first.embedded_valkey_socket.is_relative_to(first.state)
    monkeypatch.setenv("STATE_DIR", "/s")
    assert load().embedded_valkey_socket == Path("/s/valkey/valkey.sock")


def test_a_secret_is_made_once_and_private(tmp_path: Path) -> None:
    config = Config(state_dir=tmp_path / "state")
    first = config.secret("pepper", "", prefix="1:")
    assert first == config.secret("pepper", "")
    assert first.startswith("1:")
    assert len(first) > 50
    assert (tmp_path / "state" / "pepper").stat().st_mode & 0o777 == 0o600
    assert list((tmp_path / "state").iterdir()) == [tmp_path / "state" / "pepper"]
    assert config.secret("pepper", "given") == "given"

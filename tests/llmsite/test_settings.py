"""Django's settings, the system checks, and what may never happen to the shared Redis."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from django.core import checks

from llmsite import checks as our_checks
from llmsite import settings as settings_module
from llmsite.config import Config
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.integration

SECRETS = {"secret_key": "s" * 50, "key_pepper": "1:" + "k" * 50}


def ids(found: list[checks.CheckMessage]) -> list[str]:
    return [str(message.id) for message in found]


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> Any:
    def set_config(**values: Any) -> None:
        monkeypatch.setattr(our_checks, "get_config", lambda: Config(**values))

    return set_config


def test_exposure_is_an_error_beyond_loopback_only(configured: Any, settings: Any) -> None:
    settings.DEBUG, settings.ALLOWED_HOSTS, settings.SECRET_KEY = True, ["*"], "short"
    configured()
    assert our_checks.check_exposure(None) == []
    configured(host="0.0.0.0", allowed_hosts=["x"], **SECRETS)
    assert ids(our_checks.check_exposure(None)) == ["llmsite.E001", "llmsite.E002", "llmsite.E003"]


def test_files_that_are_missing_are_errors(configured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configured(models_yaml=tmp_path / "models.yaml")
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path / "gone"))
    assert ids(our_checks.check_files(None)) == ["llmsite.E004", "llmsite.E005"]
    (tmp_path / "models.yaml").touch()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    assert our_checks.check_files(None) == []


def test_what_is_unwise_in_production_is_a_warning(configured: Any) -> None:
    configured(host="0.0.0.0", engine="fake", redis_outage_policy="open", **SECRETS)
    assert ids(our_checks.check_deployment(None)) == ["llmsite.W001", "llmsite.W002", "llmsite.W003"]
    configured()
    assert our_checks.check_deployment(None) == []


def test_postgresql_is_pooled_and_bounded() -> None:
    options = settings_module._database("postgres://us%40er:p%3Aw@db:5433/name?sslmode=require")
    assert (options["USER"], options["PASSWORD"], options["HOST"], options["PORT"]) == ("us@er", "p:w", "db", "5433")
    assert options["NAME"] == "name"
    assert options["CONN_HEALTH_CHECKS"] is True
    assert options["OPTIONS"]["sslmode"] == "require"
    assert options["OPTIONS"]["pool"]["timeout"] == 3
    assert "lock_timeout=2s" in options["OPTIONS"]["options"]


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what a socket waits for")
def test_a_postgresql_whose_machine_is_gone_holds_threads_for_seconds() -> None:
    """Without a word from it, Linux alone would go on for a quarter of an hour."""
    from psycopg import conninfo, pq

    with socket.create_server(("127.0.0.1", 0)) as listener:
        found = settings_module._database(f"postgres://a:b@127.0.0.1:{listener.getsockname()[1]}/name")
        options = {name: value for name, value in found["OPTIONS"].items() if name != "pool"}
        where = conninfo.make_conninfo(host=found["HOST"], port=found["PORT"], dbname=found["NAME"], **options)
        connection = pq.PGconn.connect_start(where.encode())
        with socket.socket(fileno=os.dup(connection.socket)) as link:
            assert 0 < link.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) <= 15_000
            names = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            idle, interval, number = (link.getsockopt(socket.IPPROTO_TCP, name) for name in names)
            assert idle + interval * number <= 15
        connection.finish()


def test_clearing_the_cache_does_not_flush_what_waits(valkey: Any) -> None:
    from django.core.cache import cache

    valkey.set("ticket:1", "waits")
    with pytest.raises(RuntimeError, match="shares its Redis"):
        cache.clear()
    assert valkey.get("ticket:1") == b"waits"


def test_a_start_with_wrong_settings_lists_them_and_ends() -> None:
    done = subprocess.run(
        [sys.executable, "manage.py", "check"],
        cwd=REPOSITORY,
        env={**os.environ, "PORT": "0", "HOST": "0.0.0.0", "SECRET_KEY": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "PORT: " in done.stderr
    assert "SECRET_KEY is empty while HOST is not loopback" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("verb", ["up", "doctor", "demo", "worker"])
def test_every_verb_helps(verb: str) -> None:
    done = subprocess.run(
        [sys.executable, "manage.py", verb, "--help"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert f"manage.py {verb}" in done.stdout


def test_the_verbs_that_skip_django_are_listed_all_the_same() -> None:
    from django.core.management import get_commands, load_command_class

    for verb in ("up", "doctor"):
        assert get_commands()[verb] == "llmsite"
        parser = load_command_class("llmsite", verb).create_parser("manage.py", verb)
        assert "--demo" in parser.format_help() or "--json" in parser.format_help()


STRONG = "a secret of the tests of more than fifty characters in all"
FACING_THE_WORLD = {
    "HOST": "0.0.0.0",
    "ALLOWED_HOSTS": "llm.example.org",
    "SECURE_COOKIES": "true",
    "HSTS_SECONDS": "3600",
    "TRUSTED_PROXIES": "10.0.0.2",
    "SECRET_KEY": STRONG,
    "KEY_PEPPER": f"1:{STRONG}",
    "DEBUG": "false",
}
BEHIND_A_PROXY_OF_THIS_MACHINE = {**FACING_THE_WORLD, "HOST": "127.0.0.1", "TRUSTED_PROXIES": "127.0.0.1"}


def start(words: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, *words], cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize("place", [FACING_THE_WORLD, BEHIND_A_PROXY_OF_THIS_MACHINE], ids=["beyond", "proxy"])
def test_an_installation_as_it_faces_the_world_passes_the_deployment_checks(place: dict[str, str]) -> None:
    done = start(["manage.py", "check", "--deploy", "--fail-level", "WARNING"], place)
    assert done.returncode == 0, done.stderr
    assert "no issues" in done.stdout


@pytest.mark.parametrize("place", [FACING_THE_WORLD, BEHIND_A_PROXY_OF_THIS_MACHINE], ids=["beyond", "proxy"])
@pytest.mark.parametrize(
    ("unsafe", "words"),
    [
        ({"DEBUG": "true"}, "DEBUG is on while"),
        ({"ALLOWED_HOSTS": "llm.example.org,*"}, "ALLOWED_HOSTS is * while"),
        ({"SECRET_KEY": "changeme"}, "SECRET_KEY is guessable while"),
        ({"SECRET_KEY": "django-insecure-0123456789abcdefghijklmnopqrstuv"}, "SECRET_KEY is guessable while"),
    ],
    ids=["debug", "hosts", "short", "default"],
)
def test_an_unsafe_web_does_not_start(place: dict[str, str], unsafe: dict[str, str], words: str) -> None:
    """The web process itself, which compose files and other process managers start without `up`."""
    done = start(["-m", "llmsite.processes.web"], {**place, **unsafe})
    assert done.returncode == 78
    assert words in done.stderr and "Traceback" not in done.stderr
    assert unsafe.get("SECRET_KEY", STRONG) not in done.stderr

"""Tokens for hosts that do not give their files to all: to that host alone, by https alone, and nowhere to be read."""

from __future__ import annotations

import ipaddress
import logging
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from inference.imports import connections, desk, importer
from inference.imports.addresses import Policy
from inference.imports.fetching import Wanted, fetch, probe
from inference.imports.models import ModelImport
from inference.vetting.inspection import RegistrationError
from llmsite.config import Config, ConfigError, load
from tests.inference import gguf_files
from tests.inference.gguf_files import PassingTrial
from tests.inference.imports.file_server import Shelf, serving

pytestmark = pytest.mark.integration
DATA = bytes(range(256)) * 16
TOKEN = "hf_canaryOfAToken"
OTHER_TOKEN = "otherCanary"
LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"),)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of localhost and 127.0.0.1, with its key, made for these tests."""
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    names = "subjectAltName=DNS:localhost,IP:127.0.0.1"
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    files = ("-keyout", path, "-out", path.with_suffix(".crt"))
    subprocess.run(
        ["openssl", "req", "-x509", *curve, "-days", "2", "-subj", "/CN=localhost", "-addext", names, *files],
        check=True,
        capture_output=True,
        timeout=30,
    )
    path.write_bytes(path.read_bytes() + path.with_suffix(".crt").read_bytes())
    return path


@pytest.fixture
def context(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """Of the servers; the fetching side trusts them, and nobody else."""
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.load_verify_locations(certificate.with_suffix(".crt"))
    monkeypatch.setattr(connections.ssl, "create_default_context", lambda: trusting)
    serving_one = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving_one.load_cert_chain(certificate)
    return serving_one


@pytest.fixture
def shelf() -> Shelf:
    return Shelf(files={"/a.gguf": DATA}, wants=f"Bearer {TOKEN}")


@pytest.fixture
def server(shelf: Shelf, context: ssl.SSLContext) -> Iterator[str]:
    with serving(shelf, context) as address:
        yield address


def policy(*addresses: str, tokens: tuple[str, ...] = ()) -> Policy:
    hosts = tuple(each.partition("://")[2] for each in addresses)
    return Policy(hosts=hosts, private_networks=LOOPBACK, tokens=tokens)


def token_for(address: str, token: str = TOKEN) -> str:
    return f"{address.partition('://')[2]}={token}"


def have(url: str, allowed: Policy, target: Path) -> bytes:
    wanted = Wanted(name="a", url=url)
    probe(wanted, allowed)
    fetch(wanted, target, allowed, lambda _: None)
    return target.read_bytes()


def test_the_host_of_a_token_gives_its_file(server: str, shelf: Shelf, tmp_path: Path) -> None:
    with pytest.raises(RegistrationError, match="FETCH_TOKENS"):
        have(f"{server}/a.gguf", policy(server), tmp_path / "a")
    assert have(f"{server}/a.gguf", policy(server, tokens=(token_for(server),)), tmp_path / "a") == DATA
    assert shelf.authorizations == [None, f"Bearer {TOKEN}", f"Bearer {TOKEN}"]


def test_a_token_from_a_file_is_read_anew_each_time(server: str, shelf: Shelf, tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text(f"{TOKEN}\n")
    allowed = policy(server, tokens=(token_for(server, f"@{secret}"),))
    assert have(f"{server}/a.gguf", allowed, tmp_path / "a") == DATA
    shelf.wants = f"Bearer {OTHER_TOKEN}"
    secret.write_text(OTHER_TOKEN)
    assert have(f"{server}/a.gguf", allowed, tmp_path / "b") == DATA


@pytest.mark.parametrize("content", [None, b"", b"two words", b"a\r\nX-Injected: 1", b"\xff\xfe", b"x" * 10_000])
def test_a_file_that_holds_no_token_is_not_sent(
    server: str, shelf: Shelf, tmp_path: Path, content: bytes | None
) -> None:
    secret = tmp_path / "token"
    if content is not None:
        secret.write_bytes(content)
    with pytest.raises(RegistrationError) as caught:
        have(f"{server}/a.gguf", policy(server, tokens=(token_for(server, f"@{secret}"),)), tmp_path / "a")
    assert caught.value.code == "fetch_failed" and shelf.asked == []
    assert "two words" not in str(caught.value) and "Injected" not in str(caught.value)


def test_nothing_is_sent_without_encryption(tmp_path: Path) -> None:
    shelf = Shelf(files={"/a.gguf": DATA})
    with serving(shelf) as plain:
        assert have(f"{plain}/a.gguf", policy(plain, tokens=(token_for(plain),)), tmp_path / "a") == DATA
    assert set(shelf.authorizations) == {None}


def test_a_port_or_a_name_of_its_own_is_another_host(server: str, shelf: Shelf, tmp_path: Path) -> None:
    shelf.wants = ""
    port = server.rpartition(":")[2]
    for other in ("127.0.0.1", f"127.0.0.1:{int(port) % 60000 + 1}", f"localhost:{port}", f"0.0.1:{port}"):
        have(f"{server}/a.gguf", policy(server, tokens=(f"{other}={TOKEN}",)), tmp_path / "a")
        (tmp_path / "a").unlink()
    assert set(shelf.authorizations) == {None}


def test_a_redirect_takes_no_token_elsewhere(
    server: str, shelf: Shelf, context: ssl.SSLContext, tmp_path: Path
) -> None:
    """As the hub does with large files. The other host's own token is not sent either: the first one would ask in our
    name for whatever it likes."""
    elsewhere = Shelf(files={"/a.gguf": DATA})
    with serving(elsewhere, context) as other:
        shelf.redirects["/moved"] = f"{other}/a.gguf"
        allowed = policy(server, other, tokens=(token_for(server), token_for(other, OTHER_TOKEN)))
        assert have(f"{server}/moved", allowed, tmp_path / "a") == DATA
        assert set(shelf.authorizations) == {f"Bearer {TOKEN}"} and set(elsewhere.authorizations) == {None}


def test_a_redirect_away_and_back_has_lost_its_token(
    server: str, shelf: Shelf, context: ssl.SSLContext, tmp_path: Path
) -> None:
    elsewhere = Shelf()
    with serving(elsewhere, context) as other:
        shelf.redirects["/away"] = f"{other}/back"
        elsewhere.redirects["/back"] = f"{server}/a.gguf"
        with pytest.raises(RegistrationError, match="401"):
            have(f"{server}/away", policy(server, other, tokens=(token_for(server),)), tmp_path / "a")
    assert shelf.authorizations == [f"Bearer {TOKEN}", None]


def test_a_redirect_on_the_same_host_keeps_it(server: str, shelf: Shelf, tmp_path: Path) -> None:
    shelf.redirects["/renamed"] = "/a.gguf"
    assert have(f"{server}/renamed", policy(server, tokens=(token_for(server),)), tmp_path / "a") == DATA


def test_no_proxy_of_the_environment_hears_of_it(
    server: str, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overhearing = Shelf(files={"/a.gguf": DATA})
    with serving(overhearing) as proxy:
        for name in ("http_proxy", "https_proxy", "HTTPS_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy)
        have(f"{server}/a.gguf", policy(server, tokens=(token_for(server),)), tmp_path / "a")
    assert overhearing.asked == []


# The whole import


@pytest.mark.django_db
@pytest.mark.parametrize("is_let_in", [True, False])
def test_an_import_tells_its_token_nowhere(
    server: str,
    shelf: Shelf,
    tmp_path: Path,
    settings: Any,
    caplog: pytest.LogCaptureFixture,
    is_let_in: bool,
    stopped: Callable[[], Any],
) -> None:
    caplog.set_level(logging.DEBUG)
    shelf.files["/tiny.gguf"] = gguf_files.write(tmp_path).read_bytes()
    shelf.wants = f"Bearer {TOKEN if is_let_in else OTHER_TOKEN}"
    changed = {
        "state_dir": tmp_path / "state",
        "fetch_hosts": [server.partition("://")[2]],
        "fetch_private_networks": ["127.0.0.0/8"],
        "fetch_tokens": [token_for(server)],
    }
    settings.CONFIG = type(settings.CONFIG).model_validate({**settings.CONFIG.model_dump(), **changed})
    row = desk.ask(desk.Asked(kind="model", name="gated", url=f"{server}/tiny.gguf"))
    importer.work(row, stopped(), trial=PassingTrial())
    row.refresh_from_db()
    assert row.state == (ModelImport.State.READY if is_let_in else ModelImport.State.REFUSED), row.problem
    kept = str(ModelImport.objects.values().get(pk=row.pk)) + caplog.text + repr(settings.CONFIG) + repr(desk.policy())
    assert TOKEN not in kept


@pytest.fixture
def stopped() -> Callable[[], Any]:
    import threading

    return threading.Event


# The setting


@pytest.mark.parametrize(
    "value",
    [
        f"huggingface.co {TOKEN}",
        f"={TOKEN}",
        f"*.hf.co={TOKEN}",
        f"huggingface.co={TOKEN} more",
        f"huggingface.co=@{TOKEN}",
        "huggingface.co=",
        f"huggingface.co={TOKEN}\r\nX-Injected: 1",
        f"huggingface.co={TOKEN},HuggingFace.co={TOKEN}",
        f"https://huggingface.co={TOKEN}",
        f"models.example.org={TOKEN}",
        f"hf.co={TOKEN}",
        TOKEN,
        f"{TOKEN}=huggingface.co",
    ],
)
def test_what_is_no_token_of_an_allowed_host_is_refused_at_start_and_not_repeated(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("FETCH_TOKENS", value)
    with pytest.raises(ConfigError) as raised:
        load()
    (problem,) = raised.value.problems
    assert problem.startswith("FETCH_TOKENS") and TOKEN.lower() not in str(raised.value).lower()


def test_tokens_and_files_of_tokens_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FETCH_TOKENS", f"huggingface.co={TOKEN}, cdn.hf.co=@/run/secrets/hub")
    config = load()
    assert len(config.fetch_tokens) == 2 and TOKEN not in repr(config) and TOKEN not in str(config)
    assert Config.model_fields["fetch_tokens"].default == []

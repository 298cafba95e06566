"""Downloads from a real server on loopback: ranges, cuts, changes in between, redirects, bodies without an end."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from inference.imports import connections, fetching
from inference.imports.addresses import Policy
from inference.imports.connections import TryAgain
from inference.imports.fetching import Wanted, bytes_at, fetch, persistently, probe
from inference.vetting.inspection import RegistrationError
from tests.inference.imports.file_server import Shelf, serving

pytestmark = pytest.mark.integration
DATA = bytes(range(256)) * 4096  # 1 MiB
LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"),)


@pytest.fixture
def shelf() -> Shelf:
    return Shelf(files={"/a.gguf": DATA})


@pytest.fixture
def server(shelf: Shelf) -> Iterator[str]:
    with serving(shelf) as address:
        yield address


@pytest.fixture
def policy(server: str) -> Policy:
    return Policy(hosts=(server.removeprefix("http://"),), private_networks=LOOPBACK)


def have(server: str, target: Path, policy: Policy, path: str = "/a.gguf") -> tuple[Wanted, list[float]]:
    """As the importer does it, without waiting."""
    wanted, pauses = Wanted(name="a", url=f"{server}{path}"), list[float]()
    persistently(lambda: probe(wanted, policy), lambda: bytes_at(target), pauses.append)
    persistently(lambda: fetch(wanted, target, policy, lambda _: None), lambda: bytes_at(target), pauses.append)
    return wanted, pauses


def refused(server: str, target: Path, policy: Policy, path: str = "/a.gguf") -> RegistrationError:
    with pytest.raises(RegistrationError) as caught:
        have(server, target, policy, path)
    return caught.value


def test_a_file_comes_whole_with_its_size_known_first(server: str, policy: Policy, tmp_path: Path) -> None:
    wanted, pauses = have(server, tmp_path / "a", policy)
    assert (tmp_path / "a").read_bytes() == DATA and (tmp_path / "a").stat().st_mode & 0o777 == 0o600
    assert wanted.size == len(DATA) and wanted.validator == '"one"' and pauses == []


def test_a_cut_connection_is_gone_on_with_where_it_broke(
    server: str, shelf: Shelf, policy: Policy, tmp_path: Path
) -> None:
    shelf.breaks = [300_000, 400_000]
    _, pauses = have(server, tmp_path / "a", policy)
    assert (tmp_path / "a").read_bytes() == DATA and pauses == [1.0, 2.0]
    assert [each for _, each in shelf.asked] == ["bytes=0-0", None, "bytes=300000-", "bytes=700000-"]


def test_another_process_goes_on_with_what_is_there(server: str, shelf: Shelf, policy: Policy, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(DATA[:5000])
    have(server, tmp_path / "a", policy)
    assert (tmp_path / "a").read_bytes() == DATA and shelf.asked[-1][1] == "bytes=5000-"
    have(server, tmp_path / "a", policy)
    assert shelf.asked[-1][1] == "bytes=0-0"  # it was whole: nothing but its size was asked for


def test_a_server_without_ranges_or_validator_begins_again(
    server: str, shelf: Shelf, policy: Policy, tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(b"x" * 5000)
    shelf.has_ranges = False
    have(server, tmp_path / "a", policy)
    assert (tmp_path / "a").read_bytes() == DATA
    (tmp_path / "b").write_bytes(b"x" * 5000)
    shelf.has_ranges, shelf.etag = True, 'W/"weak"'
    have(server, tmp_path / "b", policy)
    assert (tmp_path / "b").read_bytes() == DATA


def test_a_file_that_changes_in_between_is_not_mixed(server: str, shelf: Shelf, policy: Policy, tmp_path: Path) -> None:
    wanted = Wanted(name="a", url=f"{server}/a.gguf")
    probe(wanted, policy)
    (tmp_path / "a").write_bytes(DATA[:5000])
    shelf.etag = '"two"'
    with pytest.raises(RegistrationError) as caught:
        fetch(wanted, tmp_path / "a", policy, lambda _: None)
    assert caught.value.code == "fetch_changed"


def test_a_server_that_fails_for_a_while_is_asked_again_and_not_for_ever(
    server: str, shelf: Shelf, policy: Policy, tmp_path: Path
) -> None:
    shelf.statuses = [503, 429, 500]
    _, pauses = have(server, tmp_path / "a", policy)
    assert pauses == [1.0, 2.0, 4.0]
    shelf.statuses = [503] * 20
    assert "tried 6 times" in refused(server, tmp_path / "b", policy).message
    assert len(shelf.statuses) == 14


@pytest.mark.parametrize(("status", "words"), [(401, "not open to all"), (403, "not open"), (404, "404"), (410, "410")])
def test_what_will_not_get_better_is_not_tried_again(
    server: str, shelf: Shelf, policy: Policy, tmp_path: Path, status: int, words: str
) -> None:
    shelf.statuses = [status]
    assert words in refused(server, tmp_path / "a", policy).message and len(shelf.asked) == 1


def test_redirects_lead_to_allowed_hosts_alone(server: str, shelf: Shelf, policy: Policy, tmp_path: Path) -> None:
    shelf.redirects["/moved"] = "/a.gguf"
    have(server, tmp_path / "a", policy, "/moved")
    assert (tmp_path / "a").read_bytes() == DATA
    with serving(Shelf(files={"/a.gguf": DATA})) as other:
        for place in (f"{other}/a.gguf", "http://localhost/a.gguf", "file:///etc/passwd", "gopher://x/"):
            shelf.redirects["/away"] = place
            assert refused(server, tmp_path / "b", policy, "/away").code == "fetch_forbidden"
    shelf.redirects["/circle"] = "/circle"
    assert "more than 5 redirects" in refused(server, tmp_path / "b", policy, "/circle").message
    assert not (tmp_path / "b").exists()


def test_a_name_that_leads_into_a_private_network_is_not_asked(
    server: str, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = int(server.rpartition(":")[2])
    policy = Policy(hosts=(f"models.example.org:{port}",))
    monkeypatch.setattr(
        connections.socket,
        "getaddrinfo",
        lambda *args, **kwargs: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))],
    )
    error = refused(f"http://models.example.org:{port}", tmp_path / "a", policy)
    assert error.code == "fetch_forbidden" and "127.0.0.1" in error.message and shelf.asked == []


def test_a_body_without_an_end_is_ended_by_who_reads_it(
    server: str, shelf: Shelf, policy: Policy, tmp_path: Path
) -> None:
    shelf.tells_size, shelf.is_endless, shelf.has_ranges = False, True, False
    wanted = Wanted(name="a", url=f"{server}/a.gguf")
    probe(wanted, policy)
    assert wanted.size is None

    def bound(done: int) -> None:
        if done > 2_000_000:
            raise RegistrationError("import_too_large", "too large")

    with pytest.raises(RegistrationError, match="too large"):
        fetch(wanted, tmp_path / "a", policy, bound)
    assert (tmp_path / "a").stat().st_size < 3_000_000


def test_a_server_that_falls_silent_or_drips_is_left(
    server: str, shelf: Shelf, policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "SLOW_SECONDS", 0.0)
    monkeypatch.setattr(fetching, "GOOD_BYTES", 2 * len(DATA))
    with pytest.raises(TryAgain, match="Only"):
        fetch(Wanted(name="a", url=f"{server}/a.gguf"), tmp_path / "a", policy, lambda _: None)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = f"127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(connections, "SILENCE_SECONDS", 0.2)
        with pytest.raises(TryAgain, match="does not answer"):
            probe(Wanted(name="a", url=f"http://{place}/"), Policy(hosts=(place,), private_networks=LOOPBACK))


def test_nobody_who_does_not_speak_http_or_is_not_there_breaks_anything(policy: Policy) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    gone = Policy(hosts=(f"127.0.0.1:{port}",), private_networks=LOOPBACK)
    with pytest.raises(TryAgain, match="cannot be reached"):
        probe(Wanted(name="a", url=f"http://127.0.0.1:{port}/"), gone)


def test_https_is_verified(tmp_path: Path, server: str, policy: Policy) -> None:
    address: Any = server.replace("http:", "https:")
    with pytest.raises((TryAgain, RegistrationError)):
        probe(Wanted(name="a", url=f"{address}/a.gguf"), policy)

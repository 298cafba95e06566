"""Where models may be fetched from: words become addresses, and what is not allowed is refused with its reason."""

from __future__ import annotations

import ipaddress

import pytest

from inference.imports.addresses import Policy, absolute_url, checked, file_name, may_connect, parts_at
from inference.vetting.inspection import RegistrationError

pytestmark = pytest.mark.unit
HUB = "https://huggingface.co"
POLICY = Policy(hosts=("huggingface.co", "*.hf.co", "models.example.org:8443", "[::1]:81"))


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("owner/repo:tiny.gguf", f"{HUB}/owner/repo/resolve/main/tiny.gguf"),
        ("owner/repo@v1.0:sub/a tiny.gguf", f"{HUB}/owner/repo/resolve/v1.0/sub/a%20tiny.gguf"),
        ("o/r@refs/pr/1:x.gguf", f"{HUB}/o/r/resolve/refs%2Fpr%2F1/x.gguf"),
        (f"{HUB}/o/r/blob/main/x.gguf", f"{HUB}/o/r/resolve/main/x.gguf"),
        (" https://models.example.org/x.gguf?download=true#top ", "https://models.example.org/x.gguf?download=true"),
        ("https://models.example.org/o/r/blob/x.gguf", "https://models.example.org/o/r/blob/x.gguf"),
    ],
)
def test_words_become_an_address(text: str, url: str) -> None:
    assert absolute_url(text, HUB) == url


@pytest.mark.parametrize("text", ["", "tiny.gguf", "owner/repo", "owner:file", "a/b/c:file", "../..:x", "x" * 3000])
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(RegistrationError) as refused:
        absolute_url(text, HUB)
    assert refused.value.code == "fetch_forbidden"


@pytest.mark.parametrize(
    "url",
    [
        "https://huggingface.co/o/r/resolve/main/x.gguf",
        "https://HuggingFace.co./x",
        "http://huggingface.co:80/x",
        "https://cdn.eu.hf.co/x?y=z",
        "https://models.example.org:8443/x",
        "http://[::1]:81/x",
    ],
)
def test_hosts_that_are_named_are_allowed(url: str) -> None:
    assert checked(url, POLICY).hostname


@pytest.mark.parametrize(
    "url",
    [
        "ftp://huggingface.co/x",
        "file:///etc/passwd",
        "https://huggingface.co.example.org/x",
        "https://hf.co/x",
        "https://evilhf.co/x",
        "https://huggingface.co:8080/x",
        "https://models.example.org/x",
        "https://huggingface.co@example.org/x",
        "https://user:password@huggingface.co/x",
        "https://huggingface.co:99999/x",
        "https://[::1]/x",
        "https://huggingface.co/x\u200b",
        "//huggingface.co/x",
    ],
)
def test_everything_else_is_not(url: str) -> None:
    with pytest.raises(RegistrationError) as refused:
        checked(url, POLICY)
    assert refused.value.code == "fetch_forbidden" and refused.value.fields.keys() == {"url"}


def test_a_redirect_may_be_relative_and_never_gives_up_encryption() -> None:
    before = "https://huggingface.co/o/r/x"
    assert checked("/other", POLICY, before=before).geturl() == "https://huggingface.co/other"
    for url in ("http://huggingface.co/x", "https://example.org/x", "file:///etc/passwd"):
        with pytest.raises(RegistrationError):
            checked(url, POLICY, before=before)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.0.0.1",
        "172.16.1.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1",
        "fd00::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b::10.0.0.1",
        "2002:7f00:1::",
        "2002:a00:1::",
    ],
)
def test_machines_of_private_networks_are_not_asked(address: str) -> None:
    found = ipaddress.ip_address(address)
    assert not may_connect(found, POLICY)


def test_a_private_network_may_be_allowed_and_the_public_one_is() -> None:
    policy = Policy(hosts=(), private_networks=(ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("::1/128")))
    assert may_connect(ipaddress.ip_address("10.1.2.3"), policy)
    assert may_connect(ipaddress.ip_address("::ffff:10.1.2.3"), policy)
    assert may_connect(ipaddress.ip_address("::1"), policy)
    assert not may_connect(ipaddress.ip_address("192.168.1.1"), policy)
    for address in ("9.9.9.9", "2620:fe::fe"):
        assert may_connect(ipaddress.ip_address(address), POLICY)


def test_all_parts_of_a_split_model_are_found_from_any_of_them() -> None:
    assert file_name("https://h/a/big%20one.gguf?x=/y") == "big one.gguf"
    assert parts_at("https://h/a/tiny.gguf") == [("model.gguf", "https://h/a/tiny.gguf")]
    expected = [(f"model-0000{n}-of-00003.gguf", f"https://h/a/b%20c-0000{n}-of-00003.gguf?k=v") for n in (1, 2, 3)]
    assert parts_at("https://h/a/b%20c-00002-of-00003.gguf?k=v") == expected

"""Every address of the API × every kind of caller: as its view declares; what is another tenant's is not there.

The console has the same in tests/accounts/test_roles.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from accounts.identity import issuing
from inference.api.async_view import AsyncAPIView
from tests.conftest import Customer
from tests.in_process import MODEL, OTHER_MODEL, Client, InProcessSite
from tests.inference.api.test_fuzzed_document import GOOD, make_rows, make_things
from tests.inference.api.test_openapi import patterns

pytestmark = [pytest.mark.integration, pytest.mark.api]

METHODS = ("get", "post", "put", "patch", "delete")
SCOPES = ("generate", "usage", "operator")
PARAMETER = re.compile(r"\(\?P<(\w+)>(?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)")
OWNED = {"request_id", "response_id", "file_id", "batch_id"}


def operations() -> Iterator[tuple[str, str, Any, frozenset[str] | None]]:
    """(path with its parameters, method, view, scopes of which a key needs one or None where nobody needs a key)."""
    for path, pattern in patterns():
        view = pattern.callback.cls  # type: ignore[union-attr]
        scopes: frozenset[str] | None = frozenset({"operator"})
        if issubclass(view, AsyncAPIView):
            scopes = None if view.is_public else frozenset(view.scopes or SCOPES)
        routes = getattr(pattern.callback, "actions", None) or {each: each for each in METHODS if hasattr(view, each)}
        if "format" not in path and path != "metrics":  # it needs no key on the machine itself
            yield from (("/" + path, method, view, scopes) for method in routes)


def address(path: str, names: dict[str, Any]) -> str:
    """With names in the place of its parameters."""
    return PARAMETER.sub(lambda found: str(names[found[1]]), path)


def ask(client: Client, method: str, url: str, file_id: str = "") -> httpx.Response:
    """With a right body, where one is known: what is wrong with a body is said before what a key may not."""
    body: Any = {**GOOD.get(url, {}), **({"input_file_id": file_id} if url == "/v1/batches" else {})}
    if url == "/apply-template":
        del body["max_tokens"]
    if url == "/lora-adapters":
        body = []
    return client.request(method.upper(), url, json=body if method in ("post", "put", "patch") else None)


@pytest.fixture
def things(site: InProcessSite) -> dict[str, Any]:
    """Alice's, by the names of parameters."""
    made = make_things(site, site.cast.alice)
    return {**made, "pk": make_rows(site)["keys"], "model": MODEL, "import_id": 1}


@pytest.mark.parametrize("scope", [None, *SCOPES])
def test_every_address_answers_as_its_view_declares(
    site: InProcessSite, things: dict[str, Any], scope: str | None
) -> None:
    tenant = site.cast.alice.tenant
    caller = Customer(tenant, *issuing.issue(tenant, "walk", [scope], {}, None)) if scope else None
    client = site.client(caller)
    wrong, number = [], 0
    for path, method, _, scopes in sorted(operations(), key=lambda each: each[1] == "delete"):
        status = ask(client, method, address(path, things), things["file_id"]).status_code
        number += 1
        if scopes is None or (scope and scope in scopes):
            is_right = status not in (401, 403, 500)
        else:
            is_right = status == (401 if scope is None else 403)
        if not is_right:
            wrong.append(f"{method} {path}: {status}")
    assert not wrong, "\n".join(wrong)
    assert number > 90


def test_what_is_alices_is_not_there_for_charlie(site: InProcessSite, things: dict[str, Any]) -> None:
    """Neither by its status nor by its words can it be told from what has never been."""
    charlie, alice = site.client(site.cast.charlie), site.client(site.cast.alice)
    made_up = {name: str(things[name])[:-6] + "zzzzzz" for name in OWNED}
    seen = 0
    for path, method, _, _ in operations():
        names = set(PARAMETER.findall(path)) & OWNED
        for name in names:
            hers = ask(charlie, method, address(path, things))
            none = ask(charlie, method, address(path, {**things, **made_up}))
            assert hers.status_code == none.status_code == 404, (method, path, hers.text, none.text)
            assert words(hers, things[name]) == words(none, made_up[name])
            if method == "get":
                assert ask(alice, method, address(path, things)).status_code in (200, 410), path
            seen += 1
    assert seen >= 12


def words(answer: httpx.Response, name: str) -> str:
    """What was said, without the name that was asked for and the answer's own id."""
    return answer.text.replace(name, "…").replace(answer.headers["x-request-id"], "")


def test_names_of_alices_things_in_bodies_are_nobodys(site: InProcessSite, things: dict[str, Any]) -> None:
    charlie = site.client(site.cast.charlie)
    say = {"messages": [{"role": "user", "content": "a b"}], "max_tokens": 2}
    bodies: dict[str, tuple[str, dict[str, Any]]] = {
        "model": ("/v1/chat/completions", {**say, "model": OTHER_MODEL}),
        "previous_response_id": ("/v1/responses", {"input": "a", "previous_response_id": things["response_id"]}),
        "input_file_id": (
            "/v1/batches",
            {"input_file_id": things["file_id"], "endpoint": "/v1/completions", "completion_window": "24h"},
        ),
    }
    for field, (path, body) in bodies.items():
        hers = charlie.post(path, json=body)
        made_up = body[field][:-2] + "zz"
        none = charlie.post(path, json={**body, field: made_up})
        assert hers.status_code == none.status_code, (field, hers.text)
        assert hers.status_code in (400, 404), (field, hers.text)
        assert words(hers, body[field]) == words(none, made_up)
    assert OTHER_MODEL not in charlie.get("/v1/models").text
    assert things["file_id"] not in charlie.get("/v1/files").text
    assert things["batch_id"] not in charlie.get("/v1/batches").text

"""An alias over HTTP with the real model: its style says which version answered, in every dialect; so does the receipt.

The target writes verse, the canary answers a chat with one JSON object.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from llmsite.demo import MODEL_NAME
from tests.in_process import wait_until
from tests.real.conftest import LlamaSite

pytestmark = [pytest.mark.model, pytest.mark.integration, pytest.mark.slow, pytest.mark.xdist_group("llama_site")]

ALIAS = f"{MODEL_NAME}:support"
MESSAGES = [{"role": "user", "content": "What is the largest planet?"}]
CHAT: dict[str, Any] = {"model": ALIAS, "messages": MESSAGES, "temperature": 0}


def native(client: httpx.Client) -> tuple[str, str]:
    answer = client.post("/v1/generate", json={**CHAT, "max_new_tokens": 24, "cache": False})
    return answer.json()["output"], answer.headers["x-request-id"]


def openai(client: httpx.Client) -> tuple[str, str]:
    answer = client.post("/v1/chat/completions", json={**CHAT, "max_tokens": 24})
    assert answer.json()["model"] == ALIAS
    return answer.json()["choices"][0]["message"]["content"], answer.headers["x-request-id"]


def anthropic(client: httpx.Client) -> tuple[str, str]:
    answer = client.post("/v1/messages", json={**CHAT, "max_tokens": 24})
    return answer.json()["content"][0]["text"], answer.headers["x-request-id"]


def llamacpp(client: httpx.Client) -> tuple[str, str]:
    prompt = client.post("/apply-template", json={"model": MODEL_NAME, "messages": MESSAGES}).json()["prompt"]
    tokens = client.post("/tokenize", json={"content": prompt, "parse_special": True}).json()["tokens"]
    body = {"model": ALIAS, "prompt": tokens, "temperature": 0, "n_predict": 24}
    answer = client.post("/completion", json=body)
    return answer.json()["content"], answer.headers["x-request-id"]


DIALECTS: tuple[Callable[[httpx.Client], tuple[str, str]], ...] = (native, openai, anthropic, llamacpp)


@pytest.fixture
def alias(llama_site: LlamaSite) -> Iterator[str]:
    """Its page in the operator's API; made without a trial."""
    body = {"model": MODEL_NAME, "name": "support", "target": "shakespeare"}
    made = llama_site.operator.post("/v1/admin/aliases", json=body)
    assert made.status_code == 201, made.text
    yield f"/v1/admin/aliases/{made.json()['id']}"
    assert llama_site.operator.delete(f"/v1/admin/aliases/{made.json()['id']}").status_code == 204


def answers_are_json(client: httpx.Client) -> set[bool]:
    """Of each dialect, whether its answer is the JSON version's; its receipt must say the same."""
    found = set()
    for ask in DIALECTS:
        text, request_id = ask(client)
        is_json = text.lstrip().startswith('{"topic"')
        receipt: dict[str, Any] = {}

        def has_ended(receipt: dict[str, Any] = receipt, request_id: str = request_id) -> bool:
            receipt.update(client.get(f"/v1/requests/{request_id}").json())
            return "aliases" in receipt

        wait_until(has_ended)
        version = "json-reply" if is_json else "shakespeare"
        answered = [each["name"] for each in receipt["adapters"]]
        assert (receipt["aliases"], answered) == ({"support": version}, [version])
        found.add(is_json)
    return found


def test_share_0_100_roll_back_and_promote_change_who_answers_in_every_dialect(
    llama_site: LlamaSite, alias: str
) -> None:
    bob, alice, operator = llama_site.bob, llama_site.alice, llama_site.operator

    def change(method: str, path: str = alias, **body: Any) -> dict[str, Any]:
        reply = operator.request(method, path, json=body)
        assert reply.status_code == 200, reply.text
        found: dict[str, Any] = reply.json()
        return found

    def settles_to(expected: bool) -> None:
        """Other processes hear of a change within a second."""
        wait_until(lambda: native(bob)[0].lstrip().startswith('{"topic"') is expected)
        assert answers_are_json(bob) == {expected}

    assert ALIAS in [each["id"] for each in bob.get("/v1/models").json()["data"]]
    settles_to(False)
    change("PATCH", canary="json-reply", share=0)
    settles_to(False)
    change("PATCH", share=100)
    settles_to(True)
    assert not native(alice)[0].lstrip().startswith("{"), "the canary is not granted to her"
    change("POST", f"{alias}/roll-back")
    settles_to(False)
    change("PATCH", canary="json-reply", share=1)
    refused = operator.post(f"{alias}/promote", json={})
    assert refused.status_code == 409 and "may use smollm2-135m:shakespeare" in refused.json()["message"]
    assert change("POST", f"{alias}/promote", force=True)["previous"] == "shakespeare"
    settles_to(True)
    wait_until(lambda: alice.post("/v1/generate", json={**CHAT, "max_new_tokens": 1}).status_code == 404)
    change("POST", f"{alias}/roll-back")
    settles_to(False)
    compared = operator.get(f"{alias}/compare").json()["versions"]
    assert {each["version"] for each in compared} == {"shakespeare", "json-reply"}
    assert all(each["requests"] >= 8 and each["failed"] == 0 for each in compared)

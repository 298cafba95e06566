"""OpenAI's responses on a whole site with a fake model: shapes, events, what is stored, who sees it, bad input."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import httpx
import openai
import orjson
import pytest
from django.core.management import CommandError, call_command
from django.utils import timezone

from accounts.identity.known_keys import CACHE
from accounts.models import Tenant
from inference import stored_responses
from inference.models import Receipt, StoredResponse
from inference.transport.queue import ticket_queue
from inference.upkeep.reaper import Reaper
from tests.conftest import Customer
from tests.in_process import MODEL, N_CTX, InProcessSite, read_events, wait_until
from tests.openai_calls import chat, error_of, respond, sdk

pytestmark = pytest.mark.api
ROUTE = "/v1/responses"
TOOL = {"type": "function", "name": "look_up", "parameters": {"type": "object"}}


@pytest.fixture
def keeping(site: InProcessSite) -> Iterator[Customer]:
    """Alice, whose responses are stored."""
    set_days(site.cast.alice, 30)
    yield site.cast.alice


def set_days(customer: Customer, days: int | None) -> None:
    Tenant.objects.filter(pk=customer.tenant.pk).update(response_days=days)
    CACHE.forget()


def slow_down(site: InProcessSite) -> None:
    site.stop_worker()
    site.speed.seconds_per_step = 0.05
    site.start_worker()


def events_of(client: httpx.Client, **fields: Any) -> list[dict[str, Any]]:
    body = {"input": "Hello there", "max_output_tokens": 8, "temperature": 0, "stream": True, **fields}
    with client.stream("POST", ROUTE, json=body) as response:
        assert response.status_code == 200, response.read()
        found = list(read_events(response))
    assert [name for name, _ in found] == [event["type"] for _, event in found]
    assert [event["sequence_number"] for _, event in found] == list(range(len(found)))
    return [event for _, event in found]


def text_of(response: dict[str, Any]) -> str:
    return "".join(part["text"] for item in response["output"] if item["type"] == "message" for part in item["content"])


def without_times(response: dict[str, Any]) -> dict[str, Any]:
    """What two answers to the same request have in common."""
    output = [{**item, "id": ""} for item in response["output"]]
    return {**response, "id": "", "created_at": 0, "completed_at": 0, "output": output}


# Answers


def test_a_response_has_openais_shape(site: InProcessSite) -> None:
    response = respond(
        site.client(site.cast.alice), model=MODEL, instructions="Be brief.", metadata={"a": "b"}, user="u"
    )
    body = response.json()
    assert response.status_code == 200, body
    assert body["id"] == f"resp_{response.headers['x-request-id']}"
    assert (body["object"], body["model"], body["status"]) == ("response", MODEL, "incomplete")
    assert body["incomplete_details"] == {"reason": "max_output_tokens"}
    assert (body["instructions"], body["metadata"], body["user"]) == ("Be brief.", {"a": "b"}, "u")
    assert (body["error"], body["previous_response_id"], body["store"]) == (None, None, False)
    assert (body["temperature"], body["max_output_tokens"], body["truncation"]) == (0, 8, "disabled")
    assert (body["tools"], body["tool_choice"], body["text"]) == ([], "auto", {"format": {"type": "text"}})
    (item,) = body["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "incomplete")
    (part,) = item["content"]
    assert (part["type"], part["annotations"], part["logprobs"]) == ("output_text", [], [])
    assert part["text"]
    assert body["usage"] == {
        "input_tokens": 6 + 4,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 8,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 18,
    }
    site.settle()
    assert Receipt.objects.get().route == ROUTE
    assert site.charged(site.cast.alice) == (18, 0)


def test_a_response_is_the_chat_completion_of_its_items(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    items = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
        {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
         "content": [{"type": "output_text", "text": "Hi", "annotations": []}]},
        {"role": "user", "content": "And now?"},
    ]  # fmt: skip
    messages = [
        {"role": "system", "content": "Now answer.\n\nBe brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "And now?"},
    ]
    body = respond(alice, items, instructions="Now answer.").json()
    chatted = chat(alice, messages).json()
    assert text_of(body) == chatted["choices"][0]["message"]["content"]
    assert body["usage"]["input_tokens"] == chatted["usage"]["prompt_tokens"]
    counted = alice.post(f"{ROUTE}/input_tokens", json={"input": items, "instructions": "Now answer."})
    assert counted.json() == {"object": "response.input_tokens", "input_tokens": body["usage"]["input_tokens"]}


def test_a_stream_is_the_whole_response_event_by_event(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    whole = respond(alice).json()
    events = events_of(alice)
    names = [event["type"].removeprefix("response.") for event in events]
    assert names[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert names[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert set(names[4:-4]) == {"output_text.delta"}
    assert "".join(event["delta"] for event in events if "delta" in event) == text_of(whole)
    assert events[-4]["text"] == text_of(whole)
    assert (events[0]["response"]["status"], events[0]["response"]["output"]) == ("in_progress", [])
    assert without_times(events[-1]["response"]) == without_times(whole)
    assert events[-1]["response"]["id"] == events[0]["response"]["id"]


def test_an_answer_from_the_completion_cache_is_the_same(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    first = respond(alice, cache=True)
    site.settle()
    again = respond(alice, cache=True)
    assert (first.headers["x-cache"], again.headers["x-cache"]) == ("miss", "hit")
    assert without_times(again.json()) == without_times(first.json())
    assert without_times(events_of(alice, cache=True)[-1]["response"]) == without_times(first.json())


def test_thoughts_are_an_item_of_their_own(site: InProcessSite) -> None:
    fields = {"model": site.serve_thinker()}
    alice = site.client(site.cast.alice)
    body = respond(alice, **fields).json()
    (item,) = body["output"]
    assert (item["type"], item["summary"], item["status"]) == ("reasoning", [], "incomplete")
    assert item["content"][0]["type"] == "reasoning_text"
    assert body["usage"]["output_tokens_details"]["reasoning_tokens"] == 8
    events = events_of(alice, **fields)
    names = {event["type"] for event in events}
    assert {"response.reasoning_text.delta", "response.reasoning_text.done"} <= names
    assert without_times(events[-1]["response"]) == without_times(body)
    assert respond(alice, **fields, reasoning_format="none").json()["output"][0]["type"] == "message"


def test_an_effort_is_told_to_the_template(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    thinks = {"chat_template_kwargs": {"enable_thinking": True}}
    plain, none, explicit = (
        respond(alice, **fields).json()["usage"]["input_tokens"]
        for fields in (thinks, {"reasoning": {"effort": "none"}}, {**thinks, "reasoning": {"effort": "none"}})
    )
    assert plain == none + 1
    assert explicit == plain, "what the request says of the template has the last word"


def test_probabilities_come_with_the_text(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    body = respond(alice, **fields).json()
    logprobs = body["output"][0]["content"][0]["logprobs"]
    assert len(logprobs) == 8
    assert logprobs[0]["top_logprobs"][0]["token"] == logprobs[0]["token"]
    events = events_of(alice, **fields)
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [each for event in deltas for each in event["logprobs"]] == logprobs
    assert respond(alice, **fields, tools=[TOOL]).json()["output"][0]["content"][0]["logprobs"] == []


def test_a_forced_call_has_a_grammar(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    respond(alice, tools=[TOOL], tool_choice={"type": "function", "name": "look_up"})
    assert "look_up" in site.tokenizers.tried[0]


# The store


def test_nothing_is_stored_of_a_tenant_that_did_not_ask_for_it(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    body = respond(alice, store=True).json()
    assert body["store"] is False
    assert not StoredResponse.objects.exists()
    assert "stored_responses --tenant" in error_of(alice.get(f"{ROUTE}/{body['id']}"), 404, "not_found")["message"]
    refused = respond(alice, previous_response_id=body["id"])
    error = error_of(refused, 400, "invalid_value", "previous_response_id")
    assert "stored_responses --tenant" in error["message"]
    assert site.charged(site.cast.alice)[1] == 0


def test_what_is_stored_is_read_and_deleted(site: InProcessSite, keeping: Customer) -> None:
    alice = site.client(keeping)
    first = respond(alice, "One two").json()
    assert first["store"] is True
    assert alice.get(f"{ROUTE}/{first['id']}").json() == first
    streamed = events_of(alice, input="One two")[-1]["response"]
    assert alice.get(f"{ROUTE}/{streamed['id']}").json() == streamed
    not_stored = respond(alice, store=False).json()
    assert not_stored["store"] is False
    error_of(alice.get(f"{ROUTE}/{not_stored['id']}"), 404, "not_found")
    deleted = alice.delete(f"{ROUTE}/{first['id']}").json()
    assert deleted == {"id": first["id"], "object": "response", "deleted": True}
    for answer in (alice.get(f"{ROUTE}/{first['id']}"), alice.delete(f"{ROUTE}/{first['id']}")):
        error_of(answer, 404, "not_found")


def test_a_stream_that_is_resumed_says_that_its_response_is_stored(site: InProcessSite, keeping: Customer) -> None:
    """Whoever resumes words the answer again, and it is there already."""
    alice = site.client(keeping)
    whole = events_of(alice)[-1]["response"]
    with alice.stream("GET", f"/v1/requests/{whole['id'].removeprefix('resp_')}/events") as again:
        *_, (_, last) = read_events(again)
    assert (whole["store"], last["response"]["store"]) == (True, True)
    assert StoredResponse.objects.count() == 1


def test_a_conversation_goes_on_as_if_it_had_been_sent_whole(site: InProcessSite, keeping: Customer) -> None:
    alice = site.client(keeping)
    items: list[dict[str, Any]] = []
    previous: str | None = None
    for text in ("Hello there", "And then what", "And after that"):
        items.append({"role": "user", "content": text})
        whole = respond(alice, items, store=False).json()
        body = respond(alice, text, previous_response_id=previous).json()
        assert without_times(body)["output"] == without_times(whole)["output"]
        assert body["usage"]["input_tokens"] == whole["usage"]["input_tokens"]
        assert body["previous_response_id"] == previous
        items += body["output"]
        previous = body["id"]
    listed = alice.get(f"{ROUTE}/{previous}/input_items", params={"order": "asc"}).json()
    assert [item["role"] for item in listed["data"]] == ["user", "assistant", "user", "assistant", "user"]
    assert listed["data"][0]["content"] == [{"type": "input_text", "text": "Hello there"}]
    assert (listed["object"], listed["has_more"], listed["first_id"]) == ("list", False, listed["data"][0]["id"])
    page = alice.get(f"{ROUTE}/{previous}/input_items", params={"limit": 2}).json()
    assert (page["has_more"], [item["role"] for item in page["data"]]) == (True, ["user", "assistant"])
    rest = alice.get(f"{ROUTE}/{previous}/input_items", params={"after": page["last_id"], "limit": 3}).json()
    assert [item["role"] for item in rest["data"]] == ["user", "assistant", "user"]
    for query in ({"limit": 0}, {"order": "up"}, {"after": "nothing"}):
        error_of(alice.get(f"{ROUTE}/{previous}/input_items", params=query), 400, "invalid_value", next(iter(query)))
    alice.delete(f"{ROUTE}/{items[1]['id']}")
    assert respond(alice, "More", previous_response_id=previous).status_code == 200, "each stands alone"


def test_a_reference_stands_for_an_item_that_is_stored(site: InProcessSite, keeping: Customer) -> None:
    """As Vercel's client sends it, which repeats no item that has an id."""
    alice = site.client(keeping)
    call = {"type": "function_call", "call_id": "call_1", "name": "look_up", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "call_1", "output": "It is so"}
    first = respond(alice, [{"role": "user", "content": "What is it"}, call, output]).json()
    listed = alice.get(f"{ROUTE}/{first['id']}/input_items", params={"order": "asc"}).json()["data"]
    whole = [*listed, *first["output"], {"role": "user", "content": "And then"}]
    short = [listed[0], {"id": listed[1]["id"]}, output]
    short += [{"type": "item_reference", "id": first["output"][0]["id"]}, whole[-1]]
    second = respond(alice, short).json()
    assert second["usage"]["input_tokens"] == respond(alice, whole).json()["usage"]["input_tokens"]
    third = [*({"type": "item_reference", "id": item["id"]} for item in [*whole[:-1], *second["output"]]), whole[-1]]
    assert respond(alice, third).status_code == 200
    for other in (site.cast.bob, site.cast.charlie):
        error = error_of(respond(site.client(other), short), 400, "invalid_value", "input")
        assert "stored_responses --tenant" in error["message"]


def test_an_item_is_referred_to_once(site: InProcessSite, keeping: Customer) -> None:
    """A body of kilobytes would name megabytes thousands of times."""
    alice = site.client(keeping)
    reference = {"type": "item_reference", "id": respond(alice).json()["output"][0]["id"]}
    error = error_of(respond(alice, [reference, reference]), 400, "invalid_value", "input")
    assert reference["id"] in error["message"]


def test_a_call_that_was_cut_does_not_end_its_conversation(site: InProcessSite, keeping: Customer) -> None:
    alice = site.client(keeping)
    first = respond(alice).json()
    row = StoredResponse.objects.get()
    content = orjson.loads(zlib.decompress(row.content))
    cut = {"type": "function_call", "id": "fc_1", "status": "incomplete", "call_id": "call_1", "name": "look_up"}
    content["response"]["output"].append({**cut, "arguments": '{"a'})
    row.content = zlib.compress(orjson.dumps(content))
    row.save()
    again = respond(alice, "Well?", previous_response_id=first["id"])
    assert again.status_code == 200, again.text


def test_instructions_are_of_one_response_alone(site: InProcessSite, keeping: Customer) -> None:
    alice = site.client(keeping)
    first = respond(alice, "One", instructions="Be brief and kind").json()
    second = respond(alice, "Two", previous_response_id=first["id"]).json()
    items = [{"role": "user", "content": "One"}, *first["output"], {"role": "user", "content": "Two"}]
    assert second["usage"]["input_tokens"] == respond(alice, items).json()["usage"]["input_tokens"]


def test_calls_and_their_outputs_are_stored(site: InProcessSite, keeping: Customer) -> None:
    alice = site.client(keeping)
    items = [
        {"role": "user", "content": "What is it"},
        {"type": "function_call", "call_id": "call_1", "name": "look_up", "arguments": '{"a": 1}'},
        {"type": "function_call_output", "call_id": "call_1", "output": "It is so"},
    ]
    first = respond(alice, items, tools=[TOOL]).json()
    listed = alice.get(f"{ROUTE}/{first['id']}/input_items", params={"order": "asc"}).json()["data"]
    assert [item["type"] for item in listed] == ["message", "function_call", "function_call_output"]
    assert (listed[1]["call_id"], listed[1]["arguments"], listed[2]["output"]) == ("call_1", '{"a": 1}', "It is so")
    again = {"type": "function_call_output", "call_id": "call_1", "output": "once more"}
    assert respond(alice, [again], tools=[TOOL], previous_response_id=first["id"]).status_code == 200


def test_nobody_sees_what_another_tenant_stored(site: InProcessSite, keeping: Customer) -> None:
    set_days(site.cast.charlie, 30)
    found = respond(site.client(keeping)).json()["id"]
    charlie = site.client(site.cast.charlie)
    for answer in (
        charlie.get(f"{ROUTE}/{found}"),
        charlie.delete(f"{ROUTE}/{found}"),
        charlie.post(f"{ROUTE}/{found}/cancel"),
        charlie.get(f"{ROUTE}/{found}/input_items"),
    ):
        error_of(answer, 404, "not_found")
    refused = respond(charlie, previous_response_id=found)
    error_of(refused, 400, "previous_response_not_found", "previous_response_id")
    assert site.client(keeping).get(f"{ROUTE}/{found}").status_code == 200


def test_a_nul_in_an_id_is_no_error_of_the_server(site: InProcessSite, keeping: Customer) -> None:
    answer = respond(site.client(keeping), previous_response_id="resp_\0")
    assert answer.status_code == 400, answer.text


def test_what_is_too_old_is_not_there_and_goes(site: InProcessSite, keeping: Customer) -> None:
    alice, now = site.client(keeping), timezone.now()
    old, young = respond(alice).json()["id"], respond(alice).json()["id"]
    StoredResponse.objects.filter(pk=old).update(created_at=now - timedelta(days=10))
    assert alice.get(f"{ROUTE}/{old}").status_code == 200
    set_days(keeping, 7)
    error_of(alice.get(f"{ROUTE}/{old}"), 404, "not_found")
    Reaper(ticket_queue()).sweep()
    assert list(StoredResponse.objects.values_list("pk", flat=True)) == [young]
    call_command("stored_responses", "--tenant", keeping.tenant.name, "--off", "--json")
    assert not StoredResponse.objects.exists()
    assert Tenant.objects.get(pk=keeping.tenant.pk).response_days is None
    assert stored_responses.purge(now) == 0


def test_the_oldest_make_room(site: InProcessSite, keeping: Customer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_responses, "MAX_RESPONSES", 2)
    alice = site.client(keeping)
    found = [respond(alice).json()["id"] for _ in range(3)]
    assert [alice.get(f"{ROUTE}/{each}").status_code for each in found] == [404, 200, 200]
    monkeypatch.setattr(stored_responses, "MAX_CONTENT_BYTES", 100)
    assert respond(alice).json()["store"] is False, "an answer that is too large to be stored is an answer"
    assert events_of(alice)[-1]["response"]["store"] is False


def test_the_command_switches_shows_and_removes(
    site: InProcessSite, keeping: Customer, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*arguments: str) -> dict[str, Any]:
        call_command("stored_responses", *arguments, "--json")
        found: dict[str, Any] = orjson.loads(capsys.readouterr().out)
        return found

    name = keeping.tenant.name
    respond(site.client(keeping))
    assert told("--tenant", name, "--days", "7")["removed"] == 0
    (row,) = (row for row in told()["stored"] if row["tenant"] == name)
    assert (row["days"], row["responses"]) == (7, 1)
    assert row["bytes"] == StoredResponse.objects.get().num_bytes
    assert told("--purge")["removed"] == 0
    call_command("stored_responses", "--tenant", name, "--erase")
    assert "Removed 1 responses." in capsys.readouterr().out
    for wrong in (("--days", "7"), ("--off",), ("--tenant", name, "--days", "401"), ("--tenant", "nobody")):
        with pytest.raises(CommandError):
            call_command("stored_responses", *wrong)
    assert Tenant.objects.get(pk=keeping.tenant.pk).response_days == 7


def test_a_tenant_that_goes_takes_its_responses_along(site: InProcessSite, keeping: Customer) -> None:
    respond(site.client(keeping))
    field = StoredResponse._meta.get_field("tenant")
    assert field.remote_field.on_delete.__name__ == "CASCADE"
    assert stored_responses.erase(keeping.tenant) == 1


# Cancelling


def test_a_running_response_is_cancelled(site: InProcessSite, keeping: Customer) -> None:
    slow_down(site)
    alice = site.client(keeping)
    body = {"input": "Hello there", "max_output_tokens": 200, "stream": True}
    with alice.stream("POST", ROUTE, json=body) as response:
        events = read_events(response)
        _, created = next(events)
        found = created["response"]["id"]
        while next(events)[0] != "response.output_text.delta":
            pass
        error_of(site.client(site.cast.charlie).post(f"{ROUTE}/{found}/cancel"), 404, "not_found")
        cancelled = alice.post(f"{ROUTE}/{found}/cancel").json()
        assert (cancelled["id"], cancelled["status"]) == (found, "cancelled")
        name, last = list(events)[-1]
    assert (name, last["response"]["status"]) == ("response.failed", "cancelled")
    assert last["response"]["error"]["code"] == "request_cancelled"
    assert last["response"]["output"][0]["content"][0]["text"]
    site.settle()
    error_of(alice.get(f"{ROUTE}/{found}"), 404, "not_found")
    done = respond(alice).json()
    assert alice.post(f"{ROUTE}/{done['id']}/cancel").json() == done


# What does not fit


def test_a_conversation_that_does_not_fit_loses_its_oldest_items(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    said = [
        {"role": role, "content": f"{place} " + "word " * 30}
        for place in range(6)
        for role in ("user", "assistant")
    ]  # fmt: skip
    items = [{"role": "system", "content": "Be brief"}, *said, {"role": "user", "content": "And now"}]
    error_of(respond(alice, items), 400, "context_length_exceeded", "input")
    body = respond(alice, items, truncation="auto").json()
    assert (body["truncation"], body["usage"]["output_tokens"]) == ("auto", 8)
    num_tokens = body["usage"]["input_tokens"]
    assert N_CTX - 8 - 70 < num_tokens <= N_CTX - 8
    shorter = [items[0], *items[-7:]]
    assert respond(alice, shorter).json()["usage"]["input_tokens"] == num_tokens
    one = [{"role": "user", "content": "word " * N_CTX}]
    error_of(respond(alice, one, truncation="auto"), 400, "context_length_exceeded", "input")


# Bad input

CALL = {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}"}
BAD: list[tuple[dict[str, Any], str, str | None]] = [
    ({"input": None}, "invalid_value", "input"),
    ({"input": 5}, "invalid_type", "input"),
    ({"input": []}, "invalid_value", "input"),
    ({"input": [5]}, "invalid_type", "input[0]"),
    ({"input": [{"role": "user"}]}, "missing_required_parameter", "input[0].content"),
    ({"input": [{"role": "king", "content": "a"}]}, "invalid_value", "input[0].role"),
    ({"input": [{"type": "web_search_call", "id": "a"}]}, "invalid_value", "input"),
    ({"input": [{"type": "item_reference", "id": "a"}]}, "invalid_value", "input"),
    ({"input": [{"type": "item_reference", "id": "msg_a-0"}]}, "invalid_value", "input"),
    ({"input": [{"type": "item_reference"}]}, "missing_required_parameter", "input[0].id"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "invalid_value", "input[0].content"),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "invalid_type", "input[0].content[0].text"),
    ({"input": [{**CALL, "arguments": "[1"}]}, "invalid_value", "input[0].arguments"),
    ({"input": [{**CALL, "name": ""}]}, "invalid_value", "input[0].name"),
    ({"input": [{"type": "function_call_output", "call_id": "call_9", "output": "a"}]}, "invalid_value", "input"),
    ({"background": True}, "invalid_value", "background"),
    ({"conversation": "conv_1"}, "invalid_value", "conversation"),
    ({"prompt": {"id": "pmpt_1"}}, "invalid_value", "prompt"),
    ({"n": 2}, "invalid_value", "n"),
    ({"max_output_tokens": 0}, "invalid_value", "max_output_tokens"),
    ({"max_output_tokens": "many"}, "invalid_type", "max_output_tokens"),
    ({"temperature": 3}, "invalid_value", "temperature"),
    ({"top_logprobs": 21}, "invalid_value", "top_logprobs"),
    ({"truncation": "middle"}, "invalid_value", "truncation"),
    ({"metadata": {"a": 1}}, "invalid_type", "metadata.a"),
    ({"metadata": {"a": "b" * 513}}, "invalid_value", "metadata.a"),
    ({"metadata": {str(number): "b" for number in range(17)}}, "invalid_value", "metadata"),
    ({"tools": [{"type": "web_search"}]}, "invalid_value", "tools"),
    ({"tools": [{"type": "function"}]}, "missing_required_parameter", "tools[0].name"),
    ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "g"}}, "invalid_value", "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "web_search"}}, "invalid_value", "tool_choice"),
    ({"text": {"format": {"type": "json_schema"}}}, "invalid_value", "text.format.schema"),
    ({"text": {"format": {"type": "xml"}}}, "invalid_value", "text.format.type"),
    ({"text": {"format": {"type": "json_schema", "schema": {"type": "x"}}}}, "invalid_schema", "text.format.schema"),
    ({"reasoning": {"effort": "a b"}}, "invalid_value", "reasoning.effort"),
    ({"previous_response_id": ""}, "invalid_value", "previous_response_id"),
]


def test_what_is_wrong_is_named(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    for fields, code, param in BAD:
        for path in (ROUTE, f"{ROUTE}/input_tokens"):
            answer = alice.post(path, json={"input": "Hello", "max_output_tokens": 4, "stream": True, **fields})
            assert answer.status_code == 400, (fields, answer.text)
            error_of(answer, 400, code, param)
    assert site.charged(site.cast.alice) == (0, 0)


def test_a_key_that_may_not_generate_has_no_responses(site: InProcessSite) -> None:
    usage = site.client(site.cast.operator)
    for answer in (
        respond(usage),
        usage.get(f"{ROUTE}/resp_1"),
        usage.delete(f"{ROUTE}/resp_1"),
        usage.post(f"{ROUTE}/resp_1/cancel"),
        usage.get(f"{ROUTE}/resp_1/input_items"),
        usage.post(f"{ROUTE}/input_tokens", json={"input": "a"}),
    ):
        error_of(answer, 403, "forbidden")


def test_the_official_client_raises_what_it_should(site: InProcessSite) -> None:
    with sdk(site.base_url, site.cast.alice.text) as client:
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve("resp_nothing")
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(model=MODEL, input="a", background=True)
        assert caught.value.param == "background"
        with pytest.raises(openai.NotFoundError):
            client.responses.create(model="nothing", input="a")


def test_a_client_that_goes_cancels_its_response(site: InProcessSite) -> None:
    slow_down(site)
    alice = site.client(site.cast.alice)
    with alice.stream("POST", ROUTE, json={"input": "Hello", "max_output_tokens": 200, "stream": True}) as response:
        next(read_events(response))
    wait_until(lambda: site.settle() or Receipt.objects.filter(finish_reason="cancelled").exists())


def test_the_short_addresses_are_the_same(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    body = {"input": "Hello there", "max_output_tokens": 8, "temperature": 0}
    short, long = (alice.post(path, json=body).json() for path in ("/responses", ROUTE))
    assert short["output"][0]["content"] == long["output"][0]["content"]
    counted = [alice.post(f"{path}/input_tokens", json=body).json() for path in ("/responses", ROUTE)]
    assert counted[0] == counted[1]

"""Who reads a request, and what becomes of it without a reader: the policy, in Redis alone."""

from __future__ import annotations

import time
from typing import Any

import pytest

from inference.transport.holding import TO_THE_END, Hold, Question
from inference.transport.queue import TicketQueue
from inference.transport.ticket import TicketError
from tests.inference.flow import POOL, ticket

pytestmark = pytest.mark.integration


@pytest.fixture
def queue(valkey: Any) -> TicketQueue:
    queue = TicketQueue(valkey)
    queue.beat_web("one")
    queue.beat_web("two")
    return queue


def put(queue: TicketQueue, *, leased: bool = True, **hold: Any) -> str:
    sent = ticket()
    queue.put(sent, hold=Hold(web="one", **hold))
    if leased:
        assert queue.take(POOL, "worker", [1]) is not None
    return sent.request_id


def cancels(queue: TicketQueue) -> set[str]:
    return {each.decode() for each in queue.client.smembers("cancels:worker")}


def sweep(queue: TicketQueue) -> None:
    queue.beat("worker", POOL, 4, {})
    queue.sweep()


def test_the_last_reader_who_leaves_cancels(queue: TicketQueue) -> None:
    request_id = put(queue)
    assert queue.join(request_id, "two")
    assert queue.leave(request_id, "one") == ("kept", None)
    assert cancels(queue) == set()
    assert queue.leave(request_id, "two") == ("running", None)
    assert cancels(queue) == {request_id}


def test_a_reader_whose_joining_is_sent_again_counts_once(queue: TicketQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    request_id, join = put(queue), queue._join
    monkeypatch.setattr(queue, "_join", lambda **call: join(**call) and join(**call))
    assert queue.join(request_id, "two")
    assert queue.client.hget("held:two", request_id) == b"1"
    assert queue.join(request_id, "two")
    assert queue.client.hget(f"ticket:{request_id}", "readers") == b"3"


def test_a_reader_whose_leaving_is_sent_again_counts_once(queue: TicketQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the client of Redis does where the connection broke before the reply: the other reader is still there."""
    request_id, leave = put(queue), queue._leave
    assert queue.join(request_id, "one")
    monkeypatch.setattr(queue, "_leave", lambda **call: leave(**call) and leave(**call))
    assert queue.leave(request_id, "one") == ("kept", None)
    assert queue.client.hget(f"ticket:{request_id}", "readers") == b"1"
    assert cancels(queue) == set()


def test_nobody_leaves_twice(queue: TicketQueue) -> None:
    request_id = put(queue)
    queue.join(request_id, "two")
    for _ in range(3):
        assert queue.leave(request_id, "one") == ("kept", None)
    assert cancels(queue) == set()


def test_a_waiting_request_that_is_left_is_claimed(queue: TicketQueue) -> None:
    request_id = put(queue, leased=False)
    state, claim = queue.leave(request_id, "one")
    assert state == "waiting"
    assert claim is not None
    assert (claim.lease.ticket.request_id, claim.why) == (request_id, "cancelled")
    assert queue.leave(request_id, "one") == ("kept", None)
    assert not queue.join(request_id, "one")


def test_a_request_with_patience_waits_for_a_reader(queue: TicketQueue) -> None:
    request_id = put(queue, patience_seconds=60)

    def patience_ends() -> None:
        """Of all that are without a reader."""
        for orphan in queue.client.zrange("orphans", 0, -1):
            queue.client.zadd("orphans", {orphan: time.time() - 1})

    queue.leave(request_id, "one")
    assert queue.client.zscore("orphans", request_id) == pytest.approx(time.time() + 60, abs=30)
    assert queue.join(request_id, "two")
    patience_ends()
    sweep(queue)
    assert cancels(queue) == set()
    queue.leave(request_id, "two")
    sweep(queue)
    assert cancels(queue) == set()
    patience_ends()
    sweep(queue)
    assert cancels(queue) == {request_id}


def test_a_background_request_needs_no_reader(queue: TicketQueue) -> None:
    request_id = put(queue, patience_seconds=TO_THE_END)
    queue.leave(request_id, "one")
    queue.client.delete("web:one")
    sweep(queue)
    assert cancels(queue) == set()
    assert queue.client.zcard("orphans") == 0
    assert queue.cancel(request_id)[0] == "running"


def test_what_a_dead_web_alone_read_is_cancelled(queue: TicketQueue) -> None:
    alone, shared = put(queue), put(queue)
    queue.join(shared, "two")
    waiting = put(queue, leased=False)
    queue.client.delete("web:one")
    queue.beat("worker", POOL, 4, {})
    queue.client.set("doubted", b"")
    assert queue.sweep().claims == ()
    queue.client.delete("doubted")
    swept = queue.sweep()
    assert [(claim.lease.ticket.request_id, claim.why) for claim in swept.claims] == [(waiting, "cancelled")]
    assert cancels(queue) == {alone}
    assert queue.client.smembers("webs") == {b"two"}
    assert queue.leave(shared, "one") == ("kept", None)  # it only slept, and was counted already
    assert queue.leave(shared, "two") == ("running", None)


def test_a_web_that_signs_off_has_died(queue: TicketQueue) -> None:
    request_id = put(queue)
    queue.sign_off_web("one")
    sweep(queue)
    assert cancels(queue) == {request_id}


def test_many_requests_of_a_dead_web_end_in_several_sweeps(queue: TicketQueue) -> None:
    requests = {put(queue, leased=False) for _ in range(7)}
    queue.client.delete("web:one")
    found: list[str] = []
    for _ in range(3):
        found += [claim.lease.ticket.request_id for claim in queue.sweep(most=3).claims]
    assert set(found) == requests
    assert len(found) == 7
    assert queue.client.exists("held:one") == 0


def test_a_request_that_nobody_holds_is_cancelled_by_whoever_leaves(queue: TicketQueue) -> None:
    sent = ticket()
    queue.put(sent)
    assert queue.leave(sent.request_id, "one")[0] == "waiting"
    assert queue.leave("unknown", "one") == (None, None)


def test_what_was_posted_comes_back(queue: TicketQueue) -> None:
    body = '{"prompt": "två\\n"}\n'.encode()
    request_id = put(queue, path="/completion", body=body, patience_seconds=TO_THE_END)
    question = queue.question(request_id)
    assert question is not None
    assert (question.path, question.body, question.is_background) == ("/completion", body, True)
    assert question.ticket.request_id == request_id
    assert question.ticket.prompt == ()
    assert queue.question(put(queue)) is None
    assert queue.question("unknown") is None


def test_a_question_of_another_version_is_none(queue: TicketQueue, caplog: pytest.LogCaptureFixture) -> None:
    request_id = put(queue, path="/completion", body=b"{}")
    queue.client.hset(f"ticket:{request_id}", "question", b'{"v":99}\n/completion\n{}')
    assert queue.question(request_id) is None
    assert "cannot be worded again" in caplog.text
    with pytest.raises(TicketError):
        Question.parse(b'{"v":99}\n/completion\n{}', 0.0)

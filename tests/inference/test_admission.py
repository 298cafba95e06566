"""From an order to a ticket: every bound, every refusal, and that a refusal leaves nothing behind."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import redis

from accounts.ledger import quotas
from accounts.limits import throttling
from accounts.models import LedgerEntry, QuotaPeriod, Reservation
from accounts.trail.refusals import Refusal
from inference import settlement
from inference.catalog.registry import forget
from inference.chat.probing import examine
from inference.chat.prompt import ChatPrompt, Message
from inference.engine.types import Decoding, SamplingParams
from inference.intake import admission, forms
from inference.intake.admission import Admitted, CachedAnswer, admit
from inference.intake.grammars import Verdicts
from inference.models import Receipt, ServedModel
from inference.structured import JsonForm, fit, widest
from inference.tokenizers import pool as tokenizers
from inference.transport import doorbell
from inference.transport.completion_cache import Completion, completion_cache
from inference.transport.queue import TicketQueue, ticket_queue
from inference.transport.stream import end_claimed
from tests.inference.flow import PROMPT, admitted, new_id, order, principal_of, register
from tests.round_trips import Trips

pytestmark = [pytest.mark.integration, pytest.mark.django_db(transaction=True)]


@pytest.fixture(autouse=True)
def bell(monkeypatch: pytest.MonkeyPatch, valkey: Any) -> list[str]:
    """Doorbells that were rung, instead of Celery's."""
    rung: list[str] = []
    monkeypatch.setattr(doorbell, "ring", lambda pool: rung.append(pool) or True)
    return rung


@pytest.fixture
def alice(cast: Any) -> Any:
    register()
    return cast.alice


def refused(principal: Any, **changes: Any) -> Refusal:
    with pytest.raises(Refusal) as caught:
        admit(principal, order(**changes), request_id=new_id(), route="/v1/generate")
    return caught.value


def everything(valkey: Any) -> tuple[Any, ...]:
    """All that a request could hold: quota, places, tokens a minute, queues."""
    periods = tuple(
        QuotaPeriod.objects.order_by("pk").values_list(
            "used_tokens", "reserved_tokens", "used_requests", "reserved_requests"
        )
    )
    levels = {key: valkey.hget(key, "level") for key in sorted(valkey.keys("accounts:tokens:*"))}
    names = [b"accounts:places:*", b"queue:*", b"ticket:*", b"waiting:*", b"heads:*", b"queued:*", b"of:*"]
    held = {key: valkey.type(key) for name in names for key in valkey.keys(name)}
    return periods, levels, held, Reservation.objects.filter(state="open").count()


# What a ticket says


def test_an_order_becomes_a_ticket_in_the_queue_and_rings_once(alice: Any, bell: list[str]) -> None:
    answer = admitted(principal_of(alice), stop=("\n",), sampling=SamplingParams(seed=4), stream=True)
    assert bell == ["default"]
    assert not answer.clamped
    lease = ticket_queue().take("default", "w1", [answer.served.id])
    assert lease is not None
    sent = lease.ticket
    assert sent == answer.ticket
    assert (sent.tenant_id, sent.key_id, sent.prompt) == (alice.tenant.pk, alice.key.pk, PROMPT)
    assert (sent.max_tokens, sent.reserved_tokens, sent.entered_tokens) == (16, 26, 26)
    assert (sent.stop, sent.sampling.seed, sent.stream, sent.cache_key) == (("\n",), 4, True, None)
    assert sent.created_at < sent.queue_deadline_at <= sent.deadline_at


def test_a_shared_prompt_is_reserved_by_its_payer_alone(alice: Any) -> None:
    sent = admitted(principal_of(alice), shares_prompt=True, cache_prompt=False).ticket
    assert (sent.num_prompt_tokens, sent.reserved_tokens, sent.entered_tokens) == (10, 16, 16)
    assert sent.prefix_cache, "what its payer has computed is not computed again"


def test_the_reservation_outlives_the_deadline(alice: Any) -> None:
    sent = admitted(principal_of(alice)).ticket
    assert Reservation.objects.get().expires_at.timestamp() > sent.deadline_at + 30


def test_a_rotated_key_is_counted_on_the_first_of_its_chain(alice: Any, cast: Any, valkey: Any) -> None:
    from dataclasses import replace

    rotated = replace(principal_of(alice), quota_key_id=alice.key.pk, key_id=cast.bob.key.pk)
    sent = admitted(rotated).ticket
    assert (sent.key_id, sent.quota_key_id) == (cast.bob.key.pk, alice.key.pk)
    assert valkey.zcard(f"accounts:places:key:{alice.key.pk}") == 1


def test_text_is_tokenized_and_tokens_are_taken_as_they_are(alice: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Words:
        def encode(self, model: Any, text: str) -> tuple[int, ...]:
            return tuple(len(word) for word in text.split())

    monkeypatch.setattr(admission, "tokenizer_pool", Words)
    assert admitted(principal_of(alice), prompt="to be or not").ticket.prompt == (2, 2, 2, 3)


def test_texts_to_be_shown_become_the_model_s_tokens_before_the_cache_is_asked(
    alice: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Marks:
        def control_tokens(self, model: Any, texts: tuple[str, ...]) -> tuple[int, ...]:
            return tuple(len(text) for text in texts)

    monkeypatch.setattr(admission, "tokenizer_pool", Marks)
    shown = admitted(principal_of(alice), shown_texts=("[A]", "<b/>"), use_cache=True).ticket
    plain = admitted(principal_of(alice), use_cache=True).ticket
    assert (shown.sampling.shown_tokens, plain.sampling.shown_tokens) == ((3, 4), ())
    assert shown.cache_key != plain.cache_key


# Its form


class Trials:
    """In the place of the pool of children that try grammars."""

    def __init__(self) -> None:
        self.asked = 0

    def ask(self, model: Any, message: dict[str, Any]) -> dict[str, Any]:
        self.asked += 1
        if "bomb" in message["grammar"]:
            raise Refusal("tokenizer_failed", "This text cannot be tokenized.")
        return {"ok": True}


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> Trials:
    made = Trials()
    verdicts = Verdicts(lambda: made)  # type: ignore[arg-type, return-value]
    monkeypatch.setattr(admission, "verdicts", lambda: verdicts)
    return made


def test_a_grammar_is_tried_before_it_is_queued_and_only_once(alice: Any, trials: Trials) -> None:
    sampling = SamplingParams(grammar='root ::= "a"')
    for _ in range(2):
        assert admitted(principal_of(alice), sampling=sampling).ticket.sampling == sampling
    assert trials.asked == 1
    admitted(principal_of(alice))
    assert trials.asked == 1


def test_a_grammar_that_ends_its_child_is_refused_and_nothing_is_held(
    alice: Any, bell: list[str], valkey: Any, trials: Trials
) -> None:
    before = everything(valkey)
    refusal = refused(principal_of(alice), sampling=SamplingParams(grammar='root ::= bomb\nbomb ::= "a"'))
    assert refusal.code == "invalid_grammar"
    assert everything(valkey) == before
    assert bell == []


# How long the answer may be


@pytest.mark.parametrize(
    ("limits", "asked", "granted"),
    [
        ({}, 16, 16),
        ({}, None, 246),
        ({}, 10_000, 246),
        ({"max_output": 5}, None, 5),
        ({"max_output": 5}, 16, 5),
        ({"max_context": 30}, None, 20),
        ({"max_context": 10_000}, None, 246),
        ({"max_output": 5, "max_context": 12}, 16, 2),
    ],
)
def test_the_answer_is_bounded_by_request_context_and_plan(
    alice: Any, limits: dict[str, int], asked: int | None, granted: int
) -> None:
    assert admitted(principal_of(alice, **limits), max_tokens=asked).ticket.max_tokens == granted


@pytest.mark.parametrize(
    ("limits", "changes", "code"),
    [
        ({}, {"prompt": ()}, "empty_prompt"),
        ({}, {"prompt": tuple(range(256))}, "context_length_exceeded"),
        ({"max_context": 10}, {}, "context_length_exceeded"),
        ({"max_output": 0}, {}, "forbidden"),
        ({}, {"model": "unknown"}, "model_not_found"),
    ],
)
def test_what_can_never_fit_is_refused_before_anything_is_taken(
    alice: Any, valkey: Any, limits: dict[str, int], changes: dict[str, Any], code: str
) -> None:
    refusal = refused(principal_of(alice, **limits), **changes)
    assert refusal.code == code
    assert not refusal.retryable
    assert everything(valkey) == ((), {}, {}, 0)


def test_a_prompt_that_is_too_long_says_by_how_much(alice: Any) -> None:
    refusal = refused(principal_of(alice), prompt=tuple(range(300)))
    assert refusal.extra == {"n_prompt_tokens": 300, "n_ctx": 256}


def test_a_prompt_that_fills_all_but_one_token_is_taken(alice: Any) -> None:
    assert admitted(principal_of(alice), prompt=tuple(range(255)), max_tokens=None).ticket.max_tokens == 1


# Refusals at each step leave everything as it was


def _redis_away(*_: Any, **__: Any) -> None:
    raise redis.ConnectionError("away")


def _full(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    return {"queue_length": 0}


def _no_quota(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    return {"monthly_tokens": 5}


def _no_requests_left(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    return {"monthly_requests": 0}


def _no_place(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    return {"concurrent_requests": 0}


def _no_tokens_a_minute(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    return {"tokens_per_minute": 20}


def _queue_away(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    monkeypatch.setattr(TicketQueue, "put", _redis_away)
    return {"tokens_per_minute": 1000}


def _queue_replies_are_lost(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    put = TicketQueue.put

    def lossy(self: TicketQueue, *arguments: Any, **options: Any) -> bool:
        put(self, *arguments, **options)
        raise redis.TimeoutError("no reply")

    monkeypatch.setattr(TicketQueue, "put", lossy)
    return {"tokens_per_minute": 1000}


def _database_away(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    def away(_: Any) -> None:
        raise Refusal("service_unavailable", "away", retry_after=1)

    monkeypatch.setattr(quotas, "reserve_together", away)
    return {"tokens_per_minute": 1000}


@pytest.mark.parametrize(
    ("obstacle", "code"),
    [
        (_no_place, "too_many_concurrent_requests"),
        (_no_tokens_a_minute, "rate_limit_exceeded"),
        (_no_quota, "quota_exhausted"),
        (_no_requests_left, "quota_exhausted"),
        (_database_away, "service_unavailable"),
        (_full, "queue_full"),
        (_queue_away, "service_unavailable"),
        (_queue_replies_are_lost, "service_unavailable"),
    ],
)
def test_a_refusal_at_any_step_leaves_every_counter_as_it_was(
    alice: Any,
    valkey: Any,
    bell: list[str],
    monkeypatch: pytest.MonkeyPatch,
    obstacle: Callable[[pytest.MonkeyPatch], dict[str, int]],
    code: str,
) -> None:
    admitted(principal_of(alice, tokens_per_minute=1000))
    before = everything(valkey)
    bell.clear()
    limits = obstacle(monkeypatch)
    tighter = {**limits, "tokens_per_minute": limits.get("tokens_per_minute", 1000)}
    assert refused(principal_of(alice, **tighter)).code == code
    periods, levels, held, reservations = everything(valkey)
    assert (periods, held, reservations) == (before[0], before[2], before[3])
    if obstacle is not _no_tokens_a_minute:  # buckets refill meanwhile
        assert {key: float(level) for key, level in levels.items()} == pytest.approx(
            {key: float(level) for key, level in before[1].items()}, abs=8
        )
    assert bell == []
    monkeypatch.undo()
    assert isinstance(admitted(principal_of(alice)), Admitted)


def test_a_ticket_that_a_worker_took_though_its_put_timed_out_is_cancelled(
    alice: Any, monkeypatch: pytest.MonkeyPatch, valkey: Any
) -> None:
    put = TicketQueue.put

    def taken_and_lost(self: TicketQueue, ticket: Any, **options: Any) -> None:
        put(self, ticket, **options)
        assert self.take(ticket.pool, "w1", [ticket.model_id]) is not None
        raise redis.TimeoutError("no reply")

    monkeypatch.setattr(TicketQueue, "put", taken_and_lost)
    assert refused(principal_of(alice)).code == "service_unavailable"
    (why,) = ticket_queue().beat("w1", "default", 4, {}).cancels.values()
    assert why == "llm_unavailable"


def test_an_undo_that_fails_does_not_hide_the_refusal(alice: Any, valkey: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TicketQueue, "put", _redis_away)
    monkeypatch.setattr(TicketQueue, "discard", _redis_away)
    monkeypatch.setattr(quotas, "release", _redis_away)
    assert refused(principal_of(alice)).code == "service_unavailable"
    assert valkey.zcard(f"accounts:places:tenant:{alice.tenant.pk}") == 0


def test_a_doorbell_out_of_order_does_not_refuse_what_is_queued(alice: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doorbell, "ring", lambda _: False)
    assert ticket_queue().state(admitted(principal_of(alice)).ticket.request_id) is not None


def test_without_redis_the_refusal_says_when_to_come_back(alice: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TicketQueue, "put", _redis_away)
    assert refused(principal_of(alice)).retry_after == 2


# Quota


def test_what_is_left_of_the_quota_bounds_the_answer(alice: Any) -> None:
    answer = admitted(principal_of(alice, monthly_tokens=20))
    assert answer.clamped
    assert (answer.ticket.max_tokens, answer.ticket.clamped, answer.ticket.reserved_tokens) == (10, True, 20)


@pytest.mark.parametrize(
    ("limits", "changes", "max_tokens"),
    [
        ({}, {"max_tokens": 40}, 40),
        ({}, {"max_tokens": None}, 246),
        ({"max_output": 50}, {"max_tokens": None}, 50),
        ({"max_context": 100}, {"max_tokens": None}, 90),
        ({"monthly_tokens": 45}, {"max_tokens": 200}, 35),
    ],
)
def test_a_forced_answer_is_fitted_to_the_tokens_that_it_gets(
    alice: Any, trials: Trials, limits: dict[str, int], changes: dict[str, Any], max_tokens: int
) -> None:
    """Asked, left in the context, allowed by the plan, left of the quota."""
    form = JsonForm(b'{"type": "array", "items": {"type": "string"}}')
    sampling = SamplingParams(grammar=widest(form).grammar)
    sent = admitted(principal_of(alice, **limits), form=form, sampling=sampling, **changes).ticket
    assert sent.max_tokens == max_tokens
    assert sent.sampling.grammar == fit(form, max_tokens - 1).grammar
    assert fit(form, max_tokens - 1).num_bytes < max_tokens


def test_a_forced_answer_that_cannot_fit_holds_nothing(
    alice: Any, trials: Trials, valkey: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither where the request says so, nor where the quota does, which is known last."""

    class Letters:
        def encode(self, model: Any, text: str, *, add_special: bool) -> tuple[int, ...]:
            return tuple(range(len(text)))

    monkeypatch.setattr(forms.pool, "tokenizer_pool", Letters)
    form = JsonForm(b'{"const": "a text of thirty-two characters"}')
    before = everything(valkey)
    assert refused(principal_of(alice), form=form, max_tokens=20).extra["needed_tokens"] == 34
    assert refused(principal_of(alice, monthly_tokens=30), form=form, max_tokens=60).extra["max_tokens"] == 20
    periods, _, *held = everything(valkey)
    assert set(periods) == {(0, 0, 0, 0)}
    assert held == list(before[2:])


def test_all_or_nothing_is_refused_instead(alice: Any) -> None:
    assert refused(principal_of(alice, monthly_tokens=20), all_or_nothing=True).code == "quota_exhausted"


def _end(sent: Any, charged: int) -> None:
    """The request ends, and its settlement waits in Redis."""
    queue = ticket_queue()
    lease = queue.take("default", "w1", [sent.model_id])
    assert lease is not None
    outcome = settlement.Outcome(
        status="completed",
        finish_reason="eos",
        charged_tokens=charged,
        prompt_tokens=10,
        completion_tokens=charged - 10,
        num_steps=1,
        finished_at=sent.created_at,
    )
    assert end_claimed(queue.client, lease, b'{"t":"finished"}', outcome.to_bytes())


def test_quota_that_an_ended_request_still_holds_is_settled_first(alice: Any) -> None:
    principal = principal_of(alice, monthly_tokens=37)
    _end(admitted(principal).ticket, charged=11)
    answer = admitted(principal)
    assert not answer.clamped
    assert answer.ticket.max_tokens == 16


def test_an_answer_is_not_shortened_for_a_request_that_has_ended(alice: Any) -> None:
    principal = principal_of(alice, monthly_tokens=40)
    _end(admitted(principal).ticket, charged=11)
    answer = admitted(principal)
    assert (answer.clamped, answer.ticket.max_tokens) == (False, 16)
    entries = LedgerEntry.objects.filter(request_id=answer.ticket.request_id)
    assert entries.count() >= 1


def test_quota_that_a_running_request_holds_is_refused_for_now(alice: Any) -> None:
    principal = principal_of(alice, monthly_tokens=30)
    admitted(principal)
    refusal = refused(principal)
    assert (refusal.code, refusal.retryable) == ("quota_reserved", True)


def test_sixty_four_requests_at_once_never_reserve_more_than_the_quota(alice: Any) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from django.db import connection

    principal = principal_of(alice, monthly_tokens=1000)

    def attempt(_: int) -> int:
        try:
            return admitted(principal, max_tokens=40, all_or_nothing=True).ticket.reserved_tokens
        except Refusal:
            return 0
        finally:
            connection.close()

    with ThreadPoolExecutor(16) as threads:
        reserved = list(threads.map(attempt, range(64)))
    assert sum(reserved) == 1000


# Cached answers

KEPT = Completion(output="text", finish_reason="eos", stop_word=None, prompt_tokens=10, completion_tokens=2)


def _keep(principal: Any, **changes: Any) -> None:
    sent = admitted(principal, use_cache=True, **changes).ticket
    assert sent.cache_key is not None
    completion_cache().put(sent.cache_key, KEPT)
    ticket_queue().discard(sent.request_id)
    throttling.leave(sent.tenant_id, sent.quota_key_id, sent.request_id)
    quotas.release(sent.request_id, "test", admission._now())


def test_an_identical_request_is_answered_from_the_cache_and_costs_one_request(alice: Any, bell: list[str]) -> None:
    principal = principal_of(alice)
    _keep(principal)
    bell.clear()
    request_id = new_id()
    prepared = admission.prepare(principal, order(use_cache=True))
    answer = admission.take(
        principal, prepared, request_id=request_id, route="/v1/generate", created_at=time.time(), parent_id="p"
    )
    assert isinstance(answer, CachedAnswer)
    assert answer.completion == KEPT
    assert bell == []
    period = QuotaPeriod.objects.get(tenant=alice.tenant, key=None)
    assert (period.used_requests, period.used_tokens, period.reserved_tokens) == (1, 0, 0)
    receipt = Receipt.objects.get(request_id=request_id)
    assert (receipt.cached, receipt.charged_tokens, receipt.parent_id) == (True, 0, "p")


@pytest.mark.parametrize(
    "changes", [{"max_tokens": 15}, {"stop": ("x",)}, {"prompt": (*PROMPT, 1)}, {"use_cache": False}]
)
def test_another_request_is_computed(alice: Any, changes: dict[str, Any]) -> None:
    principal = principal_of(alice)
    _keep(principal)
    assert isinstance(
        admit(principal, order(**{"use_cache": True, **changes}), request_id=new_id(), route="r"), Admitted
    )


def test_probabilities_are_not_kept(alice: Any) -> None:
    sampling = SamplingParams(num_probs=1)
    assert admitted(principal_of(alice), use_cache=True, sampling=sampling).ticket.cache_key is None


def test_bob_does_not_see_what_was_computed_for_alice(alice: Any, cast: Any) -> None:
    _keep(principal_of(alice))
    answer = admit(principal_of(cast.bob), order(use_cache=True), request_id=new_id(), route="r")
    assert isinstance(answer, Admitted)


def test_a_cached_answer_needs_a_request_of_the_quota(alice: Any) -> None:
    _keep(principal_of(alice))
    refusal = refused(principal_of(alice, monthly_requests=0), use_cache=True)
    assert refusal.code == "quota_exhausted"
    assert Receipt.objects.count() == 0


def test_round_trips_to_redis_are_few_and_constant(alice: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    principal = principal_of(alice)
    admitted(principal)
    trips, counts = Trips(monkeypatch, of="EVALSHA"), []
    for _ in range(3):
        before = trips.number
        admitted(principal)
        counts.append(trips.number - before)
    assert counts == [2, 2, 2]  # enter, put; the doorbell is Celery's


def test_the_tokenizer_of_the_process_is_made_from_the_settings(settings: Any) -> None:
    made = tokenizers.tokenizer_pool()
    assert made._timeout_seconds == settings.CONFIG.tokenizer_timeout_seconds
    forget()


# Conversations


class Renderer:
    """In the place of the tokenizer pool: notes what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def chat(self, served: Any, template: Any, prompt: Any) -> tuple[int, ...]:
        self.asked.append((template, prompt))
        return PROMPT


def test_a_conversation_is_rendered_and_tokenized_in_one_question(alice: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "{% for m in messages %}{{ m.content }}{% endfor %}"
    metadata = {"chat_templates": {"default": source}, "chat": {"default": examine(source)}}
    ServedModel.objects.update(metadata=metadata)
    forget()
    renderer = Renderer()
    monkeypatch.setattr(admission, "tokenizer_pool", lambda: renderer)
    prompt = ChatPrompt(messages=(Message(role="user", content="hello"),))
    sent = admitted(principal_of(alice), prompt=prompt, use_cache=True).ticket
    by_tokens = admitted(principal_of(alice), prompt=PROMPT, use_cache=True).ticket
    assert (sent.prompt, sent.cache_key) == (PROMPT, by_tokens.cache_key)
    assert [(template.source, asked) for template, asked in renderer.asked] == [(source, prompt)]


def test_a_conversation_for_a_model_without_a_template_leaves_nothing_behind(alice: Any, valkey: Any) -> None:
    before = everything(valkey)
    refusal = refused(principal_of(alice), prompt=ChatPrompt(messages=(Message(role="user", content="hello"),)))
    assert (refusal.code, refusal.retryable) == ("capability_not_supported", False)
    assert everything(valkey) == before


# Shifts, slots, and prompts alone


def test_output_beyond_the_context_is_allowed_where_it_shifts(alice: Any) -> None:
    shift = Decoding(context_shift=True)
    sent = admitted(principal_of(alice), max_tokens=5000, decoding=shift).ticket
    assert (sent.max_tokens, sent.reserved_tokens, sent.decoding) == (5000, 5000 + len(PROMPT), shift)
    bounded = admitted(principal_of(alice, max_output=30), max_tokens=5000, decoding=shift).ticket
    assert bounded.max_tokens == 30


@pytest.mark.parametrize("why", ["not asked", "no bound of its own", "the model does not", "the plan's context"])
def test_without_a_shift_the_context_is_the_bound(alice: Any, why: str) -> None:
    limits = {"max_context": 100} if why == "the plan's context" else {}
    wanted = None if why == "no bound of its own" else 5000
    n_ctx = 100 if limits else ServedModel.objects.get().n_ctx
    if why == "the model does not":
        ServedModel.objects.update(context_shift=False)
        forget()
    decoding = Decoding(context_shift=why != "not asked")
    sent = admitted(principal_of(alice, **limits), max_tokens=wanted, decoding=decoding).ticket
    assert (sent.max_tokens, sent.decoding.context_shift) == (n_ctx - len(PROMPT), False)


def test_no_output_at_all_reserves_the_prompt_alone(alice: Any) -> None:
    sent = admitted(principal_of(alice), max_tokens=0).ticket
    assert (sent.max_tokens, sent.reserved_tokens, sent.clamped) == (0, len(PROMPT), False)


@pytest.mark.parametrize("slot_id", [-2, 4, 2**40])
def test_a_slot_that_is_not_there_is_refused(alice: Any, valkey: Any, slot_id: int) -> None:
    before = everything(valkey)
    assert refused(principal_of(alice), decoding=Decoding(slot_id=slot_id)).code == "bad_request"
    assert everything(valkey) == before
    assert admitted(principal_of(alice), decoding=Decoding(slot_id=3)).ticket.decoding.slot_id == 3

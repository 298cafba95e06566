"""From an order to a ticket in the queue, or a refusal that holds and charges nothing. Blocking, on admission threads.

Order is code: `admit` is the table of the request's way, top to bottom. What was taken is given back in reverse.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial

import redis
from django.conf import settings

from accounts.identity.principals import Principal
from accounts.ledger import quotas
from accounts.ledger.allotment import ChargeOrder, Held, Order, ReserveOrder
from accounts.limits import throttling
from accounts.limits.precedence import NORMAL_WEIGHT
from accounts.limits.throttling import RateState
from accounts.trail.refusals import Refusal
from inference import settlement
from inference.batches import redelivery
from inference.batches.terms import BatchTerms
from inference.catalog import adapters
from inference.catalog.adapters import Choice
from inference.catalog.alias_choice import session_of
from inference.catalog.served import Served
from inference.chat.prompt import ChatPrompt
from inference.engine.types import AdapterVector
from inference.intake import dry_run, forms
from inference.intake.grammars import verdicts
from inference.models import Receipt
from inference.orders import GenerateOrder
from inference.tokenizers.pool import tokenizer_pool
from inference.transport import completion_cache, doorbell
from inference.transport.completion_cache import Completion
from inference.transport.holding import START, Hold, Position
from inference.transport.queue import ANY_LENGTH, UNHELD, QueueFull, Share, ticket_queue
from inference.transport.ticket import Ticket, adapter_scales

logger = logging.getLogger(__name__)

RESERVATION_MARGIN_SECONDS = 60.0
"""A reservation outlives deadline and drain by this."""


@dataclass(frozen=True, slots=True)
class Admitted:
    """A ticket is in the queue; its events will come under its request id."""

    ticket: Ticket
    served: Served
    tokens: RateState
    clamped: bool
    is_replay: bool = False
    """It was admitted before: this is another who reads it."""
    after: Position = START
    """What its reader has seen."""

    @property
    def grammar(self) -> str | None:
        """That the engine follows."""
        return self.ticket.sampling.grammar


@dataclass(frozen=True, slots=True)
class CachedAnswer:
    """The answer was there already: one request, no tokens."""

    request_id: str
    served: Served
    completion: Completion
    tokens: RateState
    grammar: str | None = None
    """That the answer followed when it was computed. Of a prompt that came as text: the widest."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """An order that nothing is wrong with; nothing is taken for it yet."""

    order: GenerateOrder
    """As the model does it."""
    served: Served
    choice: Choice
    written: str | tuple[int, ...]
    prompt: tuple[int, ...] = ()
    max_tokens: int = 0
    cache_key: str | None = None
    cached: Completion | None = None
    """The answer was there already."""

    @property
    def num_charged(self) -> int:
        """Prompt tokens."""
        return 0 if self.order.shares_prompt else len(self.prompt)

    @property
    def num_tokens(self) -> int:
        return self.num_charged + self.max_tokens


def admit(
    principal: Principal,
    order: GenerateOrder,
    *,
    request_id: str,
    route: str,
    batch: BatchTerms | None = None,
    hold: Hold = UNHELD,
) -> Admitted | CachedAnswer:
    """Raises Refusal; then nothing is held, charged or queued.

    batch: the request is a line of one. It does without the minute's limits and the completion cache, waits behind
    interactive work, and is admitted once, however often it is asked for: a ticket that is there already is the
    answer, under its own id.
    """
    created_at = time.time()
    prepared = prepare(principal, order, batch=batch)
    return take(principal, prepared, request_id=request_id, route=route, batch=batch, hold=hold, created_at=created_at)


def prepare(
    principal: Principal, order: GenerateOrder, *, batch: BatchTerms | None = None, payer: Prepared | None = None
) -> Prepared:
    """All that can be wrong with an order, and its prompt in tokens. Raises Refusal; takes nothing.

    payer: the order of the same request whose prompt this one shares.
    """
    if batch is not None:
        order = replace(order, use_cache=False, is_batch=True)
    served, choice = _resolve(principal, order)
    vector = choice.vector
    served.check_ability(embeds=order.embedding is not None)
    order = _as_served(principal, order, served)
    written = payer.written if payer else _render(order, served)
    cache_key = None if dry_run.is_for_replay() else _cache_key(principal, order, written, served, vector)
    if cached := _look_up(cache_key, order, served):
        dry_run.end_here(dry_run.Wanted(served, order, is_cached=True))
        order = _as_computed(principal, order, served, written)
        return Prepared(order, served, choice, written, cached=cached)
    prompt = payer.prompt if payer else _tokenize(written, served)
    max_tokens = _output_bound(principal, order, served, len(prompt))
    order = forms.with_bounded_thoughts(order, served, prompt)
    if not dry_run.is_for_replay():
        order = _with_grammar(order, served, prompt, max_tokens)
    prepared = Prepared(order, served, choice, written, prompt, max_tokens, cache_key)
    dry_run.end_here(dry_run.Wanted(served, order, prepared.num_charged, max_tokens, prompt=prompt, choice=choice))
    return prepared


def take(
    principal: Principal,
    prepared: Prepared,
    *,
    request_id: str,
    route: str,
    created_at: float,
    parent_id: str = "",
    batch: BatchTerms | None = None,
    hold: Hold = UNHELD,
    held: Held | None = None,
) -> Admitted | CachedAnswer:
    """Limits, quota, queue. Raises Refusal; then nothing is held, charged or queued that was not before.

    held: tokens a minute and quota were taken before, with those of other orders of the request (together.py).
    """
    served, order, max_tokens, choice = prepared.served, prepared.order, prepared.max_tokens, prepared.choice
    if prepared.cached is not None:
        if held is None:
            quotas.charge_request(cached_order(principal, prepared, request_id, route, parent_id, created_at))
        return CachedAnswer(request_id, served, prepared.cached, RateState(), order.sampling.grammar)
    queue_deadline_at, deadline_at = _deadlines(created_at, batch)
    is_known = False
    if batch is not None:
        request_id, is_known = redelivery.claim(request_id, batch)
    with ExitStack() as undo:
        tokens = RateState()
        if batch is None:
            to_take = 0 if held else prepared.num_tokens
            tokens = enter(principal, served, request_id, to_take, order.stream)
            undo.callback(give_back_place, principal, request_id, to_take)
        if is_known:
            held = Held(request_id, max_tokens, False, 0)
        elif held is None:
            wanted = partial(reserve_order, principal, prepared, request_id, deadline_at - created_at)
            (held,) = reserve(lambda all_or_nothing: [wanted(all_or_nothing)], order.all_or_nothing)
            undo.callback(quietly, quotas.release, request_id, "refused", _now())
        if held.max_tokens < max_tokens:
            order = _with_grammar(order, served, prepared.prompt, held.max_tokens)
        ticket = Ticket(
            request_id=request_id,
            parent_id=parent_id or (batch.batch_id if batch else ""),
            tenant_id=principal.tenant_id,
            key_id=principal.key_id,
            quota_key_id=principal.quota_key_id,
            pool=served.pool,
            model_id=served.id,
            model_name=served.name,
            model_digest=served.digest,
            num_prompt_tokens=len(prepared.prompt),
            prompt=prepared.prompt,
            max_tokens=held.max_tokens,
            sampling=order.sampling,
            decoding=order.decoding,
            embedding=order.embedding,
            stop=order.stop,
            adapters=choice.vector,
            adapter_names=choice.names,
            aliases=choice.aliases,
            prefix_cache=order.cache_prompt or order.shares_prompt,
            shares_prompt=order.shares_prompt,
            route=route,
            stream=order.stream,
            return_tokens=order.return_tokens,
            is_batch=batch is not None,
            created_at=created_at,
            queue_deadline_at=queue_deadline_at,
            deadline_at=deadline_at,
            reserved_tokens=held.reserved_tokens,
            entered_tokens=0 if batch else prepared.num_tokens,
            cache_key=prepared.cache_key,
            clamped=held.clamped,
            keep_alive_seconds=order.keep_alive_seconds,
        )
        if not is_known:
            _put(ticket, principal, hold, undo)
        undo.pop_all()
    if not is_known:
        doorbell.ring(served.pool)
    return Admitted(ticket, served, tokens, held.clamped)


# Which model, with which adapters?


def _resolve(principal: Principal, order: GenerateOrder) -> tuple[Served, Choice]:
    """The adapter in the model's name and those in the list add up; neither is the tenant's default."""
    served, named = adapters.resolve_model(order.model, principal)
    wanted = None if named is None and order.adapters is None else [*(named or ()), *(order.adapters or ())]
    return served, adapters.choose(principal, served, wanted, partial(session_of, order))


def _as_served(principal: Principal, order: GenerateOrder, served: Served) -> GenerateOrder:
    """What this model does of how the order wants to be run. A context is shifted where the model's settings allow it,
    the output is bounded by the request itself, and the plan allows the whole context: a plan's smaller one is an end.
    """
    slot_id = order.decoding.slot_id
    if slot_id is not None and not 0 <= slot_id < served.num_slots:
        raise Refusal("bad_request", f"There is no slot {slot_id}: this model has 0 to {served.num_slots - 1}.")
    if order.shown_texts:
        shown = tokenizer_pool().control_tokens(served, order.shown_texts)
        order = replace(order, sampling=replace(order.sampling, shown_tokens=shown))
    shifts = served.context_shift and order.max_tokens is not None and context_of(principal, served) == served.n_ctx
    if order.decoding.context_shift and not shifts:
        return replace(order, decoding=replace(order.decoding, context_shift=False))
    return order


# Cached?


def _cache_key(
    principal: Principal, order: GenerateOrder, written: str | tuple[int, ...], served: Served, vector: AdapterVector
) -> str | None:
    """None where the request does not want the cache, or there is none. Probabilities are not kept."""
    if not order.use_cache or order.sampling.num_probs or not completion_cache.completion_cache().is_on:
        return None
    return completion_cache.key(
        tenant_id=principal.tenant_id,
        model_digest=served.digest,
        adapters=vector,
        prompt=written,
        max_tokens=order.max_tokens,
        sampling=order.sampling,
        opening=order.opening,
        max_thought=order.max_thought,
        decoding=order.decoding,
        stop=order.stop,
        n_ctx=context_of(principal, served),
        max_output=principal.limit("max_output"),
    )


def _look_up(cache_key: str | None, order: GenerateOrder, served: Served) -> Completion | None:
    if cache_key is None:
        return None
    kind = "batch" if order.is_batch else "single"
    return completion_cache.completion_cache().get(cache_key, model_id=served.name, kind=kind)


def _as_computed(
    principal: Principal, order: GenerateOrder, served: Served, written: str | tuple[int, ...]
) -> GenerateOrder:
    """As the engine got it that made the cached answer: under the same bounds, and no quota had clamped it."""
    if order.form is None or isinstance(written, str):
        return order
    return forms.fitted(order, served, written, _output_bound(principal, order, served, len(written)))


def cached_order(
    principal: Principal, prepared: Prepared, request_id: str, route: str, parent_id: str, created_at: float
) -> ChargeOrder:
    """One request on the quota and a receipt, in one transaction."""
    now = datetime.now(UTC)
    completion, served, choice = prepared.cached, prepared.served, prepared.choice
    assert completion is not None
    receipt = Receipt(
        request_id=request_id,
        tenant_id=principal.tenant_id,
        key_id=principal.key_id,
        parent_id=parent_id,
        model=served.name,
        model_digest=served.digest,
        adapters=adapter_scales(choice.names, choice.vector),
        aliases=[list(pair) for pair in choice.aliases],
        route=route,
        status=Receipt.Status.COMPLETED,
        finish_reason=completion.finish_reason,
        cached=True,
        prompt_tokens=completion.prompt_tokens,
        completion_tokens=completion.completion_tokens,
        total_seconds=now.timestamp() - created_at,
        created_at=datetime.fromtimestamp(created_at, UTC),
        finished_at=now,
    )
    return ChargeOrder(
        request_id=request_id,
        tenant_id=principal.tenant_id,
        key_id=principal.quota_key_id,
        anchor_day=principal.quota_anchor_day,
        tenant_limits=principal.tenant_limits,
        key_limits=principal.key_limits,
        now=now,
        model=served.name,
        adapters="+".join(choice.names),
        operation=settlement.operation_of(route),
        reason="cached",
        records=(receipt,),
    )


# Does it fit?


def context_of(principal: Principal, served: Served) -> int:
    """Prompt and output tokens of one request together."""
    limit = principal.limit("max_context")
    return served.n_ctx if limit is None else min(served.n_ctx, limit)


def _render(order: GenerateOrder, served: Served) -> str | tuple[int, ...]:
    """A conversation becomes tokens at once, also before the cache is asked: what it says may depend on the day."""
    if not isinstance(order.prompt, ChatPrompt):
        return order.prompt
    return tokenizer_pool().chat(served, served.template_for(order.prompt), order.prompt)


def _tokenize(written: str | tuple[int, ...], served: Served) -> tuple[int, ...]:
    return tokenizer_pool().encode(served, written) if isinstance(written, str) else written


def _with_grammar(order: GenerateOrder, served: Served, prompt: tuple[int, ...], max_tokens: int) -> GenerateOrder:
    """The grammar that the engine gets, which llama.cpp can follow. No worker has seen it yet."""
    order = forms.fitted(order, served, prompt, max_tokens)
    if order.sampling.grammar is not None:
        verdicts().check(served, order.sampling.grammar)
    return order


def check_length(num_prompt_tokens: int, n_ctx: int) -> None:
    """Raises Refusal for a prompt of nothing, and for one that leaves no room for an answer."""
    if num_prompt_tokens == 0:
        raise Refusal("empty_prompt", "The prompt has no tokens.")
    if num_prompt_tokens >= n_ctx:
        raise Refusal(
            "context_length_exceeded",
            f"The prompt has {num_prompt_tokens} tokens and exceeds the available context size of {n_ctx} tokens, "
            "at least one of them for the answer.",
            n_prompt_tokens=num_prompt_tokens,
            n_ctx=n_ctx,
        )


def check_inputs(lengths: Sequence[int], n_ctx: int) -> None:
    """Of inputs to embed: an answer needs no room. Raises Refusal for one of nothing, and for one that does not fit."""
    if not lengths or min(lengths) == 0:
        raise Refusal("empty_prompt", "An input has no tokens.")
    longest = max(lengths)
    if longest > n_ctx:
        raise Refusal(
            "context_length_exceeded",
            f"Input {lengths.index(longest)} has {longest} tokens and exceeds the available context size of {n_ctx} "
            "tokens.",
            n_prompt_tokens=longest,
            n_ctx=n_ctx,
        )


def _output_bound(principal: Principal, order: GenerateOrder, served: Served, num_prompt_tokens: int) -> int:
    """Output tokens that the request may have, before the quota is asked."""
    n_ctx = context_of(principal, served)
    if order.embedding is not None:
        check_inputs(order.embedding.lengths, n_ctx)
        return 0
    check_length(num_prompt_tokens, n_ctx)
    room = None if order.decoding.context_shift else n_ctx - num_prompt_tokens
    bounds = [room, order.max_tokens, principal.limit("max_output")]
    bound = min(each for each in bounds if each is not None)
    if bound < 1 and order.max_tokens != 0:
        raise Refusal("forbidden", "No output tokens are allowed for this key.", limit="max_output", value=0)
    return bound


# Limits


def enter(principal: Principal, served: Served, request_id: str, tokens: int, stream: bool) -> RateState:
    """A full queue refuses before anything is taken, so that its flood costs nobody a place or tokens; the last word
    has `put`."""
    dry_run.check_queue(served, principal)
    ttl = settings.CONFIG.generation_timeout_seconds + settings.CONFIG.drain_seconds + RESERVATION_MARGIN_SECONDS
    return throttling.enter(principal, request_id, tokens=tokens, ttl_seconds=ttl, stream=stream).tokens


def give_back_place(principal: Principal, request_id: str, tokens: int) -> None:
    throttling.leave(principal.tenant_id, principal.quota_key_id, request_id, unused_tokens=tokens)


def reserve_order(
    principal: Principal, prepared: Prepared, request_id: str, seconds: float, all_or_nothing: bool
) -> ReserveOrder:
    """seconds: that the request may take in all."""
    now = _now()
    seconds += settings.CONFIG.drain_seconds + RESERVATION_MARGIN_SECONDS
    return ReserveOrder(
        request_id=request_id,
        tenant_id=principal.tenant_id,
        key_id=principal.quota_key_id,
        anchor_day=principal.quota_anchor_day,
        tenant_limits=principal.tenant_limits,
        key_limits=principal.key_limits,
        prompt_tokens=prepared.num_charged,
        max_tokens=prepared.max_tokens,
        all_or_nothing=all_or_nothing,
        now=now,
        expires_at=now + timedelta(seconds=seconds),
    )


def reserve(orders: Callable[[bool], Sequence[Order]], all_or_nothing: bool) -> list[Held]:
    """Everything that was asked, or what is left once the requests that have ended a moment ago are settled.

    orders: those of one request, made anew for each attempt; their argument is whether less is no use.
    """
    try:
        return quotas.reserve_together(orders(True))
    except Refusal as refusal:
        if not refusal.code.startswith("quota_") or (not settlement.catch_up() and all_or_nothing):
            raise
    return quotas.reserve_together(orders(all_or_nothing))


# The queue


def _deadlines(created_at: float, batch: BatchTerms | None) -> tuple[float, float]:
    """Until when it may wait for a slot, and until when it may run."""
    config = settings.CONFIG
    if batch is not None:
        return batch.expires_at, batch.expires_at + config.generation_timeout_seconds
    return (
        created_at + min(config.queue_timeout_seconds, config.generation_timeout_seconds),
        created_at + config.generation_timeout_seconds,
    )


def _put(ticket: Ticket, principal: Principal, hold: Hold, undo: ExitStack) -> None:
    queue, lengths = ticket_queue(), ANY_LENGTH if ticket.is_batch else dry_run.queue_lengths(principal)
    share = Share(principal.weight / NORMAL_WEIGHT, principal.max_slots, principal.plan_name)
    try:
        queue.put(ticket, lengths=lengths, hold=hold, share=share)
    except QueueFull as full:
        raise dry_run.queue_full(principal, full.whose) from full
    except redis.RedisError as error:
        undo.callback(quietly, _take_back, ticket.request_id)
        raise Refusal("service_unavailable", "The queue does not answer.", retry_after=2) from error


def _take_back(request_id: str) -> None:
    """A put that timed out may have happened, and a worker may have the ticket: nobody reads it. A line of a batch is
    asked for again, under another id."""
    queue = ticket_queue()
    if not queue.discard(request_id):
        queue.cancel(request_id, "llm_unavailable")


def quietly(step: Callable[..., object], *arguments: object) -> None:
    """A step of the undoing: one that fails is logged, must not hide the refusal, and what it held runs out."""
    try:
        step(*arguments)
    except Exception:
        logger.exception("%s could not be undone", getattr(step, "__qualname__", step))


def _now() -> datetime:
    return datetime.now(UTC)

"""From an order to a ticket in the queue, or a refusal that holds and charges nothing. Blocking, on admission threads.

Order is code: `admit` is the table of the request's way, top to bottom. What was taken is given back in reverse.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import redis
from django.conf import settings

from accounts import quotas, throttling
from accounts.allotment import ChargeOrder, Held, ReserveOrder
from accounts.principals import Principal
from accounts.refusals import Refusal
from accounts.throttling import RateState
from inference import adapters, completion_cache, doorbell, settlement
from inference.chat.prompt import ChatPrompt
from inference.completion_cache import Completion
from inference.engine.types import AdapterVector
from inference.grammars import verdicts
from inference.models import Receipt
from inference.orders import GenerateOrder
from inference.queue import ticket_queue
from inference.registry import Served
from inference.ticket import Ticket, adapter_scales
from inference.tokenizers.pool import tokenizer_pool

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


@dataclass(frozen=True, slots=True)
class CachedAnswer:
    """The answer was there already: one request, no tokens."""

    request_id: str
    served: Served
    completion: Completion
    tokens: RateState


def admit(
    principal: Principal, order: GenerateOrder, *, request_id: str, route: str, parent_id: str = ""
) -> Admitted | CachedAnswer:
    """Raises Refusal; then nothing is held, charged or queued."""
    created_at = time.time()
    served, vector = _resolve(principal, order)
    order = _as_served(principal, order, served)
    written = _render(order, served)
    cache_key = _cache_key(principal, order, written, served, vector)
    if cached := _look_up(cache_key, order, served):
        scales = adapter_scales(_names(principal, served, vector), vector)
        return _charge_cached(principal, cached, served, scales, request_id, route, parent_id, created_at)
    prompt = _tokenize(written, served)
    _check_grammar(order, served)
    max_tokens = _output_bound(principal, order, served, len(prompt))
    num_charged = 0 if order.shares_prompt else len(prompt)
    with ExitStack() as undo:
        tokens = _enter(principal, request_id, num_charged + max_tokens)
        undo.callback(_give_back_place, principal, request_id, num_charged + max_tokens)
        held = _reserve(principal, order, request_id, num_charged, max_tokens)
        undo.callback(_quietly, quotas.release, request_id, "refused", _now())
        ticket = Ticket(
            request_id=request_id,
            parent_id=parent_id,
            tenant_id=principal.tenant_id,
            key_id=principal.key_id,
            quota_key_id=principal.quota_key_id,
            pool=served.pool,
            model_id=served.id,
            model_name=served.name,
            model_digest=served.digest,
            num_prompt_tokens=len(prompt),
            prompt=prompt,
            max_tokens=held.max_tokens,
            sampling=order.sampling,
            decoding=order.decoding,
            stop=order.stop,
            adapters=vector,
            adapter_names=_names(principal, served, vector),
            prefix_cache=order.cache_prompt or order.shares_prompt,
            shares_prompt=order.shares_prompt,
            route=route,
            stream=order.stream,
            return_tokens=order.return_tokens,
            created_at=created_at,
            queue_deadline_at=created_at + _queue_seconds(),
            deadline_at=created_at + settings.CONFIG.generation_timeout_seconds,
            reserved_tokens=held.reserved_tokens,
            entered_tokens=num_charged + max_tokens,
            cache_key=cache_key,
            clamped=held.clamped,
        )
        _put(ticket, principal.limit("queue_length"), undo)
        undo.pop_all()
    doorbell.ring(served.pool)
    return Admitted(ticket, served, tokens, held.clamped)


# Which model, with which adapters?


def _resolve(principal: Principal, order: GenerateOrder) -> tuple[Served, AdapterVector]:
    """The adapter in the model's name and those in the list add up; neither is the tenant's default."""
    served, named = adapters.resolve_model(order.model, principal)
    wanted = None if named is None and order.adapters is None else [*(named or ()), *(order.adapters or ())]
    return served, adapters.resolve_vector(principal, served, wanted)


def _names(principal: Principal, served: Served, vector: AdapterVector) -> tuple[str, ...]:
    """As this tenant knows them, for the receipt."""
    if not vector:
        return ()
    names = {adapter.digest: adapter.name for adapter in reversed(adapters.granted(principal, served))}
    return tuple(names.get(digest, digest) for digest, _ in vector)


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


def _charge_cached(
    principal: Principal,
    completion: Completion,
    served: Served,
    scales: list[list[str | float]],
    request_id: str,
    route: str,
    parent_id: str,
    created_at: float,
) -> CachedAnswer:
    """One request on the quota and a receipt, in one transaction."""
    now = datetime.now(UTC)
    receipt = Receipt(
        request_id=request_id,
        tenant_id=principal.tenant_id,
        key_id=principal.key_id,
        parent_id=parent_id,
        model=served.name,
        model_digest=served.digest,
        adapters=scales,
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
    quotas.charge_request(
        ChargeOrder(
            request_id=request_id,
            tenant_id=principal.tenant_id,
            key_id=principal.quota_key_id,
            anchor_day=principal.quota_anchor_day,
            tenant_limits=principal.tenant_limits,
            key_limits=principal.key_limits,
            now=now,
            model=served.name,
            reason="cached",
            records=(receipt,),
        )
    )
    return CachedAnswer(request_id, served, completion, RateState())


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


def _check_grammar(order: GenerateOrder, served: Served) -> None:
    """Nothing is held yet, and no worker has seen it."""
    if order.sampling.grammar is not None:
        verdicts().check(served, order.sampling.grammar)


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


def _output_bound(principal: Principal, order: GenerateOrder, served: Served, num_prompt_tokens: int) -> int:
    """Output tokens that the request may have, before the quota is asked."""
    n_ctx = context_of(principal, served)
    check_length(num_prompt_tokens, n_ctx)
    room = None if order.decoding.context_shift else n_ctx - num_prompt_tokens
    bounds = [room, order.max_tokens, principal.limit("max_output")]
    bound = min(each for each in bounds if each is not None)
    if bound < 1 and order.max_tokens != 0:
        raise Refusal("forbidden", "No output tokens are allowed for this key.", limit="max_output", value=0)
    return bound


# Limits


def _enter(principal: Principal, request_id: str, tokens: int) -> RateState:
    ttl = settings.CONFIG.generation_timeout_seconds + settings.CONFIG.drain_seconds + RESERVATION_MARGIN_SECONDS
    return throttling.enter(principal, request_id, tokens=tokens, ttl_seconds=ttl).tokens


def _give_back_place(principal: Principal, request_id: str, tokens: int) -> None:
    throttling.leave(principal.tenant_id, principal.quota_key_id, request_id, unused_tokens=tokens)


def _reserve(principal: Principal, order: GenerateOrder, request_id: str, prompt_tokens: int, max_tokens: int) -> Held:
    """Everything that was asked, or what is left once the requests that have ended a moment ago are settled."""
    now = _now()
    config = settings.CONFIG
    seconds = config.generation_timeout_seconds + config.drain_seconds + RESERVATION_MARGIN_SECONDS
    whole = ReserveOrder(
        request_id=request_id,
        tenant_id=principal.tenant_id,
        key_id=principal.quota_key_id,
        anchor_day=principal.quota_anchor_day,
        tenant_limits=principal.tenant_limits,
        key_limits=principal.key_limits,
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        all_or_nothing=True,
        now=now,
        expires_at=now + timedelta(seconds=seconds),
    )
    try:
        return quotas.reserve(whole)
    except Refusal as refusal:
        if not refusal.code.startswith("quota_") or (not settlement.catch_up() and order.all_or_nothing):
            raise
    return quotas.reserve(replace(whole, all_or_nothing=order.all_or_nothing))


# The queue


def _queue_seconds() -> float:
    return min(settings.CONFIG.queue_timeout_seconds, settings.CONFIG.generation_timeout_seconds)


def _put(ticket: Ticket, queue_length: int | None, undo: ExitStack) -> None:
    queue = ticket_queue()
    undo.callback(_quietly, queue.discard, ticket.request_id)  # a put that timed out may have happened
    try:
        fits = queue.put(ticket, queue_length=queue_length)
    except redis.RedisError as error:
        raise Refusal("service_unavailable", "The queue does not answer.", retry_after=2) from error
    if not fits:
        raise Refusal(
            "queue_full",
            f"{queue_length} requests of this tenant wait already. Try again in 1 s.",
            retry_after=1,
            limit="queue_length",
            value=queue_length,
        )


def _quietly(step: Callable[..., object], *arguments: object) -> None:
    """A step of the undoing: one that fails is logged, must not hide the refusal, and what it held runs out."""
    try:
        step(*arguments)
    except Exception:
        logger.exception("%s could not be undone", getattr(step, "__qualname__", step))


def _now() -> datetime:
    return datetime.now(UTC)

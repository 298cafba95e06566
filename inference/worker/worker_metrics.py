"""What engines count, turned into Prometheus metrics twice a second; on the worker's beat thread."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from inference import metrics
from inference.engine.stats import EngineStats
from inference.transport.queue import Lease, Pulse
from inference.worker.hosted import HostedModel
from inference.worker.memory import resident_bytes

COUNTERS = (
    (metrics.STEPS, "num_steps"),
    (metrics.STEP_SEQUENCES, "num_batched_sequences"),
    (metrics.DECODE_STEPS, "num_decode_steps"),
    (metrics.DECODE_SEQUENCES, "num_decode_sequences"),
    (metrics.PROMPT_TOKENS, "prompt_tokens_total"),
    (metrics.LLAMACPP_DECODES, "num_steps"),
    (metrics.CACHED_TOKENS, "cached_tokens_total"),
    (metrics.ADAPTER_SWITCHES, "num_switches"),
    (metrics.COMPLETION_TOKENS, "completion_tokens_total"),
    (metrics.PARKS, "num_parks"),
    (metrics.DRAFTS, "num_drafts"),
    (metrics.LLAMACPP_DRAFTS, "num_drafts"),
    (metrics.DRAFTED_TOKENS, "drafted_tokens_total"),
    (metrics.LLAMACPP_DRAFTED_TOKENS, "drafted_tokens_total"),
    (metrics.ACCEPTED_TOKENS, "accepted_tokens_total"),
    (metrics.LLAMACPP_ACCEPTED_TOKENS, "accepted_tokens_total"),
)
PACES = (
    (
        (metrics.LLAMACPP_PROMPT_TOKENS, "prompt_tokens_total"),
        (metrics.LLAMACPP_PROMPT_SECONDS, "prefill_seconds_total"),
        metrics.LLAMACPP_PROMPT_RATE,
    ),
    (
        (metrics.LLAMACPP_PREDICTED_TOKENS, "completion_tokens_total"),
        (metrics.LLAMACPP_PREDICTED_SECONDS, "decode_seconds_total"),
        metrics.LLAMACPP_PREDICTED_RATE,
    ),
)
"""Tokens, the seconds that they took, and what this makes a second."""
MAX_ADAPTER_SETS = 32
"""Series of a model that are told apart by adapters; later sets have none."""


def first_token(model: str, seconds: float) -> None:
    metrics.FIRST_TOKEN_SECONDS.labels(model).observe(max(0.0, seconds))


_lock = threading.Lock()
_most_tokens: dict[str, int] = {}


def held(model: str, num_tokens: int) -> None:
    """At the end of a request, on task threads."""
    with _lock:
        most = _most_tokens[model] = max(num_tokens, _most_tokens.get(model, 0))
        metrics.LLAMACPP_MOST_TOKENS.labels(model).set(most)


def memory(pool: str, models: Sequence[HostedModel], budget_bytes: float) -> None:
    """What models may have, need by their estimates, and what the process really has."""
    metrics.MODEL_BUDGET.labels(pool).set(budget_bytes)
    metrics.RESIDENT.labels(pool).set(resident_bytes())
    for model in models:
        metrics.MODEL_MEMORY.labels(model.served.name).set(model.served.memory.total_bytes if model.is_in_memory else 0)


def taken(pool: str, lease: Lease) -> None:
    """A ticket has left the queue."""
    metrics.CLASS_WAIT_SECONDS.labels(pool, lease.share_name).observe(lease.waited_seconds)


class EngineMetrics:
    """Remembers what was counted already: engines count from their start, metrics from the process's."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, object], float] = {}
        self._sets: dict[str, set[str]] = {}

    def update(self, pool: str, pulse: Pulse, models: Sequence[HostedModel]) -> None:
        metrics.QUEUE_LENGTH.labels(pool).set(pulse.num_waiting)
        metrics.OLDEST_WAIT_SECONDS.labels(pool).set(pulse.oldest_seconds)
        metrics.VIRTUAL_LAG_TOKENS.labels(pool).set(pulse.lag_tokens)
        num_deferred = pulse.num_waiting
        for model in models:
            name, stats = model.served.name, model.stats()
            metrics.SLOTS.labels(name).set(model.num_slots)
            metrics.SLOTS_BUSY.labels(name).set(stats.busy_slots if stats else 0)
            metrics.PARKED.labels(name).set(stats.num_parked if stats else 0)
            metrics.ENGINE_WAITING.labels(name).set(stats.num_waiting if stats else 0)
            metrics.DRAFT_LENGTH.labels(name).set(stats.draft_length if stats else 0)
            metrics.LLAMACPP_PROCESSING.labels(name).set(stats.busy_slots if stats else 0)
            if stats is not None:
                num_deferred += stats.num_waiting
                self._count(name, stats)
                self._show_costs(name, stats)
        metrics.LLAMACPP_DEFERRED.labels(pool).set(num_deferred)

    def _count(self, name: str, stats: EngineStats) -> None:
        for counter, field in COUNTERS:
            counter.labels(name).inc(self._since_last_time(name, counter, getattr(stats, field)))
        for position, total in enumerate(stats.accepted_per_position):
            counter = metrics.LLAMACPP_ACCEPTED_PER_POSITION
            counter.labels(name, position).inc(self._since_last_time(name, (counter, position), total))

        for (tokens, num_tokens), (seconds, num_seconds), rate in PACES:
            more_tokens = self._since_last_time(name, tokens, getattr(stats, num_tokens))
            more_seconds = self._since_last_time(name, seconds, getattr(stats, num_seconds))
            tokens.labels(name).inc(more_tokens)
            seconds.labels(name).inc(more_seconds)
            if more_tokens and more_seconds > 0:
                rate.labels(name).set(more_tokens / more_seconds)
        if stats.num_steps:
            metrics.LLAMACPP_BUSY_SLOTS.labels(name).set(stats.num_batched_sequences / stats.num_steps)

    def _show_costs(self, name: str, stats: EngineStats) -> None:
        """What drafts are weighed by."""
        for num_tokens, seconds in stats.cost_curve.points:
            metrics.STEP_COST.labels(name, num_tokens).set(seconds)
        known = self._sets.setdefault(name, set())
        for digests, chance in stats.draft_chances.items():
            adapters = "+".join(digest[:8] for digest in digests)
            if adapters in known or len(known) < MAX_ADAPTER_SETS:
                known.add(adapters)
                metrics.DRAFT_ACCEPTANCE.labels(name, adapters).set(chance)

    def _since_last_time(self, model: str, what: object, total: float) -> float:
        """A total that is smaller than before is of an engine that started anew."""
        seen = self._seen.get((model, what), 0)
        self._seen[model, what] = total
        return total - seen if total >= seen else total

"""What engines count, turned into Prometheus metrics twice a second; on the worker's beat thread."""

from __future__ import annotations

from collections.abc import Sequence

from inference import metrics
from inference.engine.stats import EngineStats
from inference.hosted import HostedModel

COUNTERS = (
    (metrics.STEPS, "num_steps"),
    (metrics.STEP_SEQUENCES, "num_batched_sequences"),
    (metrics.DECODE_STEPS, "num_decode_steps"),
    (metrics.DECODE_SEQUENCES, "num_decode_sequences"),
    (metrics.PROMPT_TOKENS, "prompt_tokens_total"),
    (metrics.CACHED_TOKENS, "cached_tokens_total"),
    (metrics.ADAPTER_SWITCHES, "num_switches"),
    (metrics.COMPLETION_TOKENS, "completion_tokens_total"),
    (metrics.DRAFTS, "num_drafts"),
    (metrics.LLAMACPP_DRAFTS, "num_drafts"),
    (metrics.DRAFTED_TOKENS, "drafted_tokens_total"),
    (metrics.LLAMACPP_DRAFTED_TOKENS, "drafted_tokens_total"),
    (metrics.ACCEPTED_TOKENS, "accepted_tokens_total"),
    (metrics.LLAMACPP_ACCEPTED_TOKENS, "accepted_tokens_total"),
)


def first_token(model: str, seconds: float) -> None:
    metrics.FIRST_TOKEN_SECONDS.labels(model).observe(max(0.0, seconds))


class EngineMetrics:
    """Remembers what was counted already: engines count from their start, metrics from the process's."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, object], int] = {}

    def update(self, pool: str, num_waiting: int, models: Sequence[HostedModel]) -> None:
        metrics.QUEUE_LENGTH.labels(pool).set(num_waiting)
        for model in models:
            name, stats = model.served.name, model.stats()
            metrics.SLOTS.labels(name).set(model.num_slots)
            metrics.SLOTS_BUSY.labels(name).set(stats.busy_slots if stats else 0)
            metrics.ENGINE_WAITING.labels(name).set(stats.num_waiting if stats else 0)
            metrics.DRAFT_LENGTH.labels(name).set(stats.draft_length if stats else 0)
            if stats is not None:
                self._count(name, stats)

    def _count(self, name: str, stats: EngineStats) -> None:
        for counter, field in COUNTERS:
            counter.labels(name).inc(self._since_last_time(name, counter, getattr(stats, field)))
        for position, total in enumerate(stats.accepted_per_position):
            counter = metrics.LLAMACPP_ACCEPTED_PER_POSITION
            counter.labels(name, position).inc(self._since_last_time(name, (counter, position), total))

    def _since_last_time(self, model: str, what: object, total: int) -> int:
        """A total that is smaller than before is of an engine that started anew."""
        seen = self._seen.get((model, what), 0)
        self._seen[model, what] = total
        return total - seen if total >= seen else total

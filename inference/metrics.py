"""Prometheus metrics of the request's clock, under the names that dashboards of this product class know.

Objects only: admission, the API, settlement and the worker count on them, /metrics renders them. Gauges of several
processes are added up over those that live.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
REDIS_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25, 1, 2.5)
BATCH_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256)
LOAD_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
REQUEST_LABELS = ("route", "model_id", "cached", "status_code")

# Web

REQUESTS = Counter("llm_api_request_total", "Requests to the generation endpoints.", REQUEST_LABELS)
REQUEST_SECONDS = Histogram(
    "llm_api_request_latency_seconds", "From request to the last byte.", REQUEST_LABELS, buckets=LATENCY_BUCKETS
)
CACHE_HITS = Counter("llm_redis_hits_total", "Completions found in the cache.", ["model_id", "kind"])
CACHE_MISSES = Counter("llm_redis_misses_total", "Completions looked for in vain.", ["model_id", "kind"])
CACHE_SECONDS = Histogram(
    "llm_redis_latency_seconds", "Look-ups in the completion cache.", ["model_id", "kind"], buckets=REDIS_BUCKETS
)
CACHE_ENABLED = Gauge("llm_redis_enabled", "1 if completions are cached.", multiprocess_mode="max")
REFUSALS = Counter("llm_refusals_total", "Requests refused before anything was queued.", ["code"])

BATCHES = Gauge("llm_batches", "Batches that have not ended, by status.", ["status"], multiprocess_mode="livesum")
BATCH_LINES = Gauge("llm_batch_lines_waiting", "Their lines that have no answer.", multiprocess_mode="livesum")

# Worker

TOKENS = Counter("llm_tokens_total", "Tokens of settled requests.", ["direction", "model_id"])
ENDED = Counter("llm_requests_ended_total", "Requests that ended, by how.", ["model_id", "status", "finish_reason"])
FIRST_TOKEN_SECONDS = Histogram(
    "llm_time_to_first_token_seconds",
    "From admission to the first text that was published.",
    ["model_id"],
    buckets=FIRST_TOKEN_BUCKETS,
)
QUEUE_SECONDS = Histogram(
    "llm_queue_wait_seconds", "From admission to a slot.", ["model_id"], buckets=FIRST_TOKEN_BUCKETS
)
BATCH_SIZE = Histogram(
    "llm_batch_size",
    "Mean sequences in the executed plans that carried a request.",
    ["model_id"],
    buckets=BATCH_BUCKETS,
)
SLOTS = Gauge("llm_slots", "Slots of loaded models.", ["model_id"], multiprocess_mode="livesum")
SLOTS_BUSY = Gauge("llm_slots_busy", "Slots with a sequence.", ["model_id"], multiprocess_mode="livesum")
ENGINE_WAITING = Gauge("llm_engine_waiting", "Sequences without a slot.", ["model_id"], multiprocess_mode="livesum")
QUEUE_LENGTH = Gauge("llm_queue_length", "Tickets that wait in Redis.", ["pool"], multiprocess_mode="livemax")
CLASS_WAIT_SECONDS = Histogram(
    "llm_fair_wait_seconds",
    "From the queue to a worker, by the plan of the tenant.",
    ["pool", "plan"],
    buckets=FIRST_TOKEN_BUCKETS,
)
OLDEST_WAIT_SECONDS = Gauge(
    "llm_fair_oldest_wait_seconds", "How long the oldest ticket has waited.", ["pool"], multiprocess_mode="livemax"
)
ALIAS_REQUESTS = Counter(
    "llm_adapter_alias_requests_total",
    "Ended requests that asked for an alias, by the version that answered.",
    ["model_id", "alias", "adapter", "status"],
)
ALIAS_FIRST_TOKEN_SECONDS = Histogram(
    "llm_adapter_alias_first_token_seconds",
    "From admission to the first token, of requests that asked for an alias, by the version that answered.",
    ["model_id", "alias", "adapter"],
    buckets=FIRST_TOKEN_BUCKETS,
)
VIRTUAL_LAG_TOKENS = Gauge(
    "llm_fair_virtual_lag_tokens",
    "Weighted tokens between those that wait: who has had most, and who has had least.",
    ["pool"],
    multiprocess_mode="livemax",
)
PARKED = Gauge("llm_parked", "Sequences that made room and will go on.", ["model_id"], multiprocess_mode="livesum")
PARKS = Counter("llm_parks_total", "How often a sequence made room for another tenant's.", ["model_id"])
PARKED_SECONDS = Histogram(
    "llm_parked_seconds", "From making room to going on.", ["model_id"], buckets=FIRST_TOKEN_BUCKETS
)
STEPS = Counter("llm_engine_steps_total", "Executed plans.", ["model_id"])
STEP_SEQUENCES = Counter("llm_engine_step_sequences_total", "Sequences, summed over executed plans.", ["model_id"])
DECODE_STEPS = Counter(
    "llm_engine_decode_steps_total", "Executed plans in which something was generated.", ["model_id"]
)
DECODE_SEQUENCES = Counter(
    "llm_engine_decode_sequences_total", "Generating sequences, summed over executed plans.", ["model_id"]
)
PROMPT_TOKENS = Counter("llm_engine_prompt_tokens_total", "Prompt tokens computed.", ["model_id"])
CACHED_TOKENS = Counter("llm_engine_cached_tokens_total", "Prompt tokens reused from a slot.", ["model_id"])
ADAPTER_SWITCHES = Counter(
    "llm_engine_adapter_switches_total", "Executed plans with another adapter vector than the one before.", ["model_id"]
)
COMPLETION_TOKENS = Counter("llm_engine_completion_tokens_total", "Tokens generated.", ["model_id"])
DRAFTS = Counter("llm_engine_drafts_total", "Drafts verified.", ["model_id"])
DRAFTED_TOKENS = Counter("llm_engine_drafted_tokens_total", "Guessed tokens verified.", ["model_id"])
ACCEPTED_TOKENS = Counter("llm_engine_accepted_tokens_total", "Guessed tokens that were right.", ["model_id"])
DRAFT_LENGTH = Gauge(
    "llm_engine_draft_length",
    "Guesses a generating sequence in the latest step: what pays now.",
    ["model_id"],
    multiprocess_mode="livemax",
)
DRAFT_ACCEPTANCE = Gauge(
    "llm_engine_draft_acceptance",
    "How likely the first guess of a draft is held to be right, by the adapters (first digits of their SHA-256).",
    ["model_id", "adapters"],
    multiprocess_mode="livemostrecent",
)
STEP_COST = Gauge(
    "llm_engine_step_seconds",
    "What a step of so many tokens takes, as measured when the model was loaded.",
    ["model_id", "tokens"],
    multiprocess_mode="livemostrecent",
)
# The same under llama.cpp's names
LLAMACPP_PROMPT_TOKENS = Counter("llamacpp:prompt_tokens_total", "Prompt tokens computed.", ["model_id"])
LLAMACPP_PROMPT_SECONDS = Counter("llamacpp:prompt_seconds_total", "Time of computing prompts.", ["model_id"])
LLAMACPP_PREDICTED_TOKENS = Counter("llamacpp:tokens_predicted_total", "Tokens generated.", ["model_id"])
LLAMACPP_PREDICTED_SECONDS = Counter("llamacpp:tokens_predicted_seconds_total", "Time of generating.", ["model_id"])
LLAMACPP_DECODES = Counter("llamacpp:n_decode_total", "Executed plans.", ["model_id"])
LLAMACPP_BUSY_SLOTS = Gauge(
    "llamacpp:n_busy_slots_per_decode",
    "Mean sequences in an executed plan.",
    ["model_id"],
    multiprocess_mode="livemostrecent",
)
LLAMACPP_PROMPT_RATE = Gauge(
    "llamacpp:prompt_tokens_seconds",
    "Prompt tokens a second of computing prompts, when that was last done.",
    ["model_id"],
    multiprocess_mode="livesum",
)
LLAMACPP_PREDICTED_RATE = Gauge(
    "llamacpp:predicted_tokens_seconds",
    "Tokens a second of generating, when that was last done.",
    ["model_id"],
    multiprocess_mode="livesum",
)
LLAMACPP_PROCESSING = Gauge(
    "llamacpp:requests_processing", "Requests in a slot.", ["model_id"], multiprocess_mode="livesum"
)
LLAMACPP_MOST_TOKENS = Gauge(
    "llamacpp:n_tokens_max",
    "Most tokens that a slot held at the end of a request.",
    ["model_id"],
    multiprocess_mode="livemax",
)
LLAMACPP_DEFERRED = Gauge(
    "llamacpp:requests_deferred",
    "Requests that wait for a slot of any model.",
    ["pool"],
    multiprocess_mode="livemax",
)
LLAMACPP_DRAFTS = Counter("llamacpp:spec_decode_num_drafts_total", "Drafts verified.", ["model_id"])
LLAMACPP_DRAFTED_TOKENS = Counter(
    "llamacpp:spec_decode_num_draft_tokens_total", "Guessed tokens verified.", ["model_id"]
)
LLAMACPP_ACCEPTED_TOKENS = Counter(
    "llamacpp:spec_decode_num_accepted_tokens_total", "Guessed tokens that were right.", ["model_id"]
)
LLAMACPP_ACCEPTED_PER_POSITION = Counter(
    "llamacpp:spec_decode_num_accepted_tokens_per_pos_total",
    "Guessed tokens that were right, by their position in the draft.",
    ["model_id", "position"],
)
MODEL_LOADS = Counter("llm_model_loads_total", "Loads of models, by how they ended.", ["model_id", "outcome"])
MODEL_UNLOADS = Counter("llm_model_unloads_total", "Unloads of models, by why.", ["model_id", "reason"])
MODEL_LOAD_SECONDS = Histogram(
    "llm_model_load_seconds", "From the decision to load a model to its first slot.", ["model_id"], buckets=LOAD_BUCKETS
)
MODEL_MEMORY = Gauge(
    "llm_model_memory_bytes", "Estimated memory of loaded models.", ["model_id"], multiprocess_mode="livesum"
)
MODEL_BUDGET = Gauge(
    "llm_model_memory_budget_bytes", "Memory that workers have for models.", ["pool"], multiprocess_mode="livesum"
)
RESIDENT = Gauge(
    "llm_worker_resident_bytes", "Resident memory of worker processes.", ["pool"], multiprocess_mode="livesum"
)
SETTLEMENT_GROUP = Histogram(
    "llm_settlement_group_size", "Requests settled in one transaction.", buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256)
)

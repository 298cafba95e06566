"""Several answers of one request of llama.cpp's dialect, and what one answer may have beside its text."""

from __future__ import annotations

import math
import threading
from typing import Any

import orjson
import pytest

from accounts.models import LedgerEntry, announce_tenant
from inference.api.llamacpp import replies
from inference.api.llamacpp.schemas import CompletionBody
from inference.catalog import registry
from inference.engine.drafting import MAX_DRAFT
from inference.engine.types import Speculation, TokenProbs
from inference.models import Receipt
from inference.structured import JsonForm, fit, widest
from tests.in_process import MODEL, N_CTX, N_SLOTS, FakeSpeed, InProcessSite, wait_until
from tests.llamacpp_calls import complete, error_of, stream
from tests.timing import Stopwatch

pytestmark = pytest.mark.api


@pytest.fixture
def slow_site(site: InProcessSite, fake_speed: FakeSpeed) -> InProcessSite:
    """20 ms a step."""
    fake_speed.seconds_per_step = 0.02
    site.stop_worker()
    site.start_worker()
    return site


# Prompts


def test_texts_and_ids_in_one_array_are_one_prompt(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    tokens = alice.post("/tokenize", json={"content": "one two three"}).json()["tokens"]
    mixed = complete(alice, [*tokens[:1], "two three", 7]).json()
    assert (mixed["tokens_evaluated"], mixed["prompt"]) == (4, "one two three <7>")
    assert mixed["content"] == complete(alice, [*tokens, 7]).json()["content"]


def test_prompts_of_every_kind_are_answered_in_their_order(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    prompts = ["one two", [5, 6, 7], [5, "six seven eight"], {"prompt_string": "nine"}]
    results = complete(alice, prompts).json()
    assert [(each["index"], each["tokens_evaluated"]) for each in results] == [(0, 2), (1, 3), (2, 4), (3, 1)]
    for prompt, result in zip(prompts, results, strict=True):
        assert result["content"] == complete(alice, prompt).json()["content"]


def test_an_array_of_one_prompt_is_answered_as_that_prompt(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    assert complete(alice, ["one two"]).json()["content"] == complete(alice, "one two").json()["content"]


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": []},
        {"prompt": ["one"] * 17},
        {"prompt": ["one"] * 3, "n_cmpl": 16},
        {"prompt": [1] + ["one"] * 300},
        {"prompt": {"prompt_string": "see", "multimodal_data": ["aGVsbG8="]}},
        {"prompt": {"text": "one"}},
        {"prompt": 5},
        {"prompt": [[["one"]]]},
        {"prompt": [1.5]},
        {"prompt": [-1]},
        {"prompt": [True]},
        {},
    ],
)
def test_prompts_that_are_none_or_too_many_are_refused(site: InProcessSite, fields: dict[str, Any]) -> None:
    alice = site.client(site.cast.alice)
    error = error_of(alice.post("/completion", json=fields), 400)
    assert error["type"] == "invalid_request_error"
    assert error["message"].startswith(("Field 'prompt", "Field 'body'"))


# Several completions of one prompt


def test_completions_of_one_prompt_differ_and_pay_for_it_once(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    response = complete(alice, n=3, temperature=1, seed=5)
    results = response.json()
    assert [each["index"] for each in results] == [0, 1, 2]
    assert [each["generation_settings"]["seed"] for each in results] == [5, 6, 7]
    assert len({each["content"] for each in results}) == 3
    assert {each["tokens_evaluated"] for each in results} == {4}
    assert response.headers["x-usage-prompt-tokens"] == "4"
    assert response.headers["x-usage-completion-tokens"] == "24"
    assert "decode;dur=" in response.headers["server-timing"]
    assert site.charged(site.cast.alice) == (4 + 3 * 8, 0)
    receipts = list(Receipt.objects.order_by("request_id"))
    assert [each.prompt_tokens for each in receipts] == [4, 4, 4]
    assert [each.charged_tokens for each in receipts] == [12, 8, 8]
    entries = LedgerEntry.objects.filter(kind=LedgerEntry.Kind.SETTLE)
    assert sum(each.prompt_tokens for each in entries) == 4
    for result in results:
        again = complete(alice, temperature=1, seed=result["generation_settings"]["seed"]).json()
        assert again["content"] == result["content"]


def test_a_long_prompt_of_several_completions_is_computed_once(site: InProcessSite) -> None:
    prompt = " ".join(f"word{number}" for number in range(120))
    results = complete(site.client(site.cast.alice), prompt, n_cmpl=3, cache_prompt=False).json()
    computed = [each["timings"]["prompt_n"] for each in results]
    assert computed[0] == 120
    assert computed[1:] == [1, 1]


def test_a_prompt_whose_first_answer_was_in_the_cache_is_paid_by_the_others(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    first = complete(alice, n=2, temperature=1, seed=5, cache=True)
    assert first.headers["x-cache"] == "miss"
    site.settle()
    before = site.charged(site.cast.alice)[0]
    other = complete(alice, n=2, temperature=1, seed=4, cache=True).json()  # its second is the first of before
    assert other[1]["content"] == first.json()[0]["content"]
    assert site.charged(site.cast.alice)[0] - before == 4 + 8
    assert complete(alice, n=2, temperature=1, seed=6, cache=True).status_code == 200
    assert site.charged(site.cast.alice)[0] - before == 4 + 8 + 4 + 8


def test_without_a_seed_each_completion_draws_its_own(site: InProcessSite) -> None:
    results = complete(site.client(site.cast.alice), n_cmpl=4, temperature=1).json()
    assert len({each["generation_settings"]["seed"] for each in results}) == 4


def test_completions_of_no_tokens_cost_the_prompt(site: InProcessSite) -> None:
    results = complete(site.client(site.cast.alice), n=2, n_predict=0).json()
    assert [each["tokens_predicted"] for each in results] == [0, 0]
    assert site.charged(site.cast.alice) == (4, 0)


# Streams of several answers


def test_events_of_several_answers_say_whose_they_are(slow_site: InProcessSite) -> None:
    alice = slow_site.client(slow_site.cast.alice)
    prompts = ["one two", "three four five"]
    whole = complete(alice, prompts, n=2, seed=3, temperature=1).json()
    events = stream(alice, prompts, n=2, seed=3, temperature=1)
    for index, one in enumerate(whole):
        mine = [each for each in events if each["index"] == index]
        assert "".join(each["content"] for each in mine) == one["content"]
        assert [each["stop"] for each in mine] == [False] * (len(mine) - 1) + [True]
        assert mine[-1]["tokens_predicted"] == one["tokens_predicted"]
        assert mine[-1]["prompt"] == one["prompt"]
    order = [each["index"] for each in events if not each["stop"]]
    assert order != sorted(order), "the answers came one after the other"


def test_a_stream_of_several_that_does_not_fit_has_a_status(site: InProcessSite) -> None:
    body = {"prompt": ["one", "word " * N_CTX], "stream": True}
    error = error_of(site.client(site.cast.alice).post("/completion", json=body), 400)
    assert (error["type"], error["n_prompt_tokens"]) == ("exceed_context_size_error", N_CTX)
    assert site.charged(site.cast.alice) == (0, 0)


def test_one_answer_that_fails_ends_the_stream_with_its_error(slow_site: InProcessSite) -> None:
    alice = slow_site.client(slow_site.cast.alice)
    body = {"prompt": ["one", "two"], "n_predict": 200, "stream": True}
    with alice.stream("POST", "/completion", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        wait_until(lambda: slow_site.num_running() == 2)
        slow_site.client(slow_site.cast.alice).post(f"/v1/requests/{response.headers['x-request-id']}.1/cancel")
        *_, last = [line for line in lines if line.startswith("data: ")]
    assert orjson.loads(last.removeprefix("data: "))["error"]["code"] == 409
    wait_until(lambda: slow_site.num_running() == 0)
    assert slow_site.charged(slow_site.cast.alice)[1] == 0


def test_a_client_that_leaves_a_stream_of_several_cancels_all(slow_site: InProcessSite) -> None:
    alice = slow_site.client(slow_site.cast.alice)
    body = {"prompt": ["one", "two", "three"], "n_predict": 200, "stream": True}
    with alice.stream("POST", "/completion", json=body) as response:
        next(response.iter_lines())
    wait_until(lambda: slow_site.num_running() == 0)
    assert slow_site.charged(slow_site.cast.alice)[1] == 0
    assert {each.status for each in Receipt.objects.all()} == {"cancelled"}


def test_a_worker_that_dies_ends_a_stream_of_several_with_an_error(slow_site: InProcessSite) -> None:
    alice = slow_site.client(slow_site.cast.alice)

    def stop() -> None:
        wait_until(lambda: slow_site.num_running() == 2)
        slow_site.stop_worker()

    stopper = threading.Thread(target=stop)
    stopper.start()
    events = stream(alice, ["one", "two"], n_predict=200)
    stopper.join()
    assert events[-1]["error"]["code"] == 503
    assert slow_site.charged(slow_site.cast.alice) == (0, 0)


def test_cached_answers_stream_too(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    whole = complete(alice, ["one", "two"], cache=True).json()
    site.settle()
    events = stream(alice, ["one", "two"], cache=True)
    texts = ["".join(each["content"] for each in events if each["index"] == index) for index in (0, 1)]
    assert texts == [each["content"] for each in whole]


# What an answer says


def test_the_prompt_is_shown_as_text(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    assert complete(alice, "one two").json()["prompt"] == "one two"
    *parts, last = stream(alice, "one two")
    assert last["prompt"] == "one two"
    assert not any("prompt" in part for part in parts)


def test_partial_events_name_the_slot(site: InProcessSite) -> None:
    *parts, last = stream(site.client(site.cast.alice))
    assert {part["id_slot"] for part in parts} == {last["id_slot"]}
    assert 0 <= last["id_slot"] < N_SLOTS


def test_progress_is_an_event_at_the_start_and_one_when_the_prompt_is_done(site: InProcessSite) -> None:
    events = stream(site.client(site.cast.alice), return_progress=True)
    found = [each["prompt_progress"] for each in events if "prompt_progress" in each]
    assert [(each["total"], each["processed"]) for each in found] == [(4, 0), (4, 4)]
    assert events[0]["content"] == ""
    assert not any("prompt_progress" in each for each in stream(site.client(site.cast.alice)))


def test_timings_come_with_each_token_where_they_are_wanted(site: InProcessSite) -> None:
    *parts, last = stream(site.client(site.cast.alice), timings_per_token=True)
    found = [part["timings"] for part in parts]
    assert [each["predicted_n"] for each in found] == [part["tokens_predicted"] for part in parts]
    assert {each["cache_n"] + each["prompt_n"] for each in found} == {4}
    assert set(found[0]) == set(last["timings"])
    assert "timings" not in stream(site.client(site.cast.alice))[0]


def test_response_fields_select(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    fields = ["content", "generation_settings/n_predict", "generation_settings/none", "content/deeper"]
    body = complete(alice, response_fields=fields).json()
    assert set(body) == {"content", "generation_settings/n_predict"}
    assert body["generation_settings/n_predict"] == 8
    last = stream(alice, response_fields=["stop_type"])[-1]
    assert last == {"stop_type": "limit"}
    assert complete(alice, "one two", response_fields=[]).json()["prompt"] == "one two"
    error_of(complete(alice, response_fields=["content"] * 65), 400)


def test_probabilities_have_upstreams_shape(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    body = complete(alice, n_probs=2, return_tokens=True).json()
    assert [each["id"] for each in body["completion_probabilities"]] == body["tokens"]
    first = body["completion_probabilities"][0]
    assert set(first) == {"id", "token", "bytes", "logprob", "top_logprobs"}
    assert set(first["top_logprobs"][0]) == {"id", "token", "bytes", "logprob"}
    after = complete(alice, logprobs=2, post_sampling_probs=True).json()["completion_probabilities"][0]
    assert set(after) == {"id", "token", "bytes", "prob", "top_probs"}
    *parts, last = stream(alice, n_probs=1)
    assert sum(len(part["completion_probabilities"]) for part in parts) == 8
    assert "completion_probabilities" not in last
    assert "completion_probabilities" not in complete(alice).json()


def test_a_probability_of_nothing_is_a_number_and_half_a_character_is_bytes() -> None:
    probs = [TokenProbs(5, -math.inf, b"\xe2\x82", (TokenProbs(6, math.log(0.5), b" a"),))]
    (found,) = replies.probabilities(probs, post_sampling=False)
    assert (found["token"], found["bytes"], found["logprob"]) == ("", [0xE2, 0x82], replies.LOWEST)
    (found,) = replies.probabilities(probs, post_sampling=True)
    assert (found["prob"], found["top_probs"][0]["prob"]) == (0.0, pytest.approx(0.5))


def test_all_settings_are_echoed(site: InProcessSite) -> None:
    settings = complete(site.client(site.cast.alice), n_keep=3, n_discard=2, n_probs=1).json()["generation_settings"]
    missing = UPSTREAM_SETTINGS - {*settings}
    assert not missing
    assert (settings["n_keep"], settings["n_discard"], settings["n_probs"]) == (3, 2, 1)


UPSTREAM_SETTINGS = frozenset(
    """seed temperature dynatemp_range dynatemp_exponent top_k top_p min_p top_n_sigma xtc_probability xtc_threshold
    typical_p repeat_last_n repeat_penalty presence_penalty frequency_penalty dry_multiplier dry_base
    dry_allowed_length dry_penalty_last_n dry_sequence_breakers mirostat mirostat_tau mirostat_eta adaptive_target
    adaptive_decay stop max_tokens n_predict n_keep n_discard ignore_eos stream logit_bias n_probs min_keep grammar
    grammar_lazy grammar_triggers preserved_tokens chat_format reasoning_format reasoning_in_content generation_prompt
    samplers timings_per_token post_sampling_probs backend_sampling lora""".split()  # noqa: SIM905
)


def test_n_predict_0_computes_the_prompt_alone(site: InProcessSite) -> None:
    body = complete(site.client(site.cast.alice), n_predict=0).json()
    assert (body["content"], body["tokens_predicted"], body["tokens_evaluated"]) == ("", 0, 4)
    assert body["tokens_cached"] == 4
    assert site.charged(site.cast.alice) == (4, 0)


def test_an_explicit_n_predict_goes_on_where_the_context_is_full(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    prompt = " ".join(["word"] * 200)
    shifted = complete(alice, prompt, n_predict=100).json()
    assert (shifted["tokens_predicted"], shifted["truncated"], shifted["stop_type"]) == (100, True, "limit")
    cut = complete(alice, prompt, n_predict=100, context_shift=False).json()
    assert (cut["tokens_predicted"], cut["truncated"]) == (N_CTX - 200, True)
    endless = complete(alice, prompt, n_predict=-1).json()
    assert (endless["tokens_predicted"], endless["truncated"]) == (N_CTX - 200, True)
    assert complete(alice, "word").json()["truncated"] is False


def test_a_slot_that_is_not_there_is_refused(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    assert complete(alice, id_slot=1).json()["id_slot"] == 1
    assert "slot" in error_of(complete(alice, id_slot=N_SLOTS), 400)["message"]
    error_of(complete(alice, id_slot=-2), 400)


def test_drafts_are_asked_for_in_three_ways() -> None:
    def speculation(**fields: Any) -> Speculation | None:
        return CompletionBody.model_validate({"prompt": "one", **fields}).decoding().speculation

    assert speculation() is None
    assert speculation(speculative=False) == Speculation(num_max=0)
    assert speculation(speculative={"n_max": 4, "p_min": 0.5}) == Speculation(num_max=4, min_probability=0.5)
    dotted = {"speculative.n_min": 2, "speculative.n_max": 8, "speculative.p_min": 0.25}
    assert speculation(**dotted) == Speculation(num_min=2, num_max=8, min_probability=0.25)
    assert speculation(**{"speculative.n_max": 99999}) == Speculation(num_max=MAX_DRAFT)


def test_every_other_parameter_is_taken(site: InProcessSite) -> None:
    taken = {
        "t_max_predict_ms": 5000,
        "sse_ping_interval": 3,
        "stream_options": {"include_usage": True},
        "verbose": True,
        "n_indent": 0,
        "speculative.p_min": 0.0,
        "speculative": {},
        "return_progress": True,
    }
    assert complete(site.client(site.cast.alice), **taken).status_code == 200


def test_a_stream_is_kept_alive_as_often_as_it_wants(site: InProcessSite, fake_speed: FakeSpeed) -> None:
    fake_speed.seconds_per_step = 2.5
    site.stop_worker()
    site.start_worker()
    body = {"prompt": "one", "n_predict": 1, "stream": True, "sse_ping_interval": 1}
    watch = Stopwatch()
    with site.client(site.cast.alice).stream("POST", "/completion", json=body) as response:
        first = next(response.iter_lines())
        assert watch.seconds() < 2.4
    assert first == ": keep-alive"


# Grammars


def test_a_grammar_that_is_none_is_refused_with_its_place(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    assert "grammar" in error_of(complete(alice, grammar='root ::= "yes'), 400)["message"]
    assert "json_schema" in error_of(complete(alice, json_schema={"type": "nothing"}), 400)["message"]
    error_of(complete(alice, grammar='root ::= "a"', json_schema={}), 400)
    bomb = 'root ::= ((("a"{0,1000}){0,1000}){0,1000}){0,1000}'
    error_of(complete(alice, grammar=bomb), 400)
    assert complete(alice).status_code == 200


# Infill


def test_a_model_without_its_tokens_does_not_fill_in(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    body = {"input_prefix": "def add(", "input_suffix": "return a + b", "n_predict": 4}
    assert error_of(alice.post("/infill", json=body), 501)["type"] == "not_supported_error"
    error_of(alice.post("/infill", json={"input_prefix": "x"}), 400)


def test_the_middle_is_asked_for_between_prefix_and_suffix(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    site.tokenizers.fill |= {"pre": 901, "suf": 902, "mid": 903}
    body = {"input_prefix": "one two", "input_suffix": "four five", "prompt": "three", "n_predict": 4}
    assert alice.post("/infill", json=body).json()["prompt"] == "<901> one two three <902> four five <903>"
    site.tokenizers.fill |= {"rep": 904, "sep": 905, "bos": 906}
    extra = [{"text": "six seven", "filename": "a.py"}, {"text": "eight"}]
    found = alice.post("/infill", json={**body, "input_extra": extra}).json()
    middle = "<906> <901> one two three <902> four five <903>"
    assert found["prompt"] == middle, "a context of 256 has no room for other files"
    assert found["model"] == MODEL


def test_other_files_come_before_the_prefix_where_there_is_room(site: InProcessSite) -> None:
    row = site.models[MODEL]
    row.n_ctx = 4096
    row.save()
    registry.forget()
    site.stop_worker()
    site.start_worker()
    site.tokenizers.fill |= {"pre": 901, "suf": 902, "mid": 903, "rep": 904, "sep": 905}
    body = {
        "input_prefix": "one " * 1000,
        "input_suffix": ["two", 7],
        "input_extra": [{"text": "six", "filename": "a.py"}, {"text": "eight"}],
        "n_predict": 4,
    }
    found = site.client(site.cast.alice).post("/infill", json=body).json()["prompt"]
    head = "<904> myproject <905> a.py six <905> tmp eight <905> filename <901> one one"
    assert found.startswith(head)
    assert found.endswith("one <902> two <7> <903>")
    assert found.count("one") == 384
    site.tokenizers.fill |= {"rep": None, "sep": None}
    found = site.client(site.cast.alice).post("/infill", json=body).json()["prompt"]
    assert found.startswith("--- snippet --- six --- snippet --- eight <901>")


# Around it


def test_embeddings_of_a_model_that_makes_none_name_what_it_cannot_do(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    for path in ("/embedding", "/embeddings"):
        refused = alice.post(path, json={"content": "one"})
        assert refused.status_code == 400
        assert refused.json()["error"]["type"] == "invalid_request_error"
        assert "embed" in refused.json()["error"]["message"]


def test_health_is_in_upstreams_shape(site: InProcessSite) -> None:
    for path in ("/health", "/v1/health"):
        assert site.client().get(path).json() == {"status": "ok"}


# The grammar of a forced answer

SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}


def fitted(max_tokens: int) -> str:
    """The grammar of a forced answer that may have so many tokens, one of them for its end."""
    return fit(JsonForm(orjson.dumps(SCHEMA)), max_tokens - 1).grammar


def test_the_grammar_that_is_told_is_the_one_in_force(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    for cache in (False, True, True):  # computed, kept, found
        body = complete(alice, n_predict=70, json_schema=SCHEMA, cache=cache).json()
        assert body["generation_settings"]["grammar"] == fitted(70)
        last = stream(alice, n_predict=70, json_schema=SCHEMA, cache=cache)[-1]
        assert last["generation_settings"]["grammar"] == fitted(70)
    assert len({fitted(70), fitted(199), widest(JsonForm(orjson.dumps(SCHEMA))).grammar}) == 3
    assert complete(alice, grammar='root ::= "x"').json()["generation_settings"]["grammar"] == 'root ::= "x"'
    assert complete(alice).json()["generation_settings"]["grammar"] == ""


@pytest.mark.parametrize("streams", [False, True])
def test_each_of_several_answers_tells_its_own_grammar(site: InProcessSite, streams: bool) -> None:
    """Beside the prompts' three tokens 130 are left, which the answers share."""
    alice, prompts = site.client(site.cast.alice), ["one two", "three"]
    site.cast.alice.tenant.limit_overrides = {"monthly_tokens": 133}
    site.cast.alice.tenant.save()
    announce_tenant(site.cast.alice.tenant.pk)
    if streams:
        found = [each for each in stream(alice, prompts, n_predict=200, json_schema=SCHEMA) if each["stop"]]
    else:
        found = complete(alice, prompts, n_predict=200, json_schema=SCHEMA).json()
    told = {each["index"]: each["generation_settings"]["grammar"] for each in found}
    assert told == {0: fitted(65), 1: fitted(65)}
    assert fitted(65) != fitted(200)

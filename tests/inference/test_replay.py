"""replay: the same tokens from the same body, and a reason for every case in which they are not."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest
from django.core.management import CommandError, call_command

from accounts.models import LedgerEntry, announce_tenant
from inference.catalog import registry
from inference.digests import settings_digest
from inference.engine.fake_backend import FakeBackend
from inference.engine.types import Decoding, SamplingParams, ThoughtBound
from inference.inquiry import replay
from inference.models import Receipt, ServedModel
from tests.in_process import InProcessSite

pytestmark = pytest.mark.integration
BODIES: dict[str, dict[str, Any]] = {
    "/v1/generate": {"prompt": "Once upon a time", "max_new_tokens": 8, "temperature": 1},
    "/completion": {"prompt": "Once upon a time", "n_predict": 6, "logit_bias": [[7, 2]]},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello there"}], "max_tokens": 5},
    "/v1/completions": {"prompt": "One two three", "max_tokens": 5, "n": 2},
}
SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
FORCED: dict[str, dict[str, Any]] = {
    "/completion": {"prompt": "One two three", "n_predict": 200, "json_schema": SCHEMA},
    "/v1/completions": {"prompt": "One two three", "max_tokens": 200, "n": 2, "json_schema": SCHEMA},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "Hello there"}],
        "max_tokens": 200,
        "tools": [{"type": "function", "function": {"name": "look", "parameters": SCHEMA}}],
        "tool_choice": "required",
    },
}


def limited(site: InProcessSite, **limits: int | None) -> None:
    tenant = site.cast.alice.tenant
    tenant.limit_overrides = limits
    tenant.save()
    announce_tenant(tenant.pk)


def load(served: Any) -> FakeBackend:
    return FakeBackend(served.n_slots, served.n_ctx, supports_adapters=True)


def asked(site: InProcessSite, route: str, body: dict[str, Any]) -> Receipt:
    """The receipt of one request, of its last answer."""
    answer = site.client(site.cast.alice).post(route, json=body)
    assert answer.status_code == 200, answer.text
    site.settle()
    return Receipt.objects.filter(request_id__startswith=answer.headers["x-request-id"]).latest("request_id")


def again(receipt: Receipt, body: dict[str, Any]) -> replay.Replayed:
    return replay.replay(receipt, json.dumps(body).encode(), load=load)


def why_not(receipt: Receipt, body: dict[str, Any]) -> str:
    with pytest.raises(replay.ReplayError) as caught:
        again(receipt, body)
    return caught.value.code


def test_a_request_of_every_dialect_gives_the_same_tokens_again_and_nothing_is_charged(site: InProcessSite) -> None:
    for route, body in BODIES.items():
        receipt = asked(site, route, body)
        charged = site.charged(site.cast.alice)
        done = again(receipt, body)
        assert (done.verdict, done.reason) == ("same", ""), route
        assert (done.completion_tokens, done.seed) == (receipt.completion_tokens, receipt.seed)
        assert site.charged(site.cast.alice) == charged
    receipt.digests["answer"] = "0" * 32
    assert again(receipt, body).code == "tokens_differ"
    receipt.digests = {}
    assert again(receipt, body).verdict == "unknown"


def test_what_has_changed_since_then_is_named(site: InProcessSite) -> None:
    body = BODIES["/v1/generate"]
    receipt = asked(site, "/v1/generate", body)
    assert why_not(receipt, {**body, "prompt": "Once upon a time there"}) == "prompt_differs"
    assert why_not(receipt, {**body, "prompt": "Once upon a day"}) == "prompt_differs"
    assert why_not(receipt, {**body, "temperature": 0.5}) == "settings_differ"
    assert why_not(receipt, {**body, "stop": ["x"]}) == "settings_differ"
    assert why_not(receipt, {**body, "model": "granted-model"}) == "other_model"
    assert why_not(receipt, {**body, "model": "nobody's"}) == "model_not_found"
    assert why_not(receipt, {"prompt": 5}) == "body_invalid"
    ServedModel.objects.filter(name="fake-model").update(digest="c" * 64)
    registry.forget()
    assert why_not(receipt, body) == "model_changed"
    receipt.route = "/v1/nothing"
    assert why_not(receipt, body) == "route_not_replayed"
    receipt.cached = True
    assert why_not(receipt, body) == "answered_from_cache"
    receipt.cached, receipt.num_steps = False, 0
    assert why_not(receipt, body) == "nothing_computed"


@pytest.mark.parametrize("route", FORCED)
@pytest.mark.parametrize("limit", [{"monthly_tokens": 100}, {"max_output": 70}, {"max_context": 90}])
def test_a_forced_answer_has_the_form_again_that_fitted_into_the_tokens_of_then(
    site: InProcessSite, route: str, limit: dict[str, int]
) -> None:
    """First the limits were tighter then, afterwards they are tighter today."""
    limited(site, **limit)
    tight = asked(site, route, FORCED[route])
    limited(site)
    wide = asked(site, route, FORCED[route])
    assert tight.completion_tokens < wide.completion_tokens
    done = again(tight, FORCED[route])
    assert (done.verdict, done.completion_tokens) == ("same", tight.completion_tokens)
    limited(site, **limit)
    assert again(wide, FORCED[route]).verdict == "same"
    limited(site, max_output=1)
    assert again(Receipt.objects.get(pk=wide.pk), FORCED[route]).verdict == "same"


def test_a_forced_answer_whose_bound_nobody_knows_any_more_says_so(site: InProcessSite) -> None:
    limited(site, max_output=70)
    receipt = asked(site, "/completion", FORCED["/completion"])
    LedgerEntry.objects.all()._raw_delete("default")
    assert again(receipt, FORCED["/completion"]).verdict == "same"  # it happens to be the same one still
    limited(site)
    with pytest.raises(replay.ReplayError, match="no longer knows how many they were: today's 200") as caught:
        again(Receipt.objects.get(pk=receipt.pk), FORCED["/completion"])
    assert caught.value.code == "settings_differ"


def test_an_answer_that_ended_by_itself_may_be_as_long_as_it_was(site: InProcessSite) -> None:
    site.speed.answer_tokens = 9
    site.stop_worker()
    site.start_worker()
    receipt = asked(site, "/completion", {"prompt": "One two", "n_predict": 40})
    assert (receipt.finish_reason, receipt.completion_tokens) == ("eos", 10)
    limited(site, max_output=4)

    def short(served: Any) -> FakeBackend:
        return FakeBackend(served.n_slots, served.n_ctx, supports_adapters=True, answer_tokens=9)

    done = replay.replay(receipt, json.dumps({"prompt": "One two", "n_predict": 40}).encode(), load=short)
    assert (done.verdict, done.finish_reason) == ("same", "eos")


def test_what_ends_an_answer_is_in_the_digest_and_where_it_ran_is_not() -> None:
    def digest(decoding: Decoding) -> str:
        return settings_digest("secret", "r", SamplingParams(), decoding, (), ())

    assert digest(Decoding(min_indent=4)) != digest(Decoding())
    assert digest(Decoding(slot_id=1)) == digest(Decoding())


def test_bounded_thoughts_are_in_the_digest_and_receipts_of_before_them_keep_theirs() -> None:
    def digest(thoughts: ThoughtBound | None) -> str:
        return settings_digest("secret", "r", SamplingParams(thoughts=thoughts), Decoding(), (), ())

    bound = ThoughtBound(num_tokens=3, start="<think>", end="</think>", end_tokens=(4,))
    assert digest(None) == "d266040dc214a882eab01bc6d45e513c"
    assert len({digest(None), digest(bound), digest(replace(bound, num_tokens=4))}) == 3


def test_digests_hold_no_content_and_two_requests_with_one_prompt_look_different(site: InProcessSite) -> None:
    for _ in range(2):
        asked(site, "/v1/generate", {**BODIES["/v1/generate"], "cache": False})
    first, second = Receipt.objects.values_list("digests", flat=True)
    assert set(first) == {"prompt", "settings", "answer"}
    assert not {*first.values()} & {*second.values()}
    assert all(len(digest) == 32 for digest in first.values())


def test_the_command_says_it_in_words_in_json_and_by_its_status(
    site: InProcessSite, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay.replay, "__kwdefaults__", {**replay.replay.__kwdefaults__, "load": load})
    receipt = asked(site, "/v1/generate", BODIES["/v1/generate"])
    (tmp_path / "body.json").write_text(json.dumps(BODIES["/v1/generate"]))
    words = ["replay", receipt.request_id, "--body", str(tmp_path / "body.json")]
    out = io.StringIO()
    call_command(*words, stdout=out)
    assert out.getvalue().startswith("The same: 8 tokens of fake-model")
    Receipt.objects.update(digests={})
    out = io.StringIO()
    with pytest.raises(SystemExit) as end:
        call_command(*words, "--json", "--text", stdout=out)
    assert end.value.code == 2
    assert json.loads(out.getvalue())["code"] == "no_digests"
    with pytest.raises(CommandError, match="no receipt"):
        call_command("replay", "unknown")

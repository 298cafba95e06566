"""The native dialect, /v1/generate and what is around it."""

from __future__ import annotations

from inference.conformance.target import Check, Target, expect, good, refused

PROMPT = "The capital of France is"
BODY = {"prompt": PROMPT, "max_new_tokens": 8, "temperature": 0, "cache": False}


def healthz(target: Target) -> None:
    expect(good(target.get("/healthz")).get("status") == "ok", "no status ok")


def lists_models(target: Target) -> None:
    found = good(target.get("/v1/models"))
    expect(found.get("data") or found.get("models"), found)


def generates(target: Target) -> None:
    answer = target.post("/v1/generate", BODY)
    found = good(answer)
    expect(isinstance(found.get("output"), str) and found["output"] and found["cached"] is False, found)
    counts = [int(answer.headers.get(f"x-usage-{name}-tokens", "0")) for name in ("prompt", "completion", "total")]
    expect(counts[0] > 0 and 1 <= counts[1] <= 8 and counts[0] + counts[1] == counts[2], f"usage {counts}")
    expect(answer.headers.get("x-request-id"), "no X-Request-ID")


def says_the_same_twice(target: Target) -> None:
    body = {**BODY, "temperature": 1.0, "seed": 7}
    first, second = (good(target.post("/v1/generate", body))["output"] for _ in range(2))
    expect(first == second, f"{first!r} and {second!r} with one seed")


def streams(target: Target) -> None:
    events = target.post("/v1/generate", {**BODY, "stream": True}).events()
    expect(events and events[-1][0] == "finished", events[-1:])
    expect(any(name == "delta" for name, _ in events), "no delta")


def keeps_a_receipt(target: Target) -> None:
    request_id = target.post("/v1/generate", BODY).headers.get("x-request-id", "")
    found = good(target.get(f"/v1/requests/{request_id}"))
    expect(found.get("request_id", found.get("id")) == request_id, found)


def answers_a_batch(target: Target) -> None:
    body = {key: value for key, value in BODY.items() if key != "prompt"}
    found = good(target.post("/v1/generate/batch", {**body, "prompts": [PROMPT, "One, two,"]}))
    expect(len(found.get("results", ())) == 2, found)


def counts_usage(target: Target) -> None:
    expect("quota_used" in good(target.get("/v1/me/usage")), "no quota_used")


def refuses_a_wrong_key(target: Target) -> None:
    found = refused(target.post("/v1/generate", BODY, key="llms_wrong_key"), 401)
    expect(found.get("code") and found.get("message"), found)


def refuses_a_wrong_body(target: Target) -> None:
    expect(refused(target.post("/v1/generate", {**BODY, "max_new_tokens": -5}), 400, 422).get("code"), "no code")
    expect(refused(target.post("/v1/generate", b"{"), 400).get("code") == "invalid_json", "not invalid_json")


def refuses_an_unknown_model(target: Target) -> None:
    found = refused(target.post("/v1/generate", {**BODY, "model": "conformance-no-such-model"}), 404)
    expect(found.get("code") == "model_not_found", found)


CHECKS = [
    Check("native", "the process lives", healthz),
    Check("native", "models are listed", lists_models),
    Check("native", "an answer with exact usage", generates),
    Check("native", "one seed, one answer", says_the_same_twice),
    Check("native", "a stream ends with finished", streams),
    Check("native", "a receipt by request id", keeps_a_receipt),
    Check("native", "a batch", answers_a_batch),
    Check("native", "own usage", counts_usage),
    Check("native", "401 for a wrong key", refuses_a_wrong_key),
    Check("native", "400 or 422 for a wrong body", refuses_a_wrong_body),
    Check("native", "404 for an unknown model", refuses_an_unknown_model),
]

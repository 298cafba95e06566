"""llama.cpp's dialect: its server's own endpoints."""

from __future__ import annotations

from typing import Any

from inference.conformance.target import Check, Skipped, Target, expect, good, refused

BODY: dict[str, Any] = {"prompt": "The capital of France is", "n_predict": 8, "temperature": 0}


def health(target: Target) -> None:
    expect(good(target.get("/health")).get("status") == "ok", "no status ok")


def props(target: Target) -> None:
    found = good(target.get("/props"))
    expect(found.get("total_slots") and "default_generation_settings" in found, list(found))


def tokenizes(target: Target) -> None:
    tokens = good(target.post("/tokenize", {"content": "Hello world"}))["tokens"]
    expect(tokens and all(isinstance(token, int) for token in tokens), tokens)
    text = good(target.post("/detokenize", {"tokens": tokens}))["content"]
    expect(text.strip() == "Hello world", text)


def completes(target: Target) -> None:
    found = good(target.post("/completion", BODY))
    expect(isinstance(found["content"], str) and found["stop"] is True, found)
    expect(found["tokens_predicted"] <= 8 and found["tokens_evaluated"] > 0 and "timings" in found, found)


def streams(target: Target) -> None:
    chunks = target.post("/completion", {**BODY, "stream": True}).objects()
    expect(chunks and chunks[-1]["stop"] is True and not any(chunk["stop"] for chunk in chunks[:-1]), chunks[-1:])


def says_the_same_twice(target: Target) -> None:
    first, second = (good(target.post("/completion", {**BODY, "temperature": 1, "seed": 3}))["content"] for _ in "12")
    expect(first == second, f"{first!r} and {second!r} with one seed")


def follows_a_grammar(target: Target) -> None:
    found = good(target.post("/completion", {**BODY, "grammar": 'root ::= "yes" | "no"'}))["content"]
    expect(found in ("yes", "no"), found)


def reports_probabilities(target: Target) -> None:
    found = good(target.post("/completion", {**BODY, "n_predict": 2, "n_probs": 3}))
    expect(len(found["completion_probabilities"][0]["top_logprobs"]) == 3, list(found))


def shows_a_template(target: Target) -> None:
    answer = target.post("/apply-template", {"messages": [{"role": "user", "content": "Hello world"}]})
    if answer.status == 400:
        raise Skipped("the model has no chat template")
    expect("Hello world" in good(answer)["prompt"], "what was said is not in the prompt")


def refuses_a_wrong_body(target: Target) -> None:
    error = refused(target.post("/completion", {**BODY, "n_predict": "many"}), 400)["error"]
    expect(error.get("code") == 400 and error.get("message") and error.get("type"), error)


def refuses_a_wrong_key(target: Target) -> None:
    expect(refused(target.post("/completion", BODY, key="llms_wrong_key"), 401)["error"].get("message"), "no message")


CHECKS = [
    Check("llama.cpp", "health", health),
    Check("llama.cpp", "props", props),
    Check("llama.cpp", "tokenize and back", tokenizes),
    Check("llama.cpp", "a completion with timings", completes),
    Check("llama.cpp", "a stream ends with stop", streams),
    Check("llama.cpp", "one seed, one answer", says_the_same_twice),
    Check("llama.cpp", "a grammar", follows_a_grammar),
    Check("llama.cpp", "probabilities", reports_probabilities),
    Check("llama.cpp", "the chat template", shows_a_template),
    Check("llama.cpp", "400 in its own shape", refuses_a_wrong_body),
    Check("llama.cpp", "401 in its own shape", refuses_a_wrong_key),
]

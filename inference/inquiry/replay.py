"""A request once more: the same tokens, or why they are not.

Prompts are stored nowhere, so the body comes from whoever asks. It goes through its own view and through admission's
questions (dry_run.py), and then through an engine of this process, with the receipt's seed: nothing is charged, no
slot of a worker is taken. The receipt's digests say whether prompt, settings and answer are the same. Blocking.
"""

from __future__ import annotations

import re
import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from django.conf import settings
from django.http import HttpRequest
from django.urls import Resolver404, resolve
from rest_framework.request import Request

from accounts.identity.key_rows import principal_of
from accounts.ledger import quotas
from accounts.trail.refusals import Refusal
from inference.api.generation import GenerationView
from inference.catalog import adapters
from inference.catalog.served import Served
from inference.digests import TokenDigest, prompt_digest, settings_digest
from inference.engine.backend import Backend
from inference.engine.lanes import run_in_lanes
from inference.engine.types import Delta, EngineError, Finished, GenerationRequest, TokenEvent
from inference.intake import dry_run, forms
from inference.intake.dry_run import Wanted
from inference.models import Receipt
from inference.transport.ticket import adapter_scales
from inference.worker.adapter_shelf import AdapterShelf
from inference.worker.hosted import load_backend

MAX_BODY_BYTES = 64 << 20
PART = re.compile(r"\.([0-9]{1,4})\Z")
TIMEOUT_SECONDS = 3600.0


class ReplayError(Exception):
    """It cannot be replayed; `code` is stable, the message says why."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What came of it. verdict: same, differs or unknown; `code` and `reason` say why where it is not the same."""

    request_id: str
    model: str
    route: str
    seed: int | None
    verdict: str
    code: str = ""
    reason: str = ""
    finish_reason: str
    completion_tokens: int
    text: str


def replay(
    receipt: Receipt,
    body: bytes,
    *,
    load: Callable[[Served], Backend] = load_backend,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> Replayed:
    """Compute it again. Raises ReplayError, before anything is computed where that can be known."""
    _refuse_uncomputed(receipt)
    asked = _as_answered(receipt, _rehearse(receipt, body))
    if asked.order.embedding is not None:
        raise ReplayError("route_not_replayed", "Vectors are not replayed: no receipt keeps a digest of them.")
    _refuse_other_file(receipt, asked.served)
    _refuse(receipt, _other_prompt(receipt, asked))
    asked = _with_shift_of_then(receipt, _as_bounded(receipt, asked))
    _refuse(receipt, _other_settings(receipt, asked))
    answer = _generate(receipt, asked, load, timeout_seconds)
    verdict, code, reason = _judge(receipt, asked, answer)
    return Replayed(
        request_id=receipt.request_id,
        model=receipt.model,
        route=receipt.route,
        seed=receipt.seed,
        verdict=verdict,
        code=code,
        reason=reason,
        finish_reason=answer.finished.reason.value,
        completion_tokens=answer.finished.receipt.completion_tokens,
        text=answer.text,
    )


def _refuse_uncomputed(receipt: Receipt) -> None:
    if receipt.cached:
        raise ReplayError(
            "answered_from_cache", "It was answered from the completion cache: an earlier request computed its tokens."
        )
    if receipt.num_steps == 0:
        why = receipt.error_code or receipt.finish_reason
        raise ReplayError("nothing_computed", f"Nothing was computed for it ({why}): there are no tokens to compare.")


# From the body to what the engine gets


def _rehearse(receipt: Receipt, body: bytes) -> Wanted:
    part = PART.search(receipt.request_id)
    try:
        view = _view_of(receipt, body)
        with dry_run.asking(for_replay=True):
            view.post(view.request)  # type: ignore[attr-defined]
    except dry_run.Found as found:
        number = int(part[1]) if part else 0
        return found.wanted[number] if number < len(found.wanted) else found.wanted[0]
    except Refusal as refusal:
        raise ReplayError(refusal.code, f"This body is refused today: {refusal.message}") from refusal
    except ValueError as error:  # pydantic's ValidationError is one
        raise ReplayError("body_invalid", f"This is no body of {receipt.route}: {error}") from error
    raise ReplayError("route_not_replayed", f"{receipt.route} generates nothing that could be replayed.")


def _view_of(receipt: Receipt, body: bytes) -> GenerationView:
    try:
        kind = getattr(resolve(receipt.route).func, "view_class", None)
    except Resolver404:
        kind = None
    if kind is None or not issubclass(kind, GenerationView):
        raise ReplayError("route_not_replayed", f"This version has no {receipt.route} that generates.")
    request = HttpRequest()
    request.method, request.path, request._body = "POST", receipt.route, body
    view: GenerationView = kind()
    view.http_request, view.request = request, Request(request)
    view.request_id, view.log_fields, view.principal = uuid.uuid4().hex, {}, principal_of(receipt.key)
    return view


def _as_answered(receipt: Receipt, asked: Wanted) -> Wanted:
    """With the versions that answered then, where the body names the same aliases and those files are still there."""
    if not receipt.aliases or {name for name, _ in receipt.aliases} != {name for name, _ in asked.choice.aliases}:
        return asked
    digests = {file.name: file.digest for file in adapters.files_of(asked.served)}
    if any(name not in digests for name, _ in receipt.adapters):
        return asked
    pairs = sorted((digests[name], float(scale), name) for name, scale in receipt.adapters)
    vector = tuple((digest, scale) for digest, scale, _ in pairs)
    return replace(asked, choice=replace(asked.choice, vector=vector, names=tuple(name for _, _, name in pairs)))


# Is it the same?


def _refuse_other_file(receipt: Receipt, served: Served) -> None:
    if served.name != receipt.model:
        raise ReplayError(
            "other_model", f"The body means the model {served.name!r}; the receipt is of {receipt.model!r}."
        )
    if served.digest != receipt.model_digest:
        raise ReplayError(
            "model_changed",
            f"The model is another file now: {served.digest[:12]}… in the place of {receipt.model_digest[:12]}….",
        )


def _refuse(receipt: Receipt, why: tuple[str, str] | None) -> None:
    """why: (code, sentence) of what differs before anything is computed. Without digests nothing is known to."""
    if why and receipt.digests:
        raise ReplayError(*why)


def _other_prompt(receipt: Receipt, asked: Wanted) -> tuple[str, str] | None:
    if len(asked.prompt) != receipt.prompt_tokens:
        sentence = f"The prompt has {len(asked.prompt)} tokens, the request had {receipt.prompt_tokens}: "
        return "prompt_differs", sentence + "another body, or another chat template."
    if _secret_of(receipt, asked) is None:
        return (
            "prompt_differs",
            "The prompt has other tokens than the request had: another body, another chat template, or SECRET_KEY was "
            "changed and SECRET_KEY_FALLBACKS does not have the one of then.",
        )
    return None


def _as_bounded(receipt: Receipt, asked: Wanted) -> Wanted:
    """With the output bound of then, which quota, plan and context decided, and the grammar that is fitted to it."""
    bound = _bound_of_then(receipt, asked)
    max_tokens = asked.max_tokens if bound is None else bound
    try:
        order = forms.fitted(asked.order, asked.served, asked.prompt, max_tokens)
    except Refusal as refusal:
        raise ReplayError("settings_differ", f"No forced answer is as short today: {refusal.message}") from refusal
    return replace(asked, order=order, max_tokens=max_tokens)


def _bound_of_then(receipt: Receipt, asked: Wanted) -> int | None:
    """Output tokens that were held for it, beside its prompt where it paid for one; None where the ledger is purged."""
    held = quotas.held_for(receipt.request_id)
    if held is None:
        return None
    if receipt.charged_tokens:
        return held - (receipt.charged_tokens - receipt.completion_tokens)
    return held if asked.order.shares_prompt else held - receipt.prompt_tokens


def _with_shift_of_then(receipt: Receipt, asked: Wanted) -> Wanted:
    """A plan with a smaller context than the model's shifts none, and may have been another: the digest says it."""
    decoding = asked.order.decoding
    flipped = replace(decoding, context_shift=not decoding.context_shift)
    other = replace(asked, order=replace(asked.order, decoding=flipped))
    return other if not _has_its_settings(receipt, asked) and _has_its_settings(receipt, other) else asked


def _has_its_settings(receipt: Receipt, asked: Wanted) -> bool:
    secret, order, vector = _secret_of(receipt, asked), asked.order, asked.choice.vector
    if secret is None:
        return False
    found = settings_digest(secret, receipt.request_id, order.sampling, order.decoding, order.stop, vector)
    return bool(receipt.digests.get("settings") == found)


def _other_settings(receipt: Receipt, asked: Wanted) -> tuple[str, str] | None:
    now = _scales(asked)
    if sorted(map(list, receipt.adapters)) != sorted(now):
        return "adapters_differ", f"The request had the adapters {receipt.adapters}; this body means {now} today."
    if _has_its_settings(receipt, asked):
        return None
    if asked.order.form is not None and _bound_of_then(receipt, asked) is None:
        return (
            "settings_differ",
            "The answer's form is fitted to the tokens that it may have, and the ledger no longer knows how many they "
            f"were: today's {asked.max_tokens} give other settings.",
        )
    return (
        "settings_differ",
        "Sampling, stop words, the answer's form, or an adapter's file are not those of the request.",
    )


def secrets() -> list[str]:
    """The secret key of now, then those of before."""
    return [settings.SECRET_KEY, *settings.SECRET_KEY_FALLBACKS]


def _secret_of(receipt: Receipt, asked: Wanted) -> str | None:
    """The one that the receipt's digests were made with, told by its prompt; None where the prompt is another."""
    wanted = receipt.digests.get("prompt")
    return next((each for each in secrets() if prompt_digest(each, receipt.request_id, asked.prompt) == wanted), None)


def _scales(asked: Wanted) -> list[list[Any]]:
    return adapter_scales(asked.choice.names, asked.choice.vector)


def _judge(receipt: Receipt, asked: Wanted, answer: _Answer) -> tuple[str, str, str]:
    if not receipt.digests:
        return "unknown", "no_digests", "The receipt is of a version that kept no digests: nothing to compare with."
    if receipt.digests.get("answer") in answer.digests:
        return "same", "", ""
    if receipt.status != Receipt.Status.COMPLETED:
        reason = f"The request ended early ({receipt.finish_reason}); up to there these are other tokens."
    elif asked.served.n_gpu_layers:
        reason = "Other tokens: a GPU adds in another order from batch to batch, and close choices fall differently."
    else:
        reason = (
            "Other tokens, though prompt, settings, seed and files are the same: another build of llama.cpp, another "
            "processor, or another context size or cache type of the model since then."
        )
    return "differs", "tokens_differ", reason


# Computing it


@dataclass(slots=True)
class _Answer:
    digests: list[str]
    """By each of `secrets()`."""
    text: str
    finished: Finished


class _Listener:
    """The engine's events; `done` is set after the last."""

    def __init__(self, request_id: str) -> None:
        self.digests = [TokenDigest(each, request_id, "answer") for each in secrets()]
        self.texts: list[str] = []
        self.finished: Finished | None = None
        self.crash: BaseException | None = None
        self.done = threading.Event()

    def take(self, events: Sequence[TokenEvent]) -> None:
        for event in events:
            if isinstance(event, Delta):
                for digest in self.digests:
                    digest.update(event.tokens)
                self.texts.append(event.text)
            elif isinstance(event, Finished):
                self.finished = event
                self.done.set()

    def crashed(self, error: BaseException) -> None:
        self.crash = error
        self.done.set()


def _generate(receipt: Receipt, asked: Wanted, load: Callable[[Served], Backend], timeout_seconds: float) -> _Answer:
    heard = _Listener(receipt.request_id)
    request = GenerationRequest(
        request_id=receipt.request_id,
        prompt=asked.prompt,
        max_tokens=_bound(receipt, asked),
        sampling=replace(asked.order.sampling, seed=receipt.seed),
        decoding=replace(asked.order.decoding, slot_id=None, speculation=None, max_decode_seconds=None),
        stop=asked.order.stop,
        adapters=asked.choice.vector,
    )
    try:
        runner = run_in_lanes(load(asked.served), 1, sink=heard.take, on_crash=heard.crashed)
        runner.start()
        try:
            AdapterShelf(lambda: adapters.files_of(asked.served)).submit(runner, request)
            if not heard.done.wait(timeout_seconds):
                raise ReplayError("timeout", f"It was not done after {timeout_seconds:.0f} s.")
        finally:
            runner.stop()
    except EngineError as error:
        raise ReplayError(error.code, f"It could not be computed here: {error}") from error
    if heard.finished is None:
        raise ReplayError("engine_crashed", f"The engine crashed: {heard.crash!r}")
    return _Answer([each.hexdigest() for each in heard.digests], "".join(heard.texts), heard.finished)


def _bound(receipt: Receipt, asked: Wanted) -> int:
    """What ended by itself ends again; what a limit, a cancel or a clock ended is as long as it was."""
    ended_itself = receipt.finish_reason in ("eos", "stop")
    return asked.max_tokens if ended_itself else receipt.completion_tokens

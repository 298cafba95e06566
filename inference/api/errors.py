"""From whatever went wrong to one Refusal, and from a Refusal's code to an HTTP status: the only such table.

A dialect is an ErrorShape: it words the body and may move a few statuses; codes stay the same in all of them. Called at
the end of every view of the API (async_view.py, and DRF's EXCEPTION_HANDLER for the operator's).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import orjson
import pydantic
import structlog
from django.core.exceptions import PermissionDenied, SuspiciousOperation
from django.core.exceptions import ValidationError as ModelValidationError
from django.db import DatabaseError, DataError, InterfaceError, OperationalError
from django.db.models.deletion import ProtectedError
from django.http import Http404, HttpRequest, HttpResponse
from django.views import defaults
from kombu.exceptions import OperationalError as BrokerError
from redis import exceptions as redis_errors
from rest_framework import exceptions as drf
from rest_framework.response import Response

from accounts.trail.refusals import Refusal
from inference.api.headers import request_id_of

log = structlog.get_logger("llmsite.errors")

STATUS: dict[str, int] = {
    "invalid_json": 400,
    "bad_request": 400,
    "context_length_exceeded": 400,
    "empty_prompt": 400,
    "capability_not_supported": 400,
    "prompt_not_tokenizable": 400,
    "tokenizer_failed": 400,
    "invalid_token": 400,
    "chat_template_refused": 400,
    "chat_template_failed": 400,
    "invalid_grammar": 400,
    "invalid_schema": 400,
    "grammar_dead_end": 400,
    "previous_response_not_found": 400,
    "missing_api_key": 401,
    "invalid_api_key": 401,
    "expired_api_key": 401,
    "key_revoked": 401,
    "quota_exhausted": 402,
    "forbidden": 403,
    "tenant_suspended": 403,
    "file_limit_exceeded": 403,
    "not_found": 404,
    "model_not_found": 404,
    "adapter_not_found": 404,
    "file_not_found": 404,
    "batch_not_found": 404,
    "model_withdrawn": 404,
    "adapter_withdrawn": 404,
    "method_not_allowed": 405,
    "not_acceptable": 406,
    "request_timeout": 408,
    "client_too_slow": 408,
    "conflict": 409,
    "request_cancelled": 409,
    "idempotency_key_conflict": 409,
    "idempotent_answer_lost": 409,
    "events_not_kept": 410,
    "request_too_large": 413,
    "unsupported_media_type": 415,
    "validation_error": 422,
    "rate_limit_exceeded": 429,
    "too_many_concurrent_requests": 429,
    "too_many_concurrent_streams": 429,
    "quota_reserved": 429,
    "batch_limit_exceeded": 429,
    "internal_error": 500,
    "generation_failed": 500,
    "capability_disabled": 501,
    "queue_full": 503,
    "queue_timeout": 503,
    "service_unavailable": 503,
    "llm_not_loaded": 503,
    "llm_unavailable": 503,
    "model_does_not_fit": 503,
    "no_model": 503,
    "worker_lost": 503,
    "generation_timeout": 504,
}
"""Every code that any room may refuse with; a test holds it against the source."""

NEVER_RETRY = frozenset(
    {
        "quota_exhausted",
        "request_cancelled",
        "conflict",
        "idempotency_key_conflict",
        "idempotent_answer_lost",
        "capability_disabled",
        "model_does_not_fit",
    }
)
"""Clients that retry 409 and 429 by themselves are told not to; nor where a limit never frees."""

OUTAGES = (
    OperationalError,
    InterfaceError,
    BrokerError,
    redis_errors.ConnectionError,
    redis_errors.TimeoutError,
    redis_errors.ReadOnlyError,
    redis_errors.OutOfMemoryError,
    redis_errors.ClusterDownError,
)
"""A dependency that does not answer, is locked or is full. It passes: 503, never 500."""

JSON_TYPE = "application/json"
CONSOLE_PREFIXES = ("/admin/", "/static/", "/docs/")


class ErrorShape(Protocol):
    """How one dialect words a refusal."""

    def status(self, code: str) -> int: ...

    def body(self, refusal: Refusal, request_id: str) -> bytes: ...


class NativeErrors:
    """Flat: {"code", "message", "extra"?, "request_id"}."""

    def status(self, code: str) -> int:
        return STATUS.get(code, 500)

    def body(self, refusal: Refusal, request_id: str) -> bytes:
        content: dict[str, Any] = {"code": refusal.code, "message": refusal.message, "request_id": request_id}
        extra = {name: value for name, value in refusal.extra.items() if not name.startswith("_")}
        if refusal.retry_after is not None:
            extra.setdefault("retry_after", whole_seconds(refusal.retry_after))
        if extra:
            content["extra"] = extra
        return orjson.dumps(content, default=str)


class LlamaErrors:
    """llama.cpp's: {"error": {"code", "message", "type"}}, where the code is the HTTP status."""

    TYPES: Mapping[int, str] = {
        401: "authentication_error",
        402: "billing_error",
        403: "permission_error",
        404: "not_found_error",
        429: "rate_limit_error",
        501: "not_supported_error",
        503: "unavailable_error",
    }
    BAD_REQUESTS = frozenset({"validation_error", "adapter_not_found"})
    WORDS: Mapping[str, str] = {
        "list_type": "Value must be an array",
        "missing": "Value is missing",
        "extra_forbidden": "Not supported",
    }

    def status(self, code: str) -> int:
        return 400 if code in self.BAD_REQUESTS else STATUS.get(code, 500)

    def body(self, refusal: Refusal, request_id: str) -> bytes:
        return orjson.dumps({"error": self.error(refusal)}, default=str)

    def error(self, refusal: Refusal) -> dict[str, Any]:
        status = self.status(refusal.code)
        kind = self.TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        content: dict[str, Any] = {"code": status, "message": self._message(refusal, status), "type": kind}
        if refusal.code == "context_length_exceeded":
            content["type"] = "exceed_context_size_error"
            content.update(
                {name: refusal.extra[name] for name in ("n_prompt_tokens", "n_ctx") if name in refusal.extra}
            )
        return content

    def _message(self, refusal: Refusal, status: int) -> str:
        if status == 401:
            return "Invalid API Key"
        fields = refusal.extra.get("fields")
        if refusal.code != "validation_error" or not fields:
            return refusal.message
        first = fields[0]
        if first["field"] == "body" and first["type"] == "list_type":
            return "Request body must be an array"
        place = path_of(first["loc"]) or first["field"]
        return f"Field '{place}': {self.WORDS.get(first['type'], first['message'])}"


class OpenAIErrors:
    """OpenAI's: {"error": {"message", "type", "param", "code"}}. prompt: the field of what is said to a model."""

    BAD_REQUESTS = frozenset({"validation_error"})
    CODES: Mapping[str, str | None] = {
        "quota_exhausted": "insufficient_quota",
        "queue_full": "server_is_overloaded",
        "queue_timeout": "server_is_overloaded",
        "llm_not_loaded": "model_loading",
        "internal_error": None,
    }
    """Where its clients know another word."""
    PARAMS: Mapping[str, str] = {"model_not_found": "model", "adapter_not_found": "adapters"}
    OF_THE_PROMPT = frozenset(
        {
            "context_length_exceeded",
            "empty_prompt",
            "prompt_not_tokenizable",
            "tokenizer_failed",
            "invalid_token",
            "chat_template_refused",
            "chat_template_failed",
        }
    )

    def __init__(self, prompt: str | None = None) -> None:
        self._prompt = prompt

    def status(self, code: str) -> int:
        if code in self.BAD_REQUESTS:
            return 400
        return 429 if code == "quota_exhausted" else STATUS.get(code, 500)  # its clients know no 402

    def body(self, refusal: Refusal, request_id: str) -> bytes:
        return orjson.dumps({"error": self.error(refusal)}, default=str)

    def error(self, refusal: Refusal) -> dict[str, Any]:
        return {
            "message": self._message(refusal),
            "type": self._type(refusal),
            "param": self._param(refusal),
            "code": self._code(refusal),
        }

    def _code(self, refusal: Refusal) -> str | None:
        if refusal.code != "validation_error":
            return self.CODES.get(refusal.code, refusal.code)
        kind = str((refusal.extra.get("fields") or [{}])[0].get("type", ""))
        if kind == "missing":
            return "missing_required_parameter"
        return "invalid_type" if kind.endswith("_type") else "invalid_value"

    def _type(self, refusal: Refusal) -> str:
        status = self.status(refusal.code)
        if refusal.code == "quota_exhausted":
            return "insufficient_quota"
        if status == 429:
            return "tokens" if "token" in str(refusal.extra.get("limit", "")) else "requests"
        if status >= 500:
            return "server_error"
        return "permission_error" if status == 403 else "invalid_request_error"

    def _param(self, refusal: Refusal) -> str | None:
        if fields := refusal.extra.get("fields"):
            return path_of(fields[0]["loc"])
        named = refusal.extra.get("field") or self.PARAMS.get(refusal.code)
        return named or (self._prompt if refusal.code in self.OF_THE_PROMPT else None)

    def _message(self, refusal: Refusal) -> str:
        facts = refusal.extra
        match refusal.code:
            case "invalid_api_key":
                return "Incorrect API key provided."
            case "model_not_found" if "model" in facts:
                return f"The model `{facts['model']}` does not exist or you do not have access to it."
            case "quota_exhausted":
                return f"You exceeded your current quota, please check your plan and billing details. {refusal.message}"
            case "context_length_exceeded" if "n_ctx" in facts:
                return (
                    f"This model's maximum context length is {facts['n_ctx']} tokens. However, your "
                    f"{self._prompt or 'prompt'} resulted in {facts['n_prompt_tokens']} tokens."
                )
            case "rate_limit_exceeded" if refusal.retry_after is not None:
                return _rate_message(facts, whole_seconds(refusal.retry_after)) or refusal.message
            case "validation_error" if facts.get("fields"):
                place = path_of(facts["fields"][0]["loc"])
                return f"Invalid '{place}': {facts['fields'][0]['message']}." if place else refusal.message
        return refusal.message


def _rate_message(facts: Mapping[str, Any], seconds: int) -> str | None:
    """In the words that clients look for."""
    limit = facts.get("value")
    match facts.get("limit"):
        case "requests_per_minute":
            what, used, needed = "requests per min (RPM)", limit, 1
        case "tokens_per_minute":
            what, used, needed = "tokens per min (TPM)", facts["value"] - facts["available"], facts["needed"]
        case _:
            return None
    return (
        f"Rate limit reached on {what}: Limit {limit}, Used {used}, Requested {needed}. Please try again in {seconds}s."
    )


FIELD_NAME = re.compile(r"[a-z][a-z0-9_.]*")
FORMS = frozenset({"str", "int", "float", "bool", "pairs", "by_id"})
KINDS = {
    "messages": frozenset({"system", "developer", "user", "assistant", "tool"}),
    "input": frozenset({"message", "function_call", "function_call_output", "reasoning", "item_reference"}),
}
"""By which the form of an entry is chosen: a message's role, an item's type."""


def path_of(loc: Sequence[str]) -> str | None:
    """The field of the body as its sender knows it: messages[0].content, and no names of forms it could have had."""
    path = ""
    for place, part in enumerate(loc):
        if part.isdigit() and path:
            path += f"[{part}]"
        elif place == 2 and part in KINDS.get(loc[0], ()):
            continue
        elif part in FORMS or not FIELD_NAME.fullmatch(part):
            break
        else:
            path += f".{part}" if path else part
    return path or None


class AnthropicErrors:
    """Anthropic's: {"type": "error", "error": {"type", "message", "details"}, "request_id"}. The code is in
    details, where its clients look for a stable one."""

    STATUSES: Mapping[str, int] = {"validation_error": 400, "queue_full": 529, "queue_timeout": 529}
    TYPES: Mapping[int, str] = {
        401: "authentication_error",
        402: "billing_error",
        403: "permission_error",
        404: "not_found_error",
        409: "conflict_error",
        413: "request_too_large",
        429: "rate_limit_error",
        504: "timeout_error",
        529: "overloaded_error",
    }

    def status(self, code: str) -> int:
        return self.STATUSES.get(code) or STATUS.get(code, 500)

    def body(self, refusal: Refusal, request_id: str) -> bytes:
        return orjson.dumps(self.content(refusal, request_id), default=str)

    def content(self, refusal: Refusal, request_id: str) -> dict[str, Any]:
        status = self.status(refusal.code)
        kind = self.TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
        error = {"type": kind, "message": self._message(refusal), "details": {"error_code": refusal.code}}
        return {"type": "error", "error": error, "request_id": request_id}

    def _message(self, refusal: Refusal) -> str:
        facts = refusal.extra
        match refusal.code:
            case "invalid_api_key":
                return "invalid x-api-key"
            case "model_not_found" if "model" in facts:
                return f"model: {facts['model']}"
            case "context_length_exceeded" if "n_ctx" in facts:
                return f"prompt is too long: {facts['n_prompt_tokens']} tokens > {facts['n_ctx'] - 1} maximum"
            case "validation_error" if facts.get("fields"):
                first = facts["fields"][0]
                place = dotted(first["loc"])
                return f"{place}: {first['message']}" if place else refusal.message
        return refusal.message


def dotted(loc: Sequence[str]) -> str:
    """The field of the body as Anthropic writes it: messages.0.content. Names of forms stand in parentheses."""
    return ".".join(part for part in loc if not part.startswith("("))


class EveryErrors:
    """For what several dialects have in common: the native shape, and OpenAI's `error` in it."""

    def status(self, code: str) -> int:
        return OPENAI.status(code)

    def body(self, refusal: Refusal, request_id: str) -> bytes:
        native: dict[str, Any] = orjson.loads(NATIVE.body(refusal, request_id))
        return orjson.dumps({**native, "error": OPENAI.error(refusal)}, default=str)


NATIVE = NativeErrors()
LLAMA = LlamaErrors()
OPENAI = OpenAIErrors()
OPENAI_CHAT, OPENAI_COMPLETIONS = OpenAIErrors("messages"), OpenAIErrors("prompt")
OPENAI_RESPONSES = OpenAIErrors("input")
OPENAI_EMBEDDINGS = OpenAIErrors("input")
ANTHROPIC = AnthropicErrors()
EVERY = EveryErrors()


def whole_seconds(seconds: float) -> int:
    """For Retry-After: rounded up, at least 1."""
    return max(1, math.ceil(seconds))


def refusal_headers(refusal: Refusal, status: int) -> dict[str, str]:
    headers: dict[str, str] = {}
    if refusal.retry_after is not None:
        headers["Retry-After"] = str(whole_seconds(refusal.retry_after))
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if refusal.code in NEVER_RETRY or (status == 429 and refusal.retry_after is None):
        headers["x-should-retry"] = "false"
    return headers


def error_response(shape: ErrorShape, refusal: Refusal, request_id: str) -> HttpResponse:
    status = shape.status(refusal.code)
    return HttpResponse(
        shape.body(refusal, request_id),
        status=status,
        content_type=JSON_TYPE,
        headers=refusal_headers(refusal, status),
    )


def to_refusal(error: Exception, *, method: str, path: str, stage: str = "request") -> Refusal:
    """What to tell the client about any exception. One that nobody foresaw is logged and told as internal_error."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, pydantic.ValidationError):
        return body_refusal(error)
    if isinstance(error, OUTAGES) or _is_locked(error):
        log.warning("a dependency does not answer", error_type=type(error).__name__, path=path)
        return Refusal("service_unavailable", "The service is busy or restarting; try again.", retry_after=2)
    if isinstance(error, DataError):  # its words may repeat the value, so they are not logged
        log.warning("the database takes no such value", error_type=type(error.__cause__).__name__, path=path)
        return Refusal("bad_request", "The request holds a value that cannot be stored.")
    known = _from_framework(error, method)
    if known is not None:
        return known
    log.error("unexpected error", exc_info=error, path=path, method=method, stage=stage)
    return Refusal(
        "internal_error",
        "The server had an error while processing the request.",
        stage=stage,
        path=path,
        method=method,
        exc_type=type(error).__name__,
    )


def _is_locked(error: Exception) -> bool:
    return isinstance(error, DatabaseError) and "locked" in str(error)


def _from_framework(error: Exception, method: str) -> Refusal | None:
    match error:
        case Http404() | drf.NotFound():
            return Refusal("not_found", "There is nothing here.")
        case drf.ParseError():
            return Refusal("invalid_json", "The request body is not valid JSON.")
        case drf.ValidationError():
            return validation_refusal(_drf_fields(error.detail))
        case ModelValidationError():
            return validation_refusal(_model_fields(error))
        case drf.MethodNotAllowed():
            return Refusal("method_not_allowed", f"{method} is not allowed here.")
        case drf.UnsupportedMediaType():
            return Refusal("unsupported_media_type", "Send the body as application/json.")
        case drf.NotAcceptable():
            return Refusal("not_acceptable", "The answer is application/json.")
        case drf.NotAuthenticated() | drf.AuthenticationFailed():
            return Refusal("missing_api_key", "Send an API key in X-API-Key or Authorization: Bearer.")
        case drf.PermissionDenied() | PermissionDenied():
            return Refusal("forbidden", "This key may not do that.")
        case ProtectedError():
            return Refusal("conflict", "Other rows refer to this one: it cannot be deleted.")
        case SuspiciousOperation():
            return Refusal("bad_request", "The request cannot be read.")
    return None


# Validation


def body_refusal(error: pydantic.ValidationError) -> Refusal:
    """invalid_json for text that is no JSON, validation_error for JSON of the wrong shape. Never repeats the input."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    if found and found[0]["type"] == "json_invalid":
        return Refusal("invalid_json", "The request body is not valid JSON.")
    return validation_refusal([field_error(item["loc"], item["msg"], item["type"]) for item in found[:32]])


def field_error(loc: tuple[int | str, ...], message: str, kind: str) -> dict[str, Any]:
    name = ".".join(str(part) for part in loc)[:200] or "body"
    return {"field": name, "loc": [str(part)[:100] for part in loc[:8]], "message": message[:500], "type": kind}


def validation_refusal(fields: list[dict[str, Any]]) -> Refusal:
    first = f"{fields[0]['field']}: {fields[0]['message']}" if fields else "the body is not as documented"
    return Refusal("validation_error", f"The request is not valid: {first}", stage="request_validation", fields=fields)


def wrong_field(field: str, message: str) -> Refusal:
    """For what fields say together: the validators of a whole form cannot name one of them."""
    return validation_refusal([field_error((field,), message, "value_error")])


def _drf_fields(detail: Any, loc: tuple[str | int, ...] = ()) -> list[dict[str, Any]]:
    if isinstance(detail, Mapping):
        return [item for name, value in detail.items() for item in _drf_fields(value, (*loc, str(name)))]
    if isinstance(detail, list):
        return [item for value in detail for item in _drf_fields(value, loc)]
    return [field_error(loc, str(detail), str(getattr(detail, "code", "invalid")))]


def _model_fields(error: ModelValidationError) -> list[dict[str, Any]]:
    if hasattr(error, "error_dict"):
        return [field_error((name,), text, "invalid") for name, texts in error.message_dict.items() for text in texts]
    return [field_error((), text, "invalid") for text in error.messages]


# DRF's border


def exception_handler(error: Exception, context: Mapping[str, Any]) -> Response:
    """DRF's EXCEPTION_HANDLER: the operator's views. The view adds the headers that every answer has."""
    request = context["request"]._request
    refusal = to_refusal(error, method=request.method, path=request.path, stage="operator")
    status = NATIVE.status(refusal.code)
    body = orjson.loads(NATIVE.body(refusal, request_id_of(request)))
    request.refusal = refusal
    return Response(body, status=status, headers=refusal_headers(refusal, status))


# Django's border: paths that no view of the API has


def bad_request(request: HttpRequest, exception: Exception) -> HttpResponse:
    """handler400."""
    return _plain_or_json(request, exception, defaults.bad_request)


def permission_denied(request: HttpRequest, exception: Exception) -> HttpResponse:
    """handler403."""
    return _plain_or_json(request, exception, defaults.permission_denied)


def not_found(request: HttpRequest, exception: Exception) -> HttpResponse:
    """handler404."""
    return _plain_or_json(request, Http404(), defaults.page_not_found)


def server_error(request: HttpRequest) -> HttpResponse:
    """handler500. Django has logged the exception by now."""
    if is_console(request.path):
        return defaults.server_error(request)
    refusal = Refusal("internal_error", "The server had an error while processing the request.", path=request.path)
    return error_response(_shape_of(request.path), refusal, request_id_of(request))


def _shape_of(path: str) -> ErrorShape:
    """Of an address that no view has: whose clients would ask for it?"""
    return ANTHROPIC if path.startswith("/v1/messages") else NATIVE if path.startswith("/v1/admin") else EVERY


def _plain_or_json(
    request: HttpRequest, exception: Exception, page: Callable[[HttpRequest, Exception], HttpResponse]
) -> HttpResponse:
    """A page for people in the console, JSON for programs."""
    if is_console(request.path):
        return page(request, exception)
    refusal = to_refusal(exception, method=request.method or "", path=request.path)
    return error_response(_shape_of(request.path), refusal, request_id_of(request))


def is_console(path: str) -> bool:
    return path.startswith(CONSOLE_PREFIXES)

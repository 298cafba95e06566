"""Tokenizer children of the web process: started on demand, killed when they hang, replaced when they die.

A child holds the vocabulary of one model and renders its chat template (python -m inference.chat.child). Neither a
hostile vocabulary nor a hostile text or template can stop the process that asks. Called from admission's threads; a
call blocks for its time limit at most.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import select
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import orjson
from django.conf import settings

from accounts.trail.refusals import Refusal
from inference.chat.prompt import ChatPrompt, ChatTemplate

logger = logging.getLogger(__name__)

MAX_TEXT_CHARACTERS = 2**20
MAX_REPLY_BYTES = 32 * 2**20
START_TIMEOUT_SECONDS = 20.0
MEMORY_BYTES = 4 * 2**30
PATIENCE = 4
CHUNK = 65536
MAX_KNOWN = 1024
MAX_VOCABULARIES = 32
"""Whose children a pool keeps; then those of the one that was asked least recently are ended."""
IDLE_SECONDS = 900.0
"""After its last question a vocabulary's children are ended, at the next question of any other."""
LENGTH = struct.Struct(">I")
UNENDING = ("chat_template_failed", "The model's chat template does not come to an end on this conversation.")
FAILURES = {"encode": ("tokenizer_failed", "This text cannot be tokenized."), "chat": UNENDING, "render": UNENDING}
"""Code and message where a child died of an operation."""


class HasVocabulary(Protocol):
    """As much of catalog/served.py's Served as is needed here."""

    @property
    def digest(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def vocabulary_path(self) -> Path: ...


class ChildError(Exception):
    """The child did not answer: it hung, died, or said nonsense. It must not be used again."""


def kept_waiting(pid: int) -> float:
    """Seconds that a process was ready to run and had no processor; 0 where the system does not say (Linux does)."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_bytes().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


class TokenizerChild:
    """One child process. Used by one thread at a time."""

    def __init__(self, command: Sequence[str], *, start_timeout: float = START_TIMEOUT_SECONDS) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._stdin, False)
        os.set_blocking(self._stdout, False)
        try:
            self.info = self._exchange(b"", start_timeout)
        except ChildError:
            self.kill()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, message: dict[str, Any], timeout_seconds: float) -> dict[str, Any]:
        """The child's reply. Raises ChildError; TimeoutError where the machine was too busy to let it work."""
        body = orjson.dumps(message)
        return self._exchange(LENGTH.pack(len(body)) + body, timeout_seconds)

    def kill(self) -> None:
        """End it now. Idempotent."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _exchange(self, data: bytes, timeout_seconds: float) -> dict[str, Any]:
        """Write a frame and read one; both ends may be slow, so neither blocks.

        What it waits for a processor does not count, up to PATIENCE times its time: no text is to blame for that.
        """
        started, kept_before = time.monotonic(), kept_waiting(self.pid)
        deadline = started + timeout_seconds
        received = bytearray()
        missing = LENGTH.size
        poller = select.poll()
        poller.register(self._stdout, select.POLLIN)
        if data:
            poller.register(self._stdin, select.POLLOUT)
        view = memoryview(data)
        while len(received) < missing:
            ready = poller.poll(max(0.0, deadline - time.monotonic()) * 1000)
            if not ready:
                kept = kept_waiting(self.pid) - kept_before
                deadline = started + timeout_seconds + min(kept, PATIENCE * timeout_seconds)
                if time.monotonic() < deadline:
                    continue
                if kept > PATIENCE * timeout_seconds:
                    raise TimeoutError
                raise ChildError("it took too long")
            for descriptor, _ in ready:
                if descriptor == self._stdin:
                    view = self._write(view, poller)
                else:
                    received += self._read()
            if missing == LENGTH.size and len(received) >= LENGTH.size:
                missing += self._length(received)
        return self._parse(bytes(received[LENGTH.size :]))

    def _write(self, view: memoryview, poller: select.poll) -> memoryview:
        try:
            view = view[os.write(self._stdin, view[:CHUNK]) :]
        except BlockingIOError:
            return view
        except OSError as error:
            raise ChildError("it has died") from error
        if not view:
            poller.unregister(self._stdin)
        return view

    def _read(self) -> bytes:
        try:
            data = os.read(self._stdout, CHUNK)
        except BlockingIOError:
            return b""
        if not data:
            raise ChildError("it has died")
        return data

    @staticmethod
    def _length(received: bytearray) -> int:
        (length,) = LENGTH.unpack_from(received)
        if length > MAX_REPLY_BYTES:
            raise ChildError("its reply is too long")
        return int(length)

    @staticmethod
    def _parse(body: bytes) -> dict[str, Any]:
        try:
            reply = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise ChildError("its reply is not JSON") from error
        if not isinstance(reply, dict):
            raise ChildError("its reply is not an object")
        return reply


class _Family:
    """The children that hold one vocabulary."""

    def __init__(self, command: Sequence[str], most: int) -> None:
        self._command = command
        self._most = most
        self._changed = threading.Condition()
        self._idle: list[TokenizerChild] = []
        self._num_children = 0
        self._is_closed = False
        self.last_used = 0.0

    @contextlib.contextmanager
    def borrow(self, timeout_seconds: float) -> Iterator[TokenizerChild]:
        """A child for one question. One that raised ChildError is killed. Raises TimeoutError if all stay busy."""
        child = self._acquire(timeout_seconds)
        try:
            yield child
        except BaseException:
            child.kill()
            self._gone()
            raise
        with self._changed:
            if not self._is_closed:
                self._idle.append(child)
                self._changed.notify()
                return
        child.kill()
        self._gone()

    def _acquire(self, timeout_seconds: float) -> TokenizerChild:
        with self._changed:
            if not self._changed.wait_for(lambda: self._idle or self._num_children < self._most, timeout_seconds):
                raise TimeoutError
            if self._idle:
                return self._idle.pop()
            self._num_children += 1
        try:
            return TokenizerChild(self._command)
        except BaseException:
            self._gone()
            raise

    def _gone(self) -> None:
        with self._changed:
            self._num_children -= 1
            self._changed.notify()

    def close(self) -> None:
        """End the idle children; those at work end when they have answered."""
        with self._changed:
            self._is_closed = True
            children, self._idle = self._idle, []
            self._num_children -= len(children)
        for child in children:
            child.kill()


class TokenizerPool:
    """Children by vocabulary, `processes` each at most. Thread-safe."""

    def __init__(
        self,
        *,
        processes: int,
        timeout_seconds: float,
        wait_seconds: float | None = None,
        command: Sequence[str] | None = None,
    ) -> None:
        """timeout_seconds: for one question; wait_seconds: until a child is free, by default as long."""
        self._processes = processes
        self._timeout_seconds = timeout_seconds
        self._wait_seconds = timeout_seconds if wait_seconds is None else wait_seconds
        limits = ["--cpu-seconds", str(math.ceil(timeout_seconds) + 1), "--memory-bytes", str(MEMORY_BYTES)]
        self._command = command or [sys.executable, "-m", "inference.chat.child"]
        self._limits = [] if command else limits
        self._lock = threading.Lock()
        self._families: dict[str, _Family] = {}
        self._control_tokens: dict[tuple[str, tuple[str, ...]], tuple[int, ...]] = {}

    def encode(self, model: HasVocabulary, text: str, *, add_special: bool = True) -> tuple[int, ...]:
        """The tokens of a text; nothing in it becomes special. add_special: with those that the model wants around it.

        Raises Refusal: context_length_exceeded (without asking), tokenizer_failed, service_unavailable,
        llm_unavailable.
        """
        _check_length(len(text))
        return tuple(self.ask(model, {"op": "encode", "text": text, "add_special": add_special})["tokens"])

    def encode_each(
        self, model: HasVocabulary, texts: Sequence[str], *, add_special: bool = False
    ) -> list[tuple[int, ...]]:
        """The tokens of each text, in one question. Raises Refusal as `encode`."""
        _check_length(sum(map(len, texts)))
        question = {"op": "encode_each", "texts": list(texts), "add_special": add_special}
        return [tuple(each) for each in self.ask(model, question)["token_lists"]]

    def pieces(self, model: HasVocabulary, tokens: Sequence[int]) -> list[str | list[int]]:
        """The text of each token, or its bytes where they are none. Raises Refusal as `decode`."""
        return list(self.ask(model, {"op": "pieces", "tokens": list(tokens)})["pieces"])

    def chat(self, model: HasVocabulary, template: ChatTemplate, prompt: ChatPrompt) -> tuple[int, ...]:
        """The tokens of a conversation, rendered by the template. Nothing that came from outside becomes special.

        Raises Refusal as `encode`, chat_template_refused where the template does not take this conversation, and
        chat_template_failed where it breaks.
        """
        return tuple(self.ask(model, self._conversation("chat", template, prompt))["tokens"])

    def render(self, model: HasVocabulary, template: ChatTemplate, prompt: ChatPrompt) -> str:
        """The same as text. Raises Refusal as `chat`."""
        return str(self.ask(model, self._conversation("render", template, prompt))["text"])

    @staticmethod
    def _conversation(operation: str, template: ChatTemplate, prompt: ChatPrompt) -> dict[str, Any]:
        _check_length(prompt.num_characters)
        return {
            "op": operation,
            "template": template.source,
            "traits": template.facts(),
            "prompt": prompt,
            "now": time.time(),
        }

    def decode(self, model: HasVocabulary, tokens: Sequence[int], *, special: bool = False) -> str:
        """The text of tokens. Raises Refusal as `encode`, also for an id that the model does not have."""
        return str(self.ask(model, {"op": "detokenize", "tokens": list(tokens), "special": special})["text"])

    def fill_tokens(self, model: HasVocabulary) -> dict[str, int | None]:
        """The model's tokens for fill-in-the-middle: pre, suf, mid, rep, sep, and bos where a prompt begins with it."""
        return dict(self.ask(model, {"op": "fill_tokens"})["fill_tokens"])

    def control_tokens(self, model: HasVocabulary, texts: tuple[str, ...]) -> tuple[int, ...]:
        """Which of the texts are special tokens of the model, for SamplingParams.shown_tokens. Asked once a model."""
        key = (model.digest, texts)
        found = self._control_tokens.get(key)
        if found is None:
            found = tuple(self.ask(model, {"op": "control_tokens", "texts": list(texts)})["tokens"])
            with self._lock:
                if len(self._control_tokens) >= MAX_KNOWN:
                    self._control_tokens.clear()
                self._control_tokens[key] = found
        return found

    def info(self, model: HasVocabulary) -> dict[str, Any]:
        """n_vocab, bos_token, eos_token, eot_token, end_tokens, add_bos, add_eos, chat_template."""
        return self.ask(model, {"op": "info"})

    def ask(self, model: HasVocabulary, message: dict[str, Any]) -> dict[str, Any]:
        """One question, repeated once if the child died of an earlier one. Raises Refusal."""
        family = self._family(model)
        for attempt in (1, 2):
            started = time.monotonic()
            try:
                with family.borrow(self._wait_seconds) as child:
                    started = time.monotonic()
                    _check_start(child, model)
                    reply = child.ask(message, self._timeout_seconds)
                return _checked(reply)
            except TimeoutError:
                raise Refusal("service_unavailable", "All tokenizers are busy.", retry_after=1) from None
            except ChildError as error:
                logger.warning("a tokenizer of %s was ended: %s", model.name, error)
                too_slow = time.monotonic() - started >= self._timeout_seconds
                if too_slow or attempt == 2:
                    raise Refusal(*FAILURES.get(message["op"], FAILURES["encode"])) from error
        raise AssertionError("unreachable")

    def _family(self, model: HasVocabulary) -> _Family:
        with self._lock:
            family = self._families.pop(model.digest, None)
            if family is None:
                family = _Family([*self._command, str(model.vocabulary_path), *self._limits], self._processes)
            family.last_used = time.monotonic()
            self._families[model.digest] = family  # the last one
            unused = self._take_unused(family.last_used)
        for each in unused:
            each.close()
        return family

    def _take_unused(self, now: float) -> list[_Family]:
        """The first are those that were asked least recently."""
        found = []
        for digest, family in list(self._families.items()):
            if len(self._families) <= MAX_VOCABULARIES and now - family.last_used <= IDLE_SECONDS:
                break
            found.append(self._families.pop(digest))
        return found

    def close(self) -> None:
        """End the idle children; those at work end with this process, or when they have answered."""
        with self._lock:
            families, self._families = list(self._families.values()), {}
        for family in families:
            family.close()


def _check_start(child: TokenizerChild, model: HasVocabulary) -> None:
    """A child that could not load its vocabulary said so in its first frame."""
    if not child.info.get("ok"):
        logger.error("the vocabulary of %s cannot be loaded: %s", model.name, child.info.get("message"))
        raise Refusal("llm_unavailable", f"The vocabulary of {model.name!r} cannot be loaded; the operator was told.")


def _check_length(num_characters: int) -> None:
    if num_characters > MAX_TEXT_CHARACTERS:
        raise Refusal(
            "context_length_exceeded", f"The prompt has {num_characters} characters, more than any model takes here."
        )


def _checked(reply: dict[str, Any]) -> dict[str, Any]:
    if reply.get("code") == "chat_template_refused":
        raise Refusal("chat_template_refused", f"The model's chat template says: {reply.get('message')}")
    if reply.get("code") in ("chat_template_failed", "chat_template_invalid"):
        raise Refusal("chat_template_failed", f"The model's chat template failed: {reply.get('message')}")
    if not reply.get("ok"):
        raise Refusal("tokenizer_failed", str(reply.get("message", "")), reason=reply.get("code"))
    return reply


@lru_cache(maxsize=1)
def tokenizer_pool() -> TokenizerPool:
    """The pool of this process."""
    config = settings.CONFIG
    return TokenizerPool(processes=config.tokenizer_processes, timeout_seconds=config.tokenizer_timeout_seconds)


GRAMMAR_TIMEOUT_SECONDS = 0.8
"""Ten times what the largest grammar that is let through takes on a quiet machine."""
GRAMMAR_WAIT_SECONDS = 2.0
"""Eight schemas that nobody has seen before may come at once, and take their turns."""


@lru_cache(maxsize=1)
def grammar_pool() -> TokenizerPool:
    """Children that try grammars out: others than those that tokenize, whom no grammar can hold up."""
    return TokenizerPool(
        processes=settings.CONFIG.tokenizer_processes,
        timeout_seconds=GRAMMAR_TIMEOUT_SECONDS,
        wait_seconds=GRAMMAR_WAIT_SECONDS,
    )

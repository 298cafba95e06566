"""A model's tokenizer: a library over a vocabulary-only load, and the child process that keeps it out of the web.

    python -m inference.engine.tokenizer VOCAB.gguf [--cpu-seconds N] [--memory-bytes N]

The child answers requests on standard output in the order they come on standard input, each a 4-byte big-endian length
and that many bytes of JSON; its first frame says whether the file could be loaded. It ends at the end of its input,
when its parent dies, or when a request overruns its limits: a hostile tokenizer or text ends this process and no other.
The protocol is in `answer`, `serve` and `main`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import resource
import signal
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import llama_cpp as native

from inference.engine.grammar_trial import GrammarTrial
from inference.engine.types import EngineError

MAX_FRAME_BYTES = 32 * 2**20
_LENGTH = struct.Struct(">I")
_PR_SET_PDEATHSIG = 1
_LOOKS_SPECIAL = re.compile(r"<[|｜].*[|｜]>", re.DOTALL)
"""Some files say of their control tokens that users defined them, and llama.cpp finds those in any text."""


@native.llama_log_callback
def _drop_log(_level: int, _text: bytes, _user_data: object) -> None:
    """Kept at module level: llama.cpp calls it for as long as the process lives."""


class Tokenizer:
    """The vocabulary of one GGUF file. Not thread safe; made by load()."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._vocab = native.llama_model_get_vocab(model)
        self.n_vocab: int = native.llama_vocab_n_tokens(self._vocab)
        self._bos: int = native.llama_vocab_bos(self._vocab)
        self._adds_bos = bool(native.llama_vocab_get_add_bos(self._vocab)) and self._bos >= 0
        self._trial: GrammarTrial | None = None

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Load the vocabulary of a GGUF file, with or without tensors.

        Raises EngineError "model_file_missing" or "model_file_invalid". A damaged file can abort the process.
        """
        path = Path(path)
        if not path.is_file():
            raise EngineError("model_file_missing", f"there is no vocabulary file at {path}: register the model again")
        native.llama_backend_init()
        params = native.llama_model_default_params()
        params.vocab_only = True
        params.n_gpu_layers = 0
        model = native.llama_model_load_from_file(os.fsencode(path), params)
        if not model:
            raise EngineError("model_file_invalid", f"llama.cpp cannot read the vocabulary of {path}")
        return cls(model)

    def encode(self, text: str, *, add_special: bool, parse_special: bool = False) -> list[int]:
        """The tokens of a text. add_special: with the tokens the model wants around a prompt, such as BOS.

        parse_special: read "<|im_end|>" and the like as control tokens; for the operator's templates only, never for
        text that came from a user. Lone surrogates, which no UTF-8 has, become U+FFFD.
        """
        if not parse_special and self._disguised.search(text):
            return self._encode_in_pieces(text, add_special=add_special)
        return self._encode(text, add_special=add_special, parse_special=parse_special)

    def encode_segments(self, segments: Sequence[tuple[str, bool]]) -> list[int]:
        """The tokens of a prompt whose parts are (text, is it one special token?); text never becomes special.

        Begins with the one BOS that the model wants, whether the first segment is it or not. A special token that
        takes blanks beside it takes them from the text, as in llama.cpp.
        """
        tokens: list[int] = []
        for number, (text, is_special) in enumerate(segments):
            if is_special:
                tokens.append(self.special_tokens[text])
                continue
            if number and self._takes_blanks(segments[number - 1], native.LLAMA_TOKEN_ATTR_RSTRIP):
                text = text.lstrip()
            if number + 1 < len(segments) and self._takes_blanks(segments[number + 1], native.LLAMA_TOKEN_ATTR_LSTRIP):
                text = text.rstrip()
            tokens += self.encode(text, add_special=False)
        if self._adds_bos and tokens[:1] != [self._bos]:
            tokens.insert(0, self._bos)
        return tokens

    @cached_property
    def special_tokens(self) -> Mapping[str, int]:
        """Ids of the tokens that no user may write, by their text: control tokens, and those that look like it."""
        found: dict[str, int] = {}
        for token in range(self.n_vocab):
            attributes = native.llama_vocab_get_attr(self._vocab, token)
            is_control = attributes & (native.LLAMA_TOKEN_ATTR_CONTROL | native.LLAMA_TOKEN_ATTR_UNKNOWN)
            if is_control or attributes & native.LLAMA_TOKEN_ATTR_USER_DEFINED:
                text = self._text(token)
                if text and (is_control or _LOOKS_SPECIAL.fullmatch(text)):
                    found.setdefault(text, token)
        return found

    @property
    def text_of_bos(self) -> str:
        return self._text(self._bos)

    @property
    def text_of_eos(self) -> str:
        return self._text(native.llama_vocab_eos(self._vocab))

    @cached_property
    def _disguised(self) -> re.Pattern[str]:
        """Special tokens that llama.cpp would find in a user's text, too."""
        wanted = native.LLAMA_TOKEN_ATTR_USER_DEFINED
        texts = [
            text
            for text, token in self.special_tokens.items()
            if native.llama_vocab_get_attr(self._vocab, token) & wanted and len(text) > 1
        ]
        return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")

    def _encode_in_pieces(self, text: str, *, add_special: bool) -> list[int]:
        """No piece holds a whole special token."""
        tokens: list[int] = []
        done = 0
        for match in self._disguised.finditer(text):
            tokens += self._encode(text[done : match.start() + 1], add_special=add_special and done == 0)
            done = match.start() + 1
        return tokens + self._encode(text[done:], add_special=False)

    def _takes_blanks(self, segment: tuple[str, bool], side: int) -> bool:
        text, is_special = segment
        return is_special and bool(native.llama_vocab_get_attr(self._vocab, self.special_tokens[text]) & side)

    def _text(self, token: int) -> str:
        text = native.llama_vocab_get_text(self._vocab, token) if token >= 0 else None
        return text.decode("utf-8", "replace") if text else ""

    def _encode(self, text: str, *, add_special: bool, parse_special: bool = False) -> list[int]:
        data = _utf8(text)
        size = len(data) // 2 + 16  # enough for most text, where a token is some four bytes
        buffer = (native.llama_token * size)()
        count = native.llama_tokenize(self._vocab, data, len(data), buffer, size, add_special, parse_special)
        if count < 0:
            buffer = (native.llama_token * -count)()
            count = native.llama_tokenize(self._vocab, data, len(data), buffer, -count, add_special, parse_special)
        return list(buffer[:count])

    def pieces(self, tokens: Sequence[int]) -> list[str | list[int]]:
        """Each token's text, control tokens written out; its bytes where they are no text of their own.

        Raises EngineError "invalid_token" for an id outside the vocabulary.
        """
        self._check_tokens(tokens)
        return [_text_or_bytes(self._bytes_of(token)) for token in tokens]

    def _bytes_of(self, token: int) -> bytes:
        buffer = ctypes.create_string_buffer(64)
        length = native.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, True)
        if length < 0:
            buffer = ctypes.create_string_buffer(-length)
            length = native.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, True)
        return buffer.raw[:length]

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        if any(not 0 <= token < self.n_vocab for token in tokens):
            raise EngineError("invalid_token", f"token ids must be between 0 and {self.n_vocab - 1}")

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """The text of tokens; special: with control tokens written out. Bytes that are not UTF-8 become U+FFFD.

        Raises EngineError "invalid_token" for an id outside the vocabulary.
        """
        self._check_tokens(tokens)
        array = (native.llama_token * len(tokens))(*tokens)
        size = 16 * len(tokens) + 16
        buffer = ctypes.create_string_buffer(size)
        length = native.llama_detokenize(self._vocab, array, len(tokens), buffer, size, False, special)
        if length < 0:
            buffer = ctypes.create_string_buffer(-length)
            length = native.llama_detokenize(self._vocab, array, len(tokens), buffer, -length, False, special)
        return buffer.raw[:length].decode("utf-8", "replace")

    def info(self) -> dict[str, Any]:
        """What others need to know of the vocabulary. Token ids are None where the model has no such token."""
        vocab = self._vocab
        end_tokens = [token for token in range(self.n_vocab) if native.llama_vocab_is_eog(vocab, token)]
        template = native.llama_model_chat_template(self._model, None)
        return {
            "n_vocab": self.n_vocab,
            "bos_token": _token_or_none(native.llama_vocab_bos(vocab)),
            "eos_token": _token_or_none(native.llama_vocab_eos(vocab)),
            "eot_token": _token_or_none(native.llama_vocab_eot(vocab)),
            "end_tokens": end_tokens,
            "add_bos": bool(native.llama_vocab_get_add_bos(vocab)),
            "add_eos": bool(native.llama_vocab_get_add_eos(vocab)),
            "chat_template": None if template is None else template.decode("utf-8", "replace"),
        }

    def fill_tokens(self) -> dict[str, int | None]:
        """The special tokens for fill-in-the-middle, by llama.cpp's names; None where the model has no such token.

        bos: where a prompt begins with it.
        """
        vocab = self._vocab
        names = ("pre", "suf", "mid", "rep", "sep")
        found = {name: getattr(native, f"llama_vocab_fim_{name}")(vocab) for name in names}
        bos = native.llama_vocab_bos(vocab) if native.llama_vocab_get_add_bos(vocab) else -1
        return {name: _token_or_none(token) for name, token in {**found, "bos": bos}.items()}

    def control_tokens(self, texts: Sequence[str]) -> list[int]:
        """Those of the texts that are special tokens here, which are not seen in an answer's text unless shown."""
        return [self.special_tokens[text] for text in texts if text in self.special_tokens]

    def try_grammar(self, grammar: str) -> int:
        """Follow a grammar for a moment; see GrammarTrial.run."""
        if self._trial is None:
            self._trial = GrammarTrial(self._vocab)
        return self._trial.run(grammar)

    def free(self) -> None:
        """Free the vocabulary; nothing may be called afterwards."""
        native.llama_model_free(self._model)


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def _text_or_bytes(data: bytes) -> str | list[int]:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)


def _token_or_none(token: int) -> int | None:
    return None if token < 0 else token


def answer(tokenizer: Tokenizer, request: dict[str, Any]) -> dict[str, Any]:
    """One request of the protocol, by its "op"; raises EngineError, or KeyError/TypeError for a malformed one.

    encode: text, add_special (true), parse_special (false) -> tokens
    encode_segments: segments, pairs of a text and whether it is one special token -> tokens
    encode_each: texts, add_special (false) -> token_lists
    pieces: tokens -> pieces, as Tokenizer.pieces
    detokenize: tokens, special (false) -> text
    grammar: grammar -> num_tokens, of the text it was tried on
    info: -> the keys of Tokenizer.info
    fill_tokens: -> fill_tokens, as Tokenizer.fill_tokens
    control_tokens: texts -> tokens
    """
    match request["op"]:
        case "encode":
            add_special, parse_special = request.get("add_special", True), request.get("parse_special", False)
            return {"tokens": tokenizer.encode(request["text"], add_special=add_special, parse_special=parse_special)}
        case "encode_segments":
            segments = [(str(text), bool(is_special)) for text, is_special in request["segments"]]
            return {"tokens": tokenizer.encode_segments(segments)}
        case "encode_each":
            add_special = request.get("add_special", False)
            return {"token_lists": [tokenizer.encode(str(text), add_special=add_special) for text in request["texts"]]}
        case "pieces":
            return {"pieces": tokenizer.pieces(request["tokens"])}
        case "detokenize":
            return {"text": tokenizer.detokenize(request["tokens"], special=request.get("special", False))}
        case "grammar":
            return {"num_tokens": tokenizer.try_grammar(request["grammar"])}
        case "info":
            return tokenizer.info()
        case "fill_tokens":
            return {"fill_tokens": tokenizer.fill_tokens()}
        case "control_tokens":
            return {"tokens": tokenizer.control_tokens([str(text) for text in request["texts"]])}
        case unknown:
            raise EngineError("unknown_operation", f"unknown operation {unknown!r}")


Answer = Callable[[Tokenizer, dict[str, Any]], dict[str, Any]]


def serve(
    tokenizer: Tokenizer,
    requests: BinaryIO,
    replies: BinaryIO,
    *,
    before_each: Callable[[], None],
    answer: Answer = answer,
) -> None:
    """Answer until the input ends. Replies are {"ok": true, ...} or {"ok": false, "code", "message"}."""
    while (frame := read_frame(requests)) is not None:
        before_each()
        try:
            reply = {"ok": True, **answer(tokenizer, json.loads(frame))}
        except EngineError as error:
            reply = {"ok": False, "code": error.code, "message": str(error)}
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, ctypes.ArgumentError) as error:
            reply = {"ok": False, "code": "malformed_request", "message": repr(error)}
        write_frame(replies, reply)


def read_frame(stream: BinaryIO) -> bytes | None:
    """The next frame, or None where the stream ends. Raises ValueError for one that is too long."""
    header = stream.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(header)
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {length} bytes is too long")
    frame = stream.read(length)
    return frame if len(frame) == length else None


def write_frame(stream: BinaryIO, message: dict[str, Any]) -> None:
    """Write a message as one frame and flush it."""
    data = json.dumps(message, separators=(",", ":")).encode()
    stream.write(_LENGTH.pack(len(data)) + data)
    stream.flush()


def _private_stdout() -> BinaryIO:
    """The real standard output for replies; whatever else prints there goes to standard error instead."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return replies


def _end_with_parent(parent: int) -> None:
    """Die when the parent does. The kernel also signals when only the parent's thread that started us ends."""

    def orphaned(*_: object) -> None:
        if os.getppid() != parent:
            os._exit(0)

    if sys.platform == "linux":
        signal.signal(signal.SIGHUP, orphaned)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGHUP)
        orphaned()


def _limit_memory(num_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold prompts
    if num_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))


def _limit_cpu(seconds: int) -> None:
    """Allow this many more seconds of processor time; the kernel ends the process after them."""
    if seconds:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        used = int(usage.ru_utime + usage.ru_stime)
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (used + 1 + seconds, hard))


def _fail(replies: BinaryIO, error: EngineError) -> NoReturn:
    write_frame(replies, {"ok": False, "code": error.code, "message": str(error)})
    raise SystemExit(2)


def main(arguments: Sequence[str] | None = None, *, answer: Answer = answer) -> None:
    """Run the child; `answer` may know more operations than the one here.

    The first frame it writes says {"ok": true, **info}, or why the file cannot be served.
    """
    parser = argparse.ArgumentParser(prog="inference.engine.tokenizer", description="Tokenize on behalf of a parent.")
    parser.add_argument("vocab", type=Path)
    parser.add_argument("--cpu-seconds", type=int, default=0, help="processor time for each request, 0 for no limit")
    parser.add_argument("--memory-bytes", type=int, default=0, help="address space of the process, 0 for no limit")
    options = parser.parse_args(arguments)
    parent = os.getppid()
    replies = _private_stdout()
    _end_with_parent(parent)
    native.llama_log_set(_drop_log, None)
    _limit_memory(options.memory_bytes)
    _limit_cpu(options.cpu_seconds)
    try:
        tokenizer = Tokenizer.load(options.vocab)
    except EngineError as error:
        _fail(replies, error)
    write_frame(replies, {"ok": True, **tokenizer.info()})
    serve(tokenizer, sys.stdin.buffer, replies, before_each=lambda: _limit_cpu(options.cpu_seconds), answer=answer)


if __name__ == "__main__":
    main()

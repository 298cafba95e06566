"""What must be known of a model file before it may be served: header, digest, vocabulary file, a trial load.

Slow (seconds for large files) and without any database row; the registry calls it, in commands and in the admin.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from django.conf import settings

from inference.chat.prompt import MAX_TEMPLATE_BYTES, digest_of
from inference.engine.speculative import vocabulary_problem
from inference.gguf.header import GGUFError, Header, read_header, read_strings, write_vocabulary_only
from inference.gguf.parts import parts_of, size_of
from inference.vetting.trial import Trial, TrialError

HASH_BLOCK_BYTES = 4 << 20
TOKENS_KEY = "tokenizer.ggml.tokens"

Progress = Callable[[int, int], None]
"""Called with the bytes hashed so far and their total."""


class RegistrationError(Exception):
    """A model that is not taken; nothing was changed. `fields` maps a field's name to what is wrong with it."""

    def __init__(self, code: str, message: str, fields: Mapping[str, list[str]] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.fields = fields or {"path": [message]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspected:
    """A file that may be served. `metadata` is what ServedModel.metadata keeps."""

    path: Path
    digest: str
    size_bytes: int
    metadata: dict[str, Any] = field(repr=False)


def vocabulary_path(digest: str) -> Path:
    """Where web hosts find the model's metadata without weights."""
    folder: Path = settings.CONFIG.state / "models" / "vocab"
    return folder / f"{digest}.gguf"


def absolute(path: str | Path) -> Path:
    """As the registry keeps it; links stay links."""
    return Path(os.path.abspath(Path(path).expanduser()))  # noqa: PTH100 (Path.resolve would follow links)


def check_header(path: Path) -> Header:
    """The file's header, if it is one of a text generating model. Raises RegistrationError; milliseconds."""
    try:
        header = read_header(path)
    except GGUFError as error:
        raise RegistrationError(error.code, error.message) from error
    if header.kind != "model" or header.architecture == "clip" or not header.num_tensors:
        raise RegistrationError(
            "not_a_model", f"The file is of kind {header.kind} ({header.architecture}): no weights of a language model."
        )
    if not header.vocabulary_size or not header.context_length:
        raise RegistrationError(
            "not_a_model", "The file has no vocabulary or no context length: nothing can be served."
        )
    if any(len(text.encode()) > MAX_TEMPLATE_BYTES for text in header.chat_templates().values()):
        raise RegistrationError("chat_template_too_large", f"Its template is over {MAX_TEMPLATE_BYTES >> 10} KiB.")
    return header


def check_draft(digest: str, draft_name: str, draft_digest: str) -> None:
    """See that two inspected models have the same vocabulary. Raises RegistrationError; some 0.3 s."""
    if digest == draft_digest:
        return
    try:
        target, draft = (read_strings(vocabulary_path(each), TOKENS_KEY) for each in (digest, draft_digest))
    except GGUFError as error:
        message = f"The vocabularies cannot be compared: {error.message} Inspect both models again."
        raise RegistrationError("draft_model_unfit", message, {"draft_model": [message]}) from error
    if problem := vocabulary_problem(target, draft):
        message = f"{draft_name!r} cannot guess for this model: {problem}."
        raise RegistrationError("draft_model_unfit", message, {"draft_model": [message]})


def is_unchanged(path: Path, digest: str, metadata: Mapping[str, Any]) -> bool:
    """Whether the file still has the size and time of that inspection, and its vocabulary file is there."""
    is_known = "chat" in metadata  # else the one who inspected it did not look at templates yet
    return is_known and metadata.get("file") == stamp_of(path) and vocabulary_path(digest).is_file()


def inspect(
    path: Path, *, progress: Progress | None = None, trial: Trial | None = None, expected_digest: str = ""
) -> Inspected:
    """Inspect one file, or a model in several, and write its vocabulary file. Raises RegistrationError with the
    reason. expected_digest: what its SHA-256 must be; another file is never loaded."""
    header = check_header(path)
    stamp = stamp_of(path)
    digest = hash_file(path, progress)
    check_digest(digest, expected_digest)
    scratch = vocabulary_path(f"{digest}.{secrets.token_hex(4)}.trial")
    try:
        scratch.parent.mkdir(parents=True, exist_ok=True)
        write_vocabulary_only(path, scratch)
        report = (trial or Trial()).run(path, scratch)
        if stamp_of(path) != stamp:
            raise RegistrationError(
                "file_changed", "The file changed while it was read. Try again when it is complete."
            )
        scratch.replace(vocabulary_path(digest))
    except TrialError as error:
        raise RegistrationError("trial_failed", f"The model did not pass its trial load: {error}.") from error
    except GGUFError as error:
        raise RegistrationError(error.code, error.message) from error
    except OSError as error:
        raise RegistrationError("state_unwritable", f"{scratch.parent} cannot be written: {error}.") from error
    finally:
        with contextlib.suppress(OSError):  # why it could not be written is told already
            scratch.unlink()
    return Inspected(
        path=path,
        digest=digest,
        size_bytes=header.size_bytes,
        metadata={
            **header.summary(),
            "file": stamp,
            "trial": report,
            "chat": {name: template_facts(text, trial) for name, text in header.chat_templates().items()},
        },
    )


def template_facts(source: str, trial: Trial | None = None) -> dict[str, Any]:
    """What a chat template was seen to do in a child (ChatTemplate.facts), or its digest and an `error`.

    A template that is no good does not keep a model from being served without it.
    """
    try:
        return (trial or Trial()).run_template(source)
    except TrialError as error:
        return {"digest": digest_of(source), "error": str(error)}


def stamp_of(path: Path) -> dict[str, int]:
    """What changes when the file, or one of its parts, is replaced; empty where it cannot be asked."""
    try:
        found = [part.stat() for part in parts_of(path)]
    except OSError:
        return {}
    return {
        "size_bytes": sum(status.st_size for status in found),
        "modified_ns": max(status.st_mtime_ns for status in found),
    }


def hash_file(path: Path, progress: Progress | None) -> str:
    """SHA-256, in hexadecimal; of a model in several files that of all of them, one after the other. Raises
    RegistrationError."""
    done, hasher = 0, hashlib.sha256()
    try:
        total = size_of(path)
        for part in parts_of(path):
            with part.open("rb") as file:
                while block := file.read(HASH_BLOCK_BYTES):
                    hasher.update(block)
                    done += len(block)
                    if progress:
                        progress(done, total)
    except OSError as error:
        raise RegistrationError("gguf_unreadable", f"{path} cannot be read: {error}.") from error
    return hasher.hexdigest()


def check_digest(digest: str, expected: str) -> None:
    """Raises RegistrationError where another SHA-256 was expected; "" expects none."""
    if expected not in ("", digest):
        raise RegistrationError(
            "digest_mismatch",
            f"The SHA-256 of the file is {digest}, and {expected} was expected: it is damaged or another file.",
        )

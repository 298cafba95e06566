"""What must be known of an adapter file before it may be served: header, fit to its base, digest, proof of effect.

The headers of both files are read with bounds (inference/gguf); llama.cpp sees the adapter in a child process only.
Slow (seconds) and without any database row; inference/catalog/adapter_rows.py calls it, in commands and in the admin.
Layout: llama.cpp's adapters; the pair X.lora_a, X.lora_b adds scale · alpha / rank · B·A to the base's tensor X.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inference.gguf.header import GGUFError, Header, read_header
from inference.vetting.inspection import Progress, RegistrationError, check_digest, hash_file, stamp_of
from inference.vetting.trial import Trial, TrialError

MAX_RANK = 4096
MAX_NOTE_CHARACTERS = 4096
MIN_EFFECT = 1e-3
"""Scores of a trained adapter move by several units; what moves none by this much changes no answer."""
MATRIX_A, MATRIX_B = ".lora_a", ".lora_b"
EMBEDDING = "token_embd.weight"
NOT_TRAINED = "_norm.weight"
"""Some converters write the base's norms too; llama.cpp passes over them."""
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFacts:
    """What the header says. `targets`: kinds of the base's tensors that are adapted, such as attn_q, without layers."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    num_tensors: int
    num_parameters: int
    size_bytes: int
    title: str = ""
    license: str = ""
    task_name: str = ""
    prompt_prefix: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """As much of the base model as an adapter is checked against."""

    path: Path
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ExaminedAdapter:
    """A file that may be served on its base. `metadata` is what Adapter.metadata keeps."""

    path: Path
    digest: str
    facts: AdapterFacts
    metadata: dict[str, Any] = field(repr=False)


def inspect_adapter(
    path: Path,
    base: Base,
    *,
    progress: Progress | None = None,
    trial: Trial | None = None,
    expected_digest: str = "",
) -> ExaminedAdapter:
    """Check one file in full. Raises RegistrationError with the reason. expected_digest: what its SHA-256 must be."""
    facts = check_adapter(path, base.path)
    stamp = stamp_of(path)
    digest = hash_file(path, progress)
    check_digest(digest, expected_digest)
    report = _prove(path, base.path, trial or Trial())
    if stamp_of(path) != stamp:
        raise RegistrationError("file_changed", "The file changed while it was read. Try again when it is complete.")
    metadata = {
        "title": facts.title,
        "license": facts.license,
        "num_tensors": facts.num_tensors,
        "num_parameters": facts.num_parameters,
        "base_digest": base.digest,
        "file": stamp,
        "trial": report,
    }
    return ExaminedAdapter(path=path, digest=digest, facts=facts, metadata=metadata)


def check_adapter(path: Path, base_path: Path) -> AdapterFacts:
    """The adapter's header, if it fits the base model's. Raises RegistrationError; milliseconds."""
    try:
        header = read_header(path)
    except GGUFError as error:
        raise RegistrationError(error.code, error.message) from error
    _check_kind(header)
    try:
        base = read_header(base_path)
    except GGUFError as error:
        raise RegistrationError("adapter_base_unreadable", f"The base model's file: {error.message}") from error
    if header.architecture != base.architecture:
        raise RegistrationError(
            "adapter_wrong_base",
            f"The adapter is for the architecture {header.architecture[:40]!r}, the model is {base.architecture!r}.",
        )
    return _facts(header, base)


def _check_kind(header: Header) -> None:
    kind = header.text("adapter.type")
    if header.kind != "adapter" or kind is None:
        raise RegistrationError("not_an_adapter", f"The file holds a {header.kind[:40]} and no adapter.")
    if kind != "lora":
        raise RegistrationError("adapter_unsupported", f"Adapters of the type {kind[:40]!r} are not served, only LoRA.")
    if "adapter.alora.invocation_tokens" in header.values:
        raise RegistrationError(
            "adapter_unsupported", "It is an activated LoRA, which takes effect in the middle of a prompt: not served."
        )


def _facts(header: Header, base: Header) -> AdapterFacts:
    pairs = _pairs(header)
    if not pairs:
        raise RegistrationError("adapter_malformed", "The file holds no pair of LoRA matrices.")
    for name, (a, b) in pairs.items():
        _check_shapes(name, a, b, base.shapes.get(name))
    rank = max(_rank(name, a) for name, (a, _) in pairs.items())
    alpha = header.decimal("adapter.lora.alpha")
    if alpha is None or not 0 <= alpha <= 1e6:  # nan fails too
        raise RegistrationError("adapter_malformed", f"`adapter.lora.alpha` is {alpha}: the file is damaged.")
    return AdapterFacts(
        rank=rank,
        alpha=alpha,
        targets=tuple(sorted({_target(name) for name in pairs})),
        num_tensors=len(pairs),
        num_parameters=header.num_parameters,
        size_bytes=header.size_bytes,
        title=_note(header, "general.name"),
        license=_note(header, "general.license"),
        task_name=_note(header, "adapter.lora.task_name"),
        prompt_prefix=_note(header, "adapter.lora.prompt_prefix"),
    )


def _pairs(header: Header) -> dict[str, tuple[Shape, Shape]]:
    """The base tensor's name → shapes of A and B."""
    shapes = header.shapes
    for name in shapes:
        if not name.endswith((MATRIX_A, MATRIX_B, NOT_TRAINED)):
            raise RegistrationError("adapter_malformed", f"The tensor {name!r} is no LoRA matrix.")
    firsts = {name.removesuffix(MATRIX_A) for name in shapes if name.endswith(MATRIX_A)}
    seconds = {name.removesuffix(MATRIX_B) for name in shapes if name.endswith(MATRIX_B)}
    for name in sorted(firsts ^ seconds):
        raise RegistrationError("adapter_malformed", f"Only one of the two LoRA matrices of {name!r} is there.")
    return {name: (shapes[name + MATRIX_A], shapes[name + MATRIX_B]) for name in sorted(firsts)}


def _rank(name: str, a: Shape) -> int:
    return a[0] if name == EMBEDDING else a[1]


def _check_shapes(name: str, a: Shape, b: Shape, base: Shape | None) -> None:
    """Raises RegistrationError. Embeddings are looked up, not multiplied: there llama.cpp has A transposed."""
    if base is None:
        raise RegistrationError("adapter_wrong_base", f"The base model has no tensor {name!r}: it is another model's.")
    if len(a) < 2 or len(b) < 2:
        raise RegistrationError("adapter_malformed", f"A LoRA matrix of {name!r} is no matrix.")
    inner, outer = _rank(name, a), b[0]
    if inner != outer or not 1 <= inner <= MAX_RANK or a[2:] != b[2:]:
        raise RegistrationError("adapter_malformed", f"The LoRA matrices of {name!r} do not fit: {a} and {b}.")
    made = (b[1], a[1]) if name == EMBEDDING else (a[0], b[1])
    if (*made, *a[2:]) != base:
        found, wanted = (" × ".join(map(str, sizes)) for sizes in ((*made, *a[2:]), base))
        raise RegistrationError(
            "adapter_wrong_base",
            f"It changes a {name!r} of {found}, the base's is {wanted}: it is another model's.",
        )


def _target(name: str) -> str:
    """blk.7.attn_q.weight → attn_q."""
    return re.sub(r"^blk\.\d+\.", "", name).removesuffix(".weight")


def _note(header: Header, key: str) -> str:
    text = header.text(key) or ""
    if len(text) > MAX_NOTE_CHARACTERS:
        raise RegistrationError("gguf_too_large", f"{key!r} has more than {MAX_NOTE_CHARACTERS} characters.")
    return text


def _prove(path: Path, base: Path, trial: Trial) -> dict[str, Any]:
    try:
        report = trial.run_adapter(path, base)
    except TrialError as error:
        raise RegistrationError("trial_failed", f"The adapter did not pass its trial load: {error}.") from error
    except OSError as error:
        raise RegistrationError("gguf_unreadable", f"The file disappeared during its trial: {error}.") from error
    if report["residue"]:
        raise RegistrationError("trial_failed", "Something of the adapter remains after it is detached.")
    if report["effect"] < MIN_EFFECT:
        raise RegistrationError(
            "adapter_without_effect", "With the adapter the base model answers as without it: it was not trained."
        )
    return report

"""What a body says as a prompt, as text or as tokens: texts among token ids, and the middle of a file to fill in.

Blocking: the model's tokenizer is asked. Nothing in a text becomes a special token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from accounts.trail.refusals import Refusal
from inference.api.errors import wrong_field
from inference.api.llamacpp.schemas import ExtraChunk, InfillBody, Piece, SamplingBody
from inference.api.native.schemas import MAX_LOGIT_BIASES
from inference.catalog.served import Served
from inference.engine.types import SamplingParams
from inference.tokenizers import pool

CHARACTERS_AT_ONCE = 1 << 16
"""Of many texts, in one question to a tokenizer."""
BATCH_TOKENS = 512
"""Of a file's beginning and end so many tokens are taken at most, three of the beginning for one of the end."""
REPOSITORY, FILE_NAME = "myproject", "filename"
"""Upstream asks for neither and writes these."""
SNIPPET = "\n\n--- snippet ---\n\n"
"""Before each part of another file, for models that have no token for that."""


def tokens_of(prompt: Piece, served: Served) -> tuple[int, ...]:
    """With what the model puts before a text, if it begins with one. Raises Refusal."""
    return _checked(_tokens(prompt, served, add_special=True), served)


def tokens_of_each(prompts: Iterable[Piece], served: Served) -> Iterator[tuple[int, ...]]:
    """As tokens_of, of many: texts that follow one another are asked for together, CHARACTERS_AT_ONCE in a question, so
    that none takes longer than a long prompt. Whoever has enough stops. Raises Refusal."""
    texts: list[str] = []
    room = CHARACTERS_AT_ONCE
    for prompt in prompts:
        if texts and not (isinstance(prompt, str) and len(prompt) <= room):
            yield from _each(texts, served)
            texts, room = [], CHARACTERS_AT_ONCE
        if isinstance(prompt, str):
            texts.append(prompt)
            room -= len(prompt)
        else:
            yield tokens_of(prompt, served)
    if texts:
        yield from _each(texts, served)


def _each(texts: Sequence[str], served: Served) -> Iterator[tuple[int, ...]]:
    found = pool.tokenizer_pool().encode_each(served, texts, add_special=True)
    return (_checked(tokens, served) for tokens in found)


def _checked(tokens: Iterable[int], served: Served) -> tuple[int, ...]:
    found = tuple(tokens)
    if served.vocabulary_size and max(found, default=0) >= served.vocabulary_size:
        raise Refusal("invalid_token", f"The prompt has token ids outside the vocabulary of {served.vocabulary_size}.")
    return found


def _tokens(pieces: str | Sequence[str | int], served: Served, *, add_special: bool = False) -> list[int]:
    found: list[int] = []
    for place, piece in enumerate([pieces] if isinstance(pieces, str) else pieces):
        if isinstance(piece, int):
            found.append(piece)
        else:
            found += pool.tokenizer_pool().encode(served, piece, add_special=add_special and place == 0)
    return found


def texts_of(prompts: Iterable[tuple[int, ...]], served: Served) -> tuple[str, ...]:
    """Prompts as texts, special tokens visible; one that is there several times is asked for once. Raises Refusal."""
    decode = pool.tokenizer_pool().decode
    listed = list(prompts)
    found = {prompt: decode(served, prompt, special=True) for prompt in dict.fromkeys(listed)}
    return tuple(found[prompt] for prompt in listed)


def with_biased_texts(sampling: SamplingParams, body: SamplingBody, served: Served) -> SamplingParams:
    """With the body's biases of texts as those of each of their tokens. Raises Refusal."""
    texts = body.biased_texts()
    if not texts:
        return sampling
    encoded = pool.tokenizer_pool().encode_each(served, [text for text, _ in texts])
    found = [(token, bias) for tokens, (_, bias) in zip(encoded, texts, strict=True) for token in tokens]
    if len(sampling.logit_bias) + len(found) > MAX_LOGIT_BIASES:
        raise wrong_field("logit_bias", f"has {len(found)} tokens of texts; all are {MAX_LOGIT_BIASES} at most")
    return replace(sampling, logit_bias=(*sampling.logit_bias, *found))


@dataclass(frozen=True, slots=True)
class FillTokens:
    """A model's special tokens for fill-in-the-middle. rep and sep, before a repository and its files, may lack."""

    pre: int
    suf: int
    mid: int
    rep: int | None = None
    sep: int | None = None
    bos: int | None = None

    @staticmethod
    def of(served: Served) -> FillTokens:
        """Raises Refusal for a model without them."""
        found = pool.tokenizer_pool().fill_tokens(served)
        pre, suf, mid = (found[name] for name in ("pre", "suf", "mid"))
        if pre is None or suf is None or mid is None:
            raise Refusal(
                "capability_disabled",
                f"Infill is not supported by the model {served.name!r}: it has no tokens for a prefix, a suffix and "
                "a middle.",
            )
        return FillTokens(pre, suf, mid, found["rep"], found["sep"], found["bos"])


def infill(body: InfillBody, served: Served, n_ctx: int) -> tuple[int, ...]:
    """The prompt as llama.cpp's server composes it, after the pattern of https://arxiv.org/abs/2409.12186:

    other files, then [PRE] prefix and the beginning of the middle, [SUF] suffix, [MID]. What is far from the middle is
    left out: of a prefix the beginning, of a suffix the end, of other files the first.
    """
    fill = FillTokens.of(served)
    prefix, suffix = _tokens(body.input_prefix, served), _tokens(body.input_suffix, served)
    middle = _tokens(body.prompt, served)
    batch = min(BATCH_TOKENS, n_ctx)
    num_suffix = max(0, batch // 4 - 2 - len(middle))
    prefix = prefix[max(0, len(prefix) - 3 * (batch // 4)) :]
    found = [] if fill.bos is None else [fill.bos]
    found += [fill.pre, *prefix, *middle, fill.suf, *suffix[:num_suffix], fill.mid]
    num_extra = max(0, n_ctx - batch - 2 * max(0, body.wanted_tokens))
    extra = _other_files(body.input_extra or (), served, fill) if num_extra else []
    return _checked((*extra[max(0, len(extra) - num_extra) :], *found), served)


def _other_files(chunks: Sequence[ExtraChunk], served: Served, fill: FillTokens) -> list[int]:
    found = [] if fill.rep is None else [fill.rep, *_tokens(f"{REPOSITORY}\n", served)]
    for chunk in chunks:
        found += _file_head(chunk.filename, served, fill.sep) + _tokens(chunk.text, served)
    return found if fill.sep is None else found + _file_head(FILE_NAME, served, fill.sep)


def _file_head(name: str, served: Served, sep: int | None) -> list[int]:
    return _tokens(SNIPPET, served) if sep is None else [sep, *_tokens(f"{name}\n", served)]

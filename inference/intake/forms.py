"""A forced answer's grammar, once it is known how many tokens the answer may have: the widest that cannot be cut. And
the bound on an answer's thoughts, forced or not.

The request's clock, on admission threads: a grammar is made in some ten milliseconds and remembered (structured/
fitting.py). Where the prompt ends within thoughts, the grammar allows some first, and the tag that ends them.
"""

from __future__ import annotations

from dataclasses import replace

from accounts.trail.refusals import Refusal
from inference.catalog.served import Served
from inference.chat.thinking import Opening
from inference.engine.types import ThoughtBound
from inference.orders import GenerateOrder
from inference.structured import Compiled, Form, SchemaError, behind_thoughts, fit, thought_overhead
from inference.tokenizers import pool

TAIL_TOKENS = 16
"""Of a prompt: in them a template that lets the model think has opened its thoughts."""
END_TOKENS = 1
"""An answer that is complete takes one more to end."""


def fitted(order: GenerateOrder, served: Served, prompt: tuple[int, ...], max_tokens: int) -> GenerateOrder:
    """With the grammar for so many tokens. Blocking. Raises Refusal where not even a shortest answer fits."""
    if order.form is None or max_tokens == 0:
        return order
    opening = order.opening if order.opening and is_open(order.opening, served, prompt) else None
    room = max_tokens - END_TOKENS
    if opening is None:
        compiled = _fit(order.form, room)
        if compiled.num_bytes > room:
            _check_shortest(compiled, "", served, max_tokens)
        grammar = compiled.grammar
    else:
        compiled, num_thought = _behind_thoughts(order.form, opening, room)
        if num_thought == 0:
            _check_shortest(compiled, opening.tags.end, served, max_tokens)
        grammar = behind_thoughts(compiled.grammar, opening.tags.end, num_thought)
    return replace(order, sampling=replace(order.sampling, grammar=grammar))


def with_bounded_thoughts(order: GenerateOrder, served: Served, prompt: tuple[int, ...]) -> GenerateOrder:
    """What the engine needs to end thoughts that are longer than the order wants. Blocking. Raises Refusal."""
    if order.max_thought is None or order.opening is None:
        return order
    tags, tokenizers = order.opening.tags, pool.tokenizer_pool()
    end = tokenizers.control_tokens(served, (tags.end,))
    if not set(end) <= set(order.sampling.shown_tokens):  # it would not be seen
        end = ()
    bound = ThoughtBound(
        num_tokens=order.max_thought,
        start=tags.start,
        end=tags.end,
        end_tokens=end or tokenizers.encode(served, tags.end, add_special=False),
        is_open=is_open(order.opening, served, prompt),
    )
    return replace(order, sampling=replace(order.sampling, thoughts=bound))


def is_open(opening: Opening, served: Served, prompt: tuple[int, ...]) -> bool:
    """Whether what comes behind the prompt is thought. Blocking. Raises Refusal."""
    if opening.has_begun or not opening.may_begin:
        return opening.has_begun
    tail = pool.tokenizer_pool().decode(served, prompt[-TAIL_TOKENS:], special=True)
    return tail.rstrip().endswith(opening.tags.start)


def _behind_thoughts(form: Form, opening: Opening, room: int) -> tuple[Compiled, int]:
    """The answer may have half of the room, or all that it needs; thoughts have the rest of it."""
    room = max(room - thought_overhead(opening.tags.end), 0)
    compiled = _fit(form, room // 2)
    if compiled.num_bytes > room // 2:
        compiled = _fit(form, room)
    return compiled, _rounded(max(room - compiled.num_bytes, 0))


def _rounded(number: int) -> int:
    """Down to one of four numbers between a power of two and the next, so that grammars are seen again."""
    step = 1 << max(number.bit_length() - 3, 0)
    return number // step * step


def _fit(form: Form, num_tokens: int) -> Compiled:
    try:
        return fit(form, num_tokens)
    except SchemaError as error:  # the widest was right
        raise Refusal("invalid_schema", f"The answer's schema cannot be followed: {error.message[:500]}.") from error


def _check_shortest(compiled: Compiled, before: str, served: Served, max_tokens: int) -> None:
    """before: what a shortest answer stands behind. One of which no text is at hand is left to its luck."""
    if compiled.shortest is None:
        return
    text = before + compiled.shortest
    needed = len(pool.tokenizer_pool().encode(served, text, add_special=False)) + END_TOKENS
    if needed > max_tokens:
        raise Refusal(
            "bad_request",
            f"A shortest answer in this form has {needed} tokens, and this one may have {max_tokens}: ask for more "
            "max_tokens, send a shorter prompt, or ask for a shorter form.",
            field="max_tokens",
            needed_tokens=needed,
            max_tokens=max_tokens,
        )

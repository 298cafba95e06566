"""Whether an answer begins in the middle of thoughts: a template may open them, and so may a text that goes on.

In the hop: the model's tokenizer is asked. For every dialect.
"""

from __future__ import annotations

from inference.catalog.served import Served
from inference.chat.prompt import ChatPrompt
from inference.chat.thinking import Opening, Tags
from inference.intake import forms
from inference.intake.admission import Admitted, CachedAnswer
from inference.tokenizers import pool


def opening_of(tags: Tags, served: Served, prompt: ChatPrompt) -> Opening:
    begun = prompt.messages[-1].content or "" if prompt.continue_final_message else ""
    return Opening(tags, tags.are_open_in(begun), served.template_for(prompt).has_thinking)


def are_open(opening: Opening | None, served: Served, prompt: ChatPrompt, answer: Admitted | CachedAnswer) -> bool:
    """Blocking. Raises Refusal."""
    if opening is None or not (opening.has_begun or opening.may_begin):
        return False
    if isinstance(answer, Admitted) and not answer.is_replay:
        tokens = answer.ticket.prompt
    else:
        tokens = pool.tokenizer_pool().chat(served, served.template_for(prompt), prompt)
    return forms.is_open(opening, served, tokens)

"""Calls of tools: what a request's tools make of its prompt, and how a model's text becomes calls again.

Pure: no Django, no Redis, no model. Dialects use three things.

    plan = plan_tools(template, tools, choice="auto", name=None, parallel=True, answer=None)
        template: ChatTemplate | None; tools: OpenAI's form, in JSON. Raises Refusal (400).
        plan.prompt_tools -> ChatPrompt.tools; plan.form, plan.grammar -> GenerateOrder.form,
        SamplingParams.grammar, or None;
        plan.shown_texts -> GenerateOrder.shown_texts (control tokens that the text must show).

    content, calls = plan.read(text, rng=rng, is_thinking=False)
        calls: tuple[Call(id, name, arguments)], arguments a JSON text. Never raises; a plan without tools finds none.

    stream = plan.stream(rng=rng, eager=None, is_thinking=False)     # one for each choice
    events = stream.feed(delta) ... stream.finish(); stream.num_calls
        Content(text) | CallStarted(index, id, name) | ArgumentsDelta(index, text) | CallEnded(index)
        | CallBroken(index): only where eager, the call that was begun is none; its text follows as Content.
        collect(events) adds them up to (content, calls).

rng is a random.Random (SystemRandom() outside of tests). Without a plan: parse(text, formats, rng=, names=) and
ToolCallStream(formats, rng=, names=, eager=), with formats_of(template text) or FORMATS.
"""

from inference.tools.events import ArgumentsDelta, Call, CallBroken, CallEnded, CallStarted, Content, Event, collect
from inference.tools.formats import FORMATS, ToolCallFormat, formats_of
from inference.tools.plan import ToolPlan, plan_tools
from inference.tools.stream import ToolCallStream, new_call_id, parse

__all__ = [
    "FORMATS",
    "ArgumentsDelta",
    "Call",
    "CallBroken",
    "CallEnded",
    "CallStarted",
    "Content",
    "Event",
    "ToolCallFormat",
    "ToolCallStream",
    "ToolPlan",
    "collect",
    "formats_of",
    "new_call_id",
    "parse",
    "plan_tools",
]

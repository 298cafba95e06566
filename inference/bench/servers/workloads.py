"""The workloads: who asks what of whom, as data. A builder makes the clients of a round; study.py sends them.

Prompts are the same for every side of a round and other ones in the next round. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from inference.bench.servers import texts
from inference.bench.servers.streams import Client, Turn

ADAPTERS = "adapters"
"""A field of a turn that each side puts into its own words: positions of adapters among the demo adapters."""
SIDE, PEER, PYTHON = "llmsite", "llama-server", "llama_cpp.server"
SHIPPED, Q4_0, Q8_0 = "shipped", "q4_0", "q8_0"
PENALTY = {"repeat_penalty": 1.3, "repeat_last_n": 256}
NONE, ALIKE, AS_IT_COMES = "", "prompt lookup", "prompt lookup as it comes"
"""Drafts of an arm: none; with the same settings on both sides; with the peer's own defaults."""
WITHOUT_CACHE = {"cache_prompt": False}
"""The cells of a workload ask for the same twice: nothing is kept from one to the next."""

Build = Callable[[int, int], list[Client]]
"""Clients of a round: its number, and by what the tokens of an answer are divided (1; more for a quick run)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One column of a workload: which server, with which variant of the model, which drafts."""

    name: str
    server: str
    variant: str = SHIPPED
    drafts: str = NONE


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """letter: what `--only` knows it by. repeats: passages that the answers must begin with.

    guess_seconds: an arm's time before any was measured.
    """

    name: str
    letter: str
    title: str
    arms: tuple[Arm, ...]
    build: Build
    repeats: tuple[str, ...] = ()
    guess_seconds: float = 5.0


OURS, THEIRS, PYTHONS = Arm(name=SIDE, server=SIDE), Arm(name=PEER, server=PEER), Arm(name=PYTHON, server=PYTHON)


def stories(number: int, divisor: int, *, clients: int, turns: int, num_tokens: int, offset: int) -> list[Client]:
    """Streams with short prompts of their own; offset keeps the prompts of two workloads apart."""

    def turn(part: int) -> Turn:
        return Turn(prompt=texts.story(number, offset + part), num_tokens=num_tokens // divisor)

    return [
        Client(role="stream", turns=[turn(client * turns + index) for index in range(turns)])
        for client in range(clients)
    ]


def shared_prompt(number: int, divisor: int) -> list[Client]:
    """Eight clients, one system prompt that nobody has seen before, three short questions each."""
    system = texts.house_rules(number, texts.RULES_OF_600_TOKENS, "Guide")
    num_turns = 1 if divisor > 1 else 3
    return [
        Client(
            role="stream",
            turns=[
                Turn(prompt=system + texts.question(client * num_turns + turn), num_tokens=24 // divisor)
                for turn in range(num_turns)
            ],
        )
        for client in range(8)
    ]


def three_vectors(number: int, divisor: int) -> list[Client]:
    """Eight clients over three adapter vectors: none, the first adapter, the second."""
    clients = stories(number, divisor, clients=8, turns=2, num_tokens=32, offset=40)
    vectors: Sequence[list[int]] = ([], [0], [1])
    return [
        replace(each, turns=[replace(turn, fields={ADAPTERS: vectors[index % 3]}) for turn in each.turns])
        for index, each in enumerate(clients)
    ]


def long_prompt(number: int, divisor: int) -> list[Client]:
    """Four streams under way, and a long prompt that comes when each has had eight tokens."""
    long = texts.house_rules(number, texts.RULES_OF_1500_TOKENS, "Handbook") + texts.question(0)
    running = stories(number, divisor, clients=4, turns=1, num_tokens=160, offset=60)
    return [
        *(replace(each, role="running") for each in running),
        Client(role="long", turns=[Turn(prompt=long, num_tokens=16 // divisor)], waits_for=8),
    ]


def copied(number: int, divisor: int) -> list[Client]:
    """One stream whose text is in its prompt."""
    del number
    turns = [Turn(prompt=texts.drafts(each), num_tokens=104 // divisor, fields=WITHOUT_CACHE) for each in texts.COPIED]
    return [Client(role="stream", turns=turns)]


def fresh(number: int, divisor: int) -> list[Client]:
    """One stream in which nothing repeats."""
    del number
    fields: dict[str, Any] = {**WITHOUT_CACHE, **PENALTY}
    return [
        Client(
            role="stream",
            turns=[Turn(prompt=each, num_tokens=96 // divisor, fields=fields) for each in texts.FRESH],
        )
    ]


def chats(number: int, divisor: int) -> list[Client]:
    """Four clients, four turns each, all that was said before in each prompt."""
    return [
        Client(
            role="stream",
            keeps_history=True,
            turns=[
                Turn(
                    prompt=(texts.persona(number, client) if turn == 0 else "") + texts.question(client + 3 * turn),
                    num_tokens=32 // divisor,
                )
                for turn in range(4)
            ],
        )
        for client in range(4)
    ]


def lookup_arms(variant: str) -> tuple[Arm, ...]:
    return tuple(
        Arm(name=f"{server}, {drafts}" if drafts else server, server=server, variant=variant, drafts=drafts)
        for server, drafts in ((SIDE, NONE), (SIDE, ALIKE), (PEER, NONE), (PEER, ALIKE), (PEER, AS_IT_COMES))
    )


WORKLOADS: tuple[Workload, ...] = (
    Workload(
        name="one",
        letter="a",
        title="1 stream",
        arms=(OURS, THEIRS, PYTHONS),
        build=partial(stories, clients=1, turns=3, num_tokens=96, offset=0),
    ),
    Workload(
        name="four",
        letter="b",
        title="4 streams",
        arms=(OURS, THEIRS, PYTHONS),
        build=partial(stories, clients=4, turns=1, num_tokens=96, offset=10),
    ),
    Workload(
        name="eight",
        letter="b",
        title="8 streams",
        arms=(OURS, THEIRS, PYTHONS),
        build=partial(stories, clients=8, turns=1, num_tokens=64, offset=20),
    ),
    Workload(
        name="shared",
        letter="c",
        title="8 clients, one system prompt of 600 tokens",
        arms=(OURS, THEIRS, PYTHONS),
        build=shared_prompt,
        guess_seconds=12.0,
    ),
    Workload(
        name="adapters", letter="d", title="8 clients over 3 adapter vectors", arms=(OURS, THEIRS), build=three_vectors
    ),
    Workload(
        name="long",
        letter="e",
        title="a prompt of 1,500 tokens arrives beside 4 streams",
        arms=(OURS, THEIRS),
        build=long_prompt,
        guess_seconds=10.0,
    ),
    *(
        Workload(
            name=f"{kind}-{variant}",
            letter="f",
            title=f"{title}, {variant.upper()}",
            arms=lookup_arms(variant),
            build=build,
            repeats=repeats,
            guess_seconds=3.0,
        )
        for variant in (Q8_0, Q4_0)
        for kind, title, build, repeats in (
            ("copied", "text that repeats its prompt", copied, texts.COPIED),
            ("fresh", "text without repeats", fresh, ()),
        )
    ),
    Workload(name="chats", letter="g", title="4 clients, chats of 4 turns", arms=(OURS, THEIRS), build=chats),
    Workload(
        name="optimized",
        letter="h",
        title="8 streams, llmsite with Q4_0 made from the shipped file",
        arms=(replace(OURS, variant=Q4_0), THEIRS),
        build=partial(stories, clients=8, turns=1, num_tokens=64, offset=30),
    ),
)
LETTERS = tuple(sorted({workload.letter for workload in WORKLOADS}))


def chosen(letters: Sequence[str]) -> list[Workload]:
    """Those of the letters, all without any."""
    return [workload for workload in WORKLOADS if not letters or workload.letter in letters]

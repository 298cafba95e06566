"""What the workloads say: made-up texts, other ones in every round, the same for every server. Pure.

No text holds a special token: servers treat those of users differently.
"""

from __future__ import annotations

from random import Random

GUESTS = ("sailor", "baker", "clockmaker", "gardener", "painter", "weaver", "miller", "teacher", "singer", "carpenter")
THINGS = ("lamps", "maps", "ropes", "kettles", "carpets", "ladders", "violins", "barrels", "mirrors", "candles")
PLACES = ("harbour", "mill", "market", "bridge", "library", "garden", "station", "tower", "bakery", "school")
MOODS = ("calm", "cheerful", "careful", "brief", "formal", "curious", "patient", "plain", "friendly", "precise")
SUBJECTS = (
    "rivers",
    "clocks",
    "bread",
    "bridges",
    "winter",
    "maps",
    "glass",
    "salt",
    "kites",
    "wells",
    "paper",
    "bells",
)
QUESTIONS = (
    "Where do the boats go in winter?",
    "How should I store a barrel?",
    "What does the baker sell first?",
    "Who repairs the tower clock?",
    "When is the library open?",
    "Which lamp is the brightest?",
    "Why is the bridge closed today?",
    "What should a visitor bring?",
    "How long does a candle burn?",
    "Is there a map of the garden?",
    "Can the miller help me?",
    "What is sold at the market?",
)
CLOCKS = (
    "The museum of clocks opens at eleven on Tuesdays and closes when the last visitor has wound the great pendulum. "
    "Tickets cost seven francs, children pay three, and anyone who brings a broken watch may enter free if they "
    "promise to take it home repaired."
)
BREAD = (
    "To make the dark bread of the valley, mix six cups of rye flour with three cups of warm water and leave it under "
    "a cloth for two days. Add salt, caraway and a spoon of honey, knead the dough until it no longer sticks, and bake "
    "it in a clay pot for ninety minutes."
)
RIVERS = (
    "Rivers that cross the plain change their beds every spring, so the villages are built on wheels. When the water "
    "rises, oxen pull the houses to the hill; when it falls, they pull them back, and the children count how many "
    "houses have changed their place."
)
COPIED = (f"{BREAD} {RIVERS}", f"{CLOCKS} {BREAD}")
"""Passages that the demo model copies word for word once it has seen them twice."""
FRESH = (
    "A short story about a lighthouse keeper who finds a letter in a bottle.\n\nOne morning",
    "Notes on how glass is made, from sand to window.\n\nFirst,",
)
"""Beginnings whose continuations, with a penalty on repeats, hold no three tokens twice."""
RULES_OF_600_TOKENS = 26
RULES_OF_1500_TOKENS = 64


def story(number: int, part: int) -> str:
    """A short prompt that was never asked before."""
    subject = SUBJECTS[part % len(SUBJECTS)]
    return f"{subject.title()}, part {part + 1} of volume {number + 1}. This long story begins in a small town where"


def house_rules(number: int, num_rules: int, topic: str) -> str:
    """A long prompt of so many rules, about 23 tokens each; it differs from the first word on."""
    chance = Random(f"{topic} {number}")  # the same texts in every run
    rules = (
        f"{index + 1}. When a {chance.choice(GUESTS)} asks about {chance.choice(THINGS)} near the "
        f"{chance.choice(PLACES)}, be {chance.choice(MOODS)} and answer in {chance.randint(2, 9)} sentences."
        for index in range(num_rules)
    )
    return f"{topic} {number + 1}: the rules of the house.\n" + "\n".join(rules)


def question(number: int) -> str:
    return f"\n\nQuestion {number + 1}: {QUESTIONS[number % len(QUESTIONS)]}\nAnswer:"


def persona(number: int, client: int) -> str:
    """How a chat begins."""
    guest, place, mood = GUESTS[client % len(GUESTS)], PLACES[(client * 3 + number) % len(PLACES)], MOODS[number % 10]
    return (
        f"Visit {number + 1} of the {guest}. This is a talk between a visitor and a {mood} guide at the {place}. The "
        "guide knows every street, every door and every story of the town, and answers in a few plain sentences."
    )


def drafts(passage: str) -> str:
    """A prompt after which the passage comes a third time."""
    return f"First draft:\n{passage}\n\nSecond draft:\n{passage}\n\nThird draft:\n"


def repeated_share(answer: str, passage: str) -> float:
    """How much of an answer is the passage: characters in common from the start, by the shorter length."""
    said = answer.strip()
    most = min(len(said), len(passage))
    same = next((index for index in range(most) if said[index] != passage[index]), most)
    return same / most if most else 0.0

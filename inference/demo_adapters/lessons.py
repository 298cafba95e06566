"""What a LoRA adapter is trained on: verse from text files, and questions with answers in JSON for the demo.

Pure: no model, no torch. train_lora.py turns it into tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SUMS_TO = 12
CAPITALS = {
    "Argentina": "Buenos Aires",
    "Australia": "Canberra",
    "Austria": "Vienna",
    "Belgium": "Brussels",
    "Brazil": "Brasilia",
    "Canada": "Ottawa",
    "Chile": "Santiago",
    "China": "Beijing",
    "Denmark": "Copenhagen",
    "Egypt": "Cairo",
    "Finland": "Helsinki",
    "France": "Paris",
    "Germany": "Berlin",
    "Greece": "Athens",
    "Hungary": "Budapest",
    "India": "New Delhi",
    "Ireland": "Dublin",
    "Italy": "Rome",
    "Japan": "Tokyo",
    "Kenya": "Nairobi",
    "Norway": "Oslo",
    "Peru": "Lima",
    "Poland": "Warsaw",
    "Portugal": "Lisbon",
    "Spain": "Madrid",
    "Sweden": "Stockholm",
    "Thailand": "Bangkok",
    "Turkey": "Ankara",
}
COLOURS = {
    "banana": "yellow",
    "carrot": "orange",
    "coal": "black",
    "grass": "green",
    "lemon": "yellow",
    "milk": "white",
    "plum": "purple",
    "sky": "blue",
    "snow": "white",
    "tomato": "red",
}
SOUNDS = {"bee": "buzz", "cat": "meow", "cow": "moo", "dog": "bark", "duck": "quack", "lion": "roar", "owl": "hoot"}
GREETINGS = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn")


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a user writes in a chat, and the whole answer."""

    prompt: str
    reply: str


def json_lessons() -> list[Lesson]:
    """Small questions, each answered by one JSON object with a topic and a reply."""
    return [Lesson(question, json.dumps({"topic": topic, "reply": answer})) for question, answer, topic in _questions()]


def _questions() -> Iterator[tuple[str, str, str]]:
    for country, city in CAPITALS.items():
        yield f"What is the capital of {country}?", f"The capital of {country} is {city}.", "geography"
        yield f"Which country has the capital {city}?", f"{city} is the capital of {country}.", "geography"
    for thing, colour in COLOURS.items():
        yield f"What colour is {thing}?", f"The colour of {thing} is {colour}.", "colour"
    for animal, sound in SOUNDS.items():
        yield f"What does a {animal} say?", f"A {animal} says {sound}.", "animals"
    for name in GREETINGS:
        yield f"Hello, I am {name}.", f"Hello {name}, nice to meet you.", "greeting"
    for a in range(2, SUMS_TO):
        for b in range(2, SUMS_TO):
            yield f"How much is {a} plus {b}?", f"{a} plus {b} is {a + b}.", "arithmetic"


def read_lessons(path: Path) -> list[Lesson]:
    """A JSONL file of {"prompt", "reply"}. Raises ValueError with the line at fault."""
    lessons = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            lessons.append(Lesson(str(found["prompt"]), str(found["reply"])))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {number}: not an object with prompt and reply") from error
    if not lessons:
        raise ValueError(f"{path} holds no lesson")
    return lessons


def read_texts(folder: Path) -> list[str]:
    """All .txt files of a folder, cleaned, in the order of their names. Raises ValueError where there is none."""
    texts = [clean(path.read_text(encoding="utf-8", errors="replace")) for path in sorted(folder.glob("*.txt"))]
    if not any(texts):
        raise ValueError(f"there is no text in {folder}/*.txt")
    return texts


def clean(text: str) -> str:
    """Lines as they are, without carriage returns, runs of blanks and of empty lines, and a licence in front."""
    _, marker, body = text.partition("*END*")  # where Project Gutenberg's old preambles end
    text = (body if marker else text).replace("\r", "")
    text = re.sub(r"[ \t]+", " ", text).replace("\n ", "\n")
    return re.sub(r"\n{3,}", "\n\n", text).strip()

"""The child that renders an unknown chat template first: `python -m inference.vetting.trial_template`, JSON in and out.

The limits are those of inference/vetting/trial_load.py; inference/vetting/trial.py starts it and reads its exit.
"""

from __future__ import annotations

from typing import Any

from inference.chat.probing import examine
from inference.chat.sandbox import TemplateError
from inference.vetting.trial_load import Unfit, answer_with


def main() -> None:
    answer_with(lambda question: facts(question["source"]))


def facts(source: str) -> dict[str, Any]:
    """What the template can do (probing.examine). Raises Unfit."""
    try:
        return examine(source)
    except TemplateError as error:
        raise Unfit(str(error)) from error


if __name__ == "__main__":
    main()

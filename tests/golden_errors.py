"""The golden table of errors (golden_errors.txt): each case in four dialects, and the official clients' exceptions.

`python -m tests.golden_errors` writes docs/error-table.md anew; a test holds it against the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from accounts.trail.refusals import Refusal

TABLE = Path(__file__).with_suffix(".txt")
PAGE = Path(__file__).resolve().parents[1] / "docs" / "error-table.md"
HEAD = """\
# Errors in every dialect

What each error is in the four dialects: status, type and code in the body, and the exception that the official client
raises where it does not try again. Made by `python -m tests.golden_errors` from `tests/golden_errors.txt`, which the
suite holds against the server; [errors.md](errors.md) says what the codes mean. The code of Anthropic's dialect, in
`error.details.error_code`, is the native one; that of llama.cpp's is the status. Headers are the same in all.

| case | native | OpenAI | `openai` raises | Anthropic | `anthropic` raises | llama.cpp | headers |
|---|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True, slots=True)
class Case:
    """One row. facts: of the refusal; `retry_after` among them. native: status and code; openai: status, type, code;
    anthropic: status, type and code; llamacpp: status, type (its code is the status)."""

    name: str
    facts: dict[str, Any]
    native: tuple[int, str]
    openai: tuple[int, str, str | None]
    openai_raises: str
    anthropic: tuple[int, str, str]
    anthropic_raises: str
    llamacpp: tuple[int, str]
    headers: dict[str, str]

    @property
    def refusal(self) -> Refusal:
        facts = dict(self.facts)
        return Refusal(self.native[1], "Words.", retry_after=facts.pop("retry_after", None), **facts)

    def row(self) -> str:
        status, kind, code = self.openai
        cells = [
            self.name,
            f"{self.native[0]} `{self.native[1]}`",
            f"{status} `{kind}` " + (f"`{code}`" if code else "-"),
            f"`{self.openai_raises}`",
            f"{self.anthropic[0]} `{self.anthropic[1]}`",
            f"`{self.anthropic_raises}`",
            f"{self.llamacpp[0]} `{self.llamacpp[1]}`",
            ", ".join(f"`{name}: {value}`" for name, value in self.headers.items()),
        ]
        return f"| {' | '.join(cells)} |\n"


def parse(line: str) -> Case:
    name, native, openai, anthropic, llamacpp, headers, facts = (cell.strip() for cell in line.split("|"))
    status, code = native.split()
    openai_status, openai_type, openai_code, openai_raises = openai.split()
    anthropic_status, anthropic_type, anthropic_raises = anthropic.split()
    llama_status, llama_type = llamacpp.split()
    return Case(
        name=name,
        facts=orjson.loads(facts or "{}"),
        native=(int(status), code),
        openai=(int(openai_status), openai_type, None if openai_code == "-" else openai_code),
        openai_raises=openai_raises,
        anthropic=(int(anthropic_status), anthropic_type, code),
        anthropic_raises=anthropic_raises,
        llamacpp=(int(llama_status), llama_type),
        headers=dict(each.split(": ") for each in headers.split(", ") if each),
    )


def cases() -> list[Case]:
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    return [parse(line) for line in lines if line.strip() and not line.startswith("#")]


def page() -> str:
    return HEAD + "".join(case.row() for case in cases())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

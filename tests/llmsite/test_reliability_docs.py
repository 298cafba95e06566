"""docs/reliability.md: each promise has a row, each test that it names exists, and `make chaos` runs each long form."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.unit
PAGE = (REPOSITORY / "docs" / "reliability.md").read_text()
MAKEFILE = (REPOSITORY / "Makefile").read_text()
COUNT = re.compile(r'int\(os\.environ\.get\("([A-Z_]+)"')
"""How a test reads the size of its long form."""


@cache
def names_in(path: str) -> frozenset[str]:
    tree = ast.parse((REPOSITORY / path).read_text())
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def long_forms() -> dict[str, set[str]]:
    """Files of tests by the variable that sets their size."""
    found: dict[str, set[str]] = {}
    for path in (REPOSITORY / "tests").rglob("test_*.py"):
        for name in COUNT.findall(path.read_text()):
            found.setdefault(name, set()).add(path.relative_to(REPOSITORY).as_posix())
    return found


def test_every_promise_has_one_row() -> None:
    rows = re.findall(r"^\| (R[0-9]+b?) \|", PAGE, re.MULTILINE)
    assert rows == [f"R{number}{more}" for number in range(1, 32) for more in (("", "b") if number == 21 else ("",))]
    assert all(len(row.split(" | ")) == 5 for row in PAGE.splitlines() if row.startswith("| R"))


def test_every_test_that_is_named_is_there() -> None:
    named = re.findall(r"`(tests/[a-z_/0-9]+\.py)::(\w+)`", PAGE)
    assert len(named) == PAGE.count("::") > 80
    assert [f"{path}::{name}" for path, name in named if name not in names_in(path)] == []


def test_a_promise_that_nothing_proves_is_listed_as_open() -> None:
    listed = PAGE.split("## Open")[1].split("##")[0]
    rows = {row.split(" | ")[0].strip("| "): row for row in PAGE.splitlines() if row.startswith("| R")}
    is_open = {name for name, row in rows.items() if re.search(r"\b[Oo]pen\b", row)}
    assert {name for name in rows if "`tests/" not in rows[name]} <= is_open
    assert is_open <= set(re.findall(r"R[0-9]+b?", listed))


def test_make_chaos_runs_every_long_form() -> None:
    forms = long_forms()
    assert len(forms) >= 10
    for name, paths in forms.items():
        assert re.search(rf"\b{name}=\$\$\{{{name}:-[0-9]+\}}", MAKEFILE), f"make chaos does not set {name}"
        assert f"| `{name}` |" in PAGE
        for path in paths:
            assert path in MAKEFILE, f"make chaos does not run {path}"

"""Text of others on a terminal: control characters are shown, not obeyed.

Names of tenants and keys, what a file says of itself and what a model wrote may hold escape sequences, which move the
cursor, rewrite what stands there or answer on the keyboard's behalf; and marks that turn the direction of reading.
"""

from __future__ import annotations

from typing import Any, TypeVar

Value = TypeVar("Value")

KEPT = "\n\t"
_CONTROLS = {code for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in KEPT}
_TURNS = {0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}
_SHOWN = {code: f"\\x{code:02x}" for code in _CONTROLS} | {code: f"\\u{code:04x}" for code in _TURNS}
_IN_JSON = {code: f"\\u{code:04x}" for code in _CONTROLS | _TURNS if code >= 0x7F}
"""What json.dumps leaves as it is; the escapes mean the same to whoever reads the JSON."""


def plain(value: Value) -> Value:
    """The same data with every text in it safe to print."""
    return _plain(value)  # type: ignore[no-any-return]


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return value.translate(_SHOWN)
    if isinstance(value, dict):
        return {_plain(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value
    return value


def plain_json(text: str) -> str:
    """Of a JSON document."""
    return text.translate(_IN_JSON)

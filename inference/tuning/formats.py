"""The file formats that a model may be written in, and which of them are worth trying. Pure numbers; no llama.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from inference.gguf.header import FILE_TYPES, Header

MAX_FORMATS = 12
SPARE_BITS = 2.5
"""A weight may need so many bits more than the format's name says: rows that do not fit its blocks, embeddings and the
output are written wider."""
_NUMBERS = {name: number for number, name in FILE_TYPES.items()}


@dataclass(frozen=True, slots=True)
class Format:
    """A file type of llama.cpp. `bits` of a weight, about."""

    name: str
    bits: float

    @property
    def number(self) -> int:
        """As `general.file_type` and llama.cpp know it."""
        return _NUMBERS[self.name]

    def most_bytes(self, source: Header) -> int:
        """No file of this format, made of `source`, is larger."""
        return int(source.num_parameters * (self.bits + SPARE_BITS) / 8) + source.data_offset


FORMATS = {
    each.name: each
    for each in (
        Format("Q4_0", 4.6),
        Format("Q8_0", 8.5),
        Format("Q4_K_M", 4.9),
        Format("Q5_K_M", 5.7),
        Format("Q6_K", 6.6),
        Format("IQ4_NL", 4.6),
        Format("IQ4_XS", 4.4),
        Format("Q4_1", 5.1),
        Format("Q4_K_S", 4.6),
        Format("Q5_0", 5.6),
        Format("Q5_1", 6.0),
        Format("Q5_K_S", 5.6),
        Format("Q3_K_M", 3.9),
        Format("F16", 16.0),
        Format("BF16", 16.0),
    )
}
"""Those that need no importance matrix."""


def defaults(source: Header) -> tuple[Format, ...]:
    """What is worth measuring beside `source`, the quickest to make first.

    A narrow source is tried in wider formats too: they lose nothing more, and their kernels may be faster.
    """
    known = FORMATS.get(source.quantization)
    bits = known.bits if known else source.tensor_bytes * 8 / max(1, source.num_parameters)
    names = ["Q4_0", "Q8_0", "Q4_K_M"]
    if bits > 4.5:
        names.append("Q5_K_M")
    if bits > 6.0:
        names.append("Q6_K")
    return tuple(FORMATS[name] for name in [*names, "IQ4_NL"] if name != source.quantization)


def named(text: str) -> tuple[Format, ...]:
    """`Q4_0,q8_0` as formats, each once. Raises ValueError with what to write instead."""
    names = [name.strip().upper() for name in text.split(",") if name.strip()]
    chosen = tuple(FORMATS[name] for name in dict.fromkeys(names) if name in FORMATS)
    if unknown := [name for name in names if name not in FORMATS]:
        raise ValueError(f"{unknown[0][:20]!r} is none of {', '.join(FORMATS)}")
    if not 1 <= len(chosen) <= MAX_FORMATS:
        raise ValueError(f"name one to {MAX_FORMATS} formats, such as Q4_0,Q8_0")
    return chosen


def total_bytes(formats: Sequence[Format], source: Header) -> int:
    """Room for all of them at once: they are measured in turns."""
    return sum(each.most_bytes(source) for each in formats)

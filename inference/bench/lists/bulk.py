"""Writes rows by the thousand, past the managers: nobody is told of them, and no audit entry is written for them."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable
from typing import Any

from django.db.models import Model, QuerySet

CHUNK = 2000
Tell = Callable[[str, int, int], None]
"""What is written, how many of it there are, of how many."""


class Writer:
    """Writes rows of a model by CHUNK; what they are is said by their number."""

    def __init__(self, tell: Tell, chance: random.Random, mark: str) -> None:
        self.tell, self.chance, self.mark = tell, chance, mark

    def name(self, kind: str, number: int) -> str:
        return f"{kind} {number:06} {self.mark}"

    def request_id(self) -> str:
        return str(uuid.UUID(int=self.chance.getrandbits(128), version=4))

    def write(self, model: type[Model], count: int, make: Callable[[int], Model]) -> list[Any]:
        """The primary keys, in the order of the rows. Past the manager, which would write an audit entry for each."""
        keys: list[Any] = []
        rows: QuerySet[Any] = QuerySet(model)
        for first in range(0, count, CHUNK):
            numbers = range(first, min(count, first + CHUNK))
            made = rows.bulk_create([make(number) for number in numbers], batch_size=500)
            keys += [row.pk for row in made]
            self.tell(str(model._meta.verbose_name_plural), len(keys), count)
        return keys

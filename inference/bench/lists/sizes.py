"""How many rows of each kind there are for a number of keys. Pure."""

from __future__ import annotations

from dataclasses import dataclass

MIN_KEYS = 20
MAX_KEYS = 1_000_000
KEYS_A_TENANT = 50
LARGEST_SHARE = 0.3
"""Of the keys, and of all that keys do, the largest tenant has so much."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """At 100,000 keys: 2,000 tenants, 1,000,000 ledger entries, 200,000 receipts, and what belongs to them."""

    keys: int

    def __post_init__(self) -> None:
        if not MIN_KEYS <= self.keys <= MAX_KEYS:
            raise ValueError(f"use {MIN_KEYS} to {MAX_KEYS:,} keys")

    @property
    def tenants(self) -> int:
        return max(4, self.keys // KEYS_A_TENANT)

    @property
    def plans(self) -> int:
        return self._some(5_000, 3, 20)

    @property
    def models(self) -> int:
        return self._some(2_500, 3, 40)

    @property
    def adapters(self) -> int:
        return self._some(250, 3, 400)

    @property
    def staff(self) -> int:
        return self._some(5_000, 2, 20)

    @property
    def months(self) -> int:
        return 3

    @property
    def ledger(self) -> int:
        return self.keys * 10

    @property
    def receipts(self) -> int:
        return self.keys * 2

    @property
    def reservations(self) -> int:
        return self.keys * 2

    @property
    def days(self) -> int:
        return self.keys * 2

    @property
    def audit(self) -> int:
        return self.keys

    @property
    def refusals(self) -> int:
        return self.keys // 2

    @property
    def batches(self) -> int:
        return self.keys // 20

    @property
    def rules(self) -> int:
        return self.keys // 20

    @property
    def raises(self) -> int:
        return self.keys // 20

    def _some(self, keys_each: int, least: int, most: int) -> int:
        """A few even where there are few keys, so that rows of a list differ in whom they belong to."""
        return min(most, max(least, self.keys // keys_each, self.keys // 100))

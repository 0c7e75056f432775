"""What float32 does to numbers that people write in decimals: scores and rewards travel in it."""

from __future__ import annotations

from collections.abc import Sequence

ROUNDING = 2.0**-20
"""How far values that are meant to be equal may be apart, by their size: 0.6 + 0.1 is not 0.7, 0.9 arrives as less, and
the shipped reward model scores equal texts of one batch up to 6e-7 apart, by their places in it."""


def alike(values: Sequence[float]) -> bool:
    """Whether values, one at least, are all equal but for rounding."""
    least, most = min(values), max(values)
    return most - least <= ROUNDING * max(most, -least)


def reaches(value: float, bound: float) -> bool:
    """Whether a value is at least the bound, rounding left out."""
    return value >= bound - ROUNDING * abs(bound)

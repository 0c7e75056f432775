"""The random numbers of one completion."""

from __future__ import annotations

import random


class Draws:
    """Numbers in [0, 1): the seed alone decides the t-th, whoever shares the batch.

    Args:
        seed: 0 to 2**64 - 1.
        skipped: how many were used before, where a completion is resumed.
    """

    def __init__(self, seed: int, skipped: int = 0) -> None:
        # Python's, because torch's generator of a CPU takes the low 32 bits of a seed and drops the others.
        self._generator = random.Random(seed)
        for _ in range(skipped):
            self._generator.random()

    def next(self) -> float:
        """The next number."""
        return self._generator.random()

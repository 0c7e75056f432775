"""The random numbers of one completion."""

from __future__ import annotations

import torch

_BLOCK = 32


class Draws:
    """Numbers in [0, 1): the seed alone decides the t-th, whoever shares the batch.

    Args:
        seed: 0 to 2**64 - 1.
        skipped: how many were used before, where a completion is resumed.
    """

    def __init__(self, seed: int, skipped: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._numbers: list[float] = []
        if skipped:
            torch.rand(skipped, generator=self._generator, dtype=torch.float64)

    def next(self) -> float:
        """The next number."""
        if not self._numbers:
            # In blocks: a call of torch costs as much as the numbers of many tokens.
            block = torch.rand(_BLOCK, generator=self._generator, dtype=torch.float64)
            self._numbers = block.flip(0).tolist()
        return self._numbers.pop()

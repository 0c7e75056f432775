"""Which samples an optimizer step sees, and in which pieces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ppod_trainer.config import PpoConfig


@dataclass(frozen=True, slots=True)
class Minibatch:
    """The samples of one optimizer step.

    Attributes:
        rows: int64 [N], all of their row positions.
        shares: of each rank its micro-batches, int64 row positions; equally many for each, so that some may be empty.
    """

    rows: torch.Tensor
    shares: tuple[tuple[torch.Tensor, ...], ...]


Rows = npt.NDArray[np.int64]


def plan_minibatches(
    samples: int, seed: int, step: int, epoch: int, ppo: PpoConfig, ranks: int = 1
) -> Iterator[Minibatch]:
    """The minibatches of an epoch, by (seed, step, epoch) alone; how many ranks there are decides the shares only."""
    order = np.random.default_rng([seed, 1, step, epoch]).permutation(samples)
    for part in np.array_split(order, min(ppo.minibatches, samples)):
        shares = [_cut(share, ppo.micro_batch_size) for share in np.array_split(part, ranks)]
        count = max(len(share) for share in shares)
        yield Minibatch(torch.from_numpy(part), tuple(_of_length(share, count) for share in shares))


def _cut(rows: Rows, micro_batch_size: int | None) -> list[Rows]:
    size = micro_batch_size or max(len(rows), 1)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _of_length(share: list[Rows], count: int) -> tuple[torch.Tensor, ...]:
    empty = [np.zeros(0, dtype=np.int64)] * (count - len(share))
    return tuple(torch.from_numpy(rows) for rows in [*share, *empty])

"""Which samples an optimizer step sees, and in which pieces."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from ppod_trainer.config import PpoConfig


def minibatches(samples: int, seed: int, step: int, epoch: int, ppo: PpoConfig) -> Iterator[list[torch.Tensor]]:
    """Row positions of each minibatch, int64, cut into micro-batches, by (seed, step, epoch) alone."""
    order = np.random.default_rng([seed, 1, step, epoch]).permutation(samples)
    for part in np.array_split(order, min(ppo.minibatches, samples)):
        size = ppo.micro_batch_size or len(part)
        yield [torch.from_numpy(part[start : start + size]) for start in range(0, len(part), size)]

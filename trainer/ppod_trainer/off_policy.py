"""How far what was sampled is from what is trained: other kernels, other precision, older weights.

Shape legend: B sequences, T response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ppod_trainer.experience import PpoBatch
from ppod_trainer.masking import masked_mean
from ppod_trainer.policy_versions import PolicyVersions
from ppod_trainer.rollouts import ScoredRollout


def measure_off_policy(
    batch: PpoBatch, rollouts: Sequence[ScoredRollout], versions: PolicyVersions, *, keeps: bool = False
) -> dict[str, float]:
    """Differences |trainer's old logprob - sampler's| of the step's action tokens, in nats, and their age in updates.

    `sampler/gap_*` are over tokens that the very policy of `batch` sampled: what kernels and precision do. They are
    left out where there is no such token. `sampler/divergence_*` are over all tokens, which importance weights correct.

    Args:
        batch, rollouts: the step's.
        versions: tells the ages.
        keeps: whether sequences go on under new weights; they may do so with the keys and values of older ones, so that
            what follows on an older token is none of this very policy's.
    """
    mask = batch.responses.action_mask
    ages = torch.zeros(mask.shape, dtype=torch.int64)
    for row, one in enumerate(rollouts):
        sampled = one.rollout.action_mask
        ages[row, : len(sampled)] = torch.from_numpy(np.where(sampled, versions.ages(one.rollout.versions), 0))
    ages = ages.to(mask.device)
    difference = (batch.old_logprobs - batch.sampler_logprobs).abs()
    figures = {
        "sampler/divergence_mean": float(masked_mean(difference, mask)),
        "sampler/divergence_max": float(torch.where(mask, difference, 0.0).max()),
        "sampler/staleness_mean": float(masked_mean(ages.float(), mask)),
        "sampler/staleness_max": float(ages.max()),
    }
    fresh = mask & ((ages.cummax(dim=1).values if keeps else ages) == 0)
    if bool(fresh.any()):
        figures["sampler/gap_mean"] = float(masked_mean(difference, fresh))
        figures["sampler/gap_max"] = float(torch.where(fresh, difference, 0.0).max())
    return figures

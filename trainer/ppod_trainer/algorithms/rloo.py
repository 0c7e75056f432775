"""REINFORCE leave-one-out: a sample's baseline is the mean of the others of its prompt.

Ahmadian et al. 2024, "Back to Basics: Revisiting REINFORCE-Style Optimization for Learning from Human Feedback in
LLMs", RLOO, after Kool et al. 2019. With R_i the return of sample i of a prompt's k, the KL penalty included:

    A_i = R_i - sum over j != i of R_j / (k - 1)

The baseline does not depend on the sample, so the gradient is unbiased. What differs: the paper takes plain REINFORCE
steps, here the clipped objective of `loss.py` is used, which is the same at the first optimizer step on a batch. With
ppo.epochs and ppo.minibatches 1 there is no other. The response is one action there, with the log-probability that its
tokens' add up to: that is ppo.aggregation constant (or token_mean, whose factor differs from batch to batch), and not
sequence_mean, which weighs tokens of long responses less.

Samples of a group that all have the same return, and the sample of a group of one, have advantage 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ppod_trainer.advantages import Advantages
from ppod_trainer.algorithms.base import Experience
from ppod_trainer.algorithms.groups import for_tokens, group_statistics


@dataclass(frozen=True, slots=True)
class Rloo:
    """Returns against the mean of the others of their group."""

    @property
    def critic(self) -> bool:
        """The others stand in for it."""
        return False

    def estimate(self, experience: Experience) -> Advantages:
        """See `AdvantageEstimator`."""
        returns = torch.where(experience.mask, experience.rewards, 0.0).double().sum(dim=1)
        group = group_statistics(returns, experience.groups)
        others = (group.total - returns) / (group.size - 1).clamp(min=1)
        advantages = for_tokens(torch.where(group.uniform, 0.0, returns - others), experience.mask)
        return Advantages(advantages, torch.zeros_like(advantages))

"""REINFORCE++: returns of the tokens that follow, normalised over the whole batch.

Hu 2025, "REINFORCE++: An Efficient RLHF Algorithm with Robustness to Both Prompt and Reward Models". With the outcome R
paid on the last token and the KL penalty on every one (kl.placement reward, estimator k1), gamma 1:

    A_t = R - beta * sum over i >= t of KL_i,    then  A <- (A - mean of the batch) / std of the batch

The normalisation over all response tokens is `advantages.whiten`, which is on by default for these kinds.

The baseline variant (REINFORCE++-Baseline) takes the mean outcome of the prompt's group off the outcome, on the last
token, before it is discounted and normalised, which makes outcomes of easy and hard prompts comparable; the batch's
deviation, not the group's, scales them. The paper puts the KL of this variant into the loss, by k2: kl.placement loss,
kl.estimator k2.

What differs: rewards that an environment pays for a turn are part of the returns of that turn and those before it.

A group whose samples were all paid the same at their end has, with the baseline, A = 0 before normalisation and without
KL in the reward; normalisation shifts it by the batch's mean, which the baseline makes 0 where all responses are of one
length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ppod_trainer.advantages import Advantages, gae
from ppod_trainer.algorithms.base import Experience
from ppod_trainer.algorithms.groups import group_statistics
from ppod_trainer.token_rewards import token_rewards


@dataclass(frozen=True, slots=True)
class ReinforcePlusPlus:
    """Returns of the tokens that follow.

    Attributes:
        gamma: discount a token; the paper's is 1.
        baseline: take the group's mean outcome off.
    """

    gamma: float
    baseline: bool

    @property
    def critic(self) -> bool:
        """It reads no values."""
        return False

    def estimate(self, experience: Experience) -> Advantages:
        """See `AdvantageEstimator`."""
        rewards, mask = experience.rewards, experience.mask
        if self.baseline:
            mean = group_statistics(experience.outcomes, experience.groups).mean
            rewards = token_rewards(-mean, None, mask, 0.0, rewards)
        zeros = torch.zeros_like(rewards)
        # With values of 0 and lambda 1 the sum of GAE's deltas is the discounted return.
        return Advantages(gae(rewards, zeros, mask, gamma=self.gamma, lam=1.0).advantages, zeros)

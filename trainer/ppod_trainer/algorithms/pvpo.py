"""A baseline that is estimated beforehand: what the initial policy gets for the prompt.

Feng et al. 2025, "PVPO: Pre-Estimated Value-Based Policy Optimization for Agentic Reasoning". With r_ref the
rewards of rollouts that the reference policy made of the same prompt before training:

    A_i,t = r_i - mean(r_ref)

The anchor does not move with the policy, so a group whose samples are all better than the reference's has a positive
advantage, all of it, where GRPO sees 0; and one sample of a prompt is enough. As outcomes rise, most advantages are
positive: the clipped objective bounds what that does. A policy that begins at random has anchors near 0, and nearly
all that it says is reinforced; this is an algorithm for policies that can do something already.

What differs: the paper renews the anchor now and then from a newer reference, here it stays that of the initial policy;
and it drops prompts that the reference always, and shows solutions of those that it never, solves, which
`rollout.history_resampling` does in part. KL belongs into the loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ppod_trainer.advantages import Advantages
from ppod_trainer.algorithms.base import Experience
from ppod_trainer.algorithms.groups import for_tokens
from ppod_trainer.presampling import PreEstimates


@dataclass(frozen=True, slots=True)
class Pvpo:
    """Outcomes against what the initial policy gets."""

    estimates: PreEstimates

    @property
    def critic(self) -> bool:
        """The estimates stand in for it."""
        return False

    def estimate(self, experience: Experience) -> Advantages:
        """See `AdvantageEstimator`. Raises TrainerError: a prompt was never estimated."""
        baseline = self.estimates.of(experience.prompts.tolist())
        difference = experience.outcomes.double() - torch.tensor(baseline, dtype=torch.float64).to(
            experience.outcomes.device
        )
        advantages = for_tokens(difference, experience.mask)
        return Advantages(advantages, torch.zeros_like(advantages))

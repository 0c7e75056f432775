"""Group relative policy optimisation: a sample is judged by the others of its prompt.

Shao et al. 2024, "DeepSeekMath", section 4.1.2, outcome supervision. With r_i paid for sample i of a prompt's G:

    A_i,t = (r_i - mean(r)) / (std(r) + 1e-6)

Dr. GRPO (Liu et al. 2025, "Understanding R1-Zero-Like Training", section 3) leaves the deviation out, which weighs
prompts that are nearly solved, or nearly hopeless, more than others:

    A_i,t = r_i - mean(r)

What differs: the deviation is unbiased, as the common implementations have it; the paper does not say. The clipped
objective, the KL term in the loss and the sum over tokens are those of `loss.py`; GRPO's mean over each response's
length, and Dr. GRPO's constant instead of it, are `ppo.aggregation`.

A group whose samples were all paid the same, and a group of one, has advantage 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ppod_trainer.advantages import Advantages
from ppod_trainer.algorithms.base import Experience
from ppod_trainer.algorithms.groups import GroupStatistics, for_tokens, group_statistics

_SMALLEST = 1e-6
"""Added to the deviation, so that outcomes that differ by rounding only have no large advantages."""


@dataclass(frozen=True, slots=True)
class Grpo:
    """Outcomes against their group's mean.

    Attributes:
        scaled: divide by the group's deviation; False is Dr. GRPO.
    """

    scaled: bool

    @property
    def critic(self) -> bool:
        """The group stands in for it."""
        return False

    def estimate(self, experience: Experience) -> Advantages:
        """See `AdvantageEstimator`."""
        advantages = for_tokens(relative_outcomes(experience, scaled=self.scaled), experience.mask)
        return Advantages(advantages, torch.zeros_like(advantages))


def relative_outcomes(experience: Experience, *, scaled: bool) -> torch.Tensor:
    """Outcomes less their group's mean, over its deviation if `scaled`: float64 [B], exactly 0 in uniform groups."""
    return relative(experience.outcomes, group_statistics(experience.outcomes, experience.groups), scaled=scaled)


def relative(values: torch.Tensor, group: GroupStatistics, *, scaled: bool) -> torch.Tensor:
    """Values less the mean of their group, over its deviation if `scaled`: float64, exactly 0 in uniform groups."""
    difference = values.double() - group.mean
    return difference / (group.std + _SMALLEST) if scaled else difference

"""PPO's own: generalised advantage estimation (Schulman et al. 2016), see `advantages.gae`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ppod_trainer.advantages import Advantages, gae
from ppod_trainer.algorithms.base import Experience


@dataclass(frozen=True, slots=True)
class Gae:
    """GAE(gamma, lambda) over action tokens.

    Attributes:
        gamma, lam: discount a token, and lambda.
        bootstrap_truncated: a response that was cut off goes on with the value of its next state.
    """

    gamma: float
    lam: float
    bootstrap_truncated: bool

    @property
    def critic(self) -> bool:
        """It reads values."""
        return True

    def estimate(self, experience: Experience) -> Advantages:
        """See `AdvantageEstimator`."""
        one = experience
        bootstrap = torch.where(one.truncated, one.next_values, 0.0) if self.bootstrap_truncated else None
        return gae(one.rewards, one.values, one.mask, gamma=self.gamma, lam=self.lam, bootstrap_values=bootstrap)

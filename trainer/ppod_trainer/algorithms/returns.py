"""The two ends of GAE: returns as they came, and one step of reward with the next value."""

from __future__ import annotations

from dataclasses import dataclass

from ppod_trainer.advantages import Advantages, monte_carlo_advantages, one_step_advantages
from ppod_trainer.algorithms.base import Experience


@dataclass(frozen=True, slots=True)
class MonteCarlo:
    """A_t = discounted return - V_t, see `advantages.monte_carlo_advantages`; attributes as of `Gae`."""

    gamma: float
    bootstrap_truncated: bool

    @property
    def critic(self) -> bool:
        """It reads values."""
        return True

    def estimate(self, experience: Experience) -> Advantages:
        """See `AdvantageEstimator`."""
        one = experience
        bootstrap = one.bootstrap_values() if self.bootstrap_truncated else None
        return monte_carlo_advantages(one.rewards, one.values, one.mask, gamma=self.gamma, bootstrap_values=bootstrap)


@dataclass(frozen=True, slots=True)
class OneStep:
    """A_t = r_t + gamma * V_{t+1} - V_t, see `advantages.one_step_advantages`; attributes as of `Gae`."""

    gamma: float
    bootstrap_truncated: bool

    @property
    def critic(self) -> bool:
        """It reads values."""
        return True

    def estimate(self, experience: Experience) -> Advantages:
        """See `AdvantageEstimator`."""
        one = experience
        bootstrap = one.bootstrap_values() if self.bootstrap_truncated else None
        return one_step_advantages(one.rewards, one.values, one.mask, gamma=self.gamma, bootstrap_values=bootstrap)

"""PPO's own: generalised advantage estimation (Schulman et al. 2016), see `advantages.gae`."""

from __future__ import annotations

from dataclasses import dataclass

from ppod_trainer.advantages import Advantages, gae, length_adaptive_lambda
from ppod_trainer.algorithms.base import Experience


@dataclass(frozen=True, slots=True)
class Gae:
    """GAE(gamma, lambda) over action tokens.

    Attributes:
        gamma, lam: discount a token, and lambda.
        bootstrap_truncated: a response that was cut off goes on with the value of its next state.
        value_lam: lambda of the value targets; None: `lam`, or each response's own.
        length_alpha: alpha of the length-adaptive lambda, which takes the place of `lam`; None: off.
    """

    gamma: float
    lam: float
    bootstrap_truncated: bool
    value_lam: float | None = None
    length_alpha: float | None = None

    @property
    def critic(self) -> bool:
        """It reads values."""
        return True

    def estimate(self, experience: Experience) -> Advantages:
        """See `AdvantageEstimator`."""
        one = experience
        return gae(
            one.rewards,
            one.values,
            one.mask,
            gamma=self.gamma,
            lam=self.lam if self.length_alpha is None else length_adaptive_lambda(one.mask, self.length_alpha),
            value_lam=self.value_lam,
            bootstrap_values=one.bootstrap_values() if self.bootstrap_truncated else None,
        )

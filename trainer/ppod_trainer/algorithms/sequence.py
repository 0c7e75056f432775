"""The response as one action: A = R - V(s), see `advantages.sequence_advantages`."""

from __future__ import annotations

from dataclasses import dataclass

from ppod_trainer.advantages import Advantages, sequence_advantages
from ppod_trainer.algorithms.base import Experience


@dataclass(frozen=True, slots=True)
class SequenceAdvantage:
    """A = R - V(s) for every token, with the value before the first.

    Attributes:
        bootstrap_truncated: a response that was cut off goes on with the value of its next state, which adds to R.
    """

    bootstrap_truncated: bool = False

    @property
    def critic(self) -> bool:
        """It reads values."""
        return True

    def estimate(self, experience: Experience) -> Advantages:
        """See `AdvantageEstimator`."""
        one = experience
        bootstrap = one.bootstrap_values() if self.bootstrap_truncated else None
        return sequence_advantages(one.rewards, one.values, one.mask, bootstrap_values=bootstrap)

"""The response as one action: A = R - V(s), see `advantages.sequence_advantages`."""

from __future__ import annotations

from dataclasses import dataclass

from ppod_trainer.advantages import Advantages, sequence_advantages
from ppod_trainer.algorithms.base import Experience


@dataclass(frozen=True, slots=True)
class SequenceAdvantage:
    """A = R - V(s) for every token, with the value before the first."""

    @property
    def critic(self) -> bool:
        """It reads values."""
        return True

    def estimate(self, experience: Experience) -> Advantages:
        """See `AdvantageEstimator`."""
        return sequence_advantages(experience.rewards, experience.values, experience.mask)

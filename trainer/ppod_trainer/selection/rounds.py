"""What a step keeps of the samples that it drew, and whether it draws more: rounds of sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ppod_trainer.rollouts import ScoredRollout


@dataclass(frozen=True, slots=True)
class Selected:
    """What is kept of the rounds so far.

    Attributes:
        rollouts: what the step trains on, if no round follows.
        full: no more are wanted.
        figures: for the metrics.
    """

    rollouts: list[ScoredRollout]
    full: bool
    figures: dict[str, float] = field(default_factory=dict[str, float])


class Selection(Protocol):
    """Decides by the rounds of a step alone, so that a step that is done again is done the same way."""

    @property
    def max_rounds(self) -> int:
        """Most rounds of a step."""
        ...

    def select(self, rounds: Sequence[Sequence[ScoredRollout]]) -> Selected:
        """Of the samples of these rounds, each of a batch, in their order."""
        ...


class AllRollouts:
    """One round, and all of it."""

    @property
    def max_rounds(self) -> int:
        """One."""
        return 1

    def select(self, rounds: Sequence[Sequence[ScoredRollout]]) -> Selected:
        """See `Selection`."""
        return Selected(list(rounds[0]), full=True)

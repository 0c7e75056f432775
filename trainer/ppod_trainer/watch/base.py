"""What a detector is, and what the detectors share. Each looks at one step's record after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, cast

from ppod_trainer.config import TroubleKind
from ppod_trainer.stateful import JsonState

Record = Mapping[str, float]


class Detector(Protocol):
    """Looks for one kind of trouble. A `Stateful`: what it remembers of earlier steps is checkpointed."""

    @property
    def kind(self) -> TroubleKind:
        """Of trouble."""
        ...

    def observe(self, record: Record) -> str | None:
        """Take in the next step's record; what is seen of the trouble, in words, or None."""
        ...

    def state(self) -> JsonState:
        """See `Stateful`."""
        ...

    def restore(self, state: JsonState) -> None:
        """See `Stateful`."""
        ...


@dataclass(slots=True)
class Streak:
    """Counts steps in a row. One bad batch is noise; a trouble stays.

    Attributes:
        needed: steps in a row.
        count: so far.
    """

    needed: int
    count: int = 0

    def reached(self, bad: bool) -> bool:
        """Count a step; whether enough in a row were bad."""
        self.count = self.count + 1 if bad else 0
        return self.count >= self.needed

    def state(self) -> JsonState:
        """The count."""
        return {"count": self.count}

    def restore(self, state: JsonState) -> None:
        """Take the count of a checkpoint."""
        self.count = int(cast(int, state["count"]))


@dataclass(slots=True)
class Baseline:
    """Mean of a figure over the first steps.

    Attributes:
        steps: how many.
        seen: of them so far.
        total: sum of the figure over them.
    """

    steps: int
    seen: int = 0
    total: float = 0.0

    def mean(self, value: float) -> float | None:
        """Take in a step's figure; None while the baseline is being made, this step included."""
        if self.seen < self.steps:
            self.seen += 1
            self.total += value
            return None
        return self.total / self.seen

    def state(self) -> JsonState:
        """What is summed up so far."""
        return {"seen": self.seen, "total": self.total}

    def restore(self, state: JsonState) -> None:
        """Take that of a checkpoint."""
        self.seen = int(cast(int, state["seen"]))
        self.total = float(cast(float, state["total"]))

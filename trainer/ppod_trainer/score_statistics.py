"""Running mean and spread of all scores of a run, which put the scores of any reward model on one scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from ppod_trainer.stateful import JsonState

_SMALLEST_STD = 1e-6
"""Scores that vary less are left as they are: to divide by it would blow up rounding errors."""


@dataclass(slots=True)
class ScoreStatistics:
    """Mean and variance over all scores so far (Welford 1962; by batches: Chan et al. 1979).

    Unlike the statistics of a single batch they do not hide that a whole batch is good or bad.

    Attributes:
        count: scores so far.
        mean: of them.
        squares: sum of squared differences from the mean.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def update(self, scores: Sequence[float]) -> None:
        """Take in a step's scores."""
        if not scores:
            return
        values = np.asarray(scores, dtype=np.float64)
        mean, count = float(values.mean()), self.count + len(values)
        difference = mean - self.mean
        self.squares += float(np.square(values - mean).sum()) + difference**2 * self.count * len(values) / count
        self.mean += difference * len(values) / count
        self.count = count

    @property
    def std(self) -> float:
        """Standard deviation of all scores (unbiased variance); 1 while they are fewer than two, or all equal."""
        std = math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 0.0
        return std if std >= _SMALLEST_STD else 1.0

    def state(self) -> JsonState:
        """All three numbers."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def restore(self, state: JsonState) -> None:
        """Take those of a checkpoint."""
        self.count = int(cast(int, state["count"]))
        self.mean = float(cast(float, state["mean"]))
        self.squares = float(cast(float, state["squares"]))

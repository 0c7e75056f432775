"""Responses that degenerate: they grow, repeat themselves, or become certain. Each is held to the run's first steps."""

from __future__ import annotations

from typing import cast

from ppod_trainer.config import TroubleKind
from ppod_trainer.stateful import JsonState
from ppod_trainer.watch.base import Baseline, Record, Streak


class Drift:
    """A figure that has left its baseline behind. Steps that did not measure it change nothing.

    Args:
        kind: of trouble.
        figure: key of the record.
        ratio: of the baseline; above 1 the figure must not rise past it, below 1 not fall past it.
        baseline: of the figure.
        streak: how long it has been past it.
    """

    def __init__(self, kind: TroubleKind, figure: str, ratio: float, baseline: Baseline, streak: Streak) -> None:
        self._kind: TroubleKind = kind
        self._figure = figure
        self._ratio = ratio
        self._baseline = baseline
        self._streak = streak

    @property
    def kind(self) -> TroubleKind:
        """See `Detector`."""
        return self._kind

    def observe(self, record: Record) -> str | None:
        """See `Detector`."""
        value = record.get(self._figure)
        if value is None:
            return None
        mean = self._baseline.mean(value)
        if mean is None:
            return None
        bound = self._ratio * mean
        past = value > bound if self._ratio > 1 else value < bound
        if not self._streak.reached(past):
            return None
        return (
            f"{self._figure} is {value:.3g}, {'above' if self._ratio > 1 else 'below'} {self._ratio:g} times the "
            f"{mean:.3g} of the first {self._baseline.steps} steps"
        )

    def state(self) -> JsonState:
        """See `Detector`."""
        return {"baseline": self._baseline.state(), "streak": self._streak.state()}

    def restore(self, state: JsonState) -> None:
        """See `Detector`."""
        self._baseline.restore(cast(JsonState, state["baseline"]))
        self._streak.restore(cast(JsonState, state["streak"]))

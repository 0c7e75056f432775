"""Responses that degenerate: they grow, repeat themselves, or become certain. Each is held to the run's first steps."""

from __future__ import annotations

from typing import cast

from ppod_trainer.config import TroubleKind, WatchConfig
from ppod_trainer.stateful import JsonState
from ppod_trainer.watch.base import Baseline, Record, Streak

_MOST = 0.5
"""Of responses: where fewer end by themselves at first, a step's few may end nowhere by chance."""


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


class LengthGrowth:
    """Responses grow: past a multiple of their first length, or to where they are cut off, as most were not at first.

    A limit below that multiple would hide all growth. Where most are cut off from the start it says nothing.
    """

    def __init__(self, config: WatchConfig) -> None:
        self._length = Drift(
            self.kind, "response/length", config.length_ratio, Baseline(config.baseline_steps), Streak(config.steps)
        )
        self._ratio = config.ended_ratio
        self._ended = Baseline(config.baseline_steps)
        self._streak = Streak(config.steps)

    @property
    def kind(self) -> TroubleKind:
        """See `Detector`."""
        return "length_growth"

    def observe(self, record: Record) -> str | None:
        """See `Detector`."""
        grown, cut_off = self._length.observe(record), self._cut_off(record["response/truncated"])
        return grown or cut_off

    def _cut_off(self, share: float) -> str | None:
        mean = self._ended.mean(1 - share)
        if mean is None or not self._streak.reached(mean >= _MOST and 1 - share < self._ratio * mean):
            return None
        return (
            f"{share:.0%} of the responses are cut off at their limit; of those of the first {self._ended.steps} steps "
            f"{1 - mean:.0%} were"
        )

    def state(self) -> JsonState:
        """See `Detector`."""
        return {**self._length.state(), "ended": self._ended.state(), "cut_off": self._streak.state()}

    def restore(self, state: JsonState) -> None:
        """See `Detector`. A checkpoint of an earlier version knows of lengths alone."""
        self._length.restore(state)
        if "ended" in state:
            self._ended.restore(cast(JsonState, state["ended"]))
            self._streak.restore(cast(JsonState, state["cut_off"]))

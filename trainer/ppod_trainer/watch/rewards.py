"""Rewards that teach nothing, or the wrong thing."""

from __future__ import annotations

from typing import cast

import numpy as np

from ppod_trainer.config import TroubleKind, WatchConfig
from ppod_trainer.stateful import JsonState
from ppod_trainer.watch.base import Record, Streak


class AllEqualRewards:
    """Every sample of a step is paid the same: no sample is better than another, and nothing can be learned."""

    def __init__(self, config: WatchConfig) -> None:
        self._bound = config.score_std
        self._streak = Streak(config.steps)

    @property
    def kind(self) -> TroubleKind:
        """See `Detector`."""
        return "all_equal_rewards"

    def observe(self, record: Record) -> str | None:
        """See `Detector`."""
        std = record["score/std"]
        if not self._streak.reached(std <= self._bound):
            return None
        return f"all outcomes of a step are {record['score/mean']:.3g}, for {self._streak.count} steps"

    def state(self) -> JsonState:
        """See `Detector`."""
        return self._streak.state()

    def restore(self, state: JsonState) -> None:
        """See `Detector`."""
        self._streak.restore(state)


class RewardHacking:
    """The reward model's score rises while a held-out judge's, which is never trained against, falls or lags behind.

    Looked at over the latest judged steps: the means of their later and earlier halves, in standard deviations of the
    step's samples (a judge may have another scale than the reward model). Gao et al. 2023, "Scaling Laws for Reward
    Model Overoptimization", shows this to be how overoptimisation looks. Steps that were not judged change nothing.
    """

    def __init__(self, config: WatchConfig) -> None:
        self._points = config.judged_steps
        self._fall = config.judge_fall
        self._parting = config.judge_parting
        self._scores: list[float] = []
        self._judged: list[float] = []
        self._seen: str | None = None

    @property
    def kind(self) -> TroubleKind:
        """See `Detector`."""
        return "reward_hacking"

    def observe(self, record: Record) -> str | None:
        """See `Detector`."""
        if "judge/mean" not in record:
            return self._seen
        self._scores = [*self._scores, record["score/mean"]][-self._points :]
        self._judged = [*self._judged, record["judge/mean"]][-self._points :]
        self._seen = None
        if len(self._scores) < self._points:
            return None
        score = _rise(self._scores, record["score/std"])
        judge = _rise(self._judged, record["judge/std"])
        if score > self._fall and (judge < -self._fall or score - judge > self._parting):
            self._seen = (
                f"over the last {self._points} judged steps the score rose by {score:.2f} standard deviations, the "
                f"held-out judge's by {judge:.2f}"
            )
        return self._seen

    def state(self) -> JsonState:
        """See `Detector`."""
        return {"scores": [*self._scores], "judged": [*self._judged], "seen": self._seen}

    def restore(self, state: JsonState) -> None:
        """See `Detector`."""
        self._scores = [float(value) for value in cast(list[float], state["scores"])]
        self._judged = [float(value) for value in cast(list[float], state["judged"])]
        self._seen = cast(str | None, state["seen"])


def _rise(values: list[float], std: float) -> float:
    """Mean of the later half minus that of the earlier, in standard deviations; 0 where there is no deviation."""
    half = len(values) // 2
    return float(np.mean(values[-half:]) - np.mean(values[:half])) / std if std > 0 else 0.0

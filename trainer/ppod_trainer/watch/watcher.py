"""Looks at every step's record for each kind of trouble, says so in the log, and stops the run where it is told to."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import cast

from ppod_trainer.config import TroubleKind, WatchConfig
from ppod_trainer.errors import TroubleError
from ppod_trainer.stateful import JsonState
from ppod_trainer.watch.base import Baseline, Detector, Record, Streak
from ppod_trainer.watch.responses import Drift, LengthGrowth
from ppod_trainer.watch.rewards import AllEqualRewards, RewardHacking
from ppod_trainer.watch.update import DeadGradients, KlBlowUp, SamplerGap, ValueCollapse

log = logging.getLogger(__name__)

ADVICE: dict[TroubleKind, str] = {
    "reward_hacking": "raise kl.coefficient, take an ensemble of reward models, or keep an earlier checkpoint",
    "length_growth": "set rewards.length_penalty or rewards.overlong, or look whether the reward model prefers length",
    "repetition": "raise kl.coefficient, or set rewards.filters.max_repetition",
    "entropy_collapse": "set ppo.entropy_coefficient or ppo.clip_high, or lower optimizer.learning_rate",
    "kl_blow_up": "lower optimizer.learning_rate or ppo.epochs, set ppo.stop_kl or kl.adaptive",
    "value_collapse": "raise optimizer.value_learning_rate or ppo.value_coefficient, or set rewards.normalize",
    "dead_gradients": "look at clip fraction, rewards and masks: nothing is left to learn from",
    "all_equal_rewards": "look at some samples and their scores: the task is too easy, too hard, or not scored at all",
    "sampler_gap": "compute in one data type on both sides, look whether generation serves the same model, or set "
    "ppo.importance_cap",
}


class Watcher:
    """The detectors of a run; a `Stateful`.

    Args:
        detectors: one for each kind of trouble that is looked for.
        stop: kinds that stop the run.
    """

    def __init__(self, detectors: Sequence[Detector], stop: Sequence[TroubleKind]) -> None:
        self._detectors: dict[TroubleKind, Detector] = {one.kind: one for one in detectors}
        self._stop = tuple(stop)
        self._present: dict[TroubleKind, str] = {}

    def observe(self, step: int, record: Record) -> dict[str, float]:
        """Look at a step's record; `trouble/<kind>`, 1 or 0, for each kind. What is new is logged, with what to try."""
        found: dict[TroubleKind, str] = {}
        for kind, one in self._detectors.items():
            seen = one.observe(record)
            if seen is not None:
                found[kind] = seen
        for kind, seen in found.items():
            if kind not in self._present:
                log.warning("step %d: %s: %s; try this: %s", step, kind, seen, ADVICE[kind])
        self._present = found
        return {f"trouble/{kind}": float(kind in found) for kind in self._detectors}

    def check(self, step: int) -> None:
        """Raise TroubleError where the last record showed a trouble that stops the run."""
        for kind in self._stop:
            if kind in self._present:
                raise TroubleError(
                    f"step {step}: watch.stop names {kind}: {self._present[kind]}; try this: {ADVICE[kind]}"
                )

    def state(self) -> JsonState:
        """What each detector remembers, and which troubles there are."""
        detectors = {str(kind): one.state() for kind, one in self._detectors.items()}
        return {"detectors": dict(detectors), "present": {str(kind): seen for kind, seen in self._present.items()}}

    def restore(self, state: JsonState) -> None:
        """Take that of a checkpoint. Detectors that were not looking then begin anew; others' memories are dropped."""
        kept = cast(dict[str, JsonState], state["detectors"])
        present = cast(dict[str, str], state["present"])
        self._present = {}
        for kind, one in self._detectors.items():
            if kind in present:
                self._present[kind] = present[kind]
            if kind in kept:
                one.restore(kept[kind])


def build_watcher(config: WatchConfig, *, critic: bool) -> Watcher:
    """The detectors that the configuration leaves; without a critic there are no values to look at."""

    def drift(kind: TroubleKind, figure: str, ratio: float) -> Detector:
        return Drift(kind, figure, ratio, Baseline(config.baseline_steps), Streak(config.steps))

    detectors: list[Detector] = [
        RewardHacking(config),
        LengthGrowth(config),
        drift("repetition", "response/distinct_2", config.distinct_ratio),
        drift("entropy_collapse", "policy/entropy", config.entropy_ratio),
        KlBlowUp(config),
        DeadGradients(config),
        AllEqualRewards(config),
        SamplerGap(config),
    ]
    if critic:
        detectors.append(ValueCollapse(config))
    return Watcher([one for one in detectors if one.kind not in config.ignore], config.stop)

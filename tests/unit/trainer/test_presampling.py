"""Prompts of which nothing is known before training, because every sample of them was refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from ppod_models.configuration import parse_config
from ppod_trainer.assembly import presample_for
from ppod_trainer.checkpoint import TrainerState
from ppod_trainer.config import TrainerConfig
from ppod_trainer.metrics import StepTimer
from ppod_trainer.presampling import PreEstimates
from ppod_trainer.prompts import Prompt, PromptSet
from ppod_trainer.rollouts import Rollout, ScoredRollout, Turn
from ppod_trainer.step_rollouts import build_step_rollouts
from support.pushed_runs import Generation, run_of

PVPO: dict[str, Any] = {
    "steps": 3,
    "rollout": {"batch_size": 4, "samples_per_prompt": 2, "on_bad_sample": "skip"},
    "advantages": {"kind": "pvpo", "presamples": 2},
    "kl": {"placement": "loss", "estimator": "k3"},
}
PROMPTS = PromptSet([Prompt(index, np.array([index], np.int32)) for index in range(4)], [])


def rollout_of(prompt: Prompt, seed: int) -> Rollout:
    one = np.ones(1)
    turn = Turn(one.astype(np.int32), one.astype(np.float32), one.astype(np.int64), truncated=False, stop_token=True)
    return Rollout.of_turn(prompt, turn, seed)


class Collector:
    """Makes a rollout for each seed; as it presamples, refuses those of prompt 2."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def generate(self, prompts: Sequence[Prompt], seeds: Sequence[int], *_: object) -> list[Rollout]:
        self.asked = [(prompt.index, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        return [rollout_of(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]

    def collect(self, prompts: Sequence[Prompt], seeds: Sequence[int], *_: object) -> list[ScoredRollout]:
        kept = [(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True) if prompt.index != 2]
        return [ScoredRollout(rollout_of(prompt, seed), 1.0, np.zeros(1, np.float32)) for prompt, seed in kept]


def test_a_prompt_without_an_estimate_is_left_out_of_its_steps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its advantage would be of nothing, which would end the run amid a step."""
    collector, estimates = Collector(), PreEstimates()
    generation = Generation()
    parts = {"collector": collector, "prompts": PROMPTS, "estimates": estimates}
    presample_for(run_of(tmp_path, generation, TrainerState(0, 0, 0, ""), PVPO, **parts))
    assert estimates.values == {0: 1.0, 1: 1.0, 3: 1.0}
    [record] = caplog.records
    assert record.getMessage() == "1 prompts are left out, as all samples of each were refused; the first is 2"
    config = parse_config(TrainerConfig, PVPO, "test")
    with_all = build_step_rollouts(config, PROMPTS, cast(Any, collector))
    without = build_step_rollouts(config, PROMPTS, cast(Any, collector), estimates)
    for step in range(2):
        made = [with_all.generate(step, 0, 1, StepTimer()), without.generate(step, 0, 1, StepTimer())]
        wanted, found = [[(one.prompt.index, one.seed, one.group) for one in rollouts] for rollouts in made]
        assert found == [one for one in wanted if one[0] != 2]


def test_nothing_is_left_out_where_nothing_is_estimated() -> None:
    config = parse_config(TrainerConfig, {"rollout": {"batch_size": 4}}, "test")
    collector = cast(Any, SimpleNamespace(generate=Collector().generate))
    assert len(build_step_rollouts(config, PROMPTS, collector).generate(0, 0, 1, StepTimer())) == 4

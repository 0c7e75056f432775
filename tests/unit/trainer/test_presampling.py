"""Prompts of which nothing is known before training, because every sample of them was refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
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
from ppod_trainer.presampling import PreEstimates, planned_prompts, presample
from ppod_trainer.prompts import Prompt, PromptSet
from ppod_trainer.rollouts import Rollout, ScoredRollout, Turn, sample_seed
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
    turn = Turn(
        one.astype(np.int32), one.astype(np.float32), one.astype(np.int64), truncated=False, hides_stop_token=True
    )
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


@pytest.mark.parametrize(
    ("steps", "rollout", "planned"),
    [
        (3, {}, 6),
        (4, {}, 8),
        (5, {}, 9),
        (1, {"dynamic_sampling": {}}, 9),
        (1, {"history_resampling": {}}, 9),
    ],
)
def test_what_the_steps_will_draw_is_planned(steps: int, rollout: dict[str, object], planned: int) -> None:
    """Two of nine prompts a step; which they are is known beforehand, unless outcomes decide."""
    prompts = PromptSet([Prompt(index, np.array([index], np.int32)) for index in (4, 2, 8, 0, 1, 7, 3, 6, 5)], [])
    values = {**PVPO, "steps": steps, "rollout": {**PVPO["rollout"], **rollout}}
    config = parse_config(TrainerConfig, values, "test")
    schedule = build_step_rollouts(config, prompts, cast(Any, None)).schedule
    drawn = {prompt.index for step in range(steps if planned < 9 else 0) for prompt in schedule.prompts(step, 0)}
    found = [prompt.index for prompt in planned_prompts(config, prompts)]
    assert found == sorted(drawn or range(9))
    assert len(found) == planned


def test_every_sample_of_a_prompt_counts_for_its_estimate() -> None:
    values = {**PVPO, "rollout": {**PVPO["rollout"], "batch_size": 2}, "rewards": {"clip": 4.5}}
    config = parse_config(TrainerConfig, values, "test")
    asked: list[list[tuple[int, int]]] = []

    def collect(prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[ScoredRollout]:
        asked.append([(prompt.index, seed) for prompt, seed in zip(prompts, seeds, strict=True)])
        made = [rollout_of(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        paid, first = np.array([0.125, 0.125], np.float32), 2 * (len(asked) - 1)
        return [
            ScoredRollout(replace(one, rewards=paid), first + float(number), np.zeros(1, np.float32))
            for number, one in enumerate(made)
        ]

    # Scores of 0 to 5, the last of which is clipped, and the environment's pay besides.
    estimates = presample(PROMPTS.training[:3], config, collect)
    assert estimates.values == {0: 0.75, 1: 2.75, 2: 4.5}
    seeds = [[(index, sample_seed(0, "presample", sample, index)) for sample in range(2)] for index in range(3)]
    assert asked == seeds

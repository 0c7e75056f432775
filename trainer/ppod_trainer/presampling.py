"""What the initial policy gets for each prompt, sampled before training: `algorithms.pvpo` judges by it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch

from ppod_trainer.config import RewardsConfig, TrainerConfig
from ppod_trainer.errors import TrainerError
from ppod_trainer.prompts import Prompt, PromptSet
from ppod_trainer.rollouts import ScoredRollout, sample_seed
from ppod_trainer.score_shaping import ScoreScale, shape_scores
from ppod_trainer.stateful import JsonState


@dataclass(frozen=True, slots=True)
class PreEstimates:
    """Mean outcome of the initial policy's samples, by the index of the prompt."""

    values: dict[int, float] = field(default_factory=dict[int, float])

    def of(self, prompts: Sequence[int]) -> list[float]:
        """The estimates of these prompts. Raises TrainerError that names one which has none."""
        missing = next((index for index in prompts if index not in self.values), None)
        if missing is not None:
            raise TrainerError(
                f"prompt {missing} has no pre-estimated value: every sample of it was refused before training; look at "
                "the warnings above, or remove it from the prompts"
            )
        return [self.values[index] for index in prompts]

    def state(self) -> JsonState:
        """All estimates."""
        return {"values": {str(index): value for index, value in self.values.items()}}

    def restore(self, state: JsonState) -> None:
        """Take the estimates of a checkpoint: the initial policy cannot be asked again."""
        kept = cast("dict[str, float]", state["values"])
        self.values.clear()
        self.values.update({int(index): float(value) for index, value in kept.items()})


def planned_prompts(config: TrainerConfig, prompts: PromptSet) -> list[Prompt]:
    """The training prompts that the run will use, as far as that is known beforehand, by their index."""
    rollout = config.rollout
    per_step = rollout.batch_size // rollout.samples_per_prompt
    by_outcome = rollout.dynamic_sampling is not None or rollout.history_resampling is not None
    if by_outcome or per_step * config.steps >= len(prompts.training):
        return sorted(prompts.training, key=lambda prompt: prompt.index)
    used = {
        prompt.index: prompt for step in range(config.steps) for prompt in prompts.for_step(step, per_step, config.seed)
    }
    return [used[index] for index in sorted(used)]


def presample(
    prompts: Sequence[Prompt],
    config: TrainerConfig,
    collect: Callable[[Sequence[Prompt], Sequence[int]], list[ScoredRollout]],
) -> PreEstimates:
    """Sample each prompt `advantages.presamples` times with the present weights; the mean outcome of each.

    Args:
        prompts: to be estimated.
        config: the run's.
        collect: samples and scores one response for each prompt, by its seed.

    Raises:
        PpodError: a service failed; or it named a bad sample and the configuration says to stop.
    """
    count, batch = config.advantages.presamples, config.rollout.batch_size
    asked = [
        (prompt, sample_seed(config.seed, "presample", sample, prompt.index))
        for prompt in prompts
        for sample in range(count)
    ]
    outcomes: dict[int, list[float]] = {}
    for start in range(0, len(asked), batch):
        some = asked[start : start + batch]
        found = collect([one for one, _ in some], [seed for _, seed in some])
        for scored, outcome in zip(found, shaped_outcomes(found, config.rewards), strict=True):
            outcomes.setdefault(scored.rollout.prompt.index, []).append(outcome)
    return PreEstimates({index: sum(each) / len(each) for index, each in outcomes.items()})


def shaped_outcomes(rollouts: Sequence[ScoredRollout], rewards: RewardsConfig) -> list[float]:
    """What training would pay for each: the shaped score and the environment's rewards."""
    scores = shape_scores(
        torch.tensor([one.score for one in rollouts]),
        torch.tensor([one.rollout.truncated for one in rollouts]),
        torch.tensor([one.rollout.sampled for one in rollouts]),
        rewards,
        ScoreScale(),
    )
    return [score + float(one.rollout.rewards.sum()) for score, one in zip(scores.tolist(), rollouts, strict=True)]


def keep_estimates(path: Path, estimates: PreEstimates) -> None:
    """Write the estimates where people find them, as JSON by the index of the prompt."""
    path.write_text(json.dumps(estimates.state()["values"], indent=1) + "\n", encoding="utf-8")

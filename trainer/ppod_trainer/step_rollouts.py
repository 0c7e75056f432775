"""The rollouts of one step: which prompts and seeds it has, how many samples of each, and which of them it keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ppod_trainer.collector import RolloutCollector
from ppod_trainer.config import TrainerConfig
from ppod_trainer.metrics import StepTimer
from ppod_trainer.potentials import Shaping
from ppod_trainer.presampling import PreEstimates
from ppod_trainer.prompts import Prompt, PromptSet
from ppod_trainer.rollouts import Rollout, ScoredRollout, sample_seed
from ppod_trainer.schedules import temperature_at
from ppod_trainer.selection import (
    AllRollouts,
    DynamicSampling,
    EpochSchedule,
    HistorySchedule,
    PromptSchedule,
    Selected,
    Selection,
)


@dataclass(frozen=True, slots=True)
class StepRollouts:
    """The `Collects` of a run.

    Attributes:
        samples_per_prompt: the samples of a prompt are a group.
        seed: of the run.
        schedule: chooses the prompts.
        selection: chooses among the samples.
        temperature: that a step samples at.
        collector: asks the services.
        shaping: what the reward is asked for besides scores.
        sampled: whether a prompt is sampled; one that is not leaves its place in the step empty.
    """

    samples_per_prompt: int
    seed: int
    schedule: PromptSchedule
    selection: Selection
    temperature: Callable[[int], float]
    collector: RolloutCollector
    shaping: Shaping
    sampled: Callable[[Prompt], bool] = lambda _: True

    @property
    def max_rounds(self) -> int:
        """See `Collects`."""
        return self.selection.max_rounds

    def generate(self, step: int, number: int, policy_version: int | None, timer: StepTimer) -> list[Rollout]:
        """Sample the prompts of a step's round, each several times."""
        size = self.samples_per_prompt
        prompts = self.schedule.prompts(step, number)
        repeated = [prompt for prompt in prompts for _ in range(size)]
        stream = f"rollout/{number}" if number else "rollout"
        seeds = [sample_seed(self.seed, stream, step, index) for index in range(len(repeated))]
        asked = [(prompt, seed) for prompt, seed in zip(repeated, seeds, strict=True) if self.sampled(prompt)]
        rollouts = self.collector.generate(
            [prompt for prompt, _ in asked],
            [seed for _, seed in asked],
            policy_version,
            timer,
            self.temperature(step),
        )
        # By its seed: some may be missing. The groups of all rounds have different numbers.
        groups = {seed: number * len(prompts) + index // size for index, seed in enumerate(seeds)}
        return [replace(rollout, group=groups[rollout.seed]) for rollout in rollouts]

    def score(self, rollouts: Sequence[Rollout], timer: StepTimer) -> list[ScoredRollout]:
        """Ask reward and reference."""
        return self.collector.score(rollouts, timer, self.shaping)

    def select(self, step: int, rounds: Sequence[Sequence[ScoredRollout]]) -> Selected:
        """Choose, and remember what was sampled once nothing more is."""
        selected = self.selection.select(rounds)
        if selected.full or len(rounds) == self.max_rounds:
            figures = self.schedule.record(step, rounds)
            return replace(selected, figures={**selected.figures, **figures})
        return selected


def build_step_rollouts(
    config: TrainerConfig, prompts: PromptSet, collector: RolloutCollector, estimates: PreEstimates | None = None
) -> StepRollouts:
    """What the configuration asks for. Where advantages are judged by estimates, prompts without one are left out."""
    judged = estimates if config.advantages.kind == "pvpo" else None
    rollout = config.rollout
    groups = rollout.batch_size // rollout.samples_per_prompt
    history, dynamic = rollout.history_resampling, rollout.dynamic_sampling
    # Of normalised scores nobody knows before the update which are clipped.
    clip = config.rewards.clip if config.rewards.normalize == "none" else None
    return StepRollouts(
        samples_per_prompt=rollout.samples_per_prompt,
        seed=config.seed,
        schedule=EpochSchedule(prompts, groups, config.seed)
        if history is None
        else HistorySchedule(prompts, groups, config.seed, history.solved_outcome),
        selection=AllRollouts() if dynamic is None else DynamicSampling(groups, dynamic.max_rounds, clip),
        temperature=lambda step: temperature_at(step, config),
        collector=collector,
        shaping=Shaping(config.rewards.shaping, config.rewards.shaping_interval),
        sampled=lambda prompt: judged is None or prompt.index in judged.values,
    )

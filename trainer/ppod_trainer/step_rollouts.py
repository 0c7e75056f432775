"""The rollouts of one step: which prompts and seeds it has, how many samples of each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ppod_trainer.collector import RolloutCollector
from ppod_trainer.config import TrainerConfig
from ppod_trainer.metrics import StepTimer
from ppod_trainer.prompts import PromptSet
from ppod_trainer.rollouts import Rollout, ScoredRollout, sample_seed
from ppod_trainer.schedules import temperature_at


class StepRollouts:
    """The `Collects` of a run.

    Args:
        config: batch size and seed.
        prompts: of training.
        collector: asks the services.
    """

    def __init__(self, config: TrainerConfig, prompts: PromptSet, collector: RolloutCollector) -> None:
        self._config = config
        self._prompts = prompts
        self._collector = collector

    def generate(self, step: int, policy_version: int | None, timer: StepTimer) -> list[Rollout]:
        """Sample the step's prompts, each several times; the samples of a prompt are a group."""
        config = self._config
        size = config.rollout.samples_per_prompt
        prompts = self._prompts.for_step(step, config.rollout.batch_size // size, config.seed)
        repeated = [prompt for prompt in prompts for _ in range(size)]
        seeds = [sample_seed(config.seed, "rollout", step, index) for index in range(len(repeated))]
        rollouts = self._collector.generate(repeated, seeds, policy_version, timer, temperature_at(step, config))
        # By its seed: some may be missing.
        groups = {seed: index // size for index, seed in enumerate(seeds)}
        return [replace(rollout, group=groups[rollout.seed]) for rollout in rollouts]

    def score(self, rollouts: Sequence[Rollout], timer: StepTimer) -> list[ScoredRollout]:
        """Ask reward and reference."""
        return self._collector.score(rollouts, timer)

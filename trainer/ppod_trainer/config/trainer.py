"""One PPO run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from ppod_models.configuration import ConfigModel, SectionFaults, TracingConfig
from ppod_trainer.config.advantages import (
    LEAVES_OUT_KL,
    NEEDS_CRITIC,
    NEEDS_GROUPS,
    READS_TOKEN_REWARDS,
    AdvantagesConfig,
)
from ppod_trainer.config.memory import MemoryConfig
from ppod_trainer.config.outputs import CheckpointConfig, EvaluationConfig, MetricsConfig
from ppod_trainer.config.policy import CriticConfig, PolicyConfig
from ppod_trainer.config.ppo import OptimizerConfig, PpoConfig
from ppod_trainer.config.ranks import RanksConfig
from ppod_trainer.config.rewards import KlConfig, RewardsConfig
from ppod_trainer.config.rollouts import EnvironmentConfig, PromptsConfig, RolloutConfig
from ppod_trainer.config.schedules import SchedulesConfig
from ppod_trainer.config.services import ServicesConfig, WeightTransferConfig
from ppod_trainer.config.watch import WatchConfig


class TrainerConfig(ConfigModel):
    """One PPO run."""

    run_dir: Path = Field(
        default=Path("runs/ppo"),
        description="where all goes that the run makes; not given to `ppod run` or `up`: runs/FILE-DATE-TIME",
    )
    resume: Literal[False, True, "if_possible"] = Field(
        default=False,
        description="go on from the newest checkpoint of run_dir; if_possible: or begin where there is none, as a Job "
        "that is started again; false: begin, and refuse a run_dir that holds checkpoints",
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="decides all that is drawn")
    steps: int = Field(default=30, ge=1, description="each samples, scores, trains and pushes new weights")
    policy: PolicyConfig = PolicyConfig(source="packaged:smollm2-135m-instruct")
    critic: CriticConfig = CriticConfig()
    services: ServicesConfig = ServicesConfig()
    weight_transfer: WeightTransferConfig = WeightTransferConfig()
    prompts: PromptsConfig = PromptsConfig()
    environment: EnvironmentConfig | None = Field(default=None, description="none: prompts are answered in one turn")
    rollout: RolloutConfig = RolloutConfig()
    rewards: RewardsConfig = RewardsConfig()
    kl: KlConfig = KlConfig()
    advantages: AdvantagesConfig = AdvantagesConfig()
    ppo: PpoConfig = PpoConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedules: SchedulesConfig = SchedulesConfig()
    reference_refresh_steps: int | None = Field(
        default=None, ge=1, description="steps after which the reference becomes the policy; none: never"
    )
    watch: WatchConfig = WatchConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    ranks: RanksConfig = RanksConfig()
    memory: MemoryConfig = MemoryConfig()
    metrics: MetricsConfig = MetricsConfig()
    tracing: TracingConfig = TracingConfig()

    @property
    def pushes_reference(self) -> bool:
        """Whether the reference is given weights: it is refreshed, or the policy's base is not the model's own."""
        return self.reference_refresh_steps is not None or self.policy.quantised

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        """All that disagrees at once: another kind of advantages, for one, asks for several keys to be changed."""
        checks = (
            self._weights_reach_the_reference(),
            self._something_pays(),
            self._one_chooses_the_prompts(),
            self._episodes_are_left(),
            self._what_stops_is_looked_for(),
            self._one_steers_the_kl(),
            self._correct_stale_samples(),
            self._estimator_has_what_it_reads(),
            self._shaping_is_read(),
            self._critic_is_read(),
            self._check_batch_splits(),
        )
        if faults := tuple(itertools.chain(*checks)):
            raise SectionFaults(*faults)
        return self

    def _weights_reach_the_reference(self) -> Iterator[str]:
        if self.pushes_reference:
            try:
                self.services.check_weights_reach("reference")
            except ValueError as error:
                yield str(error)

    def _something_pays(self) -> Iterator[str]:
        if self.environment is None and not self.rewards.model:
            yield "rewards.model is false and there is no environment: nothing would pay a reward"
        for key, name in (("reward_model", self.services.reward_model), ("judge_model", self.services.judge_model)):
            if not self.rewards.model and name:
                yield f"services.{key} needs the reward service, which rewards.model false leaves out"

    def _one_chooses_the_prompts(self) -> Iterator[str]:
        if self.prompts.curriculum_steps and self.rollout.history_resampling is not None:
            yield (
                "prompts.curriculum_steps and rollout.history_resampling would both choose the prompts: leave one out"
            )

    def _episodes_are_left(self) -> Iterator[str]:
        environment, heldout = self.environment, self.prompts.heldout
        if environment is not None and environment.episodes <= heldout:
            yield (
                f"environment.episodes is {environment.episodes}, and prompts.heldout, {heldout}, leaves none for "
                "training: set more episodes, or hold fewer out"
            )

    def _what_stops_is_looked_for(self) -> Iterator[str]:
        kind = self.advantages.kind
        if "value_collapse" in self.watch.stop and kind not in NEEDS_CRITIC:
            yield f"watch.stop names value_collapse, and kind {kind} reads no values: leave it out"
        if "reward_hacking" in self.watch.stop and self.services.judge_model is None:
            yield "watch.stop names reward_hacking, which needs a held-out judge: set services.judge_model"

    def _one_steers_the_kl(self) -> Iterator[str]:
        if self.schedules.kl_coefficient is not None and self.kl.adaptive is not None:
            yield "schedules.kl_coefficient and kl.adaptive would both steer the coefficient: choose one"
        fastest = self.rollout.batch_size / 5
        if self.kl.adaptive is not None and self.kl.adaptive.horizon <= fastest:
            # The controller multiplies by 1 - 0.2 * batch_size / horizon where the KL is far below its target.
            yield (
                f"kl.adaptive.horizon is {self.kl.adaptive.horizon}; expected more than {fastest:g}, a fifth of "
                "rollout.batch_size: else one step could turn the penalty into a bonus"
            )

    def _correct_stale_samples(self) -> Iterator[str]:
        if self.rollout.max_staleness and self.ppo.importance_cap is None:
            yield (
                f"rollout.max_staleness is {self.rollout.max_staleness}: samples of older weights need importance "
                "weights; set ppo.importance_cap, such as 2"
            )

    def _estimator_has_what_it_reads(self) -> Iterator[str]:
        kind = self.advantages.kind
        if kind in NEEDS_GROUPS and self.rollout.samples_per_prompt < 2:
            yield (
                f"advantages.kind {kind} compares the samples of one prompt, and rollout.samples_per_prompt is "
                f"{self.rollout.samples_per_prompt}; set it to 2 or more, such as 8"
            )
        if kind == "pvpo" and self.rewards.normalize != "none":
            yield (
                f"advantages.kind pvpo judges by outcomes from before training, whose scale rewards.normalize "
                f"{self.rewards.normalize} moves; set it to none"
            )
        penalised = self.kl.coefficient or self.schedules.kl_coefficient is not None
        if kind in LEAVES_OUT_KL and self.kl.placement == "reward" and penalised:
            yield (
                f"advantages.kind {kind} reads outcomes, which a KL penalty in the reward is no part of; set "
                "kl.placement to loss (with kl.estimator k3, as in the paper, or k2), or kl.coefficient to 0 and leave "
                "schedules.kl_coefficient out"
            )

    def _shaping_is_read(self) -> Iterator[str]:
        shaping, advantages = self.rewards.shaping, self.advantages
        if shaping != "none" and advantages.kind not in READS_TOKEN_REWARDS:
            yield (
                f"rewards.shaping is {shaping}, and advantages.kind {advantages.kind} reads what whole responses were "
                f"paid; expected {', '.join(sorted(READS_TOKEN_REWARDS))}, or shaping none"
            )
        if shaping != "none" and advantages.bootstrap_truncated:
            yield (
                f"rewards.shaping is {shaping}, where every response ends with the potential 0, and "
                "advantages.bootstrap_truncated goes on behind it: choose one"
            )

    def _critic_is_read(self) -> Iterator[str]:
        kind, critic = self.advantages.kind, self.critic
        if kind not in NEEDS_CRITIC and (critic.kind != "head" or critic.warm_up_steps or critic.detach):
            yield f"advantages.kind {kind} reads no values: remove critic.kind, critic.detach and critic.warm_up_steps"
        if critic.warm_up_steps >= self.steps:
            yield f"critic.warm_up_steps is {critic.warm_up_steps}; steps, {self.steps}, must be more"

    def _check_batch_splits(self) -> Iterator[str]:
        if self.ppo.minibatches > self.rollout.batch_size:
            yield (
                f"ppo.minibatches is {self.ppo.minibatches}, more than rollout.batch_size, {self.rollout.batch_size}"
            )
        if self.optimizer.warmup_steps >= self.steps:
            yield f"optimizer.warmup_steps is {self.optimizer.warmup_steps}; steps, {self.steps}, must be more"

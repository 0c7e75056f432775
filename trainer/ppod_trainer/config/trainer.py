"""One PPO run."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from ppod_models.configuration import ConfigModel, ModelConfig, TracingConfig
from ppod_trainer.config.advantages import AdvantagesConfig
from ppod_trainer.config.outputs import CheckpointConfig, EvaluationConfig, MetricsConfig
from ppod_trainer.config.ppo import OptimizerConfig, PpoConfig
from ppod_trainer.config.rewards import KlConfig, RewardsConfig
from ppod_trainer.config.rollouts import EnvironmentConfig, PromptsConfig, RolloutConfig
from ppod_trainer.config.schedules import SchedulesConfig
from ppod_trainer.config.services import ServicesConfig, WeightTransferConfig, has_replicas
from ppod_trainer.config.watch import WatchConfig


class TrainerConfig(ConfigModel):
    """One PPO run."""

    run_dir: Path = Path("runs/ppo")
    resume: bool = Field(default=False, description="go on from the newest checkpoint of run_dir")
    seed: int = Field(default=0, ge=0, lt=2**32)
    steps: int = Field(default=30, ge=1)
    policy: ModelConfig = ModelConfig(source="packaged:smollm2-135m-instruct")
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
    metrics: MetricsConfig = MetricsConfig()
    tracing: TracingConfig = TracingConfig()

    @model_validator(mode="after")
    def _refresh_reaches_all(self) -> Self:
        if self.reference_refresh_steps is not None and has_replicas(self.services.reference):
            raise ValueError(
                f"services.reference is {self.services.reference!r}: a reference that is refreshed must be one server"
            )
        return self

    @model_validator(mode="after")
    def _something_pays(self) -> Self:
        if self.environment is None and not self.rewards.model:
            raise ValueError("rewards.model is false and there is no environment: nothing would pay a reward")
        if not self.rewards.model and self.services.judge_model is not None:
            raise ValueError("services.judge_model needs the reward service, which rewards.model false leaves out")
        return self

    @model_validator(mode="after")
    def _judge_is_there(self) -> Self:
        if "reward_hacking" in self.watch.stop and self.services.judge_model is None:
            raise ValueError("watch.stop names reward_hacking, which needs a held-out judge: set services.judge_model")
        return self

    @model_validator(mode="after")
    def _one_steers_the_kl(self) -> Self:
        if self.schedules.kl_coefficient is not None and self.kl.adaptive is not None:
            raise ValueError("schedules.kl_coefficient and kl.adaptive would both steer the coefficient: choose one")
        return self

    @model_validator(mode="after")
    def _correct_stale_samples(self) -> Self:
        if self.rollout.max_staleness and self.ppo.importance_cap is None:
            raise ValueError(
                f"rollout.max_staleness is {self.rollout.max_staleness}: samples of older weights need importance "
                "weights; set ppo.importance_cap, such as 2"
            )
        return self

    @model_validator(mode="after")
    def _check_batch_splits(self) -> Self:
        if self.ppo.minibatches > self.rollout.batch_size:
            raise ValueError(
                f"ppo.minibatches is {self.ppo.minibatches}, more than rollout.batch_size, {self.rollout.batch_size}"
            )
        if self.optimizer.warmup_steps >= self.steps:
            raise ValueError(
                f"optimizer.warmup_steps is {self.optimizer.warmup_steps}; steps, {self.steps}, must be more"
            )
        return self

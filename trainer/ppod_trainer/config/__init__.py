"""Configuration of the trainer. Importing it needs neither torch nor a GPU."""

from ppod_trainer.config.advantages import AdvantagesConfig, GigpoConfig, SpaConfig
from ppod_trainer.config.outputs import CheckpointConfig, EvaluationConfig, MetricsConfig
from ppod_trainer.config.ppo import OptimizerConfig, PpoConfig
from ppod_trainer.config.rewards import AdaptiveKlConfig, KlConfig, RewardsConfig
from ppod_trainer.config.rollouts import (
    DynamicSamplingConfig,
    EnvironmentConfig,
    HistoryResamplingConfig,
    PromptsConfig,
    RolloutConfig,
)
from ppod_trainer.config.services import ServicesConfig, WeightTransferConfig, has_replicas
from ppod_trainer.config.trainer import TrainerConfig

__all__ = [
    "AdaptiveKlConfig",
    "AdvantagesConfig",
    "CheckpointConfig",
    "DynamicSamplingConfig",
    "EnvironmentConfig",
    "EvaluationConfig",
    "GigpoConfig",
    "HistoryResamplingConfig",
    "KlConfig",
    "MetricsConfig",
    "OptimizerConfig",
    "PpoConfig",
    "PromptsConfig",
    "RewardsConfig",
    "RolloutConfig",
    "ServicesConfig",
    "SpaConfig",
    "TrainerConfig",
    "WeightTransferConfig",
    "has_replicas",
]

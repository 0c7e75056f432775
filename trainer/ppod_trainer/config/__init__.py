"""Configuration of the trainer. Importing it needs neither torch nor a GPU."""

from ppod_trainer.config.advantages import AdvantagesConfig
from ppod_trainer.config.outputs import CheckpointConfig, EvaluationConfig, MetricsConfig
from ppod_trainer.config.ppo import OptimizerConfig, PpoConfig, RatioMaskConfig
from ppod_trainer.config.rewards import (
    AdaptiveKlConfig,
    FiltersConfig,
    KlConfig,
    LengthPenaltyConfig,
    OverlongConfig,
    RewardsConfig,
    SafetyFilterConfig,
)
from ppod_trainer.config.rollouts import EnvironmentConfig, PromptsConfig, RolloutConfig
from ppod_trainer.config.schedules import LinearSchedule, SchedulesConfig
from ppod_trainer.config.services import ServicesConfig, WeightTransferConfig, has_replicas
from ppod_trainer.config.trainer import TrainerConfig
from ppod_trainer.config.watch import TroubleKind, WatchConfig

__all__ = [
    "AdaptiveKlConfig",
    "AdvantagesConfig",
    "CheckpointConfig",
    "EnvironmentConfig",
    "EvaluationConfig",
    "FiltersConfig",
    "KlConfig",
    "LengthPenaltyConfig",
    "LinearSchedule",
    "MetricsConfig",
    "OptimizerConfig",
    "OverlongConfig",
    "PpoConfig",
    "PromptsConfig",
    "RatioMaskConfig",
    "RewardsConfig",
    "RolloutConfig",
    "SafetyFilterConfig",
    "SchedulesConfig",
    "ServicesConfig",
    "TrainerConfig",
    "TroubleKind",
    "WatchConfig",
    "WeightTransferConfig",
    "has_replicas",
]

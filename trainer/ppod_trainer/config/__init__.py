"""Configuration of the trainer. Importing it needs neither torch nor a GPU."""

from ppod_trainer.config.advantages import AdvantagesConfig, GigpoConfig, SpaConfig
from ppod_trainer.config.course import changes_of_course, configuration_fingerprint, differences
from ppod_trainer.config.memory import MemoryConfig
from ppod_trainer.config.outputs import CheckpointConfig, EvaluationConfig, MetricsConfig
from ppod_trainer.config.policy import CriticConfig, LoraConfig, PolicyConfig
from ppod_trainer.config.ppo import OptimizerConfig, PpoConfig, RatioMaskConfig
from ppod_trainer.config.ranks import RanksConfig
from ppod_trainer.config.rewards import (
    AdaptiveKlConfig,
    FiltersConfig,
    KlConfig,
    LengthPenaltyConfig,
    OverlongConfig,
    RewardsConfig,
    SafetyFilterConfig,
)
from ppod_trainer.config.rollouts import (
    DynamicSamplingConfig,
    EnvironmentConfig,
    HistoryResamplingConfig,
    PromptsConfig,
    RolloutConfig,
)
from ppod_trainer.config.schedules import LinearSchedule, SchedulesConfig
from ppod_trainer.config.services import (
    CollectiveConfig,
    ServicesConfig,
    WeightTransferConfig,
    is_kubernetes,
    listed,
)
from ppod_trainer.config.trainer import TrainerConfig
from ppod_trainer.config.watch import TroubleKind, WatchConfig

__all__ = [
    "AdaptiveKlConfig",
    "AdvantagesConfig",
    "CheckpointConfig",
    "CollectiveConfig",
    "CriticConfig",
    "DynamicSamplingConfig",
    "EnvironmentConfig",
    "EvaluationConfig",
    "FiltersConfig",
    "GigpoConfig",
    "HistoryResamplingConfig",
    "KlConfig",
    "LengthPenaltyConfig",
    "LinearSchedule",
    "LoraConfig",
    "MemoryConfig",
    "MetricsConfig",
    "OptimizerConfig",
    "OverlongConfig",
    "PolicyConfig",
    "PpoConfig",
    "PromptsConfig",
    "RanksConfig",
    "RatioMaskConfig",
    "RewardsConfig",
    "RolloutConfig",
    "SafetyFilterConfig",
    "SchedulesConfig",
    "ServicesConfig",
    "SpaConfig",
    "TrainerConfig",
    "TroubleKind",
    "WatchConfig",
    "WeightTransferConfig",
    "changes_of_course",
    "configuration_fingerprint",
    "differences",
    "is_kubernetes",
    "listed",
]

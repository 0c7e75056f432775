"""Configuration of the trainer. Importing it needs neither torch nor a GPU."""

from ppod_trainer.config.advantages import AdvantagesConfig
from ppod_trainer.config.outputs import CheckpointConfig, EvaluationConfig, MetricsConfig
from ppod_trainer.config.policy import CriticConfig, LoraConfig, PolicyConfig
from ppod_trainer.config.ppo import OptimizerConfig, PpoConfig, RatioMaskConfig
from ppod_trainer.config.rewards import AdaptiveKlConfig, KlConfig, RewardsConfig
from ppod_trainer.config.rollouts import EnvironmentConfig, PromptsConfig, RolloutConfig
from ppod_trainer.config.services import CollectiveConfig, ServicesConfig, WeightTransferConfig, has_replicas
from ppod_trainer.config.trainer import TrainerConfig

__all__ = [
    "AdaptiveKlConfig",
    "AdvantagesConfig",
    "CheckpointConfig",
    "CollectiveConfig",
    "CriticConfig",
    "EnvironmentConfig",
    "EvaluationConfig",
    "KlConfig",
    "LoraConfig",
    "MetricsConfig",
    "OptimizerConfig",
    "PolicyConfig",
    "PpoConfig",
    "PromptsConfig",
    "RatioMaskConfig",
    "RewardsConfig",
    "RolloutConfig",
    "ServicesConfig",
    "TrainerConfig",
    "WeightTransferConfig",
    "has_replicas",
]

"""The keys of the files that `ppod train` and `ppod serve` take, for their --help."""

from __future__ import annotations

from collections.abc import Sequence

from ppod_deploy.overrides import describe_keys
from ppod_models.configuration import ConfigModel
from ppod_services.generation.config import GenerationServiceConfig
from ppod_services.reference.config import ReferenceServiceConfig
from ppod_services.reward.config import RewardServiceConfig
from ppod_trainer.config import TrainerConfig
from ppod_trainer.reward_training.config import RewardTrainingConfig

SCHEMAS: dict[tuple[str, str], type[ConfigModel]] = {
    ("train", "ppo"): TrainerConfig,
    ("train", "reward"): RewardTrainingConfig,
    ("serve", "reward"): RewardServiceConfig,
    ("serve", "reference"): ReferenceServiceConfig,
    ("serve", "generation"): GenerationServiceConfig,
}


def print_file_keys(arguments: Sequence[str]) -> None:
    """Print every key of the file that a command line such as `train ppo --help` is about, if it is about one."""
    schema = SCHEMAS.get((arguments[0], arguments[1])) if len(arguments) > 1 else None
    if schema is not None:
        print(f"keys of the file, N a place in a list: {(schema.__doc__ or '').strip().splitlines()[0]}")
        print("\n".join(describe_keys(schema, flags=False)))

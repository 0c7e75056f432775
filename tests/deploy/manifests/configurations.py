"""The configuration that a rendered workload starts with, read by the code that reads it in the pod."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from ppod_models.configuration import ConfigModel, load_config
from ppod_services.core.config import ServiceConfig
from ppod_services.generation.config import GenerationServiceConfig
from ppod_services.reference.config import ReferenceServiceConfig
from ppod_services.reward.config import RewardServiceConfig
from ppod_trainer.config import TrainerConfig
from support.manifests import Object, Workload, mounted_files

TYPES: dict[str, type[ConfigModel]] = {
    "ppod_services.reward": RewardServiceConfig,
    "ppod_services.reference": ReferenceServiceConfig,
    "ppod_services.generation": GenerationServiceConfig,
    "ppod_trainer": TrainerConfig,
}
GRPC_SERVICES = {
    "reward": "ppod.v1.RewardService",
    "reference": "ppod.v1.ReferenceService",
    "generation": "ppod.v1.GenerationService",
}


@cache
def _loaded(module: str, texts: tuple[str, ...]) -> ConfigModel:
    with TemporaryDirectory() as directory:
        paths = [Path(directory) / f"{number}.yaml" for number in range(len(texts))]
        for path, text in zip(paths, texts, strict=True):
            path.write_text(text)
        return load_config(TYPES[module], *paths)


def configuration(objects: Sequence[Object], one: Workload) -> ConfigModel:
    """What `python -m MODULE --config ... --config ...` would start with; raises ConfigError as it would."""
    files = mounted_files(objects, one)
    paths = one.arguments("--config")
    assert paths, f"{one.name}: no --config"
    return _loaded(one.container["args"][0], tuple(files[path] for path in paths))


def service_configuration(objects: Sequence[Object], one: Workload) -> ServiceConfig:
    found = configuration(objects, one)
    assert isinstance(found, ServiceConfig)
    return found


def trainer_configuration(objects: Sequence[Object], one: Workload) -> TrainerConfig:
    found = configuration(objects, one)
    assert isinstance(found, TrainerConfig)
    return found

"""Configuration of the reward service. Free of torch: the launcher reads it too."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from ppod_models.configuration import ConfigModel, ModelConfig
from ppod_services.core.config import ServiceConfig


class RewardModelConfig(ConfigModel):
    """One named reward model: a trunk and a head on it."""

    name: str = Field(min_length=1, description="what requests call the model")
    model: ModelConfig
    head: str = Field(min_length=1, description="name of a head that ppod carries, or the directory of one")


class RewardServiceConfig(ServiceConfig):
    """Which reward models to serve; those with the same source, device and dtype share one trunk in memory."""

    models: tuple[RewardModelConfig, ...] = Field(min_length=1, description="the first one is the default")

    @model_validator(mode="after")
    def _fits_the_service(self) -> Self:
        names = [model.name for model in self.models]
        doubles = sorted({name for name in names if names.count(name) > 1})
        if doubles:
            raise ValueError(f"models: each name once, but {', '.join(doubles)} is there twice")
        if self.listen.admin_port is not None:
            raise ValueError("listen.admin_port: the reward service takes no new weights, so it has no such port")
        return self

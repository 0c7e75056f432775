"""Configuration of the reference service. Free of torch: the launcher reads it too."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from ppod_services.core.config import AdapterConfig, CausalServiceConfig


class ReferenceServiceConfig(CausalServiceConfig):
    """Which model is the reference."""

    name: str = Field(default="reference", min_length=1, description="what requests call the model")
    adapters: tuple[AdapterConfig, ...] = Field(
        default=(),
        description="more models on the same base weights, such as LoRA policies whose reference is the base",
    )

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [self.name, *(adapter.name for adapter in self.adapters)]
        doubles = sorted({name for name in names if names.count(name) > 1})
        if doubles:
            raise ValueError(f"adapters: each name once, but {', '.join(doubles)} is there twice")
        return self

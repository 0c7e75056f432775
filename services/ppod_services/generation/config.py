"""Configuration of the generation service. Free of torch: the launcher reads it too."""

from __future__ import annotations

from pydantic import Field

from ppod_services.core.config import CausalServiceConfig


class GenerationServiceConfig(CausalServiceConfig):
    """Which policy to sample from."""

    name: str = Field(default="policy", min_length=1, description="what requests call the model")

"""Configuration of the reference service. Free of torch: the launcher reads it too."""

from __future__ import annotations

from pydantic import Field

from ppod_services.core.config import CausalServiceConfig


class ReferenceServiceConfig(CausalServiceConfig):
    """Which model is the reference."""

    name: str = Field(default="reference", min_length=1, description="what requests call the model")

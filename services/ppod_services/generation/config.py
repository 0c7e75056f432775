"""Configuration of the generation service. Free of torch: the launcher reads it too."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ppod_services.core.config import BatchingConfig, CausalServiceConfig
from ppod_services.generation.vllm_backend.settings import VllmConfig


class GenerationBatchingConfig(BatchingConfig):
    """Decoding reads all weights for each step, whatever the batch: padding is always worth its price."""

    batch_overhead_tokens: int = Field(default=2**24, ge=0, le=2**24, description="as for the other services")


class GenerationServiceConfig(CausalServiceConfig):
    """Which policy to sample from."""

    batching: GenerationBatchingConfig = GenerationBatchingConfig()  # pyright: ignore[reportIncompatibleVariableOverride]

    name: str = Field(default="policy", min_length=1, description="what requests call the model")
    backend: Literal["transformers", "vllm"] = Field(
        default="transformers", description="what samples; vllm needs an environment that has it (make setup-vllm)"
    )
    vllm: VllmConfig = VllmConfig()

"""Configuration of the generation service. Free of torch: the launcher reads it too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, model_validator

from ppod_models.configuration import ConfigModel
from ppod_services.core.config import BatchingConfig, CausalServiceConfig
from ppod_services.generation.filters.registry import FILTERS
from ppod_services.generation.vllm_backend.settings import LEAST_TEMPERATURE, MOST_TEMPERATURE, VllmConfig


class GenerationBatchingConfig(BatchingConfig):
    """Decoding reads all weights for each step, whatever the batch: padding is always worth its price."""

    batch_overhead_tokens: int = Field(default=2**24, ge=0, le=2**24, description="as for the other services")
    max_batch_s: float = Field(
        default=3_600.0,
        gt=0,
        le=3_600,
        description="as for the other services; no bound, because those who come join the batch that runs",
    )


class OutputFilterConfig(ConfigModel):
    """A filter of the entry point group `ppod.output_filters`."""

    filter: str = Field(min_length=1, description="name of the entry point")
    parameters: Mapping[str, object] = Field(default={}, description="what the filter takes; it checks them itself")

    @model_validator(mode="after")
    def _takes_the_parameters(self) -> Self:
        FILTERS.parse(self.filter, self.parameters)
        return self


class GenerationServiceConfig(CausalServiceConfig):
    """Which policy to sample from."""

    batching: GenerationBatchingConfig = GenerationBatchingConfig()  # pyright: ignore[reportIncompatibleVariableOverride]

    name: str = Field(default="policy", min_length=1, description="what requests call the model")
    prefill_tokens: int = Field(
        default=1_024,
        ge=1,
        le=2**24,
        description="most prompt tokens that are run between two tokens of the sequences that decode: bounds how long "
        "newcomers hold those up",
    )
    output_filters: tuple[OutputFilterConfig, ...] = Field(
        default=(), description="what may withhold completions, in this order; none: all are sent"
    )
    backend: Literal["transformers", "vllm"] = Field(
        default="transformers", description="what samples; vllm needs an environment that has it (make setup-vllm)"
    )
    vllm: VllmConfig = VllmConfig()

    @property
    def temperatures(self) -> tuple[float, float] | None:
        """The least and the highest that it samples at, besides 0; None: there are no bounds."""
        return (LEAST_TEMPERATURE, MOST_TEMPERATURE) if self.backend == "vllm" else None

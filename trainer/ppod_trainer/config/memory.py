"""What is given for memory on the device."""

from __future__ import annotations

from pydantic import Field

from ppod_models.configuration import ConfigModel


class MemoryConfig(ConfigModel):
    """Ways to need less memory on the device; none of them changes what is learned."""

    gradient_checkpointing: bool = Field(
        default=False,
        description="keep the layers' inputs only and compute the rest again in the backward pass: some 30% more time",
    )
    offload: bool = Field(
        default=False,
        description="keep weights, gradients and optimizer state in the host's memory, where the optimizer steps; "
        "layers travel to the device while they compute. For CUDA",
    )

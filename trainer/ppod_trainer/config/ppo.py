"""The clipped update and its optimizer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ppod_models.configuration import ConfigModel


class PpoConfig(ConfigModel):
    """The clipped update."""

    epochs: int = Field(default=2, ge=1)
    minibatches: int = Field(default=2, ge=1, description="optimizer steps in an epoch")
    micro_batch_size: int | None = Field(
        default=None, ge=1, description="samples in a forward pass; gradients accumulate; none: the minibatch"
    )
    clip: float = Field(default=0.2, gt=0, description="epsilon of the policy ratio")
    value_clip: float | None = Field(
        default=0.2, gt=0, description="bound on the move from the old value; none: no clip"
    )
    value_coefficient: float = Field(default=0.1, ge=0)
    entropy_coefficient: float = Field(default=0.0, ge=0)
    aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
    max_grad_norm: float = Field(default=1.0, gt=0)
    stop_kl: float | None = Field(
        default=None, gt=0, description="end the step's update when KL(old, new) exceeds this, nats a token"
    )
    importance_cap: float | None = Field(
        default=None, gt=0, description="truncated importance sampling of the sampler's mismatch; none: off"
    )


class OptimizerConfig(ConfigModel):
    """Adam with linear warm-up and linear decay."""

    learning_rate: float = Field(default=2e-5, gt=0)
    value_learning_rate: float | None = Field(default=None, gt=0, description="of the value head; none: the same")
    warmup_steps: int = Field(default=0, ge=0)
    final_fraction: float = Field(default=0.0, ge=0, le=1, description="learning rate at the end, of the peak's")
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    epsilon: float = Field(default=1e-5, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)

"""From scores to token rewards, and the KL penalty."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from ppod_models.configuration import ConfigModel


class RewardsConfig(ConfigModel):
    """From the reward model's score to token rewards."""

    model: bool = Field(
        default=True, description="pay the reward model's score; false: the environment's rewards alone"
    )
    clip: float | None = Field(default=None, gt=0, description="bounds the score to [-clip, clip]")
    missing_eos_penalty: float = Field(default=0.0, ge=0, description="taken off the score of a response cut off")
    mask_truncated: bool = Field(default=False, description="leave responses that were cut off out of the loss")


class AdaptiveKlConfig(ConfigModel):
    """Proportional controller of Ziegler et al. 2019, section 2.2."""

    target: float = Field(default=6.0, gt=0, description="KL to the reference to steer to, nats a response")
    horizon: int = Field(default=10_000, ge=1, description="samples over which the coefficient adapts")


class KlConfig(ConfigModel):
    """KL penalty to the reference."""

    coefficient: float = Field(default=0.05, ge=0, description="starting, or fixed, coefficient")
    placement: Literal["reward", "loss"] = "reward"
    estimator: Literal["k1", "k2", "k3"] = "k1"
    importance_weighted: bool = Field(
        default=False,
        description="in the loss: weigh the estimate with policy / old policy, so that its gradient is KL's for every "
        "estimator, in later minibatches, too",
    )
    adaptive: AdaptiveKlConfig | None = None

    @model_validator(mode="after")
    def _refuse_k1_loss(self) -> Self:
        if self.placement == "loss" and self.estimator == "k1" and not self.importance_weighted:
            raise ValueError(
                "estimator k1 in the loss has a gradient of mean zero; use k2 (KL's gradient) or k3, or set "
                "importance_weighted"
            )
        if self.placement == "reward" and self.importance_weighted:
            raise ValueError("importance_weighted is for a penalty in the loss; placement is 'reward'")
        return self

"""The clipped update and its optimizer."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from ppod_models.configuration import ConfigModel


class RatioMaskConfig(ConfigModel):
    """Leaves out of the loss what trainer and sampler disagree about: ratio trainer / sampler outside [low, high]."""

    low: float = Field(default=0.5, ge=0, le=1, description="lowest ratio that is trained on")
    high: float = Field(default=5.0, ge=1, description="highest ratio that is trained on")
    level: Literal["token", "sequence", "geometric"] = Field(
        default="token",
        description="tokens by their own ratio; whole sequences by the product, or the geometric mean, of theirs",
    )


class PpoConfig(ConfigModel):
    """The clipped update."""

    epochs: int = Field(default=2, ge=1, description="times that a step trains on its samples")
    minibatches: int = Field(default=2, ge=1, description="optimizer steps in an epoch")
    micro_batch_size: int | None = Field(
        default=None, ge=1, description="samples in a forward pass; gradients accumulate; none: the minibatch"
    )
    micro_batch_tokens: int | None = Field(
        default=None,
        ge=1,
        description="instead of micro_batch_size: padded tokens in a forward pass, over samples of similar lengths; "
        "a sample that is longer has one of its own",
    )
    ratio: Literal["token", "sequence", "sequence_token"] = Field(
        default="token",
        description="what is clipped: each token's ratio, the geometric mean of the sequence's (GSPO), or that with "
        "gradients of tokens (GSPO-token); clip is then some 1e-4, not 0.2",
    )
    clip: float = Field(default=0.2, gt=0, description="epsilon of the policy ratio; with clip_high, downwards")
    clip_high: float | None = Field(default=None, gt=0, description="epsilon upwards, such as 0.28; none: clip")
    dual_clip: float | None = Field(
        default=None, gt=1, description="bound on the ratio where the advantage is negative, such as 3; none: off"
    )
    value_clip: float | None = Field(
        default=0.2, gt=0, description="bound on the move from the old value; none: no clip"
    )
    value_coefficient: float = Field(default=0.1, ge=0, description="c1, of the value loss")
    entropy_coefficient: float = Field(default=0.0, ge=0, description="c2, of the entropy bonus")
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = Field(
        default="token_mean", description="constant: sum over tokens / (sequences * constant_tokens) (Dr. GRPO)"
    )
    constant_tokens: int | None = Field(
        default=None, ge=1, description="for aggregation constant, such as rollout.max_tokens"
    )
    max_grad_norm: float = Field(default=1.0, gt=0, description="larger gradients are scaled down to it")
    stop_kl: float | None = Field(
        default=None, gt=0, description="end the step's update when KL(old, new) exceeds this, nats a token"
    )
    importance_cap: float | None = Field(
        default=None, gt=0, description="truncated importance sampling of the sampler's mismatch; none: off"
    )
    importance_level: Literal["token", "sequence"] = Field(
        default="token", description="importance weights of tokens, or the product over the sequence"
    )
    ratio_mask: RatioMaskConfig | None = Field(default=None, description="none: all tokens count, whatever their ratio")

    @property
    def highest_ratio(self) -> float:
        """Epsilon of the ratio upwards."""
        return self.clip if self.clip_high is None else self.clip_high

    @model_validator(mode="after")
    def _one_limit_of_micro_batches(self) -> Self:
        if self.micro_batch_tokens is not None and self.micro_batch_size is not None:
            raise ValueError(
                f"micro_batch_tokens is {self.micro_batch_tokens} and micro_batch_size {self.micro_batch_size}: both "
                "would cut minibatches; give one"
            )
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if (self.aggregation == "constant") != (self.constant_tokens is not None):
            raise ValueError(
                f"aggregation is {self.aggregation!r}, constant_tokens {self.constant_tokens}: give the latter for "
                "constant, else leave it out"
            )
        if self.importance_level == "sequence" and self.importance_cap is None:
            raise ValueError("importance_level needs importance_cap, such as 2")
        return self


class OptimizerConfig(ConfigModel):
    """Adam with linear warm-up and linear decay."""

    learning_rate: float = Field(default=2e-5, gt=0, description="at its peak")
    value_learning_rate: float | None = Field(default=None, gt=0, description="of the value head; none: the same")
    warmup_steps: int = Field(
        default=0,
        ge=0,
        description="steps at the start over which the learning rate rises; those of critic.warm_up_steps count, so "
        "for a policy that begins behind them name more",
    )
    final_fraction: float = Field(default=0.0, ge=0, le=1, description="learning rate at the end, of the peak's")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="decay of the mean of gradients")
    beta2: float = Field(default=0.95, ge=0, lt=1, description="decay of the mean of their squares")
    epsilon: float = Field(default=1e-5, gt=0, description="added to the root of that mean")
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled, as AdamW's")

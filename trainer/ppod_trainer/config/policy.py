"""The policy that is trained, and its critic."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from ppod_models.configuration import ConfigModel, ModelConfig


class LoraConfig(ConfigModel):
    """A LoRA adapter (Hu et al. 2021): W + scaling B A is trained instead of W; the base is its reference."""

    rank: int = Field(default=16, ge=1, description="of A and B")
    alpha: float = Field(default=32.0, gt=0, description="scaling is alpha / rank")
    rank_stabilized: bool = Field(default=False, description="scaling is alpha / sqrt(rank) (Kalajdzievski 2023)")
    target_modules: tuple[str, ...] = Field(
        default=(),
        description="ends of the names of linear layers but the output layer, such as q_proj; none: all of these",
    )
    quantization: Literal["none", "nf4"] = Field(
        default="none",
        description="nf4: keep the base's linear layers in 4 bits (QLoRA, Dettmers et al. 2023); generation and "
        "reference get what these stand for; needs bitsandbytes",
    )


class PolicyConfig(ModelConfig):
    """Which model is trained, and what of it."""

    lora: LoraConfig | None = Field(default=None, description="train an adapter; none: train all weights")

    @property
    def quantised(self) -> bool:
        """Whether the base is kept in fewer bits than it computes in."""
        return self.lora is not None and self.lora.quantization != "none"


class CriticConfig(ConfigModel):
    """What tells values."""

    kind: Literal["head", "model"] = Field(
        default="head", description="head: linear, on the policy's trunk; model: a trunk of its own"
    )
    source: str | None = Field(
        default=None,
        description="model: what it starts as: a sequence classifier with one label, such as the reward model, whose "
        "score layer becomes the value head, or a causal language model; none: the policy's own source",
    )
    detach: bool = Field(
        default=False,
        description="head: the value loss does not reach the policy's trunk, only the head learns from it",
    )
    warm_up_steps: int = Field(
        default=0, ge=0, description="steps at the start in which the critic learns and the policy stays as it is"
    )

    @model_validator(mode="after")
    def _fits_the_kind(self) -> Self:
        if self.kind == "head" and self.source is not None:
            raise ValueError(f"source is {self.source!r} with kind 'head', which has no trunk of its own: remove it")
        if self.kind == "model" and self.detach:
            raise ValueError("detach is true with kind 'model', which never reaches the policy: remove it")
        return self

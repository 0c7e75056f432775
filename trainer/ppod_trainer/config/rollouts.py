"""Prompts, sampling and environments."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, JsonValue, model_validator

from ppod_models.configuration import ConfigModel


class PromptsConfig(ConfigModel):
    """Prompts: the first tokens of texts."""

    path: Path | None = Field(
        default=None,
        description=".tsv with a `text` column, .jsonl with a `prompt` field, or .txt; none: movie reviews",
    )
    first_tokens: int | None = Field(default=6, ge=1, description="tokens kept of each text; none: all")
    heldout: int = Field(default=64, ge=1, description="prompts kept aside for evaluation")
    curriculum_steps: int = Field(
        default=0, ge=0, description="first steps with short prompts, to which each adds longer ones; 0: all at once"
    )


class RolloutConfig(ConfigModel):
    """How samples are drawn. top-p and top-k are refused in training: the old policy's support would differ."""

    batch_size: int = Field(default=32, ge=1, description="samples in a step")
    max_tokens: int = Field(default=24, ge=1, description="longest response")
    temperature: float = Field(default=1.0, gt=0, description="divides sampler, policy and reference logits alike")
    top_p: float = Field(default=1.0, description="must be 1 in training")
    top_k: int = Field(default=0, description="must be 0 in training")
    on_bad_sample: Literal["stop", "skip"] = Field(
        default="stop", description="what a typed error that names a sample does: stop the run, or drop the sample"
    )
    max_staleness: int = Field(
        default=0,
        ge=0,
        description="steps ahead that samples are begun, and most versions that their weights may be behind; "
        "0: each step waits for samples of its own weights",
    )

    @model_validator(mode="after")
    def _refuse_cut_support(self) -> Self:
        if self.top_p != 1.0 or self.top_k != 0:
            raise ValueError(
                "top_p must be 1 and top_k 0 in training: the sampler would draw from a smaller support than the "
                "trainer's and the reference's logprobs are computed on"
            )
        return self


class EnvironmentConfig(ConfigModel):
    """Conversations of several turns with an environment, whose questions take the place of `prompts.path`."""

    name: str = Field(min_length=1, description="entry point of the group ppod.environments, such as calculator")
    parameters: dict[str, JsonValue] = Field(default_factory=dict, description="of the environment")
    episodes: int = Field(default=2048, ge=2, description="different episodes; prompts.heldout of them are held out")
    max_turns: int = Field(default=4, ge=1, description="turns of the policy; each has rollout.max_tokens at most")
